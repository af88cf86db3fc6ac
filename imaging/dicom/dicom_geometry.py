"""Where the slices of DICOM files lie: positions, the order of frames, gaps, affines in mm."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from imaging.dicom.dicom_elements import between_mm, count_frames, look_up, spacing_mm
from utils import UserError

# DICOM's axes run to the left and back, RAS to the right and front.
LPS_TO_RAS = np.diag((-1, -1, 1, 1))
# Slices closer than this have the same position.
MIN_STEP_MM = 1e-3
# A step wider than this many usual ones means that a slice is missing.
MAX_UNEVENNESS = 1.5


# -------------------------------------------------------------------------------------- positions


def positions_mm(headers: Sequence[Any]) -> list[float] | None:
    """Project the slices' positions on the axis across them; None if one is not known.

    headers: the files of a series, or one file of several frames.
    """
    slices = [(header, frame) for header in headers for frame in range(count_frames(header))]
    directions = look_up(headers[0], "ImageOrientationPatient")
    corners = [look_up(*_arguments(one)) for one in slices]
    if len(directions) != 6 or any(len(corner) != 3 for corner in corners):
        return None
    axis = np.cross(directions[:3], directions[3:])
    return [float(axis @ np.array(corner)) for corner in corners]


def _arguments(one: tuple[Any, int]) -> tuple[Any, str, int]:
    return one[0], "ImagePositionPatient", one[1]


def sort_frames(header: Any) -> list[int]:
    """Sort a file's frames along their axis; as stored if their positions are not known.

    A file whose frames all have one position is a film, as stored. Raises UserError if frames of
    several volumes are mixed.
    """
    frames = count_frames(header)
    positions = positions_mm([header]) if _has_own_positions(header, frames) else None
    if positions is None:
        return list(range(frames))
    directions = {
        tuple(np.round(look_up(header, "ImageOrientationPatient", i), 2)) for i in range(frames)
    }
    if len(directions) > 1:
        raise UserError(
            f"frames of {len(directions)} directions in one file; expected parallel slices: "
            "save each stack as a file of its own"
        )
    order = sorted(range(frames), key=positions.__getitem__)
    steps = np.diff([positions[i] for i in order])
    if steps.max() < MIN_STEP_MM:
        return list(range(frames))
    if steps.min() < MIN_STEP_MM:
        count = 1 + int((steps >= MIN_STEP_MM).sum())
        raise UserError(
            f"{frames} frames at {count} positions: several time points, echoes or stacks in one "
            "file; expected one volume: save each as a file of its own"
        )
    return order


def _has_own_positions(header: Any, frames: int) -> bool:
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    return frames > 1 and len(groups) >= frames and "PlanePositionSequence" in groups[0]


def usual_step_mm(positions: Sequence[float]) -> float | None:
    """Give the usual distance between sorted positions; None if there is none."""
    if len(positions) < 2:
        return None
    step = float(np.median(np.diff(positions)))
    return step if step >= MIN_STEP_MM else None


def is_even(positions: Sequence[float]) -> bool:
    """Say whether sorted positions have about the same distance each."""
    steps = np.diff(positions)
    return len(steps) > 0 and MIN_STEP_MM <= steps.max() <= MAX_UNEVENNESS * steps.min()


def describe_gaps(positions: Sequence[float], names: Sequence[str]) -> tuple[str, ...]:
    """Say where slices seem to be missing, for at most three gaps, or that steps are uneven.

    names: of the slices, such as their files.
    """
    step = usual_step_mm(positions)
    if step is None or is_even(positions):
        return ()
    steps = np.diff(positions)
    gaps, told = np.flatnonzero(steps > MAX_UNEVENNESS * step).tolist(), []
    for i in gaps[:3]:
        width = positions[i + 1] - positions[i]
        missing = max(1, round(width / step) - 1)
        told.append(f"{names[i]} and {names[i + 1]} are {width:.3g} mm apart, {missing} missing")
    if not told:
        return (f"its slices are uneven: {steps.min():.3g} to {steps.max():.3g} mm apart",)
    more = f" and {len(gaps) - 3} more gaps" if len(gaps) > 3 else ""
    return (f"a gap: slices are {step:.3g} mm apart, but {'; '.join(told)}{more}",)


# ---------------------------------------------------------------------------------------- affines


def slice_affine(headers: Sequence[Any]) -> np.ndarray | None:
    """Give the affine (4, 4) of slices, rows and columns to RAS in mm, where the files have it.

    headers: one file of one frame or several, or a sorted series. None also if slices are missing:
    no affine tells that.
    """
    each = slice_affines(headers)
    spacing, _ = spacing_mm(headers[0])
    if each is None or spacing is None:
        return None
    affine = each[0].copy()
    if len(each) > 1:
        if not is_even(sorted_positions_mm(headers)):
            return None
        affine[:3, 0] = (each[-1][:3, 3] - each[0][:3, 3]) / (len(each) - 1)
    return affine


def sorted_positions_mm(headers: Sequence[Any]) -> list[float] | None:
    """Give the positions of a sorted series, or of a file's frames when they are sorted."""
    positions = positions_mm(headers)
    if positions is None or len(headers) > 1:
        return positions
    return [positions[i] for i in sort_frames(headers[0])]


def slice_affines(headers: Sequence[Any]) -> list[np.ndarray] | None:
    """Give an affine (4, 4) to RAS in mm for each slice alone, where the files have it.

    Its first axis is across the slice. headers: as in `slice_affine`.
    """
    if len(headers) > 1:
        places_of = [(header, 0) for header in headers]
    else:
        places_of = [(headers[0], i) for i in sort_frames(headers[0])]
    affines = []
    for header, frame in places_of:
        affine = frame_affine(header, frame)
        if affine is None:
            return None
        affines.append(affine)
    return affines


def frame_affine(header: Any, frame: int) -> np.ndarray | None:
    """Give the affine of one frame, see `slice_affines`."""
    start = look_up(header, "ImagePositionPatient", frame)
    directions = look_up(header, "ImageOrientationPatient", frame)
    plane = look_up(header, "PixelSpacing", frame)
    if len(start) != 3 or len(directions) != 6 or len(plane) != 2 or min(plane) <= 0:
        return None
    along_row, down_column = np.array(directions[:3]), np.array(directions[3:])
    across = np.cross(along_row, down_column) * between_mm(header)
    affine = np.eye(4)
    columns = [across, down_column * plane[0], along_row * plane[1], start]
    affine[:3] = np.stack(columns, axis=1)
    return LPS_TO_RAS @ affine
