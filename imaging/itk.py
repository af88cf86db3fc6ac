"""What NRRD and MetaImage share: voxels behind a header of text, and their place in the patient.

Both place voxels in left-posterior-superior coordinates; ours are right-anterior-superior.
"""

import bz2
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imaging import volumes
from imaging.scan import Scan, check_declared_bytes
from utils import UserError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Longest header.
MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True)
class Grid:
    """Where an image's voxels lie; a mask is written on the same grid."""

    # x, y and perhaps z.
    shape: tuple[int, ...]
    # (4, 4): x, y, z to RAS in mm.
    affine: np.ndarray
    # Unit of the header's lengths, as it is written there, and in mm.
    unit: str = ""
    unit_mm: float = 1.0


@dataclass(frozen=True)
class Header:
    """What a header says of its voxels."""

    dtype: np.dtype
    # Of all axes, the fastest first.
    sizes: tuple[int, ...]
    grid: Grid
    # Which axis holds the channels.
    channel_axis: int | None = None
    # raw, gzip, bzip2 or text.
    encoding: str = "raw"
    # Bytes before the voxels; -1 if they are the last of the file.
    skip: int = 0
    # Red, green and blue, with a fourth channel also alpha.
    is_colour: bool = False


def number_list(text: str, count: int, what: str) -> list[float]:
    """Read `count` finite numbers. Raises UserError."""
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise UserError(f"its {what} is {text[:60]!r}; expected {count} numbers")
    return numbers


def read_sizes(text: str, dimensions: int) -> tuple[int, ...]:
    """Read the lengths of all axes. Raises UserError."""
    sizes = [int(size) for size in number_list(text, dimensions, "size")]
    if min(sizes) < 1:
        raise UserError(f"its size is {text[:60]!r}; expected numbers above 0")
    return tuple(sizes)


def affine_of(directions: Sequence[np.ndarray], origin: Sequence[float]) -> np.ndarray:
    """Make an affine (4, 4) of the steps along 2 or 3 axes, and the first voxel's place.

    A picture gets slices of 1 mm. Raises UserError for an affine that cannot be inverted.
    """
    affine = np.eye(4)
    for axis, step in enumerate(directions):
        affine[: len(step), axis] = step
    affine[: len(origin), 3] = origin
    if len(directions) == 2 and len(directions[0]) == 3:
        normal = np.cross(*directions)
        affine[:3, 2] = normal / (np.linalg.norm(normal) or 1.0)
    volumes.check_affine(affine)
    return affine


def decode(header: Header, data: bytes, max_bytes: int) -> Scan:
    """Decode the voxels that follow a header. Raises UserError, or ValueError if some lack."""
    check_declared_bytes(max_bytes, *header.sizes, max(4, header.dtype.itemsize))
    count = int(np.prod(header.sizes, dtype=object))
    voxels = _unpack(header, data, count).reshape(header.sizes, order="F")
    if header.channel_axis is None:
        voxels = voxels[..., None]
    else:
        voxels = np.moveaxis(voxels, header.channel_axis, -1)
    if len(header.grid.shape) == 2:
        voxels = voxels[:, :, None]
    channels = voxels.shape[-1]
    volumes.check_channels(channels)
    pixels, affine = volumes.to_slices(voxels, header.grid.affine)
    return Scan(
        pixels,
        volumes.spacing_of(affine),
        affine=affine,
        header=header.grid,
        has_alpha=header.is_colour and channels == 4,
        separate=not header.is_colour and channels > 1,
    )


def place_of(slices: np.ndarray, image: Scan) -> tuple[np.ndarray, np.ndarray, Grid]:
    """Turn slices (S, H, W) of an image back: voxels as they are stored, affine to LPS, grid.

    The affine is in the units of the image's header.
    """
    grid = image.header
    if isinstance(grid, Grid):
        shape = (*grid.shape, 1)[:3]
        voxels = volumes.to_voxels(slices, grid.affine, shape).reshape(grid.shape)
    else:
        voxels, affine = volumes.plain_voxels(slices, image)
        grid = Grid(voxels.shape, affine)
    scale = np.diag([1 / grid.unit_mm] * 3 + [1.0])
    return voxels, scale @ LPS_TO_RAS @ grid.affine, grid


def _unpack(header: Header, data: bytes, count: int) -> np.ndarray:
    """Unpack `count` values in the order of this computer, no more."""
    if header.encoding == "text":
        # A number takes at most some 30 letters.
        words = data[: 32 * count].split()[:count]
        return np.array(words, float).astype(header.dtype)
    size = count * header.dtype.itemsize
    start = max(0, header.skip)
    if header.encoding == "gzip":
        # zlib's or gzip's own header.
        data = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data[start:], size)
    elif header.encoding == "bzip2":
        data = bz2.BZ2Decompressor().decompress(data[start:], size)
    else:
        data = data[-size:] if header.skip < 0 else data[start : start + size]
    values = np.frombuffer(data, header.dtype, count)
    return values.astype(header.dtype.newbyteorder("="))
