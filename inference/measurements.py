"""Measure what was found in an image: the rows of measurements.csv."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from imaging.scan import Scan

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
    "notes",
)


def measure_classes(
    planes: Sequence[np.ndarray], names: Sequence[str], scan: Scan
) -> list[dict[str, Any]]:
    """Measure each class: a dictionary of COLUMNS, without those that are the image's.

    planes: (S, H, W) bool, of each class. Areas are of single images, volumes of several slices,
    both only where the spacing is known; pixels (voxels) are counted in any case. Slices, rows and
    columns of the bounding box count from 0, and the last ones belong to it. Components touch at
    their sides. The mean grey level is of the file's own values, averaged over its channels.
    """
    return [
        {"class": name, **_measure(plane, scan)} for name, plane in zip(names, planes, strict=True)
    ]


def _measure(plane: np.ndarray, scan: Scan) -> dict[str, Any]:
    count = int(np.count_nonzero(plane))
    row: dict[str, Any] = {"area_pixels": count, "components": 0}
    if scan.spacing_mm and len(plane) == 1:
        row["area_mm2"] = _rounded(count * scan.spacing_mm[1] * scan.spacing_mm[2])
    elif scan.spacing_mm:
        row["volume_ml"] = _rounded(count * float(np.prod(scan.spacing_mm)) / 1000)
    if not count:
        return row
    from scipy import ndimage

    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        filled = np.flatnonzero(plane.any(others))
        box.append((int(filled[0]), int(filled[-1])))
    row["first_slice"], row["last_slice"] = box[0]
    row["top"], row["bottom"] = box[1]
    row["left"], row["right"] = box[2]
    inside = tuple(slice(first, last + 1) for first, last in box)
    row["components"] = ndimage.label(plane[inside])[1]
    pixels = scan.colours[inside][plane[inside]]
    row["mean_grey"] = _rounded(float(pixels.mean(dtype=np.float64)))
    return row


def _rounded(value: float) -> float:
    """Keep six digits."""
    return float(f"{value:.6g}")
