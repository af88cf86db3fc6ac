"""Decode DICOM, NIfTI and TIFF stacks, and write masks back in kind. `images.py` comes here for such files.

A NIfTI volume is turned so that its slices are those of the acquisition (across its coarsest axis, else axial) and
stand as radiologists look at them; its mask is turned back. A DICOM series is a folder of files, a slice each.
"""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np

from imaging.scan import Scan, check_declared_bytes
from utils import UserError, atomic, first_line

MAX_HEADER_BYTES = 2**24  # bytes before the voxels of a NIfTI file
GZIP = b"\x1f\x8b"
SLICE_AXES = {
    0: (0, 2, 1),
    1: (1, 2, 0),
    2: (2, 1, 0),
}  # which of x, y, z slices, rows and columns are


# ------------------------------------------------------------------------------------------------------------- NIfTI


def open_nifti(content: bytes) -> Any:
    """Open a NIfTI file, plain or gzipped, its voxels not yet read. Raises UserError."""
    import nibabel

    stream = io.BytesIO(content)
    stream = gzip.GzipFile(fileobj=stream) if content[:2] == GZIP else stream
    try:
        head = stream.read(352)
        header = nibabel.Nifti1Header(head[:348], check=False)
        start = max(352, int(header["vox_offset"]))
        check_declared_bytes(*header.get_data_shape(), max(4, header.get_data_dtype().itemsize))
        if start > MAX_HEADER_BYTES:
            raise UserError(
                f"its voxels start {start} bytes in; expected at most {MAX_HEADER_BYTES}"
            )
        size = (
            start
            + int(np.prod(header.get_data_shape(), dtype=object)) * header.get_data_dtype().itemsize
        )
        # Without its extensions, which nibabel would read whatever size they claim.
        image = nibabel.Nifti1Image.from_bytes(head[:348] + bytes(4) + stream.read(size - 352))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"unreadable as NIfTI ({first_line(error)})") from None
    try:
        shape = image.shape[:3] + tuple(side for side in image.shape[3:] if side > 1)
        placed = np.isfinite(nibabel.orientations.io_orientation(image.affine)).all()
    except Exception as error:
        raise UserError(f"unreadable as NIfTI ({first_line(error)})") from None
    if len(shape) not in (2, 3):
        raise UserError(f"{len(shape)} dimensions, {shape}; expected a volume of three")
    if not placed:
        raise UserError(
            "its affine cannot be inverted; expected one that places voxels in the patient"
        )
    check_declared_bytes(*shape, max(4, image.header.get_data_dtype().itemsize))
    return image


def reorientation(image: Any) -> tuple[int, np.ndarray, np.ndarray]:
    """Choose the slices' axis (0 sagittal, 1 coronal, 2 axial), turns of the array to (left, posterior, z) and back.

    z is up for axial slices; for the others it is down, as then a picture's rows run from head to foot.
    """
    from nibabel import orientations

    now = orientations.io_orientation(image.affine)
    zooms = np.ones(3)
    zooms[now[:, 0].astype(int)] = np.linalg.norm(
        image.affine[:3, :3], axis=0
    )  # in the order x, y, z
    axis = int(np.argmax(zooms)) if zooms.max() > 1.2 * np.median(zooms) else 2
    wanted = orientations.axcodes2ornt(("L", "P", "S" if axis == 2 else "I"))
    return axis, orientations.ornt_transform(now, wanted), orientations.ornt_transform(wanted, now)


def nifti_affine(image: Any) -> np.ndarray:
    """Give the affine of slices, rows and columns (see `decode_nifti`) to RAS in mm."""
    from nibabel import orientations

    axis, turns, _ = reorientation(image)
    affine = image.affine @ orientations.inv_ornt_aff(turns, (*image.shape, 1)[:3])
    return affine[:, [*SLICE_AXES[axis], 3]]


def to_slices(volume: np.ndarray, axis: int) -> np.ndarray:
    """Put a volume (x, y, z) in the order slices, rows, columns."""
    return volume.transpose(SLICE_AXES[axis])


def from_slices(slices: np.ndarray, axis: int) -> np.ndarray:
    """Undo `to_slices`."""
    return slices.transpose(np.argsort(SLICE_AXES[axis]))


def decode_nifti(content: bytes) -> Scan:
    """Decode a NIfTI volume. Raises UserError."""
    from nibabel import orientations

    image = open_nifti(content)
    try:
        voxels = np.asarray(image.dataobj, np.float32).reshape((*image.shape, 1)[:3])
    except Exception as error:
        raise UserError(f"its voxels cannot be read ({first_line(error)})") from None
    axis, turns, _ = reorientation(image)
    slices = to_slices(orientations.apply_orientation(voxels, turns), axis)
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    turned = np.empty(3)
    turned[turns[:, 0].astype(int)] = sizes  # of x, y, z
    spacing = tuple(float(turned[i]) for i in SLICE_AXES[axis])
    return Scan(slices[..., None], spacing)


def write_nifti(path: Path, ids: np.ndarray, source: bytes) -> None:
    """Write a mask (S, H, W), uint8 or uint16, of `decode_nifti`'s slices with the affines and shape of its file."""
    import nibabel
    from nibabel import orientations

    image = open_nifti(source)
    axis, _, back = reorientation(image)
    voxels = orientations.apply_orientation(from_slices(ids, axis), back).reshape(image.shape)
    header = image.header.copy()  # both of its affines are kept
    header.set_data_dtype(ids.dtype)
    header.set_slope_inter(1, 0)
    mask = nibabel.Nifti1Image(voxels, image.affine, header)
    with atomic(path) as temporary:
        temporary.write_bytes(
            gzip.compress(mask.to_bytes()) if path.name.endswith(".gz") else mask.to_bytes()
        )
