"""Show all classes of a model as one, such as left and right lung as lungs."""

from typing import Any

import numpy as np

from imaging.labels import Classes
from inference.segment import Network
from utils import UserError


class Merged:
    """A network whose classes count as one.

    classes: those of the network itself.
    """

    def __init__(self, network: Network, classes: Classes) -> None:
        self.network, self.classes = network, classes

    def __getattr__(self, name: str) -> Any:
        """Tell the rest as the network does: its engine, its precision."""
        return getattr(self.network, name)

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Turn images (N, …, C) into the probability (N, …, 1) of any class, and what follows."""
        return merge_probs(np.asarray(self.network.predict_on_batch(images)), self.classes)


def merge_probs(probs: np.ndarray, classes: Classes) -> np.ndarray:
    """Turn probabilities (…, K) into those of any class (…, 1); what follows them stays."""
    count = classes.num_channels
    if classes.overlap or count == 1:
        merged = probs[..., :count].max(-1, keepdims=True)
    else:
        merged = 1 - probs[..., :1]
    return np.concatenate([merged, probs[..., count:]], axis=-1)


def merge_metadata(metadata: dict[str, Any], name: str) -> dict[str, Any]:
    """Describe a model whose classes count as one of this name. Raises UserError for the name."""
    if len(Classes(name).names) != 1:
        raise UserError(f"merge is {name!r}; expected one name, such as lungs")
    clean = metadata.get("clean")
    return metadata | {
        "classes": [name],
        "masks": {"classes": name, "ignore": "", "overlap": False},
        "threshold": float(np.mean(metadata["threshold"])),
        "clean": [sum(clean)] if clean else None,
    }
