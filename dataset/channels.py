"""Find out whether a data set is grey or in colour."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.layouts import Pair
from imaging import dicom_series, formats
from utils import UserError

IMAGES = 5  # spread over the data set
TOLERANCE = 2  # grey levels by which the channels of a grey JPEG may differ


def detect_channels(pairs: Sequence[Pair]) -> int:
    """Return 3 if most images are in colour, else 1; a handful of images is read.

    Grey images stored as RGB are grey. Files that cannot be read do not count.
    """
    places = np.unique(np.linspace(0, len(pairs) - 1, min(IMAGES, len(pairs))).astype(int))
    votes = []
    for place in places:
        try:
            votes.append(is_colour(pairs[place].image))
        except UserError:  # reported when all files are read
            continue
    return 3 if 2 * sum(votes) > len(votes) else 1


def is_colour(path: Path) -> bool:
    """Say whether an image file shows colours. Raises UserError if it cannot be read."""
    if path.name.lower().endswith(formats.NIFTI.suffixes):  # without reading a large volume
        return False
    file = dicom_series.volume_files(path)[0][0] if path.is_dir() else path
    pixels = formats.read_scan(file).pixels[..., :3].astype(np.float32)
    return pixels.shape[-1] == 3 and float(np.ptp(pixels, axis=-1).max()) > TOLERANCE
