"""Find out how many channels the images of a data set have: grey, colour, or more."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.pairs import Pair
from imaging import formats, nifti
from imaging.dicom import dicom_series
from imaging.scan import read_bytes
from utils import UserError

IMAGES = 5  # spread over the data set
HEADER_BYTES = 2**16  # hold a volume's header, packed or not
TOLERANCE = 2  # grey levels of 8 bits by which the channels of a grey JPEG may differ


def detect_channels(pairs: Sequence[Pair]) -> int:
    """Return the number of channels that most images have; a handful of images is read.

    Grey images stored as RGB have 1. Files that cannot be read do not count.
    """
    places = np.unique(np.linspace(0, len(pairs) - 1, min(IMAGES, len(pairs))).astype(int))
    counts: Counter[int] = Counter()
    for place in places:
        pair = pairs[place]
        try:
            found = count_channels(pair.image)
        except UserError:  # reported when all files are read
            continue
        counts[found + len(pair.more_channels)] += 1
    # Of two numbers that are as common, the smaller.
    return max(counts, key=lambda count: (counts[count], -count), default=1)


def count_channels(path: Path) -> int:
    """Count an image's channels without alpha; three equal ones are 1. Raises UserError."""
    if path.name.lower().endswith(formats.NIFTI.suffixes):  # without reading a large volume
        return nifti.count_channels(read_bytes(path, HEADER_BYTES))
    file = dicom_series.volume_files(path)[0][0] if path.is_dir() else path
    scan = formats.read_scan(file)
    channels = scan.colours.shape[-1]
    if channels != 3:
        return channels
    return 3 if in_colour(scan.colours) else 1


def in_colour(pixels: np.ndarray) -> bool:
    """Say whether pixels (..., C) are red, green and blue that differ."""
    if pixels.shape[-1] != 3:
        return False
    tolerance = TOLERANCE if pixels.dtype == np.uint8 else 0
    return bool(np.ptp(pixels.astype(np.float32), axis=-1).max() > tolerance)
