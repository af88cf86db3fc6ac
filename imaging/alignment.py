"""Check that a mask lies where its image lies in the patient."""

import itertools
from dataclasses import replace

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


def place_in(image: Scan, mask: Scan) -> Scan:
    """Put a mask of a part of its image's grid, as 3D Slicer stores it, into the whole grid.

    Any other mask is returned as it is.
    """
    shape, part = image.pixels.shape[:3], mask.pixels.shape[:3]
    if image.affine is None or mask.affine is None or shape == part:
        return mask
    # Indices in the mask → indices in the image.
    steps = np.linalg.inv(image.affine) @ mask.affine
    start = np.round(steps[:3, 3]).astype(int)
    is_one_grid = np.allclose(steps[:3], np.c_[np.eye(3), start], atol=1e-2)
    if not is_one_grid or (start < 0).any() or (start + part > shape).any():
        return mask
    pixels = np.zeros((*shape, mask.pixels.shape[-1]), mask.pixels.dtype)
    pixels[tuple(slice(a, a + b) for a, b in zip(start, part, strict=True))] = mask.pixels
    note = "the mask is a part of its image's grid: what is around it counts as background"
    return replace(mask, pixels=pixels, affine=image.affine, notes=(*mask.notes, note))


def distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Measure how far two affines (4, 4) place the corners of a volume from each other."""
    ends = [(0, side - 1) for side in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)]).T
    return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())
