"""Run the exported network for requests: gather them into batches, prepare images, decide masks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imaging import formats, pictures, preprocess
from imaging.scan import MAX_BYTES, check_declared_bytes
from inference import engines, postprocess
from utils import UserError

MAX_SIDE = 65_535  # pixels of a side; PNG's writer ends at a million


class ImageTooLargeError(UserError):
    """An image with more pixels than are allowed; the service answers it with status 413."""


class Prepared(NamedTuple):
    """What the network and the answer need of an image, whose own pixels may be a hundred times as many."""

    batch: np.ndarray  # (1, h, w, C) float32 in [0, 1]
    shape: tuple[int, int]  # (H, W) of the image
    spacing_mm: tuple[float, float, float] | None


class Prediction(NamedTuple):
    """What is found in one image."""

    ids: np.ndarray  # (H, W) uint8 class ids, at the image's own size
    confidence: float  # mean probability of what was decided, before cleaning
    spacing_mm: tuple[float, float, float] | None


@dataclass(frozen=True)
class ExportedModel:
    """What a user of the exported network must know."""

    metadata: dict[str, Any]  # of the model file, see `utils.make_facts`
    sha256: str
    engine: str  # see `engines.choose`
    precision: str
    input_name: str
    input_shape: tuple[int, ...]  # (H, W, C)
    output_name: str
    output_channels: int

    def read(self, content: bytes, max_bytes: int = MAX_BYTES) -> Prepared:
        """Decode an image file of one slice and prepare it. Raises UserError, ImageTooLargeError.

        max_bytes: of the decoded image.
        """
        pixels = pictures.declared_pixels(content) / 2**20
        max_pixels = max_bytes / pictures.BYTES_PER_PIXEL / 2**20
        if pixels > max_pixels:
            found = f"{pixels:.1f} megapixels"
            expected = f"expected at most {max_pixels:g} (--max-megapixels)"
            raise ImageTooLargeError(f"{found}; {expected}")
        scan = formats.decode_scan(content, max_bytes)
        shape, window = scan.pixels.shape[1:3], self.metadata.get("window", "")
        if len(scan.pixels) != 1:
            raise UserError(f"{len(scan.pixels)} slices or frames; expected one image")
        if max(shape) > MAX_SIDE:
            raise UserError(f"{shape[0]}x{shape[1]} pixels; expected at most {MAX_SIDE} a side")
        # What its mask takes to make, in float32.
        check_declared_bytes(max_bytes, *shape, 4 * max(4, 2 * self.output_channels + 2))
        if window == "file" and scan.window is None:
            raise UserError("its header proposes no window, which this model asks for")
        prepared = preprocess.prepare_scan(
            scan, self.input_shape[:2], self.metadata["channels"], window
        )
        return Prepared(prepared.astype(np.float32) / 255, shape, scan.spacing_mm)

    def decide(self, probs: np.ndarray, prepared: Prepared) -> Prediction:
        """Decide an image's mask from its probabilities (1, h, w, K)."""
        whole = preprocess.restore(probs[0], prepared.shape)
        ids = postprocess.decide(whole, self.metadata)
        own = probs[0][preprocess.letterbox(prepared.shape, probs.shape[1:3])]  # without padding
        decided = postprocess.to_ids(own, self.metadata["threshold"]) > 0
        sure = (
            np.where(decided, own[..., 0], 1 - own[..., 0]) if own.shape[-1] == 1 else own.max(-1)
        )
        return Prediction(ids, float(sure.mean()), prepared.spacing_mm)


def load_exported(
    path: Path, threads: int = 0, kind: str = "auto", precision: str = "auto"
) -> tuple[ExportedModel, Callable[[np.ndarray], np.ndarray]]:
    """Load what `export.py` wrote, see `engines.load`.

    Returns also the function that computes probabilities (N, H, W, K) of prepared images (N, H, W, C) float32.
    """
    opened, metadata, found = engines.load_engine(path, kind, precision, threads)
    sides = opened.input_name, opened.input_shape, opened.output_name, opened.output_channels
    return ExportedModel(metadata, found, opened.engine, opened.precision, *sides), opened.run
