"""How a volume's voxels become slices as radiologists look at them, and back.

Slices are those of the acquisition: across the coarsest axis, else axial. All volume formats share
this, so that an image and its mask lie alike whatever files they are.
"""

from typing import Any

import numpy as np

from imaging.scan import Scan
from utils import UserError

# More than these are time points, not measurements of one place.
MAX_CHANNELS = 16
# Slice axis (0 sagittal, 1 coronal, 2 axial) → which of x, y, z are slices, rows and columns.
SLICE_AXES = {0: (0, 2, 1), 1: (1, 2, 0), 2: (2, 1, 0)}


def to_slices(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn voxels (x, y, z, C) into pixels (S, H, W, C).

    affine: of x, y, z to RAS in mm. Returns also the one of slice, row and column.
    """
    from nibabel import orientations

    axis, turns, _ = _reorientation(affine, voxels.shape[:3])
    volume = orientations.apply_orientation(voxels, turns)
    return volume.transpose(*SLICE_AXES[axis], 3), slice_affine(affine, voxels.shape[:3])


def slice_affine(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Turn the affine of voxels x, y, z into the one of slice, row and column, see `to_slices`."""
    from nibabel import orientations

    axis, turns, _ = _reorientation(affine, shape)
    turned = affine @ orientations.inv_ornt_aff(turns, shape)
    return turned[:, [*SLICE_AXES[axis], 3]]


def to_voxels(slices: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Undo `to_slices` for slices (S, H, W): voxels (x, y, z) of `shape` and `affine`."""
    from nibabel import orientations

    axis, _, turns_back = _reorientation(affine, shape)
    volume = slices.transpose(np.argsort(SLICE_AXES[axis]))
    return orientations.apply_orientation(volume, turns_back).reshape(shape)


def plain_voxels(slices: np.ndarray, image: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Turn slices (S, H, W) of any image into voxels (x, y, z) and their affine to RAS in mm.

    x runs along the rows, z across the slices. Without an affine, slices are taken as axial.
    """
    affine = image.affine
    if affine is None:
        depth, height, width = image.spacing_mm or (1.0, 1.0, 1.0)
        affine = np.diag([-width, -height, depth, 1.0])
    else:
        affine = affine[:, [2, 1, 0, 3]]
    return slices.transpose(2, 1, 0), affine


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Give the lengths of an affine's three axes."""
    return tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())


def check_affine(affine: np.ndarray) -> None:
    """Raise UserError unless an affine can be inverted."""
    from nibabel import orientations

    if not np.isfinite(affine).all() or not np.isfinite(orientations.io_orientation(affine)).all():
        raise UserError(
            "its affine cannot be inverted; expected one that places voxels in the patient"
        )


def check_channels(count: int) -> None:
    """Raise UserError for more volumes in a file than an image has channels."""
    if count > MAX_CHANNELS:
        raise UserError(
            f"{count} volumes, probably time points; expected one, or at most {MAX_CHANNELS} "
            "channels: save the volumes to be segmented as files of their own"
        )


def _reorientation(
    affine: np.ndarray, shape: tuple[int, ...]
) -> tuple[int, np.ndarray, np.ndarray]:
    """Choose the slice axis (0 sagittal, 1 coronal, 2 axial) and how the array is turned.

    Returns also nibabel's orientations from the file's axes to (left, posterior, z) and back. z is
    up for axial slices. For the others it is down, so that the rows run from head to foot.
    """
    from nibabel import orientations

    stored = orientations.io_orientation(affine)
    places = stored[:, 0].astype(int)
    spacing_xyz = np.ones(3)
    spacing_xyz[places] = np.linalg.norm(affine[:3, :3], axis=0)
    axis = 2
    if shape[2] == 1 and min(shape[:2]) > 1:
        # A single slice is a slice, whatever its thickness.
        axis = int(places[2])
    elif spacing_xyz.max() > 1.2 * np.median(spacing_xyz):
        axis = int(np.argmax(spacing_xyz))
    shown: Any = orientations.axcodes2ornt(("L", "P", "S" if axis == 2 else "I"))
    there = orientations.ornt_transform(stored, shown)
    return axis, there, orientations.ornt_transform(shown, stored)
