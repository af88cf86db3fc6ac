"""Read, prepare, restore and draw one image or mask: the only preprocessing, shared by training, prediction, serving.

Preparing keeps the aspect ratio: an image is scaled to fit the network's input, its intensities are stretched between
two percentiles (so 8-bit, 16-bit, dark and bright files look alike), and the rest of the input is padded with zeros.
"""

from dataclasses import dataclass

import numpy as np

from utils import UserError

MAX_BYTES = 2**31  # of one decoded file
MIN_SIDE = 16  # pixels; smaller files are thumbnails or accidents, never scans


@dataclass(frozen=True)
class Scan:
    """What an image file holds; a plain image is a volume of one slice."""

    pixels: np.ndarray  # (S, H, W, C) as stored; of DICOM rescaled, so that CT is in HU
    spacing_mm: tuple[float, float, float] | None = (
        None  # between slices, rows, columns, where the file says so
    )
    window: tuple[float, float] | None = (
        None  # centre and width of grey levels that the file proposes
    )
    patient: str = ""  # a DICOM file's, hashed


def check_declared_bytes(*factors: int) -> None:
    """Raise UserError if the product, bytes that a file's header promises, is nothing or more than MAX_BYTES."""
    size = float(np.prod(np.float64(factors)))
    if not size > 0:
        raise UserError("unreadable or truncated: its header promises no pixels")
    if size > MAX_BYTES:
        raise UserError(
            f"its header promises {size / 2**30:.2g} GiB; expected at most {MAX_BYTES / 2**30:.2g} GiB"
        )
