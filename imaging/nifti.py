"""NIfTI volumes, read and written by nibabel.

A volume is turned so that its slices are those of the acquisition: across its coarsest axis, else
axial. They stand as radiologists look at them. A mask is turned back when it is written.
"""

import gzip
import io
from typing import Any

import numpy as np

from imaging.scan import Mask, Scan, check_declared_bytes
from utils import UserError

GZIP = b"\x1f\x8b"
# Plain, gzipped.
MAGIC = ((344, b"n+1\0"), (0, GZIP))
HEADER_BYTES = 348
# Four bytes after the header say whether extensions follow.
FIRST_VOXEL = 352
# Largest header with its extensions.
MAX_HEADER_BYTES = 2**24
# Slice axis (0 sagittal, 1 coronal, 2 axial) → which of x, y, z are slices, rows and columns.
SLICE_AXES = {0: (0, 2, 1), 1: (1, 2, 0), 2: (2, 1, 0)}


def decode_nifti(content: bytes, max_bytes: int) -> Scan:
    """Decode a NIfTI volume, plain or gzipped."""
    from nibabel import orientations

    image = _open_nifti(content, max_bytes)
    voxels = np.asarray(image.dataobj, np.float32).reshape(_volume_shape(image.header))
    axis, turns, _ = _reorientation(image.affine)
    volume = orientations.apply_orientation(voxels, turns)
    affine = _slice_affine(image.header)
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    pixels = volume.transpose(SLICE_AXES[axis])[..., None]
    return Scan(pixels, spacing, affine=affine, header=image.header)


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask as gzipped NIfTI with the shape and both affines of its image."""
    import nibabel
    from nibabel import orientations

    # Only a copy may change: the scan keeps its own.
    header = image.header.copy()
    affine = header.get_best_affine()
    axis, _, turns_back = _reorientation(affine)
    volume = mask.values.transpose(np.argsort(SLICE_AXES[axis]))
    voxels = orientations.apply_orientation(volume, turns_back).reshape(header.get_data_shape())
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    return gzip.compress(nibabel.Nifti1Image(voxels, affine, header).to_bytes())


def _open_nifti(content: bytes, max_bytes: int) -> Any:
    """Open a NIfTI file; its voxels are not yet converted.

    Raises UserError for a shape or an affine that no volume has.
    """
    import nibabel

    stream = io.BytesIO(content)
    if content.startswith(GZIP):
        stream = gzip.GzipFile(fileobj=stream)
    head = stream.read(FIRST_VOXEL)
    end = _end_of_voxels(nibabel.Nifti1Header(head[:HEADER_BYTES], check=False), max_bytes)
    # nibabel reads extensions of any size that they declare. Zeros here say that none follow.
    head = head[:HEADER_BYTES] + bytes(FIRST_VOXEL - HEADER_BYTES)
    image = nibabel.Nifti1Image.from_bytes(head + stream.read(end - FIRST_VOXEL))
    _check_geometry(image)
    return image


def _end_of_voxels(header: Any, max_bytes: int) -> int:
    """Compute where the voxels end, in bytes. Raises UserError if the header declares too much."""
    shape, itemsize = header.get_data_shape(), header.get_data_dtype().itemsize
    # Voxels become float32.
    check_declared_bytes(max_bytes, *shape, max(4, itemsize))
    start = max(FIRST_VOXEL, int(header["vox_offset"]))
    if start > MAX_HEADER_BYTES:
        raise UserError(f"its voxels start at byte {start}; expected at most {MAX_HEADER_BYTES}")
    return start + int(np.prod(shape, dtype=object)) * itemsize


def _check_geometry(image: Any) -> None:
    """Raise UserError unless the image is one volume whose affine can be inverted."""
    from nibabel import orientations

    shape = image.shape[:3] + tuple(side for side in image.shape[3:] if side > 1)
    if len(shape) not in (2, 3):
        raise UserError(f"{len(shape)} dimensions, {shape}; expected a volume of three")
    if not np.isfinite(orientations.io_orientation(image.affine)).all():
        raise UserError(
            "its affine cannot be inverted; expected one that places voxels in the patient"
        )


def _volume_shape(header: Any) -> tuple[int, ...]:
    """Give the shape (x, y, z). Axes that are missing or follow have length 1."""
    return (*header.get_data_shape(), 1)[:3]


def _reorientation(affine: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Choose the slice axis (0 sagittal, 1 coronal, 2 axial) and how the array is turned.

    Returns also nibabel's orientations from the file's axes to (left, posterior, z) and back. z is
    up for axial slices. For the others it is down, so that the rows run from head to foot.
    """
    from nibabel import orientations

    stored = orientations.io_orientation(affine)
    spacing_xyz = np.ones(3)
    spacing_xyz[stored[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    axis = 2
    if spacing_xyz.max() > 1.2 * np.median(spacing_xyz):
        axis = int(np.argmax(spacing_xyz))
    shown = orientations.axcodes2ornt(("L", "P", "S" if axis == 2 else "I"))
    there = orientations.ornt_transform(stored, shown)
    return axis, there, orientations.ornt_transform(shown, stored)


def _slice_affine(header: Any) -> np.ndarray:
    """Give the affine (4, 4) of `decode_nifti`'s slices, rows and columns to RAS in mm."""
    from nibabel import orientations

    affine = header.get_best_affine()
    axis, turns, _ = _reorientation(affine)
    turned = affine @ orientations.inv_ornt_aff(turns, _volume_shape(header))
    return turned[:, [*SLICE_AXES[axis], 3]]
