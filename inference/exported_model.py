"""Segment single images with an exported network: decode and prepare a file, decide its mask."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imaging import formats, pictures, preprocess
from imaging.labels import Classes
from imaging.scan import MAX_BYTES, check_declared_bytes
from inference import engines, postprocess
from inference.segment import prepare_inputs
from utils import UserError

MAX_SIDE = 65_535  # pixels; PNG files end at a million


class ImageTooLargeError(UserError):
    """An image with more pixels than are allowed; the service answers it with status 413."""


class Prepared(NamedTuple):
    """What the network and the answer need of an image.

    Its own pixels may be a hundred times as many.
    """

    batch: np.ndarray  # (1, h, w, C) float32 in [0, 1]
    shape: tuple[int, int]  # (H, W) of the image
    spacing_mm: tuple[float, float, float] | None


class Prediction(NamedTuple):
    """What is found in one image."""

    ids: np.ndarray  # (H, W) uint8 class ids, at the image's own size
    confidence: float  # mean probability of the decided classes, before cleaning
    spacing_mm: tuple[float, float, float] | None


@dataclass(frozen=True)
class ExportedModel:
    """What a user of an exported network must know."""

    metadata: dict[str, Any]  # of the model file, see `utils.make_metadata`
    sha256: str
    engine: str  # see `engines.choose_engine`
    precision: str
    input_name: str
    input_shape: tuple[int, ...]  # (h, w, C)
    output_name: str
    output_channels: int

    def read(self, content: bytes, max_bytes: int = MAX_BYTES) -> Prepared:
        """Decode an image file of one slice and prepare it.

        max_bytes: of the decoded image. Raises UserError, ImageTooLargeError.
        """
        check_declared_pixels(content, max_bytes)
        scan = formats.decode_scan(content, max_bytes)
        shape, window = scan.pixels.shape[1:3], self.metadata.get("window", "")
        if len(scan.pixels) != 1:
            raise UserError(f"{len(scan.pixels)} slices or frames; expected one image")
        if max(shape) > MAX_SIDE:
            raise UserError(f"{shape[0]}x{shape[1]} pixels; expected at most {MAX_SIDE} a side")
        # The memory that its mask needs: probabilities in float32, and copies of them.
        check_declared_bytes(max_bytes, *shape, 4 * max(4, 2 * self.output_channels + 2))
        if window == "file" and scan.window is None:
            raise UserError("its header proposes no window, which this model asks for")
        prepared = prepare_inputs(scan, self.input_shape[:2], self.metadata)
        return Prepared(prepared.astype(np.float32) / 255, shape, scan.spacing_mm)

    def decide(self, probs: np.ndarray, prepared: Prepared) -> Prediction:
        """Decide an image's mask by its probabilities (1, h, w, K)."""
        ids = postprocess.decide(preprocess.restore(probs[0], prepared.shape), self.metadata)
        inside = probs[0][preprocess.letterbox(prepared.shape, probs.shape[1:3])]
        overlap = Classes.from_metadata(self.metadata).overlap
        confidence = mean_confidence(inside, self.metadata["threshold"], overlap)
        return Prediction(ids, confidence, prepared.spacing_mm)


def check_declared_pixels(content: bytes, max_bytes: int) -> None:
    """Raise ImageTooLargeError if a picture's header declares too many pixels."""
    found = pictures.declared_pixels(content)
    max_pixels = max_bytes / pictures.BYTES_PER_PIXEL
    if found > max_pixels:
        raise ImageTooLargeError(
            f"{found / 2**20:.1f} megapixels; expected at most {max_pixels / 2**20:g} "
            "(--max-megapixels)"
        )


def mean_confidence(probs: np.ndarray, threshold: float, overlap: bool = False) -> float:
    """Average over the pixels of (h, w, K) the probability of what is decided."""
    if probs.shape[-1] > 1 and not overlap:
        return float(probs.max(-1).mean())
    return float(np.where(probs >= threshold, probs, 1 - probs).mean())


def load_exported(
    path: Path, threads: int = 0, engine: str = "auto", precision: str = "auto"
) -> tuple[ExportedModel, Callable[[np.ndarray], np.ndarray]]:
    """Load what `export.py` wrote, see `engines.load_engine`.

    Returns also the function that computes probabilities (N, h, w, K) of prepared images
    (N, h, w, C) float32.
    """
    opened, metadata, sha256 = engines.load_engine(path, engine, precision, threads)
    model = ExportedModel(
        metadata,
        sha256,
        opened.engine,
        opened.precision,
        opened.input_name,
        opened.input_shape,
        opened.output_name,
        opened.output_channels,
    )
    return model, opened.run
