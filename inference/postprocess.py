"""Read, prepare, restore and draw one image or mask: the only preprocessing, shared by training, prediction, serving.

Preparing keeps the aspect ratio: an image is scaled to fit the network's input, its intensities are stretched between
two percentiles (so 8-bit, 16-bit, dark and bright files look alike), and the rest of the input is padded with zeros.
"""

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np


def to_ids(probs: np.ndarray, threshold: float) -> np.ndarray:
    """Decide each pixel: probs (..., K) → uint8 class ids (...); one channel by `threshold`, several by the largest."""
    if probs.shape[-1] == 1:
        return (probs[..., 0] >= threshold).astype(np.uint8)
    return np.argmax(probs, axis=-1).astype(np.uint8)


def usual_components(masks: Iterable[np.ndarray]) -> int:
    """Count the connected parts that 95 % of the masks (H, W) do not exceed; at least 1."""
    counts = [cv2.connectedComponents(mask.astype(np.uint8))[0] - 1 for mask in masks]
    return max(1, int(np.quantile(counts, 0.95, method="inverted_cdf")))


def clean_mask(ids: np.ndarray, parts: list[int]) -> np.ndarray:
    """Keep each class's `parts[class - 1]` largest parts in ids (H, W), then fill holes that hold no other class."""
    cleaned = ids.copy()
    for i, count in enumerate(parts, 1):
        found, labels = cv2.connectedComponents((ids == i).astype(np.uint8))
        if found - 1 > count:
            sizes = np.bincount(labels.ravel())[1:]
            cleaned[np.isin(labels, 1 + np.argsort(-sizes, kind="stable")[count:])] = 0
    for i in range(1, len(parts) + 1):
        filled = (cleaned == i).astype(np.uint8)
        outlines, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
        cleaned[(filled > 0) & (cleaned == 0)] = i
    return cleaned


def decide(probs: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """Turn probabilities (H, W, K) into class ids (H, W), cleaned as the model file says."""
    ids = to_ids(probs, metadata["threshold"])
    return clean_mask(ids, metadata["clean"]) if metadata.get("clean") else ids
