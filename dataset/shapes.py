"""Draw the shapes of annotation programs: polygons, COCO's run lengths, small masks at a place."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils import UserError

MAX_POINTS = 2**22  # of one shape
MAX_CROSSINGS = 2**25  # of a shape's edges with columns of pixels


def draw(drawing: Any, shape: tuple[int, int]) -> np.ndarray:
    """Draw polygons [x, y, x, y …], run lengths or a small mask: bool (H, W). Raises UserError."""
    if isinstance(drawing, dict):
        return _place(drawing, shape) if "mask" in drawing else decode_runs(drawing, shape)
    if not isinstance(drawing, list):
        raise UserError(f"a segmentation of {type(drawing).__name__}; expected polygons or RLE")
    mask = np.zeros(shape, bool)
    for polygon in drawing:
        mask |= fill_polygon(polygon, shape)
    return mask


def fill_polygon(polygon: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    """Fill a polygon [x, y, x, y …]: the pixels whose centre is inside it, bool (H, W).

    Centres are at .5. Each edge switches the pixels below it, in each column that it crosses.
    """
    points = _read_points(polygon)
    height, width = shape
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(x0, x1) - 0.5), 0, width).astype(int)
    last = np.clip(np.ceil(np.maximum(x0, x1) - 0.5), 0, width).astype(int)  # not included
    counts = last - first
    if counts.sum() > MAX_CROSSINGS:
        raise UserError(f"a polygon that crosses {counts.sum()} columns of pixels")
    edge = np.repeat(np.arange(len(points)), counts)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    slope = (y1 - y0)[edge] / (x1 - x0)[edge]
    y = y0[edge] + slope * (column + 0.5 - x0[edge])
    row = np.clip(np.ceil(y - 0.5), 0, height).astype(int)
    switches = np.zeros((height + 1, width), np.uint8)
    np.add.at(switches, (row, column), 1)
    return (np.cumsum(switches[:-1], axis=0, dtype=np.uint8) & 1).astype(bool)


def _read_points(polygon: Any) -> np.ndarray:
    """Read a polygon as points (N, 2). Raises UserError."""
    try:
        points = np.array(polygon, float)
    except (TypeError, ValueError):
        raise UserError("a polygon that is not a list of numbers") from None
    if points.ndim != 1 or points.size < 6 or points.size % 2 or points.size > 2 * MAX_POINTS:
        raise UserError(f"a polygon of {points.size} numbers; expected x and y of 3 points or more")
    if not np.isfinite(points).all():
        raise UserError("a polygon with points that are not finite")
    return points.reshape(-1, 2).clip(-1e6, 1e6)


def decode_runs(drawing: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Decode COCO's run lengths, which go down the columns: bool (H, W). Raises UserError."""
    if list(drawing.get("size", [])) != list(shape):
        raise UserError(f"run lengths of size {drawing.get('size')}; the image is {list(shape)}")
    counts = drawing.get("counts")
    try:
        if isinstance(counts, str | bytes):
            counts = _unpack_counts(counts if isinstance(counts, bytes) else counts.encode("ascii"))
        counts = np.array(counts, np.int64)
    except (TypeError, ValueError, OverflowError):
        raise UserError("run lengths that are not numbers") from None
    if counts.ndim != 1 or (counts < 0).any() or int(counts.sum()) != shape[0] * shape[1]:
        raise UserError(f"run lengths that do not add up to {shape[0]}x{shape[1]} pixels")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(shape, order="F")


def _unpack_counts(text: bytes) -> list[int]:
    """Unpack compressed run lengths.

    A number is written in groups of 5 bits, the lowest first, each a sign from 48 on; bit 6 says
    that more follow. From the fourth number on it is the difference to the one two places before.
    """
    counts: list[int] = []
    value = shift = 0
    for sign in text:
        group = sign - 48
        if not 0 <= group < 64 or shift > 60:
            raise ValueError("not a run length")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _place(drawing: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Put a small mask at its place (x, y) into an image."""
    mask, (x, y) = np.zeros(shape, bool), drawing["at"]
    part = drawing["mask"][max(0, -y) :, max(0, -x) :]
    x, y = max(0, x), max(0, y)
    part = part[: max(0, shape[0] - y), : max(0, shape[1] - x)]
    mask[y : y + part.shape[0], x : x + part.shape[1]] = part
    return mask
