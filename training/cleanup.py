"""Choose how predicted masks are cleaned, from what the training masks look like."""

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

import utils
from dataset.cache import Dataset
from imaging.labels import plane
from inference import postprocess
from metrics import score_classes

MAX_SLICES = 1000  # of each subset; more add nothing


def choose_cleanup(path: Path, dataset: Dataset, train: np.ndarray, val: np.ndarray) -> None:
    """Store in the model file how masks are cleaned, unless that lowers the validation Dice.

    A cleaned mask keeps each class's largest connected components and has no holes. How many
    components is learned from the training masks (what 95 % of them do not exceed). train, val:
    indices of slices; without validation images the training images decide.
    """
    model, metadata = utils.load_model(path)
    train, val = _thin_out(train), _thin_out(val)
    components = count_components(dataset, train, len(metadata["classes"]))
    judges = val if len(val) else train
    plain = mean_dice(model, metadata, dataset, judges)
    cleaned = mean_dice(model, metadata | {"clean": components}, dataset, judges)
    if cleaned >= plain:
        utils.update_metadata(path, clean=components)


def _thin_out(slices: np.ndarray) -> np.ndarray:
    return slices[:: max(1, len(slices) // MAX_SLICES)]


def count_components(dataset: Dataset, slices: Sequence[int], classes: int) -> list[int]:
    """Count, for each class, the connected components that 95 % of the masks do not exceed."""
    counts = []
    for class_id in range(1, classes + 1):
        masks = (plane(dataset.truth(number)[0], class_id) for number in slices)
        counts.append(postprocess.usual_components(masks))
    return counts


def mean_dice(model: keras.Model, metadata: dict, dataset: Dataset, slices: Sequence[int]) -> float:
    """Average the Dice of slices at the network's size, cleaned as `metadata` says."""
    scores = []
    for number in slices:
        image = dataset.take([number])[0].astype(np.float32) / 255
        probs = np.asarray(model.predict_on_batch(image))[0]
        found = postprocess.decide(probs, metadata)
        truth, ignored = dataset.truth(number)
        row = score_classes(truth, found, metadata["classes"], ignored=ignored)
        scores.append(row["dice"])
    return float(np.mean(scores))
