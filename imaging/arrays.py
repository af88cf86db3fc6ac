"""NumPy arrays: .npy, and .npz with one array."""

import io
import zipfile
from typing import Any

import numpy as np

from imaging.scan import MAX_CHANNELS, Scan, check_declared_bytes
from utils import UserError

NPY_MAGIC = ((0, b"\x93NUMPY"),)
NPZ_MAGIC = ((0, b"PK\3\4"),)


def decode_npy(content: bytes, max_bytes: int) -> Scan:
    """Decode an array (H, W) or (H, W, C). Raises UserError."""
    return _decode(io.BytesIO(content), max_bytes)


def decode_npz(content: bytes, max_bytes: int) -> Scan:
    """Decode the only array of an archive. Raises UserError."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        if len(names) != 1 or not names[0].endswith(".npy"):
            shown = ", ".join(names[:5])
            raise UserError(f"{len(names)} files ({shown}); expected one array")
        with archive.open(names[0]) as file:
            return _decode(file, max_bytes)


def _decode(file: Any, max_bytes: int) -> Scan:
    """Read an array after a check of its header, see numpy.lib.format."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise UserError(f"a header of version {version}; expected 1.0 or 2.0")
    shape, is_fortran, dtype = read_header(file)
    if dtype.kind not in "buif":
        raise UserError(f"an array of {dtype}; expected whole or floating-point numbers")
    check_declared_bytes(max_bytes, *shape, max(4, dtype.itemsize))
    _check_shape(shape)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    values = np.frombuffer(file.read(size), dtype, size // dtype.itemsize)
    pixels = values.reshape(shape, order="F" if is_fortran else "C")
    pixels = pixels.astype(dtype.newbyteorder("=")) if dtype.kind != "b" else np.uint8(pixels)
    pixels = pixels.reshape(*shape[:2], -1)
    is_colour = pixels.shape[-1] == 3 and dtype.itemsize == 1
    return Scan(pixels[None], separate=pixels.shape[-1] > 1 and not is_colour)


def _check_shape(shape: tuple[int, ...]) -> None:
    """Raise UserError unless a shape is (H, W) or (H, W, C) with few channels."""
    channels = (*shape, 1)[2] if len(shape) > 1 else 0
    few = len(shape) == 2 or channels < min(MAX_CHANNELS + 1, *shape[:2])
    if len(shape) not in (2, 3) or not few:
        raise UserError(
            f"an array of {' x '.join(map(str, shape))}; expected height x width, or height x "
            f"width x channels with at most {MAX_CHANNELS} channels (volumes as NIfTI or NRRD)"
        )
