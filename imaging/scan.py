"""What all formats share: the decoded scan, the mask to write, the limit on what is decoded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from imaging.labels import BITS
from imaging.lazy import LazyPixels, part_of
from utils import UserError

# Largest size of one decoded file. A small file can claim to be far larger (a decompression bomb).
MAX_BYTES = 2**31
# What `Mask.values` answers.
OVERLAPPING = "the model's classes overlap, and such a file holds one of them per pixel"
# Smaller files are thumbnails or accidents, never scans.
MIN_SIDE = 16
# More than these are slices or spectra, and would fill the memory.
MAX_CHANNELS = 64


NO_DISTANCE = "the distance between its slices is not known, as in films: volumes in ml say nothing"


@dataclass(frozen=True)
class Scan:
    """The content of an image file. A plain picture is a volume of one slice."""

    # (S, H, W, C) as stored; DICOM grey levels are rescaled, so CT is in HU. Those of a large file
    # are decoded when they are needed.
    pixels: np.ndarray | LazyPixels
    # Distance between slices, rows and columns, where the file has it.
    spacing_mm: tuple[float, float, float] | None = None
    # Centre and width of the grey levels that the file proposes to show.
    window: tuple[float, float] | None = None
    # Hash of the patient's ID in a DICOM file.
    patient: str = ""
    # (4, 4): indices of slice, row and column to RAS coordinates in mm, where the file has it.
    affine: np.ndarray | None = None
    # What `Format.encode_mask` needs of the source: its header, without pixels.
    header: Any = None
    # Name of the file's format, see `formats.FORMATS`.
    format: str = ""
    # Whether the last channel is alpha: opacity, not a measurement.
    has_alpha: bool = False
    # Whether channels are measurements of their own (stains, MR sequences), not red, green, blue.
    # Then each has grey levels of its own.
    separate: bool = False
    # (S, H, W) bool: pixels without a measurement, such as NaN. They have no say in grey levels.
    padding: np.ndarray | None = None
    # What a user must know of how the file was read, a sentence each, without the file's name.
    notes: tuple[str, ...] = ()
    # Grey levels (N,), ascending, and their brightness (N,) in 0..1: the curve that the file
    # proposes, beside its window.
    voi_curve: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def colours(self) -> np.ndarray | LazyPixels:
        """The pixels without alpha: what a network sees."""
        return part_of(self.pixels, (..., slice(-1))) if self.has_alpha else self.pixels

    def slice(self, number: int) -> "Scan":
        """Give one slice as a scan of its own."""
        return self.slices(number, number + 1)

    def slices(self, start: int, stop: int) -> "Scan":
        """Give some slices as a scan of their own."""
        chosen = slice(start, stop)
        padding = None if self.padding is None else self.padding[chosen]
        return replace(self, pixels=part_of(self.pixels, chosen), padding=padding)


@dataclass(frozen=True)
class Mask:
    """A mask to write."""

    # (S, H, W) class ids, 0 is background.
    ids: np.ndarray
    # Names of the classes 1, 2 …
    names: Sequence[str]
    # Values of background and classes in the file; none means 0, 1, 2 …
    levels: Sequence[int] = ()

    @property
    def values(self) -> np.ndarray:
        """The mask with its classes' values: (S, H, W), uint8, uint16 or uint32.

        Raises UserError for classes that overlap.
        """
        return self._look_up(self.ids, list(self.levels) or list(range(len(self.names) + 1)))

    def picture(self, ids: np.ndarray) -> np.ndarray:
        """Show some of the mask's ids: a single class of value 1 is white, 255.

        Raises UserError for classes that overlap.
        """
        if len(self.names) == 1 and list(self.levels) in ([], [0, 1]):
            return self._look_up(ids, [0, 255])
        return self._look_up(ids, list(self.levels) or list(range(len(self.names) + 1)))

    def _look_up(self, ids: np.ndarray, levels: list[int]) -> np.ndarray:
        if ids.dtype == BITS:
            raise UserError(OVERLAPPING)
        table = np.array(levels, np.min_scalar_type(max(levels)))
        return table[ids.astype(np.uint8, copy=False)]


def check_declared_bytes(max_bytes: float, *factors: int) -> None:
    """Raise UserError unless the size that a header declares is above 0 and at most `max_bytes`.

    factors: their product is the size, in bytes.
    """
    size = float(np.prod(np.float64(factors)))
    if not size > 0:
        raise UserError("unreadable or truncated: its header declares no pixels")
    if size > max_bytes:
        found, most = size / 2**30, max_bytes / 2**30
        raise UserError(f"its header declares {found:.2g} GiB; expected at most {most:.2g} GiB")


def read_bytes(path: str | Path, count: int = -1) -> bytes:
    """Read a file, or its first bytes. Raises UserError, its message without the path."""
    path = Path(path) if isinstance(path, str) else path  # or a file of a zip
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})") from error


@contextmanager
def name_in_errors(name: str | Path) -> Iterator[None]:
    """Put a file's name before the message of a UserError that is raised in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
