"""Read single elements of DICOM headers, wherever they may stand, and the spacing of pixels."""

from collections.abc import Iterator
from typing import Any

import numpy as np

# Codes of ultrasound regions (DICOM PS3.3, C.8.5.5): an ordinary picture, and centimetres.
PICTURE, CENTIMETRES = 1, 3
AT_DETECTOR = (
    "its spacing is that at the detector (ImagerPixelSpacing); in the patient it is smaller"
)
Numbers = tuple[float, ...]


def read_numbers(header: Any, name: str) -> Numbers:
    """Read an element's numbers; none if it is missing, or holds anything else."""
    value = header.get(name)
    if value is None:
        return ()
    try:
        numbers = np.atleast_1d(np.float64(value))
    except (ValueError, TypeError):
        return ()
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        return ()
    return tuple(numbers.tolist())


def look_up(header: Any, name: str, frame: int = 0) -> Numbers:
    """Read a frame's numbers of an element, wherever DICOM allows the element to stand."""
    for place in places(header, frame):
        numbers = read_numbers(place, name)
        if numbers:
            return numbers
    return ()


def places(header: Any, frame: int) -> Iterator[Any]:
    """List where a frame's elements stand: its own groups, those of all frames, the header."""
    for sequence, i in (
        ("PerFrameFunctionalGroupsSequence", frame),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        groups = header.get(sequence) or []
        if i < len(groups):
            for element in groups[i]:
                if element.VR == "SQ":
                    yield from element.value
    yield header


def count_frames(header: Any) -> int:
    """Count the frames of a file."""
    return int(header.get("NumberOfFrames") or 1)


# ---------------------------------------------------------------------------------------- spacing


def spacing_mm(header: Any) -> tuple[tuple[float, float, float] | None, tuple[str, ...]]:
    """Read the distance between slices, rows and columns, where the file has it, and notes."""
    plane, notes = _plane_spacing_mm(header)
    spacing = (between_mm(header), *plane)
    if len(spacing) != 3 or min(spacing) <= 0:
        return None, notes if not plane else ()
    return spacing, notes


def between_mm(header: Any) -> float:
    """Read the distance between slices; 1 if it is not known."""
    return _distances_mm(header)[0] if knows_distance(header) else 1.0


def knows_distance(header: Any) -> bool:
    """Say whether a file tells the distance between slices, or their thickness."""
    return bool(_distances_mm(header))


def _distances_mm(header: Any) -> Numbers:
    found = [look_up(header, name)[:1] for name in ("SpacingBetweenSlices", "SliceThickness")]
    # In nuclear medicine a negative distance means that the slices run the other way.
    return tuple(abs(numbers[0]) for numbers in found if numbers and numbers[0] != 0)


def _plane_spacing_mm(header: Any) -> tuple[Numbers, tuple[str, ...]]:
    """Read the distance between rows and columns, and what must be known of it."""
    imager = look_up(header, "ImagerPixelSpacing")
    plane = look_up(header, "PixelSpacing")
    if plane:
        calibrated = str(header.get("PixelSpacingCalibrationType") or "")
        at_detector = plane == imager and not calibrated
        return plane, (AT_DETECTOR,) if at_detector else ()
    if imager:
        return imager, (AT_DETECTOR,)
    if scanned := look_up(header, "NominalScannedPixelSpacing"):
        return scanned, ("its spacing is that on the film (NominalScannedPixelSpacing)",)
    return _ultrasound_spacing_mm(header)


def _ultrasound_spacing_mm(header: Any) -> tuple[Numbers, tuple[str, ...]]:
    """Read the spacing of ultrasound regions; none if they differ."""
    found = set()
    for region in header.get("SequenceOfUltrasoundRegions") or []:
        units = [region.get(f"PhysicalUnits{axis}Direction") for axis in "YX"]
        deltas = [read_numbers(region, f"PhysicalDelta{axis}") for axis in "YX"]
        if region.get("RegionSpatialFormat") != PICTURE or units != [CENTIMETRES] * 2:
            continue
        if all(deltas):
            # A negative step means that the axis runs the other way.
            found.add(tuple(round(10 * abs(delta[0]), 9) for delta in deltas))
    if len(found) > 1:
        return (), (f"it has {len(found)} ultrasound regions of different spacing: none is used",)
    return found.pop() if found else (), ()
