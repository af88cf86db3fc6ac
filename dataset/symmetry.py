"""Tell whether objects lie alike on both sides of an axis: only then may images be mirrored.

In volumes cut around an organ, front and back define the classes: a mirrored one would teach what
no patient has. In pictures of cells all sides are the same.
"""

from collections.abc import Sequence

import numpy as np

from imaging.grid import resize
from imaging.labels import plane

SMALL_SIZE = 32  # pixels of the small masks that are compared
SYMMETRIC = 0.7  # overlap of the mean mask with its mirror image: nothing tells its sides apart


def small_mask(mask: np.ndarray, classes: int) -> np.ndarray:
    """Stretch a mask (S, H, W) to SMALL_SIZE, slices too: shares (K, 1 or SMALL_SIZE, h, w)."""
    count = SMALL_SIZE if len(mask) > 1 else 1
    places = np.linspace(0, len(mask) - 1, count).round().astype(int)
    planes = []
    for class_id in range(1, classes + 1):
        shares = (plane(mask[place], class_id).astype(np.float32) for place in places)
        planes.append(np.stack([resize(one, (SMALL_SIZE, SMALL_SIZE)) for one in shares]))
    return np.stack(planes)


def alike(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Stack small masks (N, K, d, h, w), of volumes or of slices, whichever are more."""
    flat = [one for one in masks if one.shape[1] == 1]
    deep = [one for one in masks if one.shape[1] > 1]
    return np.array(flat if len(flat) >= len(deep) else deep)


def symmetry(masks: Sequence[np.ndarray], axis: int, partners: Sequence[int] = ()) -> float:
    """Say how symmetric the mean of small masks is: its overlap with its mirror image.

    axis: 0 slices, 1 rows, 2 columns. partners: the class that takes each one's place, such as the
    right lung the left one's. Returns that of the class where it is least; 1 without any object.
    """
    if not len(masks):
        return 1.0
    mean = alike(masks).mean(0)
    partners = list(partners) or range(len(mean))
    found = []
    for one, partner in zip(mean, partners, strict=True):
        mirrored = np.flip(mean[partner], axis)
        if one.any() or mirrored.any():
            found.append(2 * np.minimum(one, mirrored).sum() / (one.sum() + mirrored.sum()))
    return float(min(found, default=1.0))
