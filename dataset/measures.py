"""Describe a pair of image and mask as stored: what is cheap enough to be done at every reading."""

from typing import Any

import numpy as np

from dataset.channels import in_colour
from imaging.labels import Classes, plane
from imaging.scan import Scan

SAMPLE = 100_000  # pixels of which quantiles are taken


def describe_pair(scan: Scan, mask: np.ndarray, classes: Classes) -> dict[str, Any]:
    """Collect what `data.py check` reports on a pair: a row of `Dataset.info`, as JSON takes it.

    mask: (S, H, W), ids or BITS.
    """
    pixels = scan.colours
    info = {
        "size": f"{pixels.shape[1]}x{pixels.shape[2]}",
        "slices": len(pixels),
        "bits": 8 * pixels.dtype.itemsize,
        "channels": pixels.shape[-1],
        "in_colour": in_colour(_sample(pixels.reshape(-1, pixels.shape[-1]))),
        "alpha": scan.has_alpha,
        "constant": bool(np.ptp(pixels) == 0),
        "spacing": scan.spacing_mm and " x ".join(f"{side:.3g}" for side in scan.spacing_mm),
        "spacing_mm": scan.spacing_mm and [float(side) for side in scan.spacing_mm],
        "patient": scan.patient,
        "quantiles": _quantiles(pixels[..., 0]),
        "more_quantiles": [_quantiles(pixels[..., i]) for i in range(1, pixels.shape[-1])],
        "object": _quantiles(pixels[..., 0][mask > 0]),
    }
    edges = np.concatenate([mask[:, [0, -1]].ravel(), mask[:, :, [0, -1]].ravel()])
    info["border"] = np.count_nonzero(edges) / edges.size
    for i, name in enumerate(classes.names, start=1):
        one = plane(mask, i)
        info[f"share: {name}"] = np.count_nonzero(one) / one.size
    return info


def _quantiles(pixels: np.ndarray) -> list[float]:
    """Describe grey levels by 21 quantiles, of a sample where there are many."""
    sample = _sample(pixels.ravel())
    return np.quantile(sample, np.linspace(0, 1, 21)).tolist() if sample.size else []


def _sample(values: np.ndarray) -> np.ndarray:
    """Take at most about SAMPLE of the values (N, …), evenly."""
    return values[:: max(1, len(values) // SAMPLE)]
