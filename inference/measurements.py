"""Measure what was found in an image: the rows of measurements.csv."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from imaging.labels import plane
from imaging.lazy import bands
from imaging.scan import Scan
from inference.components import Components

COLUMNS = (
    "image",
    "mask",
    "class",
    "area_pixels",
    "area_mm2",
    "volume_ml",
    "components",
    "first_slice",
    "last_slice",
    "top",
    "bottom",
    "left",
    "right",
    "mean_grey",
    "predicted_dice",
    "predicted_dice_low",
    "predicted_dice_high",
    "unusual",
    "notes",
)
# Names of the bounding box's first and last slice, row and column.
SIDES = (("first_slice", "last_slice"), ("top", "bottom"), ("left", "right"))


def measure_classes(mask: np.ndarray, names: Sequence[str], scan: Scan) -> list[dict[str, Any]]:
    """Measure each class of a mask (S, H, W), ids or BITS: a dictionary for each.

    It has COLUMNS, without those that are the image's. Areas are of single images, volumes of
    several slices, both only where the spacing is known; pixels (voxels) are counted in any case.
    Slices, rows and columns of the bounding box count from 0, and the last ones belong to it.
    Components touch at their sides. The mean grey level is of the file's own values, averaged over
    its channels.
    """
    return [
        {"class": name, **_measure(mask, class_id, scan)} for class_id, name in enumerate(names, 1)
    ]


def _measure(mask: np.ndarray, class_id: int, scan: Scan) -> dict[str, Any]:
    filled = [np.zeros(length, bool) for length in mask.shape]
    count, total, colours = 0, 0.0, scan.colours
    for band in bands(mask.shape):
        inside = plane(mask[band], class_id)
        found = int(np.count_nonzero(inside))
        if not found:
            continue
        count += found
        for axis, part in enumerate((*band, slice(None))):
            others = tuple(other for other in range(3) if other != axis)
            filled[axis][part] |= inside.any(others)
        total += float(colours[band][inside].sum(dtype=np.float64))
    row: dict[str, Any] = {"area_pixels": count, "components": 0}
    if scan.spacing_mm and len(mask) == 1:
        row["area_mm2"] = _rounded(count * scan.spacing_mm[1] * scan.spacing_mm[2])
    elif scan.spacing_mm:
        row["volume_ml"] = _rounded(count * float(np.prod(scan.spacing_mm)) / 1000)
    if not count:
        return row
    for sides, one in zip(SIDES, filled, strict=True):
        places = np.flatnonzero(one)
        row |= dict(zip(sides, (int(places[0]), int(places[-1])), strict=True))
    row["components"] = len(Components(lambda band: plane(mask[band], class_id), mask.shape))
    row["mean_grey"] = _rounded(total / (count * colours.shape[-1]))
    return row


def _rounded(value: float) -> float:
    """Keep six digits."""
    return float(f"{value:.6g}")
