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
    affines = []
    headers = [pair.image for pair in pairs if _is_nifti(pair.image)]
    others = [pair.image for pair in pairs if not _is_nifti(pair.image)]
    for path in [*_some(headers, HEADERS), *_some(others, IMAGES)]:
        try:
            affine = _read_affine(path)
        except UserError:  # reported when all files are read
            continue
        if affine is not None:
            affines.append(affine)
    if not affines:
        return Frame(None, "")
    names = [orientation_of(affine) for affine in affines]
    usual = Counter(names).most_common(1)[0][0]
    spacings = []
    for affine, name in zip(affines, names, strict=True):
        axes, _ = turns_between(name, usual)
        spacings.append([volumes.spacing_of(affine)[axis] for axis in axes])
    return Frame(tuple(np.round(np.median(spacings, axis=0), 4).tolist()), usual)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(formats.NIFTI.suffixes)


def _some(paths: Sequence[Path], most: int) -> list[Path]:
    places = np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int)
    return [paths[place] for place in np.unique(places)]


def _read_affine(path: Path) -> np.ndarray | None:
    """Read the affine of a volume; None for pictures."""
    if _is_nifti(path):
        return nifti.read_affine(read_bytes(path, HEADER_BYTES))
    scan = formats.read_scan(path)
    return scan.affine if len(scan.pixels) > 1 else None
