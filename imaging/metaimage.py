"""MetaImage volumes, as ITK writes them: .mha, and .mhd with the voxels in another file.

The format: https://itk.org/Wiki/ITK/MetaIO/Documentation
"""

import re
import zlib
from pathlib import Path

import numpy as np

from imaging import itk, partners
from imaging.itk import Grid, Header
from imaging.scan import Mask, Scan
from utils import UserError

MAGIC = ((0, b"ObjectType"), (0, b"NDims"))
TYPES = {
    "MET_CHAR": "int8",
    "MET_UCHAR": "uint8",
    "MET_SHORT": "int16",
    "MET_USHORT": "uint16",
    "MET_INT": "int32",
    "MET_UINT": "uint32",
    "MET_LONG_LONG": "int64",
    "MET_ULONG_LONG": "uint64",
    "MET_FLOAT": "float32",
    "MET_DOUBLE": "float64",
}
# Types of which there are others of the same size: 4 bytes, whatever a C compiler makes of "long".
OTHER_TYPES = {"MET_LONG": "int32", "MET_ULONG": "uint32"}
# The last line of the header.
DATA_FILE = re.compile(rb"^ElementDataFile *= *(.*?) *\r?\n", re.M)


def decode_metaimage(content: bytes, max_bytes: int) -> Scan:
    """Decode a MetaImage file of one picture or volume. Raises UserError."""
    fields, name, data = _split(content)
    if name != "LOCAL":
        raise UserError("a header without voxels; expected one file, .mha")
    return itk.decode(_parse(fields), data, max_bytes)


def join(content: bytes, path: Path, max_bytes: int) -> bytes:
    """Put the voxels that a .mhd names behind it. Another content stays as it is."""
    content = content if b"\0" in content or content.endswith(b"\n") else content + b"\n"
    _, name, _ = _split(content)
    if name == "LOCAL":
        return content
    if name.startswith("LIST") or "%" in name:
        raise UserError("its voxels are in several files; expected one: save it as .mha")
    head = content[: DATA_FILE.search(content).start()]
    return head + b"ElementDataFile = LOCAL\n" + partners.read_named(path, name, max_bytes)


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask as compressed MetaImage on the grid of its image."""
    return encode(mask.values, image)


def encode(slices: np.ndarray, image: Scan) -> bytes:
    """Encode values (S, H, W) as compressed MetaImage that lies where the image lies."""
    voxels, affine, _ = itk.place_of(slices, image)
    dimensions = voxels.ndim
    steps = affine[:dimensions, :dimensions]
    spacing = np.linalg.norm(steps, axis=0)
    stored = zlib.compress(voxels.astype(voxels.dtype.newbyteorder("<")).tobytes(order="F"))

    def line(numbers: np.ndarray) -> str:
        return " ".join(f"{number:.17g}" for number in np.ravel(numbers))

    kinds = {name: kind for kind, name in TYPES.items()}
    lines = [
        "ObjectType = Image",
        f"NDims = {dimensions}",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {len(stored)}",
        f"TransformMatrix = {line((steps / spacing).T)}",
        f"Offset = {line(affine[:dimensions, 3])}",
        f"ElementSpacing = {line(spacing)}",
        "DimSize = " + " ".join(map(str, voxels.shape)),
        f"ElementType = {kinds[voxels.dtype.name]}",
        "ElementDataFile = LOCAL",
    ]
    return "\n".join(lines).encode() + b"\n" + stored


def _split(content: bytes) -> tuple[dict[str, str], str, bytes]:
    """Split a file into its header's fields, the name of its voxels' file, and what follows."""
    end = DATA_FILE.search(content[: itk.MAX_HEADER_BYTES])
    if end is None:
        raise UserError("its header has no ElementDataFile")
    fields = {}
    for line in content[: end.start()].decode("utf-8", "replace").splitlines():
        name, _, value = line.partition("=")
        fields[name.strip().lower()] = value.strip()
    return fields, end[1].decode("utf-8", "replace"), content[end.end() :]


def _parse(fields: dict[str, str]) -> Header:
    """Read the fields of a header. Raises UserError."""
    for name in ("ndims", "dimsize", "elementtype"):
        if name not in fields:
            raise UserError(f"its header has no {name}")
    dimensions = int(itk.number_list(fields["ndims"], 1, "NDims")[0])
    if dimensions not in (2, 3, 4):
        raise UserError(f"{dimensions} dimensions; expected 2 or 3")
    sizes = itk.read_sizes(fields["dimsize"], dimensions)
    channels = int(fields.get("elementnumberofchannels", 1))
    kind = fields["elementtype"].upper().removesuffix("_ARRAY")
    name = TYPES.get(kind) or OTHER_TYPES.get(kind)
    if name is None or channels < 1:
        raise UserError(f"its type is {fields['elementtype']}; expected one number per voxel")
    is_big = "true" in (_first(fields, "binarydatabyteordermsb", "elementbyteordermsb")).lower()
    dtype = np.dtype(name).newbyteorder(">" if is_big else "<")
    axis = 3 if dimensions == 4 else None
    if channels > 1:
        if dimensions == 4:
            raise UserError(f"4 dimensions and {channels} channels; expected one of both")
        sizes, axis = (channels, *sizes), 0
    is_packed = fields.get("compresseddata", "").lower() == "true"
    is_text = fields.get("binarydata", "true").lower() == "false"
    encoding = "gzip" if is_packed else "text" if is_text else "raw"
    is_colour = axis == 0 and channels in (3, 4) and dtype.itemsize == 1
    skip = int(fields.get("headersize", 0))
    return Header(dtype, sizes, _grid(fields, sizes, axis), axis, encoding, skip, is_colour)


def _first(fields: dict[str, str], *names: str) -> str:
    return next((fields[name] for name in names if name in fields), "")


def _grid(fields: dict[str, str], sizes: tuple[int, ...], channel_axis: int | None) -> Grid:
    """Read where the voxels lie. Raises UserError."""
    count = int(fields["ndims"])
    spatial = min(3, count)
    spacing = _first(fields, "elementspacing", "elementsize") or "1 " * count
    origin = _first(fields, "offset", "position", "origin") or "0 " * count
    matrix = _first(fields, "transformmatrix", "rotation", "orientation")
    lengths = itk.number_list(spacing, count, "ElementSpacing")
    turns = np.eye(count)
    if matrix:
        turns = np.reshape(itk.number_list(matrix, count * count, "TransformMatrix"), (count,) * 2)
    steps = [turns[axis, :spatial] * lengths[axis] for axis in range(spatial)]
    start = itk.number_list(origin, count, "Offset")[:spatial]
    shape = tuple(size for axis, size in enumerate(sizes) if axis != channel_axis)
    return Grid(shape, itk.LPS_TO_RAS @ itk.affine_of(steps, start))
