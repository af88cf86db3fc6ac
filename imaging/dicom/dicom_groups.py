"""Sort DICOM files into volumes: the slices of a series, each place once."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from imaging.dicom import dicom_file
from imaging.dicom.dicom_slices import NAMES, Slice, split_phases
from utils import UserError

CAPTURES = "1.2.840.10008.5.1.4.1.1.7"
# Their images always have a position.
SECTIONAL = ("CT", "MR", "PT")
# Two axes are the same if their cosine differs from 1 by less.
SAME_AXIS = 1e-3


def group_files(files: Sequence[Path]) -> tuple[list[list[Path]], list[str]]:
    """Sort DICOM files into volumes, and say in notes what was left out and why.

    A volume is the list of its slices' files, sorted along its axis; a single image or an enhanced
    file is a list of one. A file that cannot be read is a list of one too: reading it tells why.
    """
    notes: list[str] = []
    volumes, singles, slices = [], [], []
    for path in files:
        try:
            one = Slice(path, dicom_file.peek_header(path, NAMES))
        except UserError:
            volumes.append([path])
            continue
        if reason := _not_an_image(one):
            notes.append(f"{path}: {reason}; left out")
        elif one.frames > 1 or one.position_mm is None:
            singles.append(one)
        else:
            slices.append(one)
    stacks = []
    for series in _by_series(slices):
        stacks += _split_series(series, notes)
    singles += [stack[0] for stack in stacks if len(stack) == 1]
    stacks = [stack for stack in stacks if len(stack) > 1]
    volumes += _with_singles(stacks, singles, notes)
    return sorted(volumes, key=min), notes


def _not_an_image(one: Slice) -> str:
    """Say why a file is no image; "" if it is one."""
    if one.text("SOPClassUID") in dicom_file.SEGMENTATIONS:
        return "a DICOM segmentation, which is a mask"
    if one.text("Modality") == "RTSTRUCT":
        return "contours (RTSTRUCT), which are a mask"
    if one.text("Modality") == "RTDOSE":
        return "a dose distribution (RTDOSE)"
    if not one.text("Rows") or not one.text("Columns"):
        # A file that says nothing of itself is damaged: reading it tells more.
        kind = one.text("Modality") or one.text("SOPClassUID")
        return f"a DICOM file without pixels ({kind}), perhaps a report" if kind else ""
    return ""


def _by_series(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Group slices by their series; those that name none by their folder."""
    series = defaultdict(list)
    for one in slices:
        uid = one.text("SeriesInstanceUID")
        series[uid or str(one.path.parent)].append(one)
    return list(series.values())


def _split_series(series: Sequence[Slice], notes: list[str]) -> list[list[Slice]]:
    """Split a series into volumes: one size, one axis, each place once."""
    parts = defaultdict(list)
    for one in series:
        parts[one.size, _rounded(one.axis)].append(one)
    main = max(parts.values(), key=len)
    volumes = []
    for part in parts.values():
        if len(part) == 1 and len(main) > 1:
            what = f"its size or direction is another than that of the {len(main)} slices"
            notes.append(f"{part[0].path}: {what} of its series; left out")
        else:
            volumes += split_phases(_without_copies(part, notes), notes)
    return volumes


def _rounded(axis: tuple[float, ...]) -> tuple[float, ...]:
    # 0.0 is added because -0.0 would be another key.
    return tuple(round(value, 2) + 0.0 for value in axis)


def _without_copies(part: Sequence[Slice], notes: list[str]) -> list[Slice]:
    """Leave out files that are there twice."""
    kept: dict[tuple, Slice] = {}
    # A UID in several places is an anonymiser's mistake. Then only equal pixels make a copy.
    places = defaultdict(set)
    for one in part:
        places[one.text("SOPInstanceUID")].add(one.position_mm)
    for one in part:
        uid = one.text("SOPInstanceUID")
        key = (uid or str(one.path), one.position_mm, one.number)
        if key in kept and (len(places[uid]) == 1 or _same_end(one.path, kept[key].path)):
            notes.append(f"{one.path}: a copy of {kept[key].path.name}; left out")
        else:
            kept[key if key not in kept else (*key, str(one.path))] = one
    return list(kept.values())


def _same_end(one: Path, other: Path, count: int = 2**16) -> bool:
    """Say whether two files end alike: with the same pixels."""
    ends = []
    for path in (one, other):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - count))
            ends.append(file.read())
    return ends[0] == ends[1]


# ------------------------------------------------------------------------------- beside a volume


def _with_singles(
    stacks: list[list[Slice]], singles: Sequence[Slice], notes: list[str]
) -> list[list[Path]]:
    """List the volumes; of the single images those that are not mere company of a volume."""
    scouts = [stack for stack in stacks if _is_localizer(stack[0])]
    real = [stack for stack in stacks if not _is_localizer(stack[0])]
    enhanced = [one for one in singles if one.frames > 1 and one.text("Modality") in SECTIONAL]
    beside = real + [[one] for one in enhanced if not _is_capture(one)]
    volumes = [[one.path for one in stack] for stack in (real if beside else stacks)]
    for one in [*singles, *(one for stack in scouts for one in stack if beside)]:
        reason = _odd_beside(one, beside)
        if reason:
            notes.append(f"{one.path}: {reason} beside a volume; left out")
        else:
            volumes.append([one.path])
    return volumes


def _odd_beside(one: Slice, volumes: Sequence[Sequence[Slice]]) -> str:
    """Say why a single image beside volumes is none that is meant; "" if it may be."""
    if not volumes:
        return ""
    if _is_capture(one):
        return "a secondary capture (screenshot)"
    if _is_localizer(one):
        return "a localizer (scout)"
    for volume in volumes:
        first = volume[0]
        if one.frames > 1 or one.text("StudyInstanceUID") != first.text("StudyInstanceUID"):
            continue
        same_modality = one.text("Modality") == first.text("Modality")
        crosswise = one.axis and first.axis and abs(np.dot(one.axis, first.axis)) < 1 - SAME_AXIS
        if same_modality and crosswise:
            return "a slice across the others, as scouts are,"
        same_series = one.text("SeriesInstanceUID") == first.text("SeriesInstanceUID")
        if one.position_mm is None and (same_series or one.text("Modality") in SECTIONAL):
            return "an image without a position"
    return ""


def _is_capture(one: Slice) -> bool:
    return f"{one.text('SOPClassUID')}.".startswith(f"{CAPTURES}.")


def _is_localizer(one: Slice) -> bool:
    return "LOCALIZER" in one.text("ImageType").upper()
