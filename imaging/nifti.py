"""NIfTI volumes (versions 1 and 2, one file or .hdr and .img) and Analyze, read with nibabel."""

import gzip
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from imaging import partners, volumes
from imaging.alignment import distance
from imaging.scan import Mask, Scan, check_declared_bytes
from utils import UserError, first_line

GZIP = b"\x1f\x8b"
# Plain, gzipped; NIfTI-2; headers of two-file volumes and of Analyze, which has only its size.
MAGIC = (
    (344, b"n+1\0"),
    (0, GZIP),
    (4, b"n+2\0"),
    (344, b"ni1\0"),
    (4, b"ni2\0"),
    (0, b"\x5c\1\0\0"),
    (0, b"\0\0\1\x5c"),
)
HEADER_BYTES = {1: 348, 2: 540}
# Four bytes after the header say whether extensions follow.
EXTENDER = bytes(4)
# Largest header with its extensions.
MAX_HEADER_BYTES = 2**24
# Voxels that are read at once.
PIECE = 2**22
MM_PER_UNIT = {"meter": 1e3, "micron": 1e-3}
# A quaternion may be longer than 1 by this: tools round it.
QUATERNION_TOLERANCE = 1e-4
# Datatypes of colours: their number in the header → samples.
COLOURS = {128: 3, 2304: 4}


def decode_nifti(content: bytes, max_bytes: int) -> Scan:
    """Decode a NIfTI volume, plain or gzipped. A fourth dimension is the channels.

    Raises UserError.
    """
    header, voxels = _read(_open(content), max_bytes)
    return _to_scan(header, voxels, *_place(header))


def open_nifti(path: Path, max_bytes: int) -> Scan:
    """Read a file of header and voxels as `decode_nifti` does, piece by piece. Raises UserError."""
    with path.open("rb") as file:
        is_zipped = file.read(len(GZIP)) == GZIP
        file.seek(0)
        header, voxels = _read(gzip.GzipFile(fileobj=file) if is_zipped else file, max_bytes)
    return _to_scan(header, voxels, *_place(header))


def decode_mask(content: bytes, max_bytes: int, image: Scan | None) -> Scan:
    """Decode a mask. One that has only the image's qform, on the same grid, lies as the image."""
    header, voxels = _read(_open(content), max_bytes, keep_integers=True)
    affine, notes = _place(header)
    place = getattr(image, "header", None)
    if hasattr(place, "get_qform") and place["sform_code"] > 0 and place["qform_code"] > 0:
        same_grid = _volume_shape(place) == voxels.shape[:3]
        qform = _in_mm(place, place.get_qform())
        if same_grid and distance(affine, qform, voxels.shape[:3]) < 0.5 * min(
            volumes.spacing_of(qform)
        ):
            affine = _place(place)[0]
    return _to_scan(header, voxels, affine, notes)


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask as gzipped NIfTI with the shape, both affines and the units of its image."""
    return encode(mask.values, image)


def encode(slices: np.ndarray, image: Scan) -> bytes:
    """Encode values (S, H, W) as gzipped NIfTI that lies where the image lies."""
    if not hasattr(image.header, "get_qform"):
        return _encode_plain(slices, image)
    # Only a copy may change: the scan keeps its own.
    header = image.header.copy()
    shape = _volume_shape(header)
    voxels = volumes.to_voxels(slices, _place(header)[0], shape)
    # (x, y, z, 1) stays so.
    if np.prod(header.get_data_shape()) == voxels.size:
        shape = header.get_data_shape()
    header.set_data_shape(shape)
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    # The image's grey levels to show are none of a mask.
    header["cal_min"] = header["cal_max"] = 0
    kind = header.get_data_dtype()
    return _zip(header, (voxels[..., z].astype(kind) for z in range(voxels.shape[2])))


def join(content: bytes, path: Path, max_bytes: int) -> bytes:
    """Make one NIfTI of a .hdr and the .img beside it. Another content stays as it is."""
    head = _open(content).read(HEADER_BYTES[2])
    if _is_whole(head) or _version(head) is None:
        return content
    header = _parse(head)
    _check_size(header, max_bytes)
    start = max(0, int(header["vox_offset"]))
    voxels = partners.read_beside(path, ".img", start + _voxel_bytes(header))
    return _head(header) + voxels[start:]


def read_affine(content: bytes) -> np.ndarray:
    """Read a volume's affine of slice, row and column to RAS in mm by its header.

    Raises UserError.
    """
    header = _parse(_open(content).read(HEADER_BYTES[2]))
    return volumes.slice_affine(_place(header)[0], _volume_shape(header))


def count_channels(content: bytes) -> int:
    """Count a volume's channels by its header. Raises UserError."""
    try:
        header = _parse(_open(content).read(HEADER_BYTES[2]))
        samples = COLOURS.get(int(header["datatype"]))
        return min(3, samples) if samples else max(1, *header.get_data_shape()[3:], 1)
    except UserError:
        raise
    except Exception as error:
        # A damaged file causes errors of many kinds.
        raise UserError(f"unreadable as NIfTI ({first_line(error)})") from None


# -------------------------------------------------------------------------------------- headers


def _open(content: bytes) -> Any:
    """Open a content as a stream, unpacked."""
    stream = io.BytesIO(content)
    return gzip.GzipFile(fileobj=stream) if content.startswith(GZIP) else stream


def _version(head: bytes) -> int | None:
    """Tell NIfTI-1 (and Analyze) from NIfTI-2 by the size that a header begins with."""
    for version, size in HEADER_BYTES.items():
        if head[:4] in (size.to_bytes(4, "little"), size.to_bytes(4, "big")):
            return version
    return None


def _is_whole(head: bytes) -> bool:
    """Say whether a header is followed by its voxels, not beside them in an .img."""
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def _parse(head: bytes) -> Any:
    """Read a header: nibabel's NIfTI-1 or NIfTI-2. Raises UserError."""
    from nibabel import AnalyzeHeader, Nifti1Header, Nifti2Header

    version = _version(head)
    if version is None:
        raise UserError("its first bytes are not those of a NIfTI header")
    kind = Nifti1Header if version == 1 else Nifti2Header
    head = head[: HEADER_BYTES[version]]
    if version == 1 and head[344:348] not in (b"n+1\0", b"ni1\0"):
        return kind.from_header(AnalyzeHeader(head, check=False), check=False)
    header = kind(head, check=False)
    _shorten_quaternion(header)
    return header


def _shorten_quaternion(header: Any) -> None:
    """Make a quaternion 1 long that rounding has made a little longer."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = float(np.linalg.norm([header[name] for name in names]))
    if 1 < length < 1 + QUATERNION_TOLERANCE:
        for name in names:
            header[name] /= length


def _head(header: Any) -> bytes:
    """Give a header's bytes as those of a file whose voxels follow."""
    header = header.copy()
    is_first = header.sizeof_hdr == HEADER_BYTES[1]
    header["magic"] = b"n+1" if is_first else b"n+2"
    header["vox_offset"] = header.sizeof_hdr + len(EXTENDER)
    return header.binaryblock + EXTENDER


def _voxel_bytes(header: Any) -> int:
    count = np.prod(header.get_data_shape(), dtype=object)
    return int(count) * header.get_data_dtype().itemsize


def _volume_shape(header: Any) -> tuple[int, ...]:
    """Give the shape (x, y, z). Axes that are missing have length 1."""
    return (*header.get_data_shape(), 1, 1)[:3]


def _check_size(header: Any, max_bytes: int) -> None:
    """Raise UserError for a shape that no volume has, or more than `max_bytes`."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    # Voxels become float32.
    check_declared_bytes(max_bytes, *shape, max(4, dtype.itemsize))
    more = [side for side in shape[3:] if side > 1]
    if len(shape) < 2 or min(shape) < 1 or len(more) > 1:
        raise UserError(f"dimensions {shape}; expected x, y, z, and perhaps channels")
    volumes.check_channels(*more or [1])
    if dtype.kind == "c":
        raise UserError("complex numbers; expected their magnitude")


def _place(header: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Give the affine of x, y, z to RAS in mm, and notes. Raises UserError."""
    affine = _in_mm(header, header.get_best_affine())
    volumes.check_affine(affine)
    if not (header["sform_code"] > 0 and header["qform_code"] > 0):
        return affine, ()
    apart = distance(affine, _in_mm(header, header.get_qform()), _volume_shape(header))
    if not apart > 0.5 * min(volumes.spacing_of(affine)):
        return affine, ()
    return affine, (f"sform and qform differ by up to {apart:.3g} mm: the sform is used",)


def _in_mm(header: Any, affine: np.ndarray) -> np.ndarray:
    try:
        unit = header.get_xyzt_units()[0]
    except KeyError:
        unit = "unknown"
    scale = MM_PER_UNIT.get(unit, 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ affine


# --------------------------------------------------------------------------------------- voxels


def _read(stream: BinaryIO, max_bytes: int, keep_integers: bool = False) -> tuple[Any, np.ndarray]:
    """Read a file: its header, and its voxels (x, y, z, C), float32. Raises UserError.

    keep_integers: float32 would round the ids of large atlases, so integers stay what they are.
    """
    head = stream.read(HEADER_BYTES[2])
    header = _parse(head)
    if not _is_whole(head):
        raise UserError("a header without voxels; expected one file, such as .nii")
    _check_size(header, max_bytes)
    start = max(header.sizeof_hdr + len(EXTENDER), int(header["vox_offset"]))
    if start > MAX_HEADER_BYTES:
        raise UserError(f"its voxels start at byte {start}; expected at most {MAX_HEADER_BYTES}")
    stream.seek(start)
    shape = _volume_shape(header)
    if samples := COLOURS.get(int(header["datatype"])):
        colours = np.frombuffer(_read_whole(stream, _voxel_bytes(header)), np.uint8)
        return header, np.moveaxis(colours.reshape(samples, *shape, order="F"), 0, -1)
    stored = header.get_data_dtype()
    is_scaled = header.get_slope_inter() not in ((None, None), (1, 0))
    is_exact = keep_integers and stored.kind in "iu" and not is_scaled
    dtype = stored.newbyteorder("=") if is_exact else np.float32
    voxels = np.empty(int(np.prod(header.get_data_shape())), dtype)
    for first in range(0, len(voxels), PIECE):
        piece = voxels[first : first + PIECE]
        stored = _read_whole(stream, len(piece) * header.get_data_dtype().itemsize)
        piece[:] = _rescaled(stored, header)
    return header, voxels.reshape(*shape, -1, order="F")


def _read_whole(stream: BinaryIO, count: int) -> bytes:
    """Read so many bytes. Raises UserError if there are fewer."""
    content = stream.read(count)
    if len(content) < count:
        raise UserError("unreadable or truncated: fewer voxels than its header declares")
    return content


def _rescaled(stored: bytes, header: Any) -> np.ndarray:
    """Turn stored voxels into the levels that they stand for, as nibabel does."""
    from nibabel.volumeutils import apply_read_scaling

    values = np.frombuffer(stored, header.get_data_dtype())
    slope, intercept = header.get_slope_inter()
    if slope is None:
        return values
    return apply_read_scaling(values, np.float64(slope), np.float64(intercept))


def _to_scan(header: Any, voxels: np.ndarray, affine: np.ndarray, notes: tuple[str, ...]) -> Scan:
    pixels, slice_affine = volumes.to_slices(voxels, affine)
    samples = COLOURS.get(int(header["datatype"]))
    return Scan(
        pixels,
        volumes.spacing_of(slice_affine),
        affine=slice_affine,
        header=header,
        has_alpha=samples == 4,
        separate=samples is None and voxels.shape[-1] > 1,
        notes=notes,
    )


def _zip(header: Any, slices: Iterable[np.ndarray]) -> bytes:
    """Pack a header and slices (x, y) slice by slice, the same bytes at any time."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(_head(header))
        for one in slices:
            file.write(one.tobytes(order="F"))
    return buffer.getvalue()


def _encode_plain(slices: np.ndarray, image: Scan) -> bytes:
    """Encode slices of an image that is no NIfTI."""
    import nibabel

    voxels, affine = volumes.plain_voxels(slices, image)
    made = nibabel.Nifti1Image(voxels, affine)
    made.set_sform(affine, 1)
    made.set_qform(affine, 1)
    if image.spacing_mm:
        made.header.set_xyzt_units("mm")
    made.header.set_slope_inter(1, 0)
    return _zip(made.header, (voxels[..., z] for z in range(voxels.shape[2])))
