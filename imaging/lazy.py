"""Pixels that are decoded when they are needed, and how large arrays are walked over in bands."""

from collections.abc import Callable, Iterator
from itertools import product
from math import ceil
from typing import Any

import numpy as np

# Files whose pixels take more are decoded region by region.
LARGE_BYTES = 2**28
# Of more values no second array is made: what is derived from them is computed when it is needed.
LARGE_ARRAY = 2**26
# A slice of more pixels is never copied whole.
LARGE_SLICE = 2**25
# So many pixels are looked at together.
BAND_PIXELS = 2**22
# So many values say what the grey levels of an image are.
SAMPLED = 2**24
# Side of the squares that are looked at of pixels that must be decoded, and how many values.
SQUARE, DECODED = 64, 2**22
MIN_SQUARES = 8  # along each side: the corners of a scan are air

# A slice with a step of 1 for each axis.
Box = tuple[slice, ...]


class LazyPixels:
    """Pixels (S, H, W, C) of a file: what is indexed is decoded then, and is an ordinary array."""

    ndim = 4

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, read: Callable[[Box], np.ndarray]
    ) -> None:
        """read: gives the pixels of a box."""
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._read = read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Decode a region. key: integers, slices and an ellipsis."""
        box, rest = [], []
        for part, length in zip(self._complete(key), self.shape, strict=True):
            if isinstance(part, slice):
                places = range(length)[part]
                first, last = sorted((places[0], places[-1])) if places else (0, -1)
                box.append(slice(first, last + 1))
                rest.append(slice(None, None, places.step))
            else:
                place = range(length)[part]
                box.append(slice(place, place + 1))
                rest.append(0)
        if all(part.stop for part in box):
            return self._read(tuple(box))[*rest]
        return np.zeros([part.stop - part.start for part in box], self.dtype)[*rest]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Decode all of it, band by band."""
        whole = np.empty(self.shape, dtype or self.dtype)
        for band in bands(self.shape):
            whole[band] = self[band]
        return whole

    def view(self, key: Any) -> "LazyPixels":
        """Give a part that is not decoded yet. key: slices with a step of 1, and an ellipsis."""
        places = [range(n)[part] for part, n in zip(self._complete(key), self.shape, strict=True)]

        def read(box: Box) -> np.ndarray:
            moved = []
            for part, inside in zip(box, places, strict=True):
                moved.append(slice(inside.start + part.start, inside.start + part.stop))
            return self._read(tuple(moved))

        return LazyPixels(tuple(map(len, places)), self.dtype, read)

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "LazyPixels":
        """Change pixels when they are decoded.

        change: turns any region (s, h, w, C) into (s, h, w, C'), each pixel for itself.
        """
        example = change(np.zeros((1, 1, 1, self.shape[-1]), self.dtype))
        shape = (*self.shape[:3], example.shape[-1])

        def read(box: Box) -> np.ndarray:
            return change(self._read((*box[:3], slice(0, self.shape[-1]))))[..., box[3]]

        return LazyPixels(shape, example.dtype, read)

    def turned(self, turns: int, is_mirrored: bool) -> "LazyPixels":
        """Turn as `turn` does."""
        height, width = self.shape[1:3]

        def read(box: Box) -> np.ndarray:
            rows, columns = box[1:3]
            sides = [(height, width), (width, height)]
            for number in range(turns, 0, -1):
                # Before this turn, the columns ran down in the place of the rows.
                side = sides[(number - 1) % 2][1]
                rows, columns = columns, slice(side - rows.stop, side - rows.start)
            if is_mirrored:
                columns = slice(width - columns.stop, width - columns.start)
            return turn(self._read((box[0], rows, columns, box[3])), turns, is_mirrored)

        size = (width, height) if turns % 2 else (height, width)
        return LazyPixels((self.shape[0], *size, self.shape[-1]), self.dtype, read)

    def _complete(self, key: Any) -> tuple[Any, ...]:
        parts = key if isinstance(key, tuple) else (key,)
        if Ellipsis not in parts:
            parts = (*parts, Ellipsis)
        place = parts.index(Ellipsis)
        missing = self.ndim - len(parts) + 1
        return (*parts[:place], *[slice(None)] * missing, *parts[place + 1 :])


def turn(pixels: np.ndarray, turns: int, is_mirrored: bool) -> np.ndarray:
    """Flip the columns of (S, H, W, C) if wanted, then turn the rows to the left (np.rot90)."""
    pixels = pixels[:, :, ::-1] if is_mirrored else pixels
    return np.ascontiguousarray(np.rot90(pixels, turns, axes=(1, 2)))


def part_of(pixels: Any, key: Any) -> Any:
    """Give a part of pixels, decoded or not: a view. key: as of `LazyPixels.view`."""
    return pixels.view(key) if isinstance(pixels, LazyPixels) else pixels[key]


def in_memory(pixels: Any) -> np.ndarray:
    """Decode pixels (S, H, W, C) that are not decoded yet, band by band."""
    if not isinstance(pixels, LazyPixels):
        return pixels
    decoded = np.empty(pixels.shape, pixels.dtype)
    for band in bands(pixels.shape):
        decoded[band] = pixels[band]
    return decoded


def bands(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Cut (S, H, W …) into bands of about BAND_PIXELS pixels: some slices, or some rows of all."""
    axis = int(shape[1] > shape[0])
    across = max(1, int(np.prod(shape[:3])) // max(1, shape[axis]))
    step = max(1, BAND_PIXELS // across)
    for start in range(0, shape[axis], step):
        band = slice(start, min(start + step, shape[axis]))
        yield (slice(None), band) if axis else (band, slice(None))


def sample(pixels: Any) -> np.ndarray:
    """Choose pixels of (S, H, W, C) that stand for all, evenly: (s, h, w, C). Of few, all."""
    if isinstance(pixels, LazyPixels):
        return _sample_squares(pixels)
    step = sampling_step(pixels.size)
    return pixels[:, ::step, ::step] if step > 1 else pixels


def sampling_step(count: int) -> int:
    """Say which rows and columns of so many values are a sample: every so many; 1 is all."""
    return max(1, int(np.ceil((count / SAMPLED) ** 0.5)))


def _sample_squares(pixels: LazyPixels) -> np.ndarray:
    """Decode evenly spaced squares, so that most of a file need not be decoded.

    There are MIN_SQUARES along each side if so many fit, and then as few slices as is needed.
    """
    slices, *sides, channels = pixels.shape
    count = max(MIN_SQUARES, round((DECODED / (slices * channels)) ** 0.5 / SQUARE))
    rows, columns = (
        np.linspace(0, max(0, side - SQUARE), min(count, ceil(side / SQUARE)), dtype=int)
        for side in sides
    )
    most = max(1, DECODED // (len(rows) * len(columns) * SQUARE**2 * channels))
    numbers = np.linspace(0, slices - 1, min(slices, most), dtype=int)
    found = []
    for number, y, x in product(numbers, rows, columns):
        found.append(pixels[number, y : y + SQUARE, x : x + SQUARE].reshape(-1, channels))
    return np.concatenate(found)[None, None]
