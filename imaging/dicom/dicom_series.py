"""DICOM series: files that are the slices of one volume."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from imaging import dicom, lazy
from imaging.dicom import dicom_file
from imaging.dicom.dicom_elements import count_frames, read_numbers
from imaging.dicom.dicom_geometry import (
    MIN_STEP_MM,
    describe_gaps,
    positions_mm,
    slice_affine,
    usual_step_mm,
)
from imaging.dicom.dicom_grey import fill_empty_slices
from imaging.dicom.dicom_groups import group_files
from imaging.scan import Scan, check_declared_bytes, name_in_errors, read_bytes
from utils import UserError

__all__ = ["group_files", "is_dicom_file", "read_folder", "read_series", "series_files"]


def is_dicom_file(path: str | Path) -> bool:
    """Say whether a file is DICOM, by its first bytes, and no DICOMDIR.

    Raises UserError if it cannot be opened.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(dicom_file.HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror})") from None
    return dicom_file.is_dicom(head) and not dicom_file.is_directory(head)


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


def volume_files(folder: str | Path) -> tuple[list[Path], list[str]]:
    """List the files of a folder's only volume, and notes on those that are left out.

    Raises UserError.
    """
    return find_only_volume(series_files(folder))


def find_only_volume(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """List the files of the only volume among DICOM files, and notes on those that are left out.

    Files without positions are one volume if they are of one series. Raises UserError.
    """
    if not files:
        raise UserError("no DICOM files; expected those of one series")
    volumes, notes = group_files(files)
    if len(volumes) == 1:
        return volumes[0], notes
    if volumes and all(len(volume) == 1 for volume in volumes):
        # Their headers are compared when they are read.
        return [volume[0] for volume in volumes], notes
    sizes = ", ".join(str(len(volume)) for volume in volumes)
    found = f"{len(volumes)} volumes, of {sizes} files" if volumes else "no image"
    reasons = "".join(f"; {note}" for note in notes[:3])
    raise UserError(f"{found}; expected one volume: put each in its own folder{reasons}")


def read_folder(folder: str | Path, max_bytes: int) -> Scan:
    """Read the only volume in a folder of DICOM files.

    Raises UserError, its message names the file but not the folder.
    """
    return read_only_volume(series_files(folder), max_bytes, f"{folder}/")


def read_only_volume(files: Sequence[Path], max_bytes: int, folder: str = "") -> Scan:
    """Read the only volume among DICOM files. Raises UserError.

    folder: is left out of the notes.
    """
    files, notes = find_only_volume(files)
    scan = read_series(files, max_bytes)
    told = tuple(note.removeprefix(folder) for note in notes)
    return replace(scan, notes=(*scan.notes, *told))


def read_series(files: Sequence[Path], max_bytes: int) -> Scan:
    """Read the files of one volume, a slice each, or one file of several frames.

    Raises UserError, its message names the file but not the folder.
    """
    if len(files) == 1:
        with name_in_errors(files[0].name):
            return dicom.decode_dicom(read_bytes(files[0]), max_bytes)
    # The files of a large volume are read twice, so that they are not held beside it.
    is_large = sum(file.stat().st_size for file in files) > lazy.LARGE_BYTES
    headers = []
    for file in files:
        with name_in_errors(file.name):
            headers.append(dicom.read_header(read_bytes(file), max_bytes))
        if is_large:
            dicom.drop_pixels(headers[-1])
    order = sort_slices(headers)
    files, headers = [files[i] for i in order], [headers[i] for i in order]
    check_declared_bytes(max_bytes, sum(map(dicom_file.declared_bytes, headers)))
    slices, pixels = [], None
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        with name_in_errors(file.name):
            if is_large:
                header = dicom.read_header(read_bytes(file), max_bytes)
            one = dicom.decode_header(header, headers[0])
        if pixels is None:
            pixels = np.empty((len(files), *one.pixels.shape[1:]), one.pixels.dtype)
        if one.pixels.shape[1:] != pixels.shape[1:] or len(one.pixels) > 1:
            raise UserError("the files of the series have different numbers of frames or colours")
        pixels = pixels.astype(np.promote_types(pixels.dtype, one.pixels.dtype), copy=False)
        pixels[number] = one.pixels[0]
        # The slices are not held twice.
        slices.append(replace(one, pixels=one.pixels[:0].copy()))
    return _join(slices, pixels, [file.name for file in files])


def _join(slices: Sequence[Scan], pixels: np.ndarray, names: Sequence[str]) -> Scan:
    """Make one volume of sorted slices, whose pixels are (S, H, W, C)."""
    first = slices[0]
    headers = tuple(one.header[0] for one in slices)
    positions = positions_mm(headers) or []
    step_mm, spacing = usual_step_mm(positions), first.spacing_mm
    if spacing and step_mm:
        spacing = (step_mm, *spacing[1:])
    # Each note once.
    notes = dict.fromkeys(note for one in slices for note in one.notes)
    fill_empty_slices(pixels)
    return replace(
        first,
        pixels=pixels,
        spacing_mm=spacing,
        affine=slice_affine(headers),
        header=headers,
        notes=(*notes, *describe_gaps(positions, names)),
    )


def sort_slices(headers: Sequence[Any]) -> list[int]:
    """Sort a series along its axis, from the feet up where it is axial: the order of the files.

    Without positions they are sorted by their numbers. Raises UserError unless the files are slices
    of one series, each position once.
    """
    _check_one_series(headers)
    if max(map(count_frames, headers)) > 1:
        raise UserError("several files of several frames each; expected one, or a slice in each")
    positions = positions_mm(headers)
    if positions is None:
        numbers = [read_numbers(header, "InstanceNumber") for header in headers]
        return sorted(range(len(headers)), key=numbers.__getitem__)
    order = sorted(range(len(headers)), key=positions.__getitem__)
    if np.diff([positions[i] for i in order]).min() < MIN_STEP_MM:
        raise UserError("two files of the series have the same position; expected each once")
    return order


def _check_one_series(headers: Sequence[Any]) -> None:
    """Raise UserError unless all files are of one series and one size."""
    series = {header.get("SeriesInstanceUID") for header in headers}
    sizes = {(header.get("Rows"), header.get("Columns")) for header in headers}
    if len(series) > 1 or len(sizes) > 1:
        raise UserError(
            f"{len(series)} series of {len(sizes)} sizes in one folder; expected one of each: "
            "put each image in a folder of its own"
        )
    axes = {_rounded_axes(h) for h in headers}
    if len(axes) > 1:
        raise UserError(f"slices of {len(axes)} directions in one folder; expected parallel ones")


def _rounded_axes(header: Any) -> tuple[float, ...]:
    return tuple(round(value, 2) + 0.0 for value in read_numbers(header, "ImageOrientationPatient"))
