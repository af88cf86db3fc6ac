"""How a scan's pixels lie in the array that the network sees: orientation, scaling, padding.

Training, prediction and serving share this, in both directions. Axes are slices, rows and columns,
in the file and in the array.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import cv2
import numpy as np

from imaging import lazy
from imaging.lazy import LazyPixels

Pixels = np.ndarray | LazyPixels
Change = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, int, int]
# Directions of the patient's axes: right or left, anterior or posterior, superior or inferior.
DIRECTIONS = ("LR", "PA", "IS")
# Working resolutions that differ by less are the file's own.
SAME = 0.02
# OpenCV resizes no more channels at once.
CV_CHANNELS = 4


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file are in the working array, whose axis i is the file's axes[i]."""

    axes: Shape
    flips: tuple[bool, bool, bool]
    # Sizes along the array's axes: in the file's own voxels, after scaling, with padding around.
    oriented: Shape
    inner: Shape
    canvas: Shape

    @property
    def shape(self) -> Shape:
        """The file's own slices, rows and columns."""
        return tuple(self.oriented[self.axes.index(axis)] for axis in range(3))

    @property
    def is_native(self) -> bool:
        """Whether the array's voxels are the file's own."""
        return self.oriented == self.inner == self.canvas

    @property
    def rows(self) -> slice:
        """The rows of the canvas that show the image."""
        start = (self.canvas[1] - self.inner[1]) // 2
        return slice(start, start + self.inner[1])

    @property
    def columns(self) -> slice:
        """The columns of the canvas that show the image."""
        start = (self.canvas[2] - self.inner[2]) // 2
        return slice(start, start + self.inner[2])

    def orient(self, array: Pixels) -> Pixels:
        """Turn the file's array (S, H, W, …) into the working orientation, without a copy."""
        if self.axes == (0, 1, 2) and not any(self.flips):
            return array
        turned = array.transpose(*self.axes, *range(3, array.ndim))
        return turned[self._flipped] if any(self.flips) else turned

    def restore_orientation(self, array: np.ndarray) -> np.ndarray:
        """Undo `orient`."""
        array = array[self._flipped] if any(self.flips) else array
        return array.transpose(*np.argsort(self.axes), *range(3, array.ndim))

    @property
    def _flipped(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else None) for flip in self.flips)

    def scale(self, array: Pixels, change: Change | None = None) -> Iterator[np.ndarray]:
        """Scale an oriented array (D, H, W[, C]) to the working array's slices, without padding.

        change: is done to rows (h, W[, C]) of a slice before they are scaled.
        """
        change = change or np.asarray
        scaled = (resize_slice(array, i, self.inner[1:], change) for i in range(array.shape[0]))
        return resample_planes(scaled, self.oriented[0], self.inner[0])

    def restore(self, planes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Undo `scale` for slices (H, W, K) of the canvas: those of the oriented file."""
        return (resize_each(plane, self.oriented[1:]) for plane in self._restore_slices(planes))

    def restore_bands(self, planes: Iterable[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Undo `scale` as `restore` does; large slices in bands: slice, first row, (h, W, K)."""
        size = self.oriented[1:]
        for number, plane in enumerate(self._restore_slices(planes)):
            if prod(size) <= lazy.LARGE_SLICE:
                yield number, 0, resize_each(plane, size)
                continue
            for row, values in resize_bands(plane.__getitem__, plane.shape[:2], size):
                yield number, row, values

    def _restore_slices(self, planes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        inside = (plane[self.rows, self.columns] for plane in planes)
        return resample_planes(inside, self.inner[0], self.oriented[0])


def fit_grid(shape: Shape, size: tuple[int, int]) -> Grid:
    """Make the grid of slices that are scaled to fit `size` (H, W) and centred in it."""
    scale = min(size[0] / shape[1], size[1] / shape[2])
    inner = [min(size[i], max(1, round(shape[i + 1] * scale))) for i in (0, 1)]
    return Grid((0, 1, 2), (False,) * 3, shape, (shape[0], *inner), (shape[0], *size))


def orientation_of(affine: np.ndarray) -> str:
    """Name the patient's directions to which slices, rows and columns run, such as "SAR".

    affine: (4, 4), indices to RAS in mm. Oblique axes are named by the nearest direction.
    """
    steps = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    nearest = max(
        itertools.permutations(range(3)),
        key=lambda order: sum(abs(steps[order[axis], axis]) for axis in range(3)),
    )
    return "".join(
        DIRECTIONS[world][int(steps[world, axis] > 0)] for axis, world in enumerate(nearest)
    )


def turns_between(found: str, wanted: str) -> tuple[Shape, tuple[bool, bool, bool]]:
    """Say which axis of an array becomes each axis of another orientation, and which are flipped.

    found, wanted: as `orientation_of` names them.
    """
    axes, flips = [], []
    for letter in wanted:
        pair = next(pair for pair in DIRECTIONS if letter in pair)
        axis = next(i for i, other in enumerate(found) if other in pair)
        axes.append(axis)
        flips.append(found[axis] != letter)
    return tuple(axes), tuple(flips)


# --------------------------------------------------------------------------------------- scaling


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (H, W) or (H, W, C) to `size` (H, W): average when shrinking, linear when growing."""
    if image.shape[:2] == tuple(size):
        return image
    if image.ndim == 3 and image.shape[-1] > CV_CHANNELS:
        parts = [image[..., i : i + CV_CHANNELS] for i in range(0, image.shape[-1], CV_CHANNELS)]
        return np.concatenate([resize(part, size) for part in parts], axis=-1)
    height, width = image.shape[:2]
    if (size[0] - height) * (size[1] - width) < 0:
        # OpenCV averages only where no side grows. The side that shrinks goes first.
        first = (size[0], width) if size[0] < height else (height, size[1])
        return resize(resize(image, first), size)
    shrinks = size[0] < height or size[1] < width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=method)
    # OpenCV drops a last axis of 1.
    return resized.reshape(*size, *image.shape[2:])


def resize_slice(array: Pixels, number: int, size: Sequence[int], change: Change) -> np.ndarray:
    """Resize a slice of an array (D, H, W[, C]); a large one in bands, so that it is not copied.

    change: is done to rows (h, W[, C]) before.
    """
    if prod(array.shape[1:3]) <= lazy.LARGE_SLICE or array.shape[1:3] == tuple(size):
        return resize(change(array[number]), size)
    bands = resize_bands(lambda rows: change(array[number, rows]), array.shape[1:3], size)
    return np.concatenate([rows for _, rows in bands])


def resize_bands(
    read: Callable[[slice], np.ndarray], shape: Sequence[int], size: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Resize an image of `shape` (H, W) as `resize` does, in bands: first row, (h, W[, C]).

    read: gives some rows of the image.
    """
    step = shape[0] / size[0]
    count = max(1, int(lazy.BAND_PIXELS / (max(1.0, step) * max(shape[1], size[1]))))
    for start in range(0, size[0], count):
        rows = range(start, min(start + count, size[0]))
        weights = [slice_weights(row, shape[0], size[0]) for row in rows]
        first, last = min(map(min, weights)), max(map(max, weights))
        part = read(slice(first, last + 1))
        narrow = resize(part.astype(np.float32, copy=False), (len(part), size[1]))
        matrix = np.zeros((len(rows), len(part)), np.float32)
        for row, one in zip(matrix, weights, strict=True):
            row[[source - first for source in one]] = list(one.values())
        mean = np.tensordot(matrix, narrow, 1)
        yield start, mean if part.dtype.kind == "f" else np.round(mean).astype(part.dtype)


def resize_each(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize each channel of (H, W, K) by itself, see `resize`."""
    if image.shape[:2] == tuple(size):
        return image
    return np.stack([resize(image[..., k], size) for k in range(image.shape[-1])], axis=-1)


def resample_planes(planes: Iterable[np.ndarray], count: int, wanted: int) -> Iterator[np.ndarray]:
    """Make `wanted` slices of `count` slices: averages for fewer, linear between them for more.

    Only the slices that a new one lies between are held.
    """
    if count == wanted:
        yield from planes
        return
    planes, held, first = iter(planes), [], 0
    for number in range(wanted):
        weights = slice_weights(number, count, wanted)
        while first + len(held) <= max(weights):
            held.append(next(planes))
        while first < min(weights):
            held.pop(0)
            first += 1
        mean = sum(weight * np.float32(held[i - first]) for i, weight in weights.items())
        yield mean if held[0].dtype.kind == "f" else np.round(mean).astype(held[0].dtype)


def slice_weights(number: int, count: int, wanted: int) -> dict[int, float]:
    """Give the weights of `count` slices in slice `number` of `wanted`, in ascending order."""
    step = count / wanted
    if wanted < count:
        start, stop = number * step, (number + 1) * step
        covered = range(int(start), min(count, int(np.ceil(stop - 1e-9))))
        return {i: (min(stop, i + 1) - max(start, i)) / step for i in covered}
    place = min(max((number + 0.5) * step - 0.5, 0), count - 1)
    below = min(int(place), count - 2)
    if below < 0:
        return {0: 1.0}
    return {below: below + 1 - place, below + 1: place - below}
