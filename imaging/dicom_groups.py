"""Sort DICOM files into volumes: the slices of a series, each place once."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaging import dicom_file
from imaging.dicom_geometry import MIN_STEP_MM, read_numbers
from utils import UserError

# What tells the volumes of one series apart that lie in one place, the first that does. The first
# element of each row is what the note names.
PHASE_ELEMENTS = (
    "TemporalPositionIdentifier",
    "EchoNumbers",
    "EchoTime",
    "DiffusionBValue",
    "ImageType",
    "AcquisitionNumber",
    "InversionTime",
    "TriggerTime",
    "AcquisitionTime",
    "ContentTime",
)
NAMES = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "Modality",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Rows",
    "Columns",
    "NumberOfFrames",
    *PHASE_ELEMENTS,
)
# SOP classes (DICOM PS3.4, annex B).
CAPTURES = "1.2.840.10008.5.1.4.1.1.7"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
# Two axes are the same if their cosine differs from 1 by less.
SAME_AXIS = 1e-3


@dataclass
class Slice:
    """A file of a series, as far as grouping needs it."""

    path: Path
    header: Any

    def text(self, name: str) -> str:
        """Give an element as text, "" if it is missing."""
        value = self.header.get(name)
        return "" if value is None else str(value)

    @property
    def frames(self) -> int:
        numbers = read_numbers(self.header, "NumberOfFrames")
        return int(numbers[0]) if numbers else 1

    @property
    def number(self) -> float:
        """InstanceNumber, the order in which the scanner numbered the files."""
        return (read_numbers(self.header, "InstanceNumber") or (0.0,))[0]

    @property
    def axis(self) -> tuple[float, ...]:
        """The direction across the slice; () if it is not known."""
        directions = read_numbers(self.header, "ImageOrientationPatient")
        if len(directions) != 6:
            return ()
        return tuple(np.cross(directions[:3], directions[3:]).tolist())

    @property
    def position_mm(self) -> float | None:
        """Where the slice lies on its axis; None if it is not known."""
        corner, axis = read_numbers(self.header, "ImagePositionPatient"), self.axis
        return float(np.dot(axis, corner)) if len(corner) == 3 and axis else None

    @property
    def size(self) -> tuple[str, str]:
        return self.text("Rows"), self.text("Columns")


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
    if one.text("SOPClassUID") in SEGMENTATIONS:
        return "a DICOM segmentation, which is a mask"
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
            volumes += _split_phases(_without_copies(part, notes), notes)
    return volumes


def _rounded(axis: tuple[float, ...]) -> tuple[float, ...]:
    # 0.0 is added because -0.0 would be another key.
    return tuple(round(value, 2) + 0.0 for value in axis)


def _without_copies(part: Sequence[Slice], notes: list[str]) -> list[Slice]:
    """Leave out files that are there twice."""
    kept: dict[tuple, Slice] = {}
    for one in part:
        uid = one.text("SOPInstanceUID")
        key = (uid or str(one.path), one.position_mm, one.number)
        if key in kept and _same_end(one.path, kept[key].path):
            notes.append(f"{one.path}: a copy of {kept[key].path.name}; left out")
        else:
            # The same UID on two images: an anonymiser's mistake.
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


# ----------------------------------------------------------------------------------------- phases


def _split_phases(part: list[Slice], notes: list[str]) -> list[list[Slice]]:
    """Split slices that lie in the same places into volumes, such as phases and echoes."""
    part = sorted(part, key=lambda one: (one.position_mm, one.number, one.path))
    repeats = _most_at_one_place(part)
    if repeats == 1:
        return [part]
    volumes, element = _by_element(part, repeats), ""
    if volumes:
        element, volumes = volumes
    else:
        volumes = _by_turns(part)
    how = f"told apart by {element}" if element else "in the order of their numbers"
    folder = part[0].path.parent
    notes.append(
        f"{folder}: a series of {len(part)} slices shows the same places up to {repeats} times; "
        f"it is {len(volumes)} volumes, {how}"
    )
    return volumes


def _most_at_one_place(part: Sequence[Slice]) -> int:
    """Count the slices at the place that has most of them; `part` is sorted by place."""
    most, count, last = 1, 0, -np.inf
    for one in part:
        if one.position_mm - last > MIN_STEP_MM:
            count, last = 0, one.position_mm
        count += 1
        most = max(most, count)
    return most


def _by_element(part: Sequence[Slice], repeats: int) -> tuple[str, list[list[Slice]]] | None:
    """Split by the element whose values give so many volumes, each place once in each."""
    combined = ("EchoNumbers", "DiffusionBValue", "ImageType", "TemporalPositionIdentifier")
    for names in (*((name,) for name in PHASE_ELEMENTS), combined):
        volumes = defaultdict(list)
        for one in part:
            volumes[tuple(one.text(name) for name in names)].append(one)
        fits = len(volumes) == repeats
        if fits and all(_most_at_one_place(volume) == 1 for volume in volumes.values()):
            return " and ".join(names), sorted(volumes.values(), key=_first_number)
    return None


def _first_number(volume: Sequence[Slice]) -> float:
    return min(one.number for one in volume)


def _by_turns(part: Sequence[Slice]) -> list[list[Slice]]:
    """Put the first slice of each place into the first volume, the second into the second …"""
    volumes: list[list[Slice]] = []
    count, last = 0, -np.inf
    for one in part:
        if one.position_mm - last > MIN_STEP_MM:
            count, last = 0, one.position_mm
        if count == len(volumes):
            volumes.append([])
        volumes[count].append(one)
        count += 1
    return volumes


# ------------------------------------------------------------------------------- beside a volume


def _with_singles(
    stacks: list[list[Slice]], singles: Sequence[Slice], notes: list[str]
) -> list[list[Path]]:
    """List the volumes; of the single images those that are not mere company of a volume."""
    scouts = [stack for stack in stacks if _is_localizer(stack[0])]
    real = [stack for stack in stacks if not _is_localizer(stack[0])]
    beside = real + [[one] for one in singles if one.frames > 1 and not _is_capture(one)]
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
        same = [one.text(name) == first.text(name) for name in ("StudyInstanceUID", "Modality")]
        crosswise = one.axis and first.axis and abs(np.dot(one.axis, first.axis)) < 1 - SAME_AXIS
        if all(same) and len(volume) > 1 and one.frames == 1 and crosswise:
            return "a slice across the others, as scouts are,"
        in_series = one.text("SeriesInstanceUID") == first.text("SeriesInstanceUID") != ""
        if in_series and len(volume) > 1 and one.frames == 1 and one.position_mm is None:
            return "an image of the same series without a position"
    return ""


def _is_capture(one: Slice) -> bool:
    return f"{one.text('SOPClassUID')}.".startswith(f"{CAPTURES}.")


def _is_localizer(one: Slice) -> bool:
    return "LOCALIZER" in one.text("ImageType").upper()
