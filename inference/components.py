"""Connected components of large masks: labelled band by band, so that little memory is needed."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from imaging.lazy import bands

# Which part of a mask (S, H, W) is looked at, see `lazy.bands`.
Band = tuple[slice, slice]


class Components:
    """The connected components of a mask (S, H, W), in the order of their first pixels.

    Iterating gives each band and, for its pixels, 1 plus their component's place, or 0.

    Each band is labelled for itself: its labels count from 1 and 0 is outside. Numbers count the
    labels of all bands, one band after the other. A component is all numbers that touch.
    """

    sizes: np.ndarray  # (N,) pixels of each component
    at_border: np.ndarray  # (N,) bool: whether it reaches the mask's border

    def __init__(
        self,
        inside: Callable[[Band], np.ndarray],
        shape: tuple[int, int, int],
        corners: bool = False,
    ) -> None:
        """inside: gives a band of the mask, bool. corners: whether pixels touch there, too."""
        self._inside, self._shape, self._corners = inside, shape, corners
        axis = int(shape[1] > shape[0])
        self._starts = [0]  # how many labels there are before each band
        sizes, border, pairs, last = [], [], [], None  # of numbers
        for _, labels, count in self._labelled():
            sizes.append(np.bincount(labels.ravel(), minlength=count + 1)[1:])
            start = self._starts[-1]
            self._starts.append(start + count)
            # A single slice is no border: its pixels are at one if they are in the last row.
            for side in range(3):
                if side != axis and shape[side] > 1:
                    border += [_numbers(np.take(labels, end, side), start) for end in (0, -1)]
            first = _numbered(np.take(labels, 0, axis), start)
            if last is None:
                border.append(np.unique(first))
            else:
                pairs.append(touching(last, first, corners))
            last = _numbered(np.take(labels, -1, axis), start)
        border.append(np.unique(last))
        self._component_of = join(self._starts[-1], np.concatenate([*pairs, np.empty((0, 2), int)]))
        total = int(self._component_of.max(initial=-1)) + 1
        self.sizes = np.bincount(self._component_of, np.concatenate(sizes), total).astype(np.int64)
        numbers = np.unique(np.concatenate(border))
        self.at_border = np.zeros(total, bool)
        self.at_border[self._component_of[numbers[numbers > 0] - 1]] = True

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Band, np.ndarray]]:
        for place, (band, labels, _) in enumerate(self._labelled()):
            components = self._component_of[self._starts[place] : self._starts[place + 1]]
            yield band, np.concatenate([[0], 1 + components])[labels]

    def _labelled(self) -> Iterator[tuple[Band, np.ndarray, int]]:
        """Label each band for itself: the band, its labels, and how many there are."""
        from scipy import ndimage

        structure = ndimage.generate_binary_structure(3, 3 if self._corners else 1)
        for band in bands(self._shape):
            yield band, *ndimage.label(self._inside(band), structure)


def _numbered(labels: np.ndarray, start: int) -> np.ndarray:
    """Turn a band's labels into numbers; 0 stays."""
    return np.where(labels > 0, labels.astype(np.int64) + start, 0)


def _numbers(labels: np.ndarray, start: int) -> np.ndarray:
    return np.unique(_numbered(labels, start))


def touching(one: np.ndarray, other: np.ndarray, corners: bool) -> np.ndarray:
    """List the pairs of numbers (N, 2) that lie opposite in two faces (h, w), or at a corner."""
    shifts = itertools.product((-1, 0, 1), repeat=2) if corners else [(0, 0)]
    found = []
    for shift in shifts:
        here = tuple(
            slice(max(by, 0), n + min(by, 0)) for by, n in zip(shift, one.shape, strict=True)
        )
        there = tuple(
            slice(max(-by, 0), n + min(-by, 0)) for by, n in zip(shift, one.shape, strict=True)
        )
        pairs = np.stack([one[here], other[there]], axis=-1)
        found.append(pairs[pairs.all(-1)])
    pairs = np.concatenate(found)
    # Runs of the same pair are many.
    differs = (pairs[1:] != pairs[:-1]).any(-1)
    return pairs[np.concatenate([[True], differs])] if len(pairs) else pairs


def join(count: int, pairs: np.ndarray) -> np.ndarray:
    """Give the component of each of the numbers 1 to `count`, from the pairs (N, 2) that touch."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not count:
        return np.empty(0, np.int32)
    edges = (np.ones(len(pairs), bool), (pairs[:, 0] - 1, pairs[:, 1] - 1))
    return connected_components(coo_array(edges, (count, count)), directed=False)[1]
