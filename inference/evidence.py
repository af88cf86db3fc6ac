"""What a prediction tells about itself: how decided it is, small versions of image and mask.

It is collected band by band, so that no volume's probabilities are held.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from imaging.labels import Classes
from inference import postprocess
from inference.windows import Band

# Cells of a small image, in height and width.
SIDE = 12
MAX_SLICES, MAX_SIDE = 16, 256  # what is looked at of a case, in slices and pixels


class Evidence:
    """What a prediction tells about itself, collected band by band at working resolution.

    case: the prepared image (D, H, W, C) uint8. classes: those of the model.
    """

    def __init__(self, case: np.ndarray, classes: Classes, threshold: float | list[float]) -> None:
        self.shape, self.threshold = case.shape[:3], threshold
        self.channels, self.overlap = classes.num_channels, classes.overlap
        self.image = small_image(case)
        self.mask = np.zeros((SIDE, SIDE))
        self.sums: np.ndarray | float = 0.0  # by class: probability, pixels, probability in them
        self.differing = 0.0  # how much the votes differ, summed over the pixels; 0 of a single one

    def watch(self, bands: Iterator[Band]) -> Iterator[Band]:
        """Pass bands on, and remember what they say."""
        for band in bands:
            self.add(band)
            yield band

    def add(self, band: Band) -> None:
        """Count some rows of a slice."""
        probs, ids = band.probs[..., : self.channels], self.decide(band)
        classes = probs if self.overlap or probs.shape[-1] == 1 else probs[..., 1:]
        decided = decided_masks(ids, classes.shape[-1], self.overlap)
        both = classes * decided
        self.sums += np.stack([one.sum((0, 1)) for one in (classes, decided, both)]).astype(float)
        self.differing += float(band.probs[..., self.channels :].sum(dtype=float))
        self.add_mask(classes.max(-1)[None], band.row)

    def add_mask(self, shown: np.ndarray, row: int = 0) -> None:
        """Add some rows of slices (N, rows, W), from 0 to 1, to the small mask."""
        depth, height, width = self.shape
        rows, columns = cells(row, row + shown.shape[1], height), cells(0, width, width)
        self.mask += rows.T @ shown.sum(0) @ columns / depth

    def decide(self, band: Band) -> np.ndarray:
        """Decide some rows of a slice: ids (rows, W)."""
        return postprocess.to_ids(band.probs[..., : self.channels], self.threshold, self.overlap)

    @property
    def soft_dice(self) -> float:
        """The Dice of mask and probabilities, averaged over the classes that are found."""
        probable, decided, both = self.sums
        is_found = decided > 0
        if not is_found.any():
            return 1 - float(probable.sum() / (probable.sum() + 1))
        return float((2 * both / (probable + decided))[is_found].mean())

    @property
    def spread(self) -> float:
        """How much the votes differ, beside the size of the mask."""
        return self.differing / (self.sums[1].sum() + 1)

    @property
    def area(self) -> float:
        """The share of the pixels that are in the mask."""
        return float(self.sums[1].sum() / np.prod(self.shape))


def decided_masks(ids: np.ndarray, count: int, overlap: bool) -> np.ndarray:
    """Split ids (H, W), or bits of classes that overlap, into a mask for each class."""
    numbers = np.arange(count)
    return (ids[..., None] >> numbers) & 1 > 0 if overlap else ids[..., None] == numbers + 1


@lru_cache(maxsize=8)  # images of one model have one size
def cells(start: int, stop: int, length: int) -> np.ndarray:
    """Say in which of SIDE cells each of some places lies: (places, SIDE), divided by its size."""
    cell = np.arange(length) * SIDE // length
    sizes = np.maximum(1, np.bincount(cell, minlength=SIDE))
    return np.eye(SIDE, dtype=np.float32)[cell[start:stop]] / sizes.astype(np.float32)


def small_image(case: np.ndarray) -> np.ndarray:
    """Make small pictures of brightness and of texture, by rank: float32 (2 * SIDE²,).

    case: (D, H, W, C). Only the order of the cells counts, as exposure says little about the kind.
    """
    most = (MAX_SLICES, MAX_SIDE, MAX_SIDE)
    steps = (-(-side // limit) for side, limit in zip(case.shape, most, strict=False))
    some = np.asarray(case[tuple(slice(None, None, step) for step in steps)], np.float32)
    rows, columns = (cells(0, side, side) for side in some.shape[1:3])
    mean, square = (rows.T @ part.mean((0, 3)) @ columns for part in (some, some**2))
    return np.concatenate([rank(mean), rank(square - mean**2)])


def rank(cells: np.ndarray) -> np.ndarray:
    """Replace values by their mean rank, from -0.5 to 0.5; equal values have the same."""
    values = np.round(cells.ravel(), 1)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2 / max(1, len(values) - 1) - 0.5)[place].astype(
        np.float32
    )
