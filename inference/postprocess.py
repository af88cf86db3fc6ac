"""Turn probabilities into a mask: class ids, cleaned of small components and holes."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from imaging.labels import BITS, Classes, add_class, join_planes, plane, remove_class
from imaging.lazy import LARGE_SLICE
from inference.components import Components


def to_ids(
    probs: np.ndarray, threshold: float | Sequence[float], overlap: bool = False
) -> np.ndarray:
    """Decide each pixel: probabilities (..., K) → a mask (...), uint8 class ids.

    One channel is compared with `threshold`. Of several the largest wins, the background is the
    first. With a list of thresholds, one for each class, the largest wins of the classes that reach
    theirs; where none does there is background. With `overlap` each
    class is compared with its own, and the mask is of BITS.
    """
    if overlap:
        limits = np.broadcast_to(threshold, probs.shape[-1:])
        return join_planes((probs[..., k] >= limits[k] for k in range(len(limits))), BITS)
    if probs.shape[-1] == 1:
        return (probs[..., 0] >= np.ravel(threshold)[0]).astype(np.uint8)
    if np.ndim(threshold) == 0:
        return np.argmax(probs, axis=-1).astype(np.uint8)
    classes = np.where(probs[..., 1:] >= np.asarray(threshold), probs[..., 1:], -1.0)
    return np.where(classes.max(-1) < 0, 0, 1 + np.argmax(classes, axis=-1)).astype(np.uint8)


def count_components(mask: np.ndarray) -> int:
    """Count the connected components of a mask (H, W) or (S, H, W) of bool."""
    if mask.ndim == 2:
        return cv2.connectedComponents(mask.astype(np.uint8))[0] - 1
    from scipy import ndimage

    return ndimage.label(mask)[1]


def usual_count(counts: Sequence[int]) -> int:
    """Return the number of components that 95 % of the masks do not exceed; at least 1."""
    return max(1, int(np.quantile(counts, 0.95, method="inverted_cdf")))


def clean_mask(ids: np.ndarray, components: list[int]) -> np.ndarray:
    """Keep each class's largest connected components in a mask (H, W), then fill holes.

    components: how many, for each class. A hole that holds another class stays, unless classes
    overlap.
    """
    if ids.dtype == BITS:
        planes = [plane(ids, i).astype(np.uint8) for i in range(1, len(components) + 1)]
        cleaned = [clean_mask(one, [n]) > 0 for one, n in zip(planes, components, strict=True)]
        return join_planes(cleaned, BITS)
    if all(_is_clean(ids == class_id, count) for class_id, count in enumerate(components, 1)):
        return ids
    cleaned = ids.copy()
    for class_id, count in enumerate(components, 1):
        num_labels, labels = cv2.connectedComponents((ids == class_id).astype(np.uint8))
        if num_labels - 1 > count:
            sizes = np.bincount(labels.ravel())[1:]
            small = 1 + np.argsort(-sizes, kind="stable")[count:]
            cleaned[np.isin(labels, small)] = 0
    for class_id in range(1, len(components) + 1):
        filled = (cleaned == class_id).astype(np.uint8)
        outlines, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
        cleaned[(filled > 0) & (cleaned == 0)] = class_id
    return cleaned


def _is_clean(mask: np.ndarray, count: int) -> bool:
    """Say whether a mask (H, W) of bool has no holes and at most `count` components.

    Most masks are so, and asking takes less than half of the time of cleaning them.
    """
    _, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if tree is None:  # an empty mask
        return True
    is_outline = tree[0, :, 3] < 0  # others run around holes
    return is_outline.all() and len(is_outline) <= count


def clean(ids: np.ndarray, components: list[int], is_volume: bool = False) -> None:
    """Clean a mask (S, H, W) in place, slice by slice or as a volume."""
    if is_volume:
        clean_bands(ids, components, corners=False)
        return
    for number, one in enumerate(ids):
        if one.size <= LARGE_SLICE:
            one[...] = clean_mask(one, components)
        else:
            clean_bands(ids[number : number + 1], components, corners=True)


def clean_bands(cleaned: np.ndarray, components: list[int], corners: bool) -> None:
    """Clean a mask (S, H, W) in place as `clean_mask` does, without labels of all of it.

    corners: whether components touch at corners, not at faces alone.
    """
    shape = cleaned.shape
    for class_id, count in enumerate(components, 1):
        found = Components(lambda band, i=class_id: plane(cleaned[band], i), shape, corners)
        if len(found) > count:
            is_small = np.zeros(1 + len(found), bool)
            is_small[1 + np.argsort(-found.sizes, kind="stable")[count:]] = True
            for band, labels in found:
                remove_class(cleaned[band], class_id, is_small[labels])
    for class_id in range(1, len(components) + 1):
        around = Components(lambda band, i=class_id: ~plane(cleaned[band], i), shape)
        is_hole = np.concatenate([[False], ~around.at_border])
        for band, labels in around if is_hole.any() else ():
            part = cleaned[band]
            filled = is_hole[labels]
            add_class(part, class_id, filled if part.dtype == BITS else filled & (part == 0))


def decide(probs: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """Turn probabilities (H, W, K) into a mask (H, W), cleaned as the model file says."""
    ids = to_ids(probs, metadata["threshold"], Classes.from_metadata(metadata).overlap)
    return clean_mask(ids, metadata["clean"]) if metadata.get("clean") else ids
