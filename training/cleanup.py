"""Choose how predicted masks are cleaned, from what the training masks look like."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import numpy as np

import utils
from dataset.cache import Dataset
from imaging.labels import plane
from inference import postprocess
from inference.segment import DEFAULT_OPTIONS, run_windows
from inference.windows import Windows
from metrics import score_classes

MAX_PIXELS = 1000 * 128**2  # of the masks of each subset; more add nothing


def choose_cleanup(path: Path, dataset: Dataset, train: np.ndarray, val: np.ndarray) -> None:
    """Store in the model file how masks are cleaned, unless that lowers a class's validation Dice.

    A cleaned mask keeps each class's largest connected components and has no holes. How many
    components is learned from the training masks (what 95 % of them do not exceed). train, val:
    numbers of pairs; without validation images the training images decide.
    """
    model, metadata = utils.load_model(path)
    train, val = thin_out(dataset, train), thin_out(dataset, val)
    components = count_components(dataset, train)
    is_volume = dataset.sampler.dimensions == 3
    plain, cleaned = [], []
    for number in val if len(val) else train:
        found = segment_case(model, dataset, number, metadata["threshold"])
        plain += dice_of(found, dataset, number)
        postprocess.clean(found, components, is_volume)
        cleaned += dice_of(found, dataset, number)
    if (np.mean(cleaned, axis=0) >= np.mean(plain, axis=0)).all():
        utils.update_metadata(path, clean=components)


def thin_out(dataset: Dataset, pairs: np.ndarray) -> np.ndarray:
    """Choose pairs evenly, so that their masks have at most MAX_PIXELS; at least one."""
    pixels = sum(dataset.cases[number].masks[..., 0].size for number in pairs)
    return pairs[:: -(-pixels // MAX_PIXELS)] if pixels else pairs


def parts(array: np.ndarray, dataset: Dataset) -> Iterator[np.ndarray]:
    """Split a mask (D, H, W) into what is cleaned and scored at once: slices; in 3-D it is one."""
    return iter([array]) if dataset.sampler.dimensions == 3 else iter(array)


def count_components(dataset: Dataset, pairs: Sequence[int]) -> list[int]:
    """Count, for each class, the components that 95 % of the masks that hold it do not exceed."""
    counts: list[list[int]] = [[] for _ in dataset.classes.names]
    for number in pairs:
        for mask in parts(dataset.cases[number].truth(dataset.classes)[0], dataset):
            for class_id, found in enumerate(counts, 1):
                found.append(postprocess.count_components(plane(mask, class_id)))
    return [postprocess.usual_count([one for one in found if one] or [1]) for found in counts]


def segment_case(model: keras.Model, dataset: Dataset, number: int, threshold: float) -> np.ndarray:
    """Segment a case at working resolution: (D, H, W), not cleaned."""
    image = dataset.cases[number].image
    windows = Windows(image, dataset.sampler)
    probs = run_windows(model, [windows], DEFAULT_OPTIONS.batch_size)
    bands = []
    for band in windows.blend(probs):
        bands.append(postprocess.to_ids(band.probs, threshold, dataset.classes.overlap))
    return np.concatenate(bands).reshape(image.shape[:3])


def dice_of(found: np.ndarray, dataset: Dataset, number: int) -> list[list[float]]:
    """Score a mask of a case: the Dice of each class in its slices, or in the volume."""
    truth, ignored = dataset.cases[number].truth(dataset.classes)
    names, scores = dataset.classes.names, []
    hidden = [None] * len(truth) if ignored is None else list(parts(ignored, dataset))
    for one, other, out in zip(parts(truth, dataset), parts(found, dataset), hidden, strict=False):
        scored = score_classes(one, other, names, ignored=out)
        scores.append([scored.get(f"dice: {name}", scored["dice"]) for name in names])
    return scores
