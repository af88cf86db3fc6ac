"""The slices of a DICOM series: where they lie, and which volumes they are if places repeat."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from imaging.dicom.dicom_elements import read_numbers
from imaging.dicom.dicom_geometry import MIN_STEP_MM

# Slices are in one place if they are closer than this share of their thickness.
SAME_PLACE = 0.01
# What tells the volumes of one series apart that lie in one place: the first that does.
PHASE_ELEMENTS = (
    "TemporalPositionIdentifier",
    "EchoNumbers",
    "EchoTime",
    "DiffusionBValue",
    "ImageType",
    "SequenceName",
    "FlipAngle",
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
    "SliceThickness",
    "Rows",
    "Columns",
    "NumberOfFrames",
    *PHASE_ELEMENTS,
)


@dataclass
class Slice:
    """A file of a series, as far as grouping needs it."""

    path: Path
    header: Any

    def text(self, name: str) -> str:
        """Give an element as text, "" if it is missing."""
        value = self.header.get(name)
        return "" if value is None else str(value)

    @cached_property
    def frames(self) -> int:
        """Count its frames."""
        numbers = read_numbers(self.header, "NumberOfFrames")
        return int(numbers[0]) if numbers else 1

    @cached_property
    def number(self) -> float:
        """InstanceNumber, the order in which the scanner numbered the files."""
        return (read_numbers(self.header, "InstanceNumber") or (0.0,))[0]

    @cached_property
    def axis(self) -> tuple[float, ...]:
        """The direction across the slice; () if it is not known."""
        directions = read_numbers(self.header, "ImageOrientationPatient")
        if len(directions) != 6:
            return ()
        return tuple(np.cross(directions[:3], directions[3:]).tolist())

    @cached_property
    def position_mm(self) -> float | None:
        """Where the slice lies on its axis; None if it is not known."""
        corner, axis = read_numbers(self.header, "ImagePositionPatient"), self.axis
        return float(np.dot(axis, corner)) if len(corner) == 3 and axis else None

    @cached_property
    def tolerance_mm(self) -> float:
        """How far from it another slice may lie that is in the same place."""
        thickness = read_numbers(self.header, "SliceThickness") or (0.0,)
        return max(MIN_STEP_MM, SAME_PLACE * thickness[0])

    @property
    def size(self) -> tuple[str, str]:
        """Its rows and columns."""
        return self.text("Rows"), self.text("Columns")


def split_phases(part: list[Slice], notes: list[str]) -> list[list[Slice]]:
    """Split slices that lie in the same places into volumes, such as phases and echoes."""
    part = [one for place in _places(part) for one in place]
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


def _places(part: Sequence[Slice]) -> list[list[Slice]]:
    """Sort slices by their places; those of one place by their numbers."""
    places: list[list[Slice]] = []
    for one in sorted(part, key=lambda one: one.position_mm):
        if not places or one.position_mm - places[-1][0].position_mm > one.tolerance_mm:
            places.append([])
        places[-1].append(one)
    return [sorted(place, key=lambda one: (one.number, one.path)) for place in places]


def _most_at_one_place(part: Sequence[Slice]) -> int:
    """Count the slices at the place that has most of them."""
    return max(map(len, _places(part)))


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
    for place in _places(part):
        for turn, one in enumerate(place):
            if turn == len(volumes):
                volumes.append([])
            volumes[turn].append(one)
    return volumes
