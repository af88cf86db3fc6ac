"""Masks of one class with soft edges: cut at half."""

import cv2
import numpy as np

from imaging.masks.mask_advice import MAX_SUGGESTED_CLASSES

# Levels by which JPEG's rounding changes a value.
GREY_TOLERANCE = 2
# Values within this share of the range from 0 or the largest value are that value, blurred.
END = 0.125
# The largest share of blurred pixels that may lie away from an edge.
STRAY = 0.05
# JPEG's blocks have so many pixels a side.
BLOCK = 8


def cut_soft_edges(values: np.ndarray, found: set[int]) -> tuple[np.ndarray, int] | None:
    """Cut a mask with soft edges at half: the pixels inside, and how many are between.

    Returns None if the values between are elsewhere than at the edges: then they mean something.
    """
    highest = int(values.max())
    full = 255 if highest <= 255 else 65535
    if not full / 2 < highest <= full or values.min() < 0:
        return None
    inside = values > full / 2
    blurred = (values > 0) & (values < full)
    between = (values > END * full) & (values < (1 - END) * full)
    rounding = GREY_TOLERANCE * full // 255
    ringing = (values > rounding) & (values < full - rounding) & ~between
    reach = max(BLOCK, min(inside.shape[1:]) // 50)
    if _strays(between, inside, reach) or _strays(ringing, inside, 2 * reach):
        return None
    flat = np.stack([_is_flat(one) for one in values])
    if np.count_nonzero(between & flat) > STRAY * np.count_nonzero(between):
        return None
    if len(found) <= MAX_SUGGESTED_CLASSES and (blurred & flat).any():
        return None
    return inside, int(np.count_nonzero(blurred))


def _strays(blurred: np.ndarray, inside: np.ndarray, reach: int) -> bool:
    """Say whether many blurred pixels (S, H, W) are further than `reach` from an edge."""
    if not blurred.any():
        return False
    near = np.stack([_near_edge(one, reach) for one in inside])
    return np.count_nonzero(blurred & ~near) > STRAY * np.count_nonzero(blurred)


def _is_flat(values: np.ndarray) -> np.ndarray:
    """Say which pixels of a plane (H, W) have the value of all their neighbours."""
    kernel = np.ones((3, 3), np.uint8)
    values = values.astype(np.float32)
    return cv2.dilate(values, kernel) == cv2.erode(values, kernel)


def _near_edge(inside: np.ndarray, reach: int) -> np.ndarray:
    """Say which pixels of a plane (H, W) lie within `reach` pixels of its edge."""
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    plane = inside.astype(np.uint8)
    return cv2.dilate(plane, kernel) > cv2.erode(plane, kernel)
