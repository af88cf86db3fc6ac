"""Segment files with an exported network: decode and prepare a file, decide its mask."""

import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imaging import formats, lazy, pictures, preprocess
from imaging.grid import Grid
from imaging.labels import Classes
from imaging.scan import MAX_BYTES, Scan, check_declared_bytes
from inference import engines, segment
from inference.merging import Merged, merge_metadata
from inference.sampler import Sampler
from inference.windows import Windows
from utils import UserError

MAX_SIDE = 65_535  # pixels; PNG files end at a million
MAX_WINDOWS = 2**16  # of one image


class ImageTooLargeError(UserError):
    """An image with more pixels or slices than are allowed; the service answers with status 413."""


class Prepared(NamedTuple):
    """What the network and the answer need of an image.

    Its own pixels may be a hundred times as many.
    """

    windows: Windows  # what the network takes, uint8, 255 is 1.0; of a plain picture one
    grid: Grid  # how the file's voxels lie in what the windows cover
    spacing_mm: tuple[float, float, float] | None
    format: str  # see `formats.FORMATS`
    has_place: bool  # whether the file says where the image lies in space
    notes: tuple[str, ...]  # how the file was read
    source: bytes  # the scan without its pixels, which only the workers unpack

    @property
    def num_slices(self) -> int:
        """How many slices the file has."""
        return self.grid.shape[0]

    def batch(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return some windows as the network takes them: (N, …, C) float32 in [0, 1]."""
        stop = len(self.windows) if stop is None else min(stop, len(self.windows))
        chosen = np.stack([self.windows[number] for number in range(start, stop)])
        return chosen.astype(np.float32) / 255

    def scan(self) -> Scan:
        """Return the scan without its pixels: the headers that a mask refers to."""
        return pickle.loads(self.source)

    def without_pixels(self) -> "Prepared":
        """Leave out what only the network needs."""
        empty = Windows(self.windows.case[:0, :0, :0], self.windows.sampler)
        return self._replace(windows=empty)


@dataclass(frozen=True)
class ExportedModel:
    """What a user of an exported network must know."""

    metadata: dict[str, Any]  # of the model file, see `utils.make_metadata`
    sha256: str
    engine: str  # see `engines.choose_engine`
    precision: str
    input_name: str
    input_shape: tuple[int, ...]  # (h, w, C), or (d, h, w, C) of a 3-D network
    output_name: str
    output_channels: int

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The probabilities of one window: (h, w, K) or (d, h, w, K)."""
        return (*self.input_shape[:-1], self.output_channels)

    def read(self, content: bytes, max_bytes: int = MAX_BYTES, max_slices: int = 1) -> Prepared:
        """Decode an image file of at most `max_slices` slices and prepare it.

        max_bytes: of the decoded image. Raises UserError, ImageTooLargeError.
        """
        check_declared_pixels(content, max_bytes)
        return self.prepare(formats.decode_scan(content, max_bytes), max_bytes, max_slices)

    def prepare(self, scan: Scan, max_bytes: int = MAX_BYTES, max_slices: int = 1) -> Prepared:
        """Prepare an image of at most `max_slices` slices. Raises UserError, ImageTooLargeError."""
        sampler, window = Sampler.from_metadata(self.metadata), self.metadata.get("window", "")
        check_slices(len(scan.pixels), max_slices)
        segment.check_scan(scan, self.metadata)
        grid = sampler.grid(scan)
        self._check_size(grid, sampler, max_bytes)
        if window == "file" and scan.window is None:
            raise UserError("its header proposes no window, which this model asks for")
        case = preprocess.prepare_scan(scan, grid, self.metadata["channels"], window)
        windows = Windows(lazy.in_memory(case), sampler)
        if len(windows) > MAX_WINDOWS:
            raise ImageTooLargeError(f"{len(windows)} windows; expected at most {MAX_WINDOWS}")
        empty = replace(scan, pixels=scan.pixels[:0].copy(), padding=None, voi_curve=None)
        source = pickle.dumps(empty)
        has_place = scan.affine is not None
        return Prepared(windows, grid, scan.spacing_mm, scan.format, has_place, scan.notes, source)

    def _check_size(self, grid: Grid, sampler: Sampler, max_bytes: int) -> None:
        """Raise UserError, ImageTooLargeError if a scan would take too much memory."""
        height, width = grid.shape[1:]
        if max(height, width) > MAX_SIDE:
            raise UserError(f"{height}x{width} pixels; expected at most {MAX_SIDE} a side")
        # What is held of the probabilities: float32, and copies of them.
        copies = 4 * max(4, 2 * self.output_channels + 2)
        check_declared_bytes(max_bytes, *grid.oriented[1:], copies)
        depth = min(sampler.window[0], grid.canvas[0])
        layer = depth * grid.canvas[1] * grid.canvas[2] * copies
        # A file's spacing may ask for any size at working resolution.
        case = math.prod(grid.canvas) * self.metadata["channels"]
        if max(layer, case) > max_bytes:
            shown = "x".join(map(str, grid.canvas))
            raise ImageTooLargeError(
                f"{shown} voxels at the network's resolution; expected fewer (--max-megapixels)"
            )

    def decide(self, probs: Iterable[np.ndarray], prepared: Prepared) -> segment.Prediction:
        """Decide an image's mask by the probabilities (…, K) of its windows, in their order.

        The mask is not cleaned yet, see `clean`.
        """
        metadata, windows = self.metadata | {"clean": None}, prepared.windows
        bands = ((band,) for band in windows.blend(iter(probs)))
        return segment.decide_scan(bands, 1, prepared.grid, metadata, case=windows.case)

    def clean(self, ids: np.ndarray, prepared: Prepared) -> None:
        """Clean class ids (S, H, W) in place, as the model file says."""
        segment.clean(ids, prepared.grid, self.metadata)

    def predict(
        self, prepared: Prepared, run: Callable[[np.ndarray], np.ndarray], batch_size: int = 8
    ) -> segment.Prediction:
        """Segment a prepared image by `run`, which `load_exported` returned."""

        def compute() -> Iterator[np.ndarray]:
            for start in range(0, len(prepared.windows), batch_size):
                yield from run(prepared.batch(start, start + batch_size))

        found = self.decide(compute(), prepared)
        self.clean(found.ids, prepared)
        return found


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


def load_exported(
    path: Path, threads: int = 0, engine: str = "auto", precision: str = "auto", merge: str = ""
) -> tuple[ExportedModel, Callable[[np.ndarray], np.ndarray]]:
    """Load what `export.py` wrote, see `engines.load_engine`.

    merge: shows all classes as one of this name. Returns also the function that computes
    probabilities (N, …, K) of windows (N, …, C) float32.
    """
    opened, metadata, sha256 = engines.load_engine(path, engine, precision, threads)
    run, classes = opened.run, Classes.from_metadata(metadata)
    if merge:
        run = Merged(opened, classes).predict_on_batch
        metadata = merge_metadata(metadata, merge)
    model = ExportedModel(
        metadata,
        sha256,
        opened.engine,
        opened.precision,
        opened.input_name,
        opened.input_shape,
        opened.output_name,
        1 if merge else opened.output_channels,
    )
    return model, run
