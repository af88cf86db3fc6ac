"""NRRD volumes, as 3D Slicer writes them: .nrrd, and .nhdr with the voxels in another file.

The format: https://teem.sourceforge.net/nrrd/format.html
"""

import gzip
import re
from pathlib import Path

import numpy as np

from imaging import itk, partners
from imaging.itk import Grid, Header
from imaging.scan import Mask, Scan
from utils import UserError

MAGIC = ((0, b"NRRD000"),)
TYPES = {
    "int8": ("signed char", "int8", "int8_t"),
    "uint8": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "int16": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "uint16": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "int32": ("int", "signed int", "int32", "int32_t"),
    "uint32": ("uint", "unsigned int", "uint32", "uint32_t"),
    "int64": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "uint64": ("ulonglong", "unsigned long long", "uint64", "uint64_t"),
    "float32": ("float",),
    "float64": ("double",),
}
ENCODINGS = {
    "raw": "raw",
    "gz": "gzip",
    "gzip": "gzip",
    "bz2": "bzip2",
    "bzip2": "bzip2",
    "txt": "text",
    "text": "text",
    "ascii": "text",
}
# Spaces whose first two axes point elsewhere than left and posterior; all others are read as LPS.
# Those with time as a further axis end in "-time", or T.
SPACES = {
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
    "rast": (-1, -1, 1),
    "last": (1, -1, 1),
}
SPATIAL_KINDS = ("domain", "space", "???", "none")
COLOUR_KINDS = ("rgb-color", "rgba-color", "3-color", "4-color")
MM_PER_UNIT = {"um": 1e-3, "µm": 1e-3, "micron": 1e-3, "microns": 1e-3, "cm": 10.0, "m": 1e3}
DATA_FILE = re.compile(rb"^data ?file: *(.*?) *\r?\n", re.M | re.I)


def decode_nrrd(content: bytes, max_bytes: int) -> Scan:
    """Decode a NRRD file of one picture or volume. Raises UserError."""
    fields, data = _split(content)
    if "data file" in fields or "datafile" in fields:
        raise UserError("a header without voxels; expected one file, .nrrd")
    return itk.decode(_parse(fields), _skip_lines(fields, data), max_bytes)


def join(content: bytes, path: Path, max_bytes: int) -> bytes:
    """Put the voxels that a .nhdr names behind it. Another content stays as it is."""
    fields, _ = _split(content)
    name = fields.get("data file", fields.get("datafile"))
    if name is None:
        return content
    if name.upper().startswith("LIST") or "%" in name:
        raise UserError("its voxels are in several files; expected one: save it as .nrrd")
    head = DATA_FILE.sub(b"", content.replace(b"\r\n", b"\n").rstrip() + b"\n")
    return head + b"\n" + partners.read_named(path, name, max_bytes)


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask as gzipped NRRD on the grid of its image."""
    return encode(mask.values, image)


def encode(slices: np.ndarray, image: Scan) -> bytes:
    """Encode values (S, H, W) as gzipped NRRD that lies where the image lies."""
    voxels, affine, grid = itk.place_of(slices, image)
    dimensions = voxels.ndim
    space = "space: left-posterior-superior" if dimensions == 3 else "space dimension: 2"
    columns = affine[:dimensions, [*range(dimensions), 3]].T
    vectors = ["(" + ",".join(f"{value:.17g}" for value in column) + ")" for column in columns]
    units = " ".join([f'"{grid.unit}"'] * dimensions)
    lines = [
        "NRRD0005",
        f"type: {TYPES[voxels.dtype.name][-1]}",
        f"dimension: {dimensions}",
        space,
        "sizes: " + " ".join(map(str, voxels.shape)),
        "space directions: " + " ".join(vectors[:-1]),
        "kinds:" + dimensions * " domain",
        *([f"space units: {units}"] if grid.unit else []),
        "endian: little",
        "encoding: gzip",
        f"space origin: {vectors[-1]}",
    ]
    stored = voxels.astype(voxels.dtype.newbyteorder("<")).tobytes(order="F")
    return "\n".join(lines).encode() + b"\n\n" + gzip.compress(stored, mtime=0)


def _split(content: bytes) -> tuple[dict[str, str], bytes]:
    """Split a file into the fields of its header and what follows."""
    end = re.search(rb"\r?\n\r?\n", content[: itk.MAX_HEADER_BYTES])
    head = content[: end.start() if end else itk.MAX_HEADER_BYTES]
    fields = {}
    for line in head.decode("utf-8", "replace").splitlines()[1:]:
        name, colon, value = line.partition(":")
        # "key:=value" is a note of the writer, "#" a comment.
        if colon and not line.startswith("#") and not value.startswith("="):
            fields[name.strip().lower()] = value.strip()
    return fields, content[end.end() :] if end else b""


def _skip_lines(fields: dict[str, str], data: bytes) -> bytes:
    for _ in range(min(1000, int(fields.get("line skip", 0)))):
        data = data.partition(b"\n")[2]
    return data


def _parse(fields: dict[str, str]) -> Header:
    """Read the fields of a header. Raises UserError."""
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in fields:
            raise UserError(f"its header has no {name}")
    dimensions = int(itk.number_list(fields["dimension"], 1, "dimension")[0])
    sizes = itk.read_sizes(fields["sizes"], dimensions)
    encoding = ENCODINGS.get(fields["encoding"].lower())
    if encoding is None:
        raise UserError(f"its encoding is {fields['encoding']}; expected raw or gzip")
    axis, kind = _channel_axis(fields, dimensions)
    return Header(
        _dtype(fields),
        sizes,
        _grid(fields, sizes, axis),
        axis,
        encoding,
        int(fields.get("byte skip", fields.get("byteskip", 0))),
        kind in COLOUR_KINDS,
    )


def _dtype(fields: dict[str, str]) -> np.dtype:
    for name, words in TYPES.items():
        if fields["type"].lower() in words:
            order = ">" if fields.get("endian", "").lower() == "big" else "<"
            return np.dtype(name).newbyteorder(order)
    raise UserError(f"its type is {fields['type']}; expected whole or floating-point numbers")


def _channel_axis(fields: dict[str, str], dimensions: int) -> tuple[int | None, str]:
    """Find the axis that is no axis of space, and its kind. Raises UserError for several."""
    kinds = fields.get("kinds", "").lower().split() or ["domain"] * dimensions
    steps = _vectors(fields.get("space directions", "")) or [()] * dimensions
    if not len(kinds) == len(steps) == dimensions:
        raise UserError(f"its header describes {len(kinds)} or {len(steps)} of {dimensions} axes")
    axes = []
    for axis in range(dimensions):
        if steps[axis] is None or kinds[axis] not in SPATIAL_KINDS:
            axes.append(axis)
    if not axes and dimensions == 4:
        axes = [3]
    if len(axes) > 1 or dimensions - len(axes) not in (2, 3):
        raise UserError(f"{dimensions} axes; expected 2 or 3 of space, and perhaps channels")
    return (axes[0], kinds[axes[0]]) if axes else (None, "")


def _vectors(text: str) -> list[np.ndarray | None]:
    """Read vectors such as (1,0,0) none (0,1,0). Raises UserError."""
    vectors = []
    for word in re.findall(r"none|\([^)]*\)", text[:4096]):
        if word == "none":
            vectors.append(None)
            continue
        inner = word.strip("()").replace(",", " ")
        vectors.append(np.array(itk.number_list(inner, len(inner.split()), "vector")))
    return vectors


def _grid(fields: dict[str, str], sizes: tuple[int, ...], channel_axis: int | None) -> Grid:
    """Read where the voxels lie. Raises UserError."""
    axes = [axis for axis in range(len(sizes)) if axis != channel_axis]
    steps = _vectors(fields.get("space directions", ""))
    origin = _vectors(fields.get("space origin", ""))
    if len(axes) == 3 and steps and steps[0] is not None and len(steps[0]) == 4:
        # ITK writes a series of volumes with a fourth direction of space.
        steps = [None if step is None else step[:3] for step in steps]
        origin = [None if place is None else place[:3] for place in origin]
    if steps:
        steps = [steps[axis] for axis in axes]
    else:
        words = fields.get("spacings", "").split() or ["1"] * len(sizes)
        lengths = [float(words[axis]) for axis in axes]
        steps = list(np.diag([size if np.isfinite(size) else 1.0 for size in lengths]))
    start = np.zeros(len(steps[0])) if not origin or origin[0] is None else origin[0]
    if {len(step) for step in steps} != {len(start)} or len(start) not in (2, 3):
        raise UserError("its space directions and origin differ in length; expected 2 or 3 each")
    words = re.findall('"([^"]*)"', fields.get("space units", ""))
    unit = words[0] if words else ""
    unit_mm = MM_PER_UNIT.get(unit.lower(), 1.0)
    space = fields.get("space", "").lower().removesuffix("-time")
    to_lps = np.diag([*SPACES.get(space, (1, 1, 1)), 1])
    scale = np.diag([unit_mm] * 3 + [1.0])
    affine = scale @ itk.LPS_TO_RAS @ to_lps @ itk.affine_of(steps, start)
    return Grid(tuple(sizes[axis] for axis in axes), affine, unit if unit_mm != 1 else "", unit_mm)
