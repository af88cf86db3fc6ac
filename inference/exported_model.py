"""Segment files with an exported network: decode and prepare a file, decide its mask."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imaging import formats, pictures
from imaging.grid import fit_grid
from imaging.labels import Classes
from imaging.scan import MAX_BYTES, Scan, check_declared_bytes
from inference import engines, postprocess, segment
from utils import UserError

MAX_SIDE = 65_535  # pixels; PNG files end at a million


class ImageTooLargeError(UserError):
    """An image with more pixels or slices than are allowed; the service answers with status 413."""


class Prepared(NamedTuple):
    """What the network and the answer need of an image.

    Its own pixels may be a hundred times as many.
    """

    images: np.ndarray  # (S, h, w, C) uint8, 255 is 1.0; a plain picture has one slice
    shape: tuple[int, int]  # (H, W) of the image
    spacing_mm: tuple[float, float, float] | None
    format: str  # see `formats.FORMATS`
    has_place: bool  # whether the file says where the image lies in space
    notes: tuple[str, ...]  # how the file was read
    source: bytes  # the scan without its pixels, which only the workers unpack

    @property
    def batch(self) -> np.ndarray:
        """All slices as the network takes them: (S, h, w, C) float32 in [0, 1]."""
        return self.images.astype(np.float32) / 255

    def scan(self) -> Scan:
        """Return the scan without its pixels: the headers that a mask refers to."""
        return pickle.loads(self.source)


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

    def read(self, content: bytes, max_bytes: int = MAX_BYTES, max_slices: int = 1) -> Prepared:
        """Decode an image file of at most `max_slices` slices and prepare it.

        max_bytes: of the decoded image. Raises UserError, ImageTooLargeError.
        """
        check_declared_pixels(content, max_bytes)
        scan = formats.decode_scan(content, max_bytes)
        shape, window = scan.pixels.shape[1:3], self.metadata.get("window", "")
        check_slices(len(scan.pixels), max_slices)
        if max(shape) > MAX_SIDE:
            raise UserError(f"{shape[0]}x{shape[1]} pixels; expected at most {MAX_SIDE} a side")
        # The memory that its mask needs: probabilities in float32, and copies of them.
        check_declared_bytes(max_bytes, *shape, 4 * max(4, 2 * self.output_channels + 2))
        if window == "file" and scan.window is None:
            raise UserError("its header proposes no window, which this model asks for")
        images = segment.prepare_inputs(scan, self.metadata)
        empty = replace(scan, pixels=scan.pixels[:0].copy(), padding=None, voi_curve=None)
        source = pickle.dumps(empty)
        has_place = scan.affine is not None
        spacing = scan.spacing_mm
        return Prepared(images, shape, spacing, scan.format, has_place, scan.notes, source)

    def decide(self, probs: np.ndarray, prepared: Prepared) -> Prediction:
        """Decide an image's mask by its probabilities (1, h, w, K)."""
        ids, confidence = self.decide_slices(probs, prepared.shape)
        return Prediction(ids[0], confidence[0], prepared.spacing_mm)

    def decide_slices(
        self, probs: np.ndarray, shape: tuple[int, int]
    ) -> tuple[np.ndarray, list[float]]:
        """Decide slices (H, W) by their probabilities (N, h, w, K).

        Returns their masks (N, H, W), ids or BITS, and their confidence.
        """
        grid = fit_grid((len(probs), *shape), probs.shape[1:3])
        threshold, ids, confidence = self.metadata["threshold"], [], []
        overlap = Classes.from_metadata(self.metadata).overlap
        for one, restored in zip(probs, grid.restore(probs), strict=True):
            ids.append(postprocess.decide(restored, self.metadata))
            inside = one[grid.rows, grid.columns]
            confidence.append(mean_confidence(inside, threshold, overlap))
        return np.stack(ids), confidence


def check_slices(count: int, most: int) -> None:
    """Raise UserError if an image has more slices than are allowed."""
    if count > most == 1:
        raise UserError(f"{count} slices or frames; expected one image")
    if count > most:
        raise ImageTooLargeError(f"{count} slices; expected at most {most} (--max-slices)")


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
