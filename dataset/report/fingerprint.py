"""Measure the objects of a data set on its masks as stored: what decides at which size to train.

The ceiling is the Dice of a mask that is scaled to the network's input and back: no network that
sees images of that size can do better. Thickness tells thin structures also where they are all
connected, such as vessels. The idea of a fingerprint is nnU-Net's (Isensee et al. 2021).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from dataset.pairs import Pair
from dataset.reading import read_truth
from dataset.symmetry import alike, small_mask, symmetry
from imaging import preprocess
from imaging.grid import Grid, fit_grid
from imaging.labels import BITS, Classes, plane
from utils import cores

if TYPE_CHECKING:
    import pandas as pd

# Longer sides of the network's input at which ceilings are measured.
SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024)
# Pixels: how much of an object is thinner is measured for each.
WIDTHS = (2, 3, 4, 6, 8, 12, 16, 24)
MIN_POSES = 3  # masks, to tell it
# The cost is bounded: so many pairs, slices of each, and pixels of a slice's side are measured.
MAX_PAIRS = 48
MAX_SLICES = 16
MAX_SIDE = 4096
MAX_VOXELS = 2**28  # that are read for it
MAX_VOLUMES = 8  # that are resampled


@dataclass(frozen=True)
class Measured:
    """What is measured on the masks of one pair; NaN for a class that it does not have."""

    ceilings: np.ndarray  # (sizes, K + 1) Dice, of the background first
    thinner: np.ndarray  # (widths, K) share of the class that is thinner
    background_thinner: np.ndarray  # (widths,) the same of what is no class
    slices: list[int]  # that were measured and hold each class
    diameters: list[np.ndarray]  # of each class's objects, in pixels, of a disc of their area
    pose: np.ndarray  # see `symmetry.small_mask`


@dataclass(frozen=True)
class Fingerprint:
    """What is measured on a sample of a data set's pairs."""

    names: Sequence[str]
    pairs: list[Measured]

    def ceiling(self, size: int) -> np.ndarray:
        """Mean Dice (K,) of the masks scaled to fit `size` (longer side) and back."""
        return self._ceilings(size)[1:]

    def least_ceiling(self, size: int) -> float:
        """Mean ceiling of the class that suffers most.

        The background counts as one: where it is lines between cells, these are what is lost.
        """
        return float(np.nanmin(self._ceilings(size)))

    def _ceilings(self, size: int) -> np.ndarray:
        """Mean Dice (K + 1,), of the background first; 1 without any object."""
        if not self.pairs:
            return np.ones(1 + len(self.names))
        return _mean([one.ceilings[SIZES.index(size)] for one in self.pairs])

    def low_ceiling(self, size: int) -> float:
        """Give the Dice that nine of ten pairs reach, of the class where it is least."""
        dice = np.array([one.ceilings[SIZES.index(size)] for one in self.pairs])
        found = [np.quantile(one[~np.isnan(one)], 0.1) for one in dice.T if not np.isnan(one).all()]
        return float(min(found, default=1.0))

    def width(self, class_id: int, share: float) -> float:
        """Find the width in pixels below which `share` of a class lies; infinity if all is thick.

        class_id: 0 is the background.
        """
        if class_id:
            curves = [one.thinner[:, class_id - 1] for one in self.pairs]
        else:
            curves = [one.background_thinner for one in self.pairs]
        curve = _mean(curves)
        enough = np.flatnonzero(curve >= share)
        return float(WIDTHS[enough[0]]) if len(enough) else np.inf

    def diameters(self, class_id: int) -> np.ndarray:
        """List the diameters (N,) in pixels of a class's objects in all pairs."""
        return np.concatenate([np.zeros(0), *(one.diameters[class_id - 1] for one in self.pairs)])

    def slices(self, class_id: int) -> int:
        """Count the slices that were measured and hold a class."""
        return sum(one.slices[class_id - 1] for one in self.pairs)

    def objects_per_image(self) -> float:
        """Count the objects of all classes in a slice: the median of the pairs."""
        counts = [sum(map(len, one.diameters)) / max(one.slices) for one in self.pairs]
        return float(np.median(counts)) if counts else 0.0

    def pose_agreement(self) -> float:
        """Say how alike the objects lie in all images: Dice of each mask with the others' mean."""
        if len(self.pairs) < MIN_POSES:
            return 0.0
        poses = alike([one.pose for one in self.pairs]).max(1) > 0.5
        poses = poses.reshape(len(poses), -1).astype(np.float32)
        poses = poses[poses.any(1)]
        if len(poses) < MIN_POSES:
            return 0.0
        others = (poses.sum(0) - poses) / (len(poses) - 1)
        dice = 2 * (poses * others).sum(1) / (poses.sum(1) + others.sum(1))
        return float(dice.mean())

    def symmetry(self, axis: int, partners: Sequence[int] = ()) -> float:
        """Say how symmetric the mean mask is, see `symmetry.symmetry`."""
        return symmetry([one.pose for one in self.pairs], axis, partners)


def _mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Average over pairs without those that are NaN; NaN where all are."""
    array = np.array(values, float)
    counts = (~np.isnan(array)).sum(0)
    return np.where(counts, np.nansum(array, 0) / np.maximum(counts, 1), np.nan)


# --------------------------------------------------------------------------------------- the sample


def take_fingerprint(pairs: Sequence[Pair], info: "pd.DataFrame", classes: Classes) -> Fingerprint:
    """Measure the masks of some pairs with objects, spread evenly over the data set.

    info: of `Dataset`, a row for each of `pairs`. At most MAX_PAIRS are read, fewer if they hold
    more than MAX_VOXELS; of a volume MAX_SLICES slices are measured, of a larger slice the part of
    MAX_SIDE pixels with most objects.
    """

    def measure_pair(row: int) -> Measured:
        return measure(read_truth(pairs[row], classes).mask, classes)

    with ThreadPoolExecutor(cores()) as pool:
        measured = list(pool.map(measure_pair, choose_rows(info, classes.names)))
    return Fingerprint(classes.names, measured)


def choose_rows(info: "pd.DataFrame", names: Sequence[str]) -> list[int]:
    """Choose the pairs to measure: rows of `info`."""
    shares = (
        info[[f"share: {name}" for name in names]].to_numpy() if len(info) else np.zeros((0, 1))
    )
    filled = np.flatnonzero(shares.any(1))
    if not len(filled):
        return []
    places = np.linspace(0, len(filled) - 1, min(MAX_PAIRS, len(filled)))
    rows = filled[places.round().astype(int)]
    sides = [tuple(map(int, size.split("x"))) for size in info["size"]]
    voxels = np.array([np.prod(sides[row]) * info["slices"].iloc[row] for row in rows], float)
    few = np.linspace(0, len(rows) - 1, max(1, int(MAX_VOXELS / max(voxels.mean(), 1))))
    return list(rows) if voxels.sum() <= MAX_VOXELS else list(rows[few.round().astype(int)])


def resampled_ceiling(
    pairs: Sequence[Pair], info: "pd.DataFrame", classes: Classes, spacing_mm: Sequence[float]
) -> np.ndarray:
    """Measure the mean Dice (K,) of masks of volumes that are resampled to a spacing and back.

    A spacing of 0 leaves an axis as it is. At most MAX_VOLUMES are measured.
    """
    rows = choose_rows(info, classes.names)
    rows = [
        rows[place]
        for place in np.linspace(0, len(rows) - 1, min(MAX_VOLUMES, len(rows)), dtype=int)
    ]

    def attempt(row: int) -> np.ndarray:
        mask, own = read_truth(pairs[row], classes).mask, info["spacing_mm"].iloc[row]
        if not isinstance(own, list):
            return np.full(len(classes.names) + 1, np.nan)
        inner = [
            max(1, round(length * mm / wanted)) if wanted else length
            for length, mm, wanted in zip(mask.shape, own, spacing_mm, strict=True)
        ]
        grid = Grid((0, 1, 2), (False,) * 3, mask.shape, tuple(inner), tuple(inner))
        agreeing, both = compare_with_scaled(mask, grid, len(classes.names))
        return np.divide(agreeing, both, out=np.full(len(both), np.nan), where=both > 0)

    with ThreadPoolExecutor(cores()) as pool:
        return _mean(list(pool.map(attempt, rows)))[1:]


# ---------------------------------------------------------------------------------------- one pair


def measure(mask: np.ndarray, classes: Classes) -> Measured:
    """Measure a mask (S, H, W), ids or BITS."""
    count = len(classes.names)
    slices, scale = _some_slices(mask)
    overlaps, totals = np.zeros((2, len(SIZES), count + 1))
    thin, areas = np.zeros((len(WIDTHS), count + 1)), np.zeros(count + 1)
    diameters: list[list[np.ndarray]] = [[] for _ in range(count)]
    for one in slices:
        largest = 0
        for i, size in enumerate(SIZES):
            # A size above the slice's own loses nothing, and would take time.
            side = min(max(1, round(size * scale)), max(one.shape))
            if side > largest:
                grid = fit_grid((1, *one.shape), (side, side))
                agreeing, both = compare_with_scaled(one[None], grid, count)
                largest = side
            overlaps[i] += agreeing
            totals[i] += both
        for k in range(count + 1):
            object_ = plane(one, k) if k else one == 0
            areas[k] += np.count_nonzero(object_)
            thin[:, k] += thin_areas(object_)
            if k:
                diameters[k - 1].append(object_diameters(object_))
    with np.errstate(invalid="ignore", divide="ignore"):
        ceilings, thinner = overlaps / totals, thin / areas
    filled = [sum(map(bool, map(len, found))) for found in diameters]
    joined = [np.concatenate([np.zeros(0), *found]) for found in diameters]
    return Measured(
        ceilings, thinner[:, 1:], thinner[:, 0], filled, joined, small_mask(mask, count)
    )


def _some_slices(mask: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Take slices with objects, evenly, and of large ones a part; its share of the longer side."""
    filled = np.flatnonzero(mask.any((1, 2)))
    places = np.linspace(0, len(filled) - 1, min(MAX_SLICES, len(filled))).round().astype(int)
    side = max(mask.shape[1:])
    if side <= MAX_SIDE:
        return [mask[filled[place]] for place in places], 1.0
    parts = [_fullest_part(mask[filled[place]]) for place in places[:1]]
    return parts, MAX_SIDE / side


def _fullest_part(one: np.ndarray) -> np.ndarray:
    """Cut the part of MAX_SIDE pixels with most objects out of a slice (H, W)."""
    best = max(
        (
            (y, x)
            for y in range(0, one.shape[0], MAX_SIDE)
            for x in range(0, one.shape[1], MAX_SIDE)
        ),
        key=lambda at: np.count_nonzero(one[at[0] : at[0] + MAX_SIDE, at[1] : at[1] + MAX_SIDE]),
    )
    y, x = (max(0, min(best[i], one.shape[i] - MAX_SIDE)) for i in (0, 1))
    return one[y : y + MAX_SIDE, x : x + MAX_SIDE]


def compare_with_scaled(
    mask: np.ndarray, grid: Grid, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scale a mask (S, H, W) to a grid and back, as training and prediction do.

    Returns twice the pixels that agree, and the pixels of both, whose quotient is Dice: (K + 1,),
    the background and each class.
    """
    shares = preprocess.prepare_mask(mask, grid, classes).astype(np.float32)
    if mask.dtype != BITS and classes > 1:
        shares = np.concatenate([255 - shares.sum(-1, keepdims=True), shares], axis=-1)
    agreeing, both = np.zeros((2, classes + 1))
    for one, back in zip(mask, grid.restore(shares), strict=True):
        if back.shape[-1] > classes:
            winner = back.argmax(-1)
            found = [winner == k for k in range(classes + 1)]
        else:
            found = [back[..., k] >= 127.5 for k in range(classes)]
            found.insert(0, ~np.logical_or.reduce(found))
        for k, kept in enumerate(found):
            truth = plane(one, k) if k else one == 0
            agreeing[k] += 2 * np.count_nonzero(truth & kept)
            both[k] += np.count_nonzero(truth) + np.count_nonzero(kept)
    return agreeing, both


def thin_areas(object_: np.ndarray) -> np.ndarray:
    """Count the pixels of an object (H, W) of bool that are thinner than each of WIDTHS.

    A pixel is thinner than w if no disc of w pixels that lies in the object covers it. So a tree of
    vessels is thin, however far it reaches.
    """
    rows, columns = (np.flatnonzero(object_.any(axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros(len(WIDTHS))
    part = object_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # Outside of its box there is background, but not beyond the image's border.
    edges = (rows[0] > 0, rows[-1] < len(object_) - 1)
    edges += (columns[0] > 0, columns[-1] < object_.shape[1] - 1)
    part = cv2.copyMakeBorder(part.view(np.uint8), *map(int, edges), cv2.BORDER_CONSTANT, value=0)
    area = cv2.countNonZero(part)
    found = []
    for width in WIDTHS:
        disc, anchor = _disc(width), (width // 2, width // 2)
        back = (width - 1 - width // 2,) * 2
        opened = cv2.dilate(cv2.erode(part, disc, anchor=anchor), disc, anchor=back)
        found.append(area - cv2.countNonZero(opened))
    return np.array(found, float)


def _disc(width: int) -> np.ndarray:
    """Draw a disc of so many pixels: uint8 (width, width)."""
    distance = np.arange(width) - (width - 1) / 2
    return (distance[:, None] ** 2 + distance**2 <= width**2 / 4).astype(np.uint8)


def object_diameters(object_: np.ndarray) -> np.ndarray:
    """Measure the connected parts of (H, W) bool: the diameters of discs of their areas, pixels."""
    areas = cv2.connectedComponentsWithStats(object_.view(np.uint8))[2][1:, cv2.CC_STAT_AREA]
    return np.sqrt(4 / np.pi * areas)
