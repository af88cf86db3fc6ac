"""Check that a mask lies where its image lies in the patient."""

import itertools

import numpy as np

from imaging.scan import Scan
from utils import UserError


def check_alignment(image: Scan, mask: Scan) -> None:
    """Raise UserError if the affines place image and mask, of one shape, elsewhere in the patient.

    Half a pixel is allowed. Scans without an affine are not compared.
    """
    if image.affine is None or mask.affine is None:
        return
    corners = _corners(mask.pixels.shape[:3])
    offsets = ((image.affine - mask.affine) @ corners)[:3]
    distance_mm = np.linalg.norm(offsets, axis=0).max()
    pixel_mm = np.linalg.norm(image.affine[:3, :3], axis=0).min()
    if distance_mm > 0.5 * pixel_mm:
        raise UserError(
            f"its affine places it up to {distance_mm:.3g} mm away from its image; "
            "expected the same place"
        )


def _corners(shape: tuple[int, int, int]) -> np.ndarray:
    """List the eight corner voxels of a volume as homogeneous coordinates (4, 8)."""
    ends = [(0, side - 1) for side in shape]
    return np.array([(*corner, 1) for corner in itertools.product(*ends)]).T
