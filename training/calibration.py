"""Learn from held-out images how good a model's masks are, and which images it knows.

Held-out images are shown as they are and changed by augmentation, so that there are bad masks too.
What is learned is described in inference/quality.py, and stored in the model file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from dataset.augmentation import Augmentation
from dataset.cache import Case, Dataset
from dataset.kind import find_kind
from imaging.labels import Classes
from inference import quality
from inference.evidence import MAX_SIDE, MAX_SLICES, Evidence
from inference.quality import Judge, Kind
from inference.segment import DEFAULT_OPTIONS, Member, average, start_votes
from inference.windows import Windows
from metrics import score_classes

MIN_IMAGES = 8  # held out; fewer say nothing
MAX_KNOWN = 150  # training images whose kind is learned
VERSIONS = 6  # of each, changed as training changes them
# Predictions whose Dice is measured, and what the network sees of them.
MIN_SAMPLES, MAX_SAMPLES, MAX_PIXELS = 24, 240, 240 * 192**2
USUAL = (0.98, 0.99)  # shares of the held-out images that count as usual: by image, by mask
ALPHAS = np.logspace(-2, 3, 12)


class Sample(NamedTuple):
    """A prediction for a held-out image."""

    image: int  # its number
    is_plain: bool  # nothing was changed
    features: np.ndarray
    distances: tuple[float, float]
    dice: float


def calibrate(path: Path, dataset: Dataset, train: np.ndarray, val: np.ndarray) -> None:
    """Learn from the validation images, and store it in the model file; numbers of pairs.

    Fewer than MIN_IMAGES say too little, and large ones take too long: then nothing is stored.
    """
    if len(val) < MIN_IMAGES or count_samples(dataset, val) < MIN_SAMPLES:
        utils.update_metadata(path, quality=None)
        return
    utils.update_metadata(path, quality=fit(*learn(path, dataset, train, val)).pack())


def count_samples(dataset: Dataset, held_out: Sequence[int]) -> int:
    """Say how many predictions for these pairs take little time."""
    windows = [len(Windows(dataset.cases[number].image, dataset.sampler)) for number in held_out]
    pixels = np.mean(windows) * np.prod(dataset.sampler.window)
    return min(MAX_SAMPLES, int(MAX_PIXELS / pixels))


def learn(
    path: Path, dataset: Dataset, train: np.ndarray, held_out: np.ndarray
) -> tuple[tuple[Kind, Kind], list["Sample"]]:
    """Learn what a model's training images look like, and score it on held-out images."""
    member = utils.load_model(path)
    kinds = learn_kinds(dataset, train, member[1])
    return kinds, measure(member, kinds, dataset, held_out)


def learn_kinds(dataset: Dataset, train: Sequence[int], metadata: dict) -> tuple[Kind, Kind]:
    """Learn what training images and their masks look like."""
    pairs = np.asarray(train)[:: -(-len(train) // MAX_KNOWN)]
    images, masks = [], []
    # Inverted images are shown in training, but are not usual.
    kind = find_kind(dataset, train)._replace(inverted=False)
    augment = Augmentation(dataset.classes, "mild", kind)
    for number in pairs:
        small = dataset.cases[number].thinned(MAX_SLICES, MAX_SIDE)
        for case in versions(small, [None, *[augment] * VERSIONS], int(number)):
            seen = true_evidence(case, dataset.classes, metadata)
            images.append(seen.image)
            masks.append(seen.mask.ravel())
    return Kind.learn(np.array(images)), Kind.learn(np.array(masks))


def versions(case: Case, augmentations: Sequence[Augmentation | None], seed: int) -> Iterator[Case]:
    """Change a case by each augmentation; None leaves it as it is."""
    for place, augment in enumerate(augmentations):
        if augment is None:
            yield case
        elif augment.kind.dimensions == 3:
            image, masks = augment(case.image, case.masks, 1000 * seed + place)
            yield case._replace(image=image, masks=masks)
        else:
            both = zip(case.image, case.masks, strict=True)
            # The same numbers change all slices alike.
            changed = [augment(image, masks, 1000 * seed + place) for image, masks in both]
            image, masks = (np.stack(one) for one in zip(*changed, strict=True))
            yield case._replace(image=image, masks=masks)


def true_evidence(case: Case, classes: Classes, metadata: dict) -> Evidence:
    """Collect what the true mask of a case looks like."""
    evidence = Evidence(case.image, classes, metadata["threshold"])
    shown = case.masks[..., : len(classes.names)].max(-1) / np.float32(255)
    evidence.add_mask(shown)
    return evidence


def measure(
    member: Member, kinds: tuple[Kind, Kind], dataset: Dataset, held_out: Sequence[int]
) -> list[Sample]:
    """Segment held-out images, plain and changed, and score what is found."""
    kind = find_kind(dataset, held_out)._replace(inverted=False)
    mild = Augmentation(dataset.classes, "mild", kind)
    rough = Augmentation(dataset.classes, "free" if kind.dimensions == 3 else "strong", kind)
    most = max(MIN_SAMPLES, count_samples(dataset, held_out))
    pairs = np.asarray(held_out)[:: -(-3 * len(held_out) // most)]
    chosen = [None, *[mild, rough] * max(1, (most // len(pairs) - 1) // 2)]
    samples = []
    for number in pairs:
        cases = list(versions(dataset.cases[number], chosen, int(number)))
        segmented = segment_cases(member, dataset, cases)
        for augment, (evidence, dice) in zip(chosen, segmented, strict=True):
            distances = quality.measure_distances(evidence, *kinds)
            features = quality.features(evidence, distances)
            if np.isfinite(dice):  # it is not if no pixel counts
                samples.append(Sample(int(number), augment is None, features, distances, dice))
    return samples


def segment_cases(
    member: Member, dataset: Dataset, cases: Sequence[Case]
) -> Iterator[tuple[Evidence, float]]:
    """Segment cases at working resolution: what each prediction tells, and its true Dice."""
    _, metadata = member
    windows = [Windows(case.image, dataset.sampler) for case in cases]
    votes, num_averaged = start_votes([member], windows, DEFAULT_OPTIONS)
    for case, of_case in zip(cases, windows, strict=True):
        evidence = Evidence(case.image, dataset.classes, metadata["threshold"])
        bands = zip(*(of_case.blend(vote) for vote in votes), strict=False)
        ids = [evidence.decide(band) for band in evidence.watch(average(bands, num_averaged, None))]
        found = np.concatenate(ids).reshape(case.image.shape[:3])
        truth, ignored = case.truth(dataset.classes)
        yield evidence, score_classes(truth, found, dataset.classes.names, ignored=ignored)["dice"]


def fit(kinds: tuple[Kind, Kind], samples: Sequence[Sample]) -> Judge:
    """Learn to predict the Dice, and what is usual.

    The interval comes from images that were left out of the fit in their turn.
    """
    from sklearn.linear_model import RidgeCV  # these two take a second of train.py's start
    from sklearn.model_selection import GroupKFold, cross_val_predict

    features = np.array([sample.features for sample in samples])
    losses = np.log([1 - sample.dice + quality.MIN_DICE_LOSS for sample in samples])
    images = [sample.image for sample in samples]
    folds = GroupKFold(min(5, len(set(images))))
    left_out = cross_val_predict(RidgeCV(ALPHAS), features, losses, cv=folds, groups=images)
    tail = (1 - quality.CONFIDENCE) / 2
    errors = np.quantile(losses - left_out, [tail, 1 - tail])
    model = RidgeCV(ALPHAS).fit(features, losses)
    usual = np.array([sample.distances for sample in samples if sample.is_plain])
    limits = [np.quantile(some, share) for some, share in zip(usual.T, USUAL, strict=True)]
    return Judge(
        *kinds,
        tuple(map(float, limits)),
        model.coef_,
        float(model.intercept_),
        tuple(map(float, errors)),
    )
