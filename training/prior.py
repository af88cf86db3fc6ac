"""Start a network at the classes' frequencies (Lin et al. 2017, arXiv 1708.02002, section 4.1).

A new network calls each pixel half foreground. Where the foreground is rare, the first steps then
only unlearn this, and the noise of the many background pixels drowns the few others.
"""

import keras
import numpy as np
import pandas as pd

LEAST = 1e-4  # share of the pixels


def class_shares(info: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Average each class's share of the pixels, (K,), over pairs, see `Dataset.info`."""
    return np.array([info[f"share: {name}"].mean() for name in names])


def start_at_shares(model: keras.Model, shares: np.ndarray) -> None:
    """Set the last layer's bias, so that a new network gives each class its share of the pixels.

    shares: (K,), without the background that a softmax has before them. A network of one's own
    whose last layer is not that of `build_unet` stays as it is.
    """
    layer = model.layers[-1]
    if getattr(layer, "bias", None) is None:
        return
    shares = np.clip(shares, LEAST, 1 - LEAST)
    if layer.bias.shape[0] == len(shares):
        bias = np.log(shares / (1 - shares))
    else:
        background = max(1 - shares.sum(), LEAST)
        bias = np.log([background, *shares])
    layer.bias.assign(bias.astype(np.float32))
