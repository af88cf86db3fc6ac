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
    distance_mm = distance(image.affine, mask.affine, mask.pixels.shape[:3])
    pixel_mm = np.linalg.norm(image.affine[:3, :3], axis=0).min()
    if distance_mm > 0.5 * pixel_mm:
        raise UserError(
            f"its affine places it up to {distance_mm:.3g} mm away from its image; "
            "expected the same place"
        )


def distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Measure how far two affines (4, 4) place the corners of a volume from each other."""
    ends = [(0, side - 1) for side in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)]).T
    return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())
