"""Cover a prepared scan with the network's windows, and blend what the network finds in them.

Windows and their Gaussian weights: nnU-Net (Isensee et al. 2021, methods, "inference").
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from imaging.grid import Shape
from inference.sampler import Sampler

OVERLAP = 0.5  # of neighbouring windows, at least
# Weight of a window's border. It must count a little: an image's own corner lies in one window.
MIN_WEIGHT = 1e-2


class Band(NamedTuple):
    """Finished rows of a slice."""

    slice: int
    row: int  # the first
    probs: np.ndarray  # (rows, W, K) float32


class Windows:
    """The windows of a prepared scan, slice by slice and row by row.

    case: uint8 (D, H, W, C), anything that has a shape and can be sliced.
    """

    def __init__(self, case: np.ndarray, sampler: Sampler) -> None:
        self.case, self.sampler = case, sampler
        overlap = OVERLAP if sampler.patches else 0.0
        self.starts = [
            window_starts(length, side, overlap)
            for length, side in zip(case.shape[:3], sampler.window, strict=True)
        ]
        self.places = list(itertools.product(*self.starts))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> np.ndarray:
        """Return a window as the network takes it: uint8 (H, W, C) or (D, H, W, C)."""
        return read_window(self.case, self.places[number], self.sampler)

    def _only(self, probs: np.ndarray) -> np.ndarray:
        """Return the only window's probabilities as slices (D, H, W, K)."""
        return probs if self.sampler.dimensions == 3 else probs[None]

    def blend(self, probs: Iterator[np.ndarray]) -> Iterator[Band]:
        """Join the probabilities of all windows in order, each (…, K), to those of the scan.

        Where windows overlap, the pixels in their middle count most. No more is held than what one
        row of windows covers: one layer of them in 3-D.
        """
        lengths, window = self.case.shape[:3], self.sampler.window
        if lengths == tuple(window):  # a single window, which is the case
            yield from (Band(i, 0, one) for i, one in enumerate(self._only(next(probs))))
            return
        if self.sampler.dimensions == 3:
            for start, layer in roll(probs, self.starts, window, lengths):
                for number, plane in enumerate(layer):
                    yield Band(start + number, 0, plane)
            return
        for number in range(lengths[0]):
            for row, rows in roll(probs, self.starts[1:], window[1:], lengths[1:]):
                yield Band(number, row, rows)


def window_starts(length: int, side: int, overlap: float = OVERLAP) -> list[int]:
    """Place windows of `side` evenly so that they cover `length`, overlapping at least so much.

    What is smaller than a window lies in its middle, so the start is negative.
    """
    if length <= side:
        return [-((side - length) // 2)]
    step = max(1.0, side * (1 - overlap))
    count = 1 + int(np.ceil((length - side) / step))
    return np.round(np.linspace(0, length - side, count)).astype(int).tolist()


def read_window(case: np.ndarray, start: Sequence[int], sampler: Sampler) -> np.ndarray:
    """Read a window of (D, H, W, C) as the network takes it: (H, W, C) or (D, H, W, C).

    start: its first slice, row and column. Outside of the case there are zeros. In 2-D the
    neighbouring slices become channels; at a border its slice is repeated.
    """
    if sampler.dimensions == 3:
        return read_box(case, start, sampler.window)
    shifts = range(-sampler.neighbours, sampler.neighbours + 1)
    slices = []
    for shift in shifts:
        number = min(max(start[0] + shift, 0), case.shape[0] - 1)
        slices.append(read_box(case, (number, *start[1:]), sampler.window)[0])
    return slices[0] if len(slices) == 1 else np.concatenate(slices, axis=-1)


def read_box(array: np.ndarray, start: Sequence[int], size: Shape) -> np.ndarray:
    """Read a box of an array (D, H, W, …), with zeros for what lies outside."""
    place, part = intersect(start, size, array.shape[:3])
    found = np.asarray(array[place])
    if found.shape[:3] == tuple(size):
        return found
    box = np.zeros((*size, *array.shape[3:]), found.dtype)
    box[part] = found
    return box


# -------------------------------------------------------------------------------------- blending


def roll(
    probs: Iterator[np.ndarray],
    starts: Sequence[Sequence[int]],
    window: Sequence[int],
    lengths: Sequence[int],
) -> Iterator[tuple[int, np.ndarray]]:
    """Blend windows (…, K) that cover an array of `lengths`, rolling along its first axis.

    starts: of the windows along each axis. Gives finished parts in order: where each starts on the
    first axis, and its mean (n, …, K).
    """
    bells = [bell(side, len(firsts) > 1) for side, firsts in zip(window, starts, strict=True)]
    totals = [
        coverage(firsts, one, length)
        for firsts, one, length in zip(starts, bells, lengths, strict=True)
    ]
    weight = outer(bells)[..., None]
    across = outer(totals[1:])[..., None]
    # `total` holds the sums from `first` on, as far along the first axis as one window reaches.
    total, first = None, 0
    for start, following in itertools.pairwise([*starts[0], lengths[0]]):
        for others in itertools.product(*starts[1:]):
            found = next(probs)
            if total is None:
                height = min(window[0], lengths[0])
                total = np.zeros((height, *lengths[1:], found.shape[-1]), np.float32)
            place, part = intersect((start, *others), window, lengths)
            rows = slice(place[0].start - first, place[0].stop - first)
            total[(rows, *place[1:])] += (weight * found)[part]
        # Before the next row of windows all is finished. Their sum of weights is a product, too.
        count = max(following, 0) - first
        along = totals[0][first : first + count].reshape(-1, *[1] * across.ndim)
        yield first, total[:count] / along / across
        # What the next windows reach moves to the front.
        total[: len(total) - count] = total[count:].copy()
        total[len(total) - count :] = 0
        first += count


def intersect(
    start: Sequence[int], window: Sequence[int], lengths: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where a window lies in an array of `lengths`, and which part of it does."""
    place, part = [], []
    for first, side, length in zip(start, window, lengths, strict=True):
        low, high = max(first, 0), min(first + side, length)
        place.append(slice(low, high))
        part.append(slice(low - first, high - first))
    return tuple(place), tuple(part)


def bell(side: int, overlaps: bool) -> np.ndarray:
    """Return the weights along a window's side: a Gaussian, its sigma an eighth of the side.

    Without other windows on this axis all weights are 1.
    """
    if not overlaps:
        return np.ones(side, np.float32)
    distance = np.arange(side) - (side - 1) / 2
    return np.maximum(np.exp(-0.5 * (distance / (side / 8)) ** 2), MIN_WEIGHT).astype(np.float32)


def coverage(starts: Sequence[int], weights: np.ndarray, length: int) -> np.ndarray:
    """Add up the weights of all windows along one axis."""
    total = np.zeros(length, np.float32)
    for start in starts:
        (place,), (part,) = intersect((start,), (len(weights),), (length,))
        total[place] += weights[part]
    return total


def outer(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Multiply vectors to an array of as many dimensions."""
    product = np.ones((), np.float32)
    for vector in vectors:
        product = product[..., None] * vector
    return product
