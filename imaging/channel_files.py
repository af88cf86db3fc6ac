"""Images whose channels lie in files of their own, as those of nnU-Net and BraTS do."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from imaging import formats
from imaging.alignment import check_alignment
from imaging.files import file_stem
from imaging.scan import Scan, name_in_errors
from utils import UserError


def read_channels(paths: Sequence[Path], window: str = "") -> Scan:
    """Read the files of an image's channels, stacked in this order. Raises UserError."""
    scans = [formats.read_named_scan(path, window) for path in paths]
    first = scans[0]
    if len(scans) == 1:
        return first
    for path, scan in zip(paths, scans, strict=True):
        if scan.pixels.shape[:3] != first.pixels.shape[:3]:
            found, expected = (_size(one) for one in (scan, first))
            raise UserError(f"{path}: {found}; {paths[0].name} is {expected}")
        with name_in_errors(path):
            check_alignment(first, scan)
    notes = tuple(dict.fromkeys(note for scan in scans for note in scan.notes))
    pixels = np.concatenate([scan.colours for scan in scans], axis=-1)
    paddings = [scan.padding for scan in scans]
    # As in a file of several channels: a pixel counts if one channel was measured there.
    padding = None if any(one is None for one in paddings) else np.logical_and.reduce(paddings)
    return replace(
        first, pixels=pixels, padding=padding, has_alpha=False, separate=True, notes=notes
    )


def _size(scan: Scan) -> str:
    slices, height, width = scan.pixels.shape[:3]
    return f"{height}x{width} pixels" + (f" in {slices} slices" if slices > 1 else "")


def channel_endings(files: Sequence[Path]) -> tuple[str, ...]:
    """Tell how the names of an image's channels end: _0000 and _0001, or _t1 and _flair.

    () for a single file, and if the names are the same.
    """
    stems = [file_stem(path) for path in files]
    if len(set(stems)) < len(stems) or len(stems) < 2:
        return ()
    # What they have in common ends before a separator: the 000 of _0000 is no part of it.
    prefix = os.path.commonprefix(stems)  # noqa: RUF071 (of letters, not of folders)
    common = re.match(r"(?:.*(?=[_\-. ]))?", prefix, re.DOTALL)[0]
    return tuple(stem[len(common) :] for stem in stems)
