"""What the pages of a TIFF stand for: slices, channels, time. ImageJ, OME and tifffile say so."""

import json
import re
from math import prod
from typing import Any

import numpy as np

from imaging.lazy import Box, LazyPixels

# ImageJ's and OME's units of length, in mm. ImageJ has no unit for those of printing.
MM_PER_UNIT = {
    "mm": 1.0,
    "cm": 10.0,
    "m": 1e3,
    "nm": 1e-6,
    "um": 1e-3,
    "micron": 1e-3,
    "\\u00B5m": 1e-3,
    "µm": 1e-3,
    "μm": 1e-3,
}
AXIS_NAMES = {"C": "channels", "Z": "slices", "T": "frames"}
# OME's text can be of megabytes; what is needed stands at its start.
MAX_TEXT = 2**20

# Name and length of each axis across planes, the slowest first.
Axes = list[tuple[str, int]]


def plane_axes(file: Any, samples: int) -> Axes:
    """Read the axes across the planes of a TIFF; nothing if it does not say.

    samples: per pixel of a page. They can be the channels that the metadata mean.
    """
    for read in (_ome_axes, _imagej_axes, _shaped_axes):
        axes = read(file)
        if axes:
            break
    count = prod(length for name, length in axes if name == "C")
    if samples > 1 and count % samples == 0:
        rest = count // samples
        axes = [(name, length) for name, length in axes if name != "C"]
        axes += [("C", rest)] if rest > 1 else []
    return [(name, length) for name, length in axes if length > 1]


def arrange(planes: Any, axes: Axes) -> Any:
    """Turn planes (P, H, W, C), P as `axes` says, into (S, H, W, C): time and z are slices."""
    if isinstance(planes, LazyPixels):
        return _arrange_lazily(planes, axes)
    shape = [length for _, length in axes]
    ordered = sorted(range(len(axes)), key=lambda place: _RANK.get(axes[place][0], 0))
    is_channel = [place for place in ordered if axes[place][0] == "C"]
    is_slice = [place for place in ordered if axes[place][0] != "C"]
    first = len(axes)
    array = planes.reshape(*shape, *planes.shape[1:])
    array = array.transpose(*is_slice, first, first + 1, *is_channel, first + 2)
    return array.reshape(-1, *planes.shape[1:3], prod(array.shape[len(is_slice) + 2 :]))


def _arrange_lazily(planes: LazyPixels, axes: Axes) -> LazyPixels:
    count, samples = planes.shape[0], planes.shape[-1]
    if not axes:
        return planes
    # Where each slice's channels are: (S, C) numbers of plane and sample in one.
    places = arrange(np.arange(count * samples).reshape(count, 1, 1, samples), axes)[:, 0, 0]

    def read(box: Box) -> np.ndarray:
        wanted = places[box[0], box[3]]
        size = [part.stop - part.start for part in box]
        pixels = np.empty(size, planes.dtype)
        for number in np.unique(wanted // samples).tolist():
            plane = planes[number, box[1], box[2]]
            for slice_, channel in np.argwhere(wanted // samples == number):
                pixels[slice_, ..., channel] = plane[..., wanted[slice_, channel] % samples]
        return pixels

    return LazyPixels((len(places), *planes.shape[1:3], places.shape[1]), planes.dtype, read)


_RANK = {"T": 1, "Z": 2, "C": 3}


def spacing_mm(file: Any) -> tuple[float, float, float] | None:
    """Read the distance between slices, rows and columns from the metadata of OME or ImageJ.

    Without their unit a TIFF's resolution is meant for printing. NaN if the slices have none.
    """
    if fields := _ome_fields(file):
        return _ome_spacing(fields)
    page, metadata = file.pages[0], file.imagej_metadata or {}
    unit_mm = MM_PER_UNIT.get(metadata.get("unit"))
    resolutions = [page.tags.valueof(name) for name in ("YResolution", "XResolution")]
    if unit_mm is None or not all(resolutions):
        return None
    if not all(pixels and units for pixels, units in resolutions):
        return None
    rows, columns = (unit_mm * units / pixels for pixels, units in resolutions)
    # ImageJ writes what it was given, such as a negative distance.
    slices = unit_mm * abs(_number(metadata.get("spacing", 0)))
    return (slices if 0 < slices < np.inf else np.nan), rows, columns


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _ome_spacing(fields: dict[str, str]) -> tuple[float, float, float] | None:
    lengths = []
    for name in "ZYX":
        unit_mm = MM_PER_UNIT.get(fields.get(f"PhysicalSize{name}Unit", "µm"), 0.0)
        try:
            lengths.append(unit_mm * float(fields.get(f"PhysicalSize{name}", 0)))
        except ValueError:
            lengths.append(0.0)
    if not (0 < lengths[1] < np.inf and 0 < lengths[2] < np.inf):
        return None
    slices = lengths[0] if 0 < lengths[0] < np.inf else np.nan
    return slices, lengths[1], lengths[2]


def _ome_fields(file: Any) -> dict[str, str]:
    """Read the attributes of OME's first element Pixels. Other files that it names are not read."""
    if not file.is_ome:
        return {}
    found = re.search(r"<(?:\w+:)?Pixels\b([^>]*)>", (file.ome_metadata or "")[:MAX_TEXT])
    return dict(re.findall(r'(\w+)="([^"]*)"', found[1])) if found else {}


def _ome_axes(file: Any) -> Axes:
    fields = _ome_fields(file)
    order = fields.get("DimensionOrder", "")
    if not re.fullmatch("XY[CZT]{3}", order):
        return []
    return [(name, _whole(fields.get(f"Size{name}"))) for name in reversed(order[2:])]


def _imagej_axes(file: Any) -> Axes:
    metadata = file.imagej_metadata
    if metadata is None:
        return []
    order = str(metadata.get("order", "czt")).upper()
    order = order if sorted(order) == ["C", "T", "Z"] else "CZT"
    axes = [(name, _whole(metadata.get(AXIS_NAMES[name]))) for name in reversed(order)]
    # Plain stacks, among them those above 4 GB, give only the number of images.
    images = _whole(metadata.get("images"))
    return axes if prod(length for _, length in axes) > 1 else [("Z", images)]


def _shaped_axes(file: Any) -> Axes:
    """Read the shape and axes that tifffile writes."""
    try:
        fields = json.loads((file.pages[0].description or "")[:MAX_TEXT])
        shape, names = list(map(int, fields["shape"])), str(fields["axes"]).upper()
    except (ValueError, KeyError, TypeError):
        return []
    if len(shape) != len(names) or "Y" not in names:
        return []
    axes = []
    for name, length in zip(names, shape, strict=True):
        if name not in "YX":
            axes.append(("C" if name == "S" else name, length))
    return axes


def _whole(value: Any) -> int:
    """Read a length; what is none counts as 1."""
    try:
        return max(1, int(value))
    except (ValueError, TypeError):
        return 1
