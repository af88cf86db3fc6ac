"""Say how good a mask probably is, and whether the image is of a kind that the model knows.

A training learns both from images that it did not train on (training/calibration.py) and stores
them in the model file. The kind is judged by small versions of image and mask, by probabilistic
principal components (Tipping and Bishop 1999). The Dice is predicted from that and from how
decided the probabilities are.
"""

import base64
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from imaging.labels import Classes
from imaging.lazy import LARGE_ARRAY
from inference.evidence import Evidence

# Principal components that are kept. With the cells of `evidence.SIDE` they must fit into the 64 kB
# that an HDF5 file has for metadata.
COMPONENTS = 30
CONFIDENCE = 0.9  # that the true Dice lies in the interval
MIN_DICE_LOSS = 2e-3  # added to 1 - Dice, whose logarithm is predicted
MAX_STRANGENESS = 99.0
MIN_SPREAD = 0.2  # of ranks; 0.29 where all cells differ, 0.2 where a fifth of them does


class Quality(NamedTuple):
    """What a model says of a mask of its own."""

    dice: float  # predicted
    low: float  # of the interval in which the true Dice lies, in 90 % of such images
    high: float
    strangeness: float  # of the image and its mask; above 1 the model does not know the kind

    @property
    def is_unusual(self) -> bool:
        """Whether the image is of another kind than those that the model was trained on."""
        return self.strangeness > 1

    def describe(self) -> dict[str, Any]:
        """List the numbers as they are written: rounded, with their names."""
        return {
            "predicted_dice": round(self.dice, 4),
            "predicted_dice_low": round(self.low, 4),
            "predicted_dice_high": round(self.high, 4),
            "unusual": self.is_unusual,
        }

    def __str__(self) -> str:
        unusual = ", an unusual image" * self.is_unusual
        return f"predicted Dice {self.dice:.2f} ({self.low:.2f} to {self.high:.2f}){unusual}"

    @property
    def note(self) -> str:
        """A sentence about an unusual image; "" for others."""
        return "unlike the images that the model was trained on: look at the mask" * self.is_unusual


# --------------------------------------------------------------------------------- what is known


class Kind(NamedTuple):
    """Probabilistic principal components of vectors (N,): what is usual."""

    mean: np.ndarray
    components: np.ndarray  # (Q, N)
    variances: np.ndarray  # (Q,)
    rest: float  # variance of all other directions

    @classmethod
    def learn(cls, vectors: np.ndarray) -> "Kind":
        """Learn what is usual from vectors (M, N)."""
        mean = vectors.mean(0)
        _, sizes, components = np.linalg.svd(vectors - mean, full_matrices=False)
        count = min(COMPONENTS, len(vectors) // 4)
        variances = sizes**2 / len(vectors)
        rest = variances[count:].sum() / (vectors.shape[1] - count)
        return cls(mean, components[:count], variances[:count], rest + 1e-6)

    def distance(self, vector: np.ndarray) -> float:
        """Measure how unusual a vector is, in squared standard deviations a dimension."""
        from_mean = vector - self.mean
        along = self.components @ from_mean
        across = max(0.0, from_mean @ from_mean - along @ along)
        return float(
            (np.sum(along**2 / (self.variances + self.rest)) + across / self.rest) / len(vector)
        )

    def pack(self) -> dict[str, Any]:
        """Write it as JSON."""
        parts = {"mean": self.mean, "components": self.components, "variances": self.variances}
        return {**{name: pack(part) for name, part in parts.items()}, "rest": float(self.rest)}

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> "Kind":
        """Read what `pack` wrote."""
        mean, variances = unpack(packed["mean"]), unpack(packed["variances"])
        components = unpack(packed["components"]).reshape(len(variances), -1)
        return cls(mean, components, variances, packed["rest"])


def pack(array: np.ndarray) -> str:
    """Write numbers as text, in half precision."""
    return base64.b64encode(array.astype("<f2").tobytes()).decode()


@lru_cache(maxsize=64)  # those of a model are read for every image
def unpack(text: str) -> np.ndarray:
    """Read numbers that `pack` wrote."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)


# ------------------------------------------------------------------------------------- judgement


class Judge:
    """Judges predictions by what was learned when the model was trained.

    image, mask: what is usual; limits: the largest usual distances of both. weights, bias: of the
    features, for the logarithm of 1 - Dice. errors: the interval's ends beside it.
    """

    def __init__(
        self,
        image: Kind,
        mask: Kind,
        limits: tuple[float, float],
        weights: np.ndarray,
        bias: float,
        errors: tuple[float, float],
    ) -> None:
        self.image, self.mask, self.limits = image, mask, limits
        self.weights, self.bias, self.errors = weights, bias, errors

    def pack(self) -> dict[str, Any]:
        """Write it as JSON, for the model file."""
        return {
            "image": self.image.pack(),
            "mask": self.mask.pack(),
            "limits": list(self.limits),
            "weights": [float(weight) for weight in self.weights],
            "bias": self.bias,
            "errors": list(self.errors),
        }

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> "Judge":
        """Read what `pack` wrote."""
        kinds = Kind.unpack(packed["image"]), Kind.unpack(packed["mask"])
        weights = np.array(packed["weights"])
        return cls(*kinds, packed["limits"], weights, packed["bias"], packed["errors"])

    def judge(self, evidence: Evidence) -> Quality:
        """Predict the Dice of a mask, and say how strange the image is."""
        distances = measure_distances(evidence, self.image, self.mask)
        loss = features(evidence, distances) @ self.weights + self.bias
        best, middle, worst = (
            min(1.0, max(0.0, 1 + MIN_DICE_LOSS - float(np.exp(loss + error))))
            for error in (self.errors[0], 0.0, self.errors[1])
        )
        # Where most cells are equal, the ranks lie near the mean of any kind.
        is_flat = np.std(evidence.image.reshape(2, -1), axis=1).min() < MIN_SPREAD
        strangeness = max(np.divide(distances, self.limits))
        strangeness = MAX_STRANGENESS if is_flat else min(MAX_STRANGENESS, float(strangeness))
        return Quality(middle, worst, best, strangeness)


def measure_distances(evidence: Evidence, image: Kind, mask: Kind) -> tuple[float, float]:
    """Measure how unusual an image and its mask are."""
    return image.distance(evidence.image), mask.distance(evidence.mask.ravel())


def features(evidence: Evidence, distances: tuple[float, float]) -> np.ndarray:
    """List what the Dice is predicted from."""
    return np.log(
        [1.0001 - evidence.soft_dice, evidence.spread + 1e-4, *distances, evidence.area + 1e-3]
    )


def collect(case: np.ndarray | None, metadata: dict[str, Any]) -> Evidence | None:
    """Begin to collect what `judge` needs.

    None if the model file holds nothing to judge by, or for a slide that is decoded piece by piece.
    """
    if case is None or not metadata.get("quality") or np.prod(case.shape) > LARGE_ARRAY:
        return None
    return Evidence(case, Classes.from_metadata(metadata), metadata["threshold"])


def judge(evidence: Evidence, metadata: dict[str, Any]) -> Quality:
    """Judge a prediction by what the model file holds."""
    return Judge.unpack(metadata["quality"]).judge(evidence)
