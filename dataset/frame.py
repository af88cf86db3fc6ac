"""Find out how the volumes of a data set lie: the spacing and orientation that most have."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.channels import HEADER_BYTES
from dataset.pairs import Pair
from imaging import formats, nifti, volumes
from imaging.grid import orientation_of, turns_between
from imaging.scan import read_bytes
from utils import UserError

HEADERS = 100  # volumes, spread over the data set, of which only the header is read
IMAGES = 5  # that are read whole


class Frame(NamedTuple):
    """The working resolution and orientation of volumes."""

    # mm between slices, rows and columns. None: nothing is known.
    spacing: tuple[float, float, float] | None
    # See `orientation_of`.
    orientation: str


def detect_frame(pairs: Sequence[Pair]) -> Frame:
    """Return the median spacing and the most common orientation of a data set's volumes."""
    frames = []
    headers = [pair.image for pair in pairs if _is_nifti(pair.image)]
    others = [pair.image for pair in pairs if not _is_nifti(pair.image)]
    for path in [*_some(headers, HEADERS), *_some(others, IMAGES)]:
        try:
            frames.append(_read_frame(path))
        except UserError:  # reported when all files are read
            continue
    frames = [frame for frame in frames if frame.spacing is not None]
    if not frames:
        return Frame(None, "")
    names = [frame.orientation for frame in frames if frame.orientation]
    usual = Counter(names).most_common(1)[0][0] if names else ""
    spacings = []
    for frame in frames:
        axes = turns_between(frame.orientation, usual)[0] if frame.orientation else (0, 1, 2)
        spacings.append([frame.spacing[axis] for axis in axes])
    # Of microscopes, too: 0.00012 mm.
    return Frame(tuple(float(f"{one:.4g}") for one in np.median(spacings, axis=0)), usual)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(formats.NIFTI.suffixes)


def _some(paths: Sequence[Path], most: int) -> list[Path]:
    places = np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int)
    return [paths[place] for place in np.unique(places)]


def _read_frame(path: Path) -> Frame:
    """Read how a volume lies; no spacing for pictures, no orientation where a file tells none."""
    if _is_nifti(path):
        affine, spacing = nifti.read_affine(read_bytes(path, HEADER_BYTES)), None
    else:
        scan = formats.read_scan(path, is_lazy=True)
        if len(scan.pixels) == 1:
            return Frame(None, "")
        affine, spacing = scan.affine, scan.spacing_mm
    if affine is None:
        return Frame(spacing, "")
    return Frame(tuple(volumes.spacing_of(affine)), orientation_of(affine))
