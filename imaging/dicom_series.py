"""DICOM series: a folder whose files are the slices of one volume."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from imaging import dicom
from imaging.scan import Scan, check_declared_bytes, name_in_errors, read_bytes
from utils import UserError

# Slices closer than this have the same position.
MIN_STEP_MM = 1e-3
# A gap wider than this many steps means that a file is missing.
MAX_UNEVENNESS = 1.5


def is_dicom_file(path: str | Path) -> bool:
    """Say whether a file is DICOM, by its first bytes. Raises UserError if it cannot be opened."""
    try:
        with Path(path).open("rb") as file:
            return dicom.is_dicom(file.read(dicom.HEAD_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror})") from None


def series_files(folder: str | Path) -> list[Path]:
    """List the DICOM files of a folder, by their first bytes, because many have no ending.

    Raises UserError.
    """
    files = []
    for path in sorted(Path(folder).iterdir()):
        hidden = path.name.startswith(".") or path.name.upper() == "DICOMDIR"
        if path.is_file() and not hidden and is_dicom_file(path):
            files.append(path)
    return files


def is_one_volume(files: Sequence[Path]) -> bool:
    """Say whether DICOM files are the slices of one series, not images of their own.

    Raises UserError for slices of several series.
    """
    import pydicom

    counts: Counter[str] = Counter()
    for file in files:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        if len(dicom.read_numbers(header, "ImagePositionPatient")) != 3:
            return False
        counts[str(header.get("SeriesInstanceUID"))] += 1
    if len(counts) > 1 and max(counts.values()) > 1:
        sizes = ", ".join(map(str, counts.values()))
        raise UserError(
            f"{len(counts)} series, of {sizes} files; expected one: put each in its own folder"
        )
    return len(files) > 1 and len(counts) == 1


def read_series(folder: str | Path, max_bytes: int) -> Scan:
    """Read the files of a DICOM series, a slice each, as one volume.

    Raises UserError, its message names the file but not the folder.
    """
    files = series_files(folder) if isinstance(folder, (str, Path)) else folder
    if not files:
        raise UserError("a folder without DICOM files; expected those of one series")
    headers = []
    for file in files:
        with name_in_errors(file.name):
            headers.append(dicom.read_header(read_bytes(file), max_bytes))
    order, step_mm = sort_slices(headers)
    files, headers = [files[i] for i in order], [headers[i] for i in order]
    check_declared_bytes(max_bytes, sum(map(dicom.declared_bytes, headers)))
    slices = []
    for file, header in zip(files, headers, strict=True):
        with name_in_errors(file.name):
            slices.append(dicom.decode_header(header))
    return _join(slices, step_mm)


def _join(slices: Sequence[Scan], step_mm: float | None) -> Scan:
    """Make one volume of sorted slices."""
    first = slices[0]
    if any(one.pixels.shape != first.pixels.shape for one in slices):
        raise UserError("the files of the series have different numbers of frames or colours")
    spacing = first.spacing_mm
    if spacing and step_mm:
        spacing = (step_mm, *spacing[1:])
    headers = tuple(one.header[0] for one in slices)
    pixels = np.concatenate([one.pixels for one in slices])
    affine = dicom.slice_affine(headers)
    return replace(first, pixels=pixels, spacing_mm=spacing, affine=affine, header=headers)


def sort_slices(headers: Sequence[Any]) -> tuple[list[int], float | None]:
    """Sort a series along its axis, from the feet up where it is axial.

    Returns the order of the files, and the distance between slices in mm where positions are known.
    Raises UserError unless the files are slices of one series, each position once.
    """
    _check_one_series(headers)
    positions = _positions_mm(headers)
    if positions is None:
        numbers = [dicom.read_numbers(header, "InstanceNumber") for header in headers]
        return sorted(range(len(headers)), key=numbers.__getitem__), None
    order = sorted(range(len(headers)), key=positions.__getitem__)
    if len(headers) == 1:
        return order, None
    steps = np.diff([positions[i] for i in order])
    _check_steps(steps, [headers[i] for i in order])
    return order, float(np.median(steps))


def _check_one_series(headers: Sequence[Any]) -> None:
    """Raise UserError unless all files are of one series and one size."""
    series = {header.get("SeriesInstanceUID") for header in headers}
    sizes = {(header.get("Rows"), header.get("Columns")) for header in headers}
    if len(series) > 1 or len(sizes) > 1:
        raise UserError(
            f"{len(series)} series of {len(sizes)} sizes in one folder; expected one of each"
        )


def _positions_mm(headers: Sequence[Any]) -> list[float] | None:
    """Project the slices' positions on the axis across them; None if a header lacks one."""
    directions = dicom.read_numbers(headers[0], "ImageOrientationPatient")
    corners = [dicom.read_numbers(header, "ImagePositionPatient") for header in headers]
    if len(directions) != 6 or any(len(corner) != 3 for corner in corners):
        return None
    axis = np.cross(directions[:3], directions[3:])
    return [float(axis @ np.array(corner)) for corner in corners]


def _check_steps(steps: np.ndarray, headers: Sequence[Any]) -> None:
    """Raise UserError if two slices have the same position, or one seems to be missing."""
    if steps.min() < MIN_STEP_MM:
        raise UserError("two files of the series have the same position; expected each once")
    if steps.max() > MAX_UNEVENNESS * steps.min():
        before = headers[int(np.argmax(steps))].get("InstanceNumber")
        raise UserError(
            f"slices are {steps.min():.3g} to {steps.max():.3g} mm apart, the widest gap after "
            f"number {before}; expected even steps: a file may be missing"
        )


def group_files(files: Sequence[Path]) -> tuple[list[list[Path]], list[str]]:
    """Split DICOM files into volumes."""
    if is_one_volume(files):
        return [list(files)], []
    return [[file] for file in files], []
