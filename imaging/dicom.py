"""Decode DICOM, NIfTI and TIFF stacks, and write masks back in kind. `images.py` comes here for such files.

A NIfTI volume is turned so that its slices are those of the acquisition (across its coarsest axis, else axial) and
stand as radiologists look at them; its mask is turned back. A DICOM series is a folder of files, a slice each.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import imagecodecs
import numpy as np

from imaging.files import is_dicom
from imaging.scan import Scan, check_declared_bytes
from utils import UserError, first_line

T = TypeVar("T")
JPEG_COLOURS = {"RGB": "RGB", "YBR_FULL": "YCBCR", "YBR_FULL_422": "YCBCR"}


# ------------------------------------------------------------------------------------------------------------- DICOM
# pydicom reads the file and its uncompressed pixels; imagecodecs, as a plugin of pydicom, the compressed ones.

DECODER_DEPENDENCIES: dict[
    str, tuple[str, ...]
] = {}  # pydicom asks a plugin for this name and the next


def is_available(uid: str) -> bool:
    """Tell pydicom that nothing is lacking."""
    return True


def decode_frame(src: bytes, runner: Any) -> bytearray:
    """Decode one frame that is JPEG, JPEG-LS or JPEG 2000; `runner` knows what the file says of it."""
    from pydicom import uid

    samples = () if runner.samples_per_pixel == 1 else (runner.samples_per_pixel,)
    out = np.empty((runner.rows, runner.columns, *samples), f"u{runner.bits_allocated // 8}")
    colours = JPEG_COLOURS.get(runner.photometric_interpretation) if samples else None
    if runner.transfer_syntax in uid.JPEGLSTransferSyntaxes:
        imagecodecs.jpegls_decode(src, out=out)
    elif runner.transfer_syntax in uid.JPEG2000TransferSyntaxes:
        start = max(
            0, src.find(b"\xff\x4f\xff\x51")
        )  # of the codestream and its SIZ marker; some are wrapped in JP2
        size = tuple(int.from_bytes(src[start + i : start + i + 4]) for i in (12, 8))
        if (
            size != out.shape[:2]
            or int.from_bytes(src[start + 40 : start + 42]) != runner.samples_per_pixel
        ):
            raise ValueError(
                f"a frame of {size} pixels in a file of {out.shape[:2]}, or other colours"
            )
        out[...] = imagecodecs.jpeg2k_decode(src)
    else:
        imagecodecs.jpeg_decode(
            src, colorspace=colours, outcolorspace="RGB" if colours else None, out=out
        )
    if samples:
        runner.set_option("photometric_interpretation", "RGB")
        runner.set_option("planar_configuration", 0)
    return bytearray(out.tobytes())


def read_header(content: bytes) -> Any:
    """Read a DICOM file's elements, its pixels not yet decoded. Raises UserError if it is none or has no image."""
    import pydicom

    try:
        header = pydicom.dcmread(io.BytesIO(content))
        size = declared_bytes(header)
    except Exception as error:
        raise UserError(f"unreadable as DICOM ({first_line(error)})") from None
    if not any(name in header for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UserError(
            "a DICOM file without an image, a report or a plan perhaps; expected one with pixels"
        )
    check_declared_bytes(size)
    return header


def declared_bytes(header: Any) -> int:
    """Count the bytes that a file's pixels will take: grey levels become float32."""
    sizes = [int(header.get(name) or 1) for name in ("NumberOfFrames", "Rows", "Columns")]
    samples, bits = (int(header.get(name) or 1) for name in ("SamplesPerPixel", "BitsAllocated"))
    return int(np.prod(sizes, dtype=object)) * max(
        6, -(-bits // 8) * samples
    )  # 6: a palette's colours


def decode_dicom(content: bytes) -> Scan:
    """Decode a DICOM file of one frame or several: pixels rescaled (CT in HU). Raises UserError."""
    from pydicom import uid
    from pydicom.pixels import apply_color_lut, get_decoder, pixel_array

    header = read_header(content)
    ours = (
        *uid.JPEGTransferSyntaxes,
        *uid.JPEGLSTransferSyntaxes,
        uid.JPEG2000Lossless,
        uid.JPEG2000,
    )
    for syntax in ours:
        if "imagecodecs" not in get_decoder(syntax).available_plugins:
            get_decoder(syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))
    try:
        plugin = (
            "imagecodecs" if header.file_meta.TransferSyntaxUID in ours else ""
        )  # whatever else is installed
        stored, colours, window = (
            pixel_array(header, decoding_plugin=plugin),
            int(header.get("SamplesPerPixel") or 1),
            None,
        )
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            stored = apply_color_lut(stored, header)
            colours = stored.shape[-1]
        pixels = stored.reshape(-1, header.Rows, header.Columns, colours)
        if colours == 1:
            pixels = rescale(pixels, header)
            centre, width = (_look_up(header, name)[:1] for name in ("WindowCenter", "WindowWidth"))
            window = (*centre, *width) if centre and width and width[0] > 0 else None
        if header.get("PhotometricInterpretation") == "MONOCHROME1":  # low is white, as on film
            lowest = -int(header.PixelRepresentation) << int(header.BitsStored) - 1
            ends = np.array([lowest, lowest + (1 << int(header.BitsStored)) - 1]).reshape(
                1, 1, 2, 1
            )
            total = float(rescale(ends, header).sum())
            np.subtract(total, pixels, out=pixels)
            window = window and (total - window[0], window[1])
        patient = hashlib.sha256(str(header.get("PatientID") or "").encode()).hexdigest()[:16]
        return Scan(
            pixels, dicom_spacing(header), window, patient if header.get("PatientID") else ""
        )
    except Exception as error:
        raise UserError(f"its pixels cannot be decoded ({first_line(error)})") from None


def rescale(stored: np.ndarray, header: Any) -> np.ndarray:
    """Turn stored grey levels (F, H, W, 1) into those of the modality, float32: of CT into HU."""
    from pydicom.pixels import apply_modality_lut

    if header.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, header), np.float32)
    slope, intercept = (
        np.float32([(_look_up(header, name, frame) or (usual,))[0] for frame in range(len(stored))])
        for name, usual in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    levels = stored.astype(np.float32)
    levels *= slope[:, None, None, None]  # in place, as volumes are large
    levels += intercept[:, None, None, None]
    return levels


def _numbers(header: Any, name: str) -> tuple[float, ...]:
    """Read an element's finite numbers; none if it is missing or holds anything else."""
    try:
        values = np.atleast_1d(np.float64(header.get(name) if header.get(name) is not None else ()))
    except (ValueError, TypeError):
        return ()
    return tuple(values.tolist()) if np.isfinite(values).all() else ()


def _look_up(header: Any, name: str, frame: int = 0) -> tuple[float, ...]:
    """Read an element's numbers where a frame's may stand: its own groups, those of all frames, the header itself."""
    places = [header]
    for sequence, i in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        groups = header.get(sequence) or []
        if i < len(groups):
            places += [
                item for element in groups[i] if element.VR == "SQ" for item in element.value
            ]
    return next((numbers for place in reversed(places) if (numbers := _numbers(place, name))), ())


def dicom_spacing(header: Any) -> tuple[float, float, float] | None:
    """Give the millimetres between slices, rows and columns, where the file says so."""
    plane = _look_up(header, "PixelSpacing") or _look_up(header, "ImagerPixelSpacing")
    names = ("SpacingBetweenSlices", "SliceThickness")
    between = next(
        (found[0] for name in names if (found := _look_up(header, name)) and found[0] > 0), 1.0
    )
    spacing = (between, *plane)
    return spacing if len(spacing) == 3 and min(spacing) > 0 else None


def dicom_affine(headers: Sequence[Any]) -> np.ndarray | None:
    """Give the affine of the slices, rows and columns of a file, or a sorted series, to RAS in mm, if it is there."""
    first, last, frames = headers[0], headers[-1], int(headers[-1].get("NumberOfFrames") or 1)
    count = len(headers) if len(headers) > 1 else frames
    start = _look_up(first, "ImagePositionPatient")
    end = _look_up(last, "ImagePositionPatient", frames - 1)
    turned, spacing = _look_up(first, "ImageOrientationPatient"), dicom_spacing(first)
    if len(start) != 3 or len(end) != 3 or len(turned) != 6 or spacing is None:
        return None
    along, down = np.array(turned[:3]), np.array(turned[3:])
    step = (
        np.subtract(end, start) / (count - 1) if count > 1 else np.cross(along, down) * spacing[0]
    )
    affine = np.eye(4)
    affine[:3] = np.stack([step, down * spacing[1], along * spacing[2], start], axis=1)
    return np.diag((-1, -1, 1, 1)) @ affine  # DICOM's axes run to the left and back


def sort_series(headers: Sequence[Any]) -> tuple[list[int], float | None]:
    """Order a series' files along its axis, from the feet up where it is axial; give their distance in mm.

    Raises UserError unless they are slices of one series, each place once.
    """
    series = {header.get("SeriesInstanceUID") for header in headers}
    shapes = {(header.Rows, header.Columns) for header in headers}
    if len(series) > 1 or len(shapes) > 1:
        raise UserError(
            f"{len(series)} series of {len(shapes)} sizes in one folder; expected one of each"
        )
    positions = [_numbers(header, "ImagePositionPatient") for header in headers]
    directions = _numbers(headers[0], "ImageOrientationPatient")
    if len(directions) != 6 or any(len(position) != 3 for position in positions):
        return sorted(
            range(len(headers)), key=lambda i: _numbers(headers[i], "InstanceNumber")
        ), None
    axis = np.cross(directions[:3], directions[3:])
    places = [float(axis @ np.array(position)) for position in positions]
    order = sorted(range(len(headers)), key=places.__getitem__)
    steps = np.diff(np.sort(places))
    if len(steps) and steps.min() < 1e-3:
        raise UserError("two files of the series show the same place; expected each once")
    if len(steps) and steps.max() > 1.5 * steps.min():
        before = headers[order[int(np.argmax(steps))]].get("InstanceNumber")
        apart = f"slices are {steps.min():.3g} to {steps.max():.3g} mm apart, the widest gap after number {before}"
        raise UserError(f"{apart}; expected even steps: is a file missing?")
    return order, float(np.median(steps)) if len(steps) else None


def series_files(folder: str | Path) -> list[Path]:
    """List the DICOM files of a folder, by their first bytes: many have no ending. Raises UserError."""
    files = sorted(
        path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(".")
    )
    return [path for path in files if path.name.upper() != "DICOMDIR" and is_dicom(path)]


def is_one_volume(files: Sequence[Path]) -> bool:
    """Tell whether DICOM files are the slices of one series, not images of their own.

    Raises UserError for slices of several series.
    """
    import pydicom

    slices: Counter[str] = Counter()
    for file in files:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        if len(_numbers(header, "ImagePositionPatient")) != 3:
            return False
        slices[str(header.get("SeriesInstanceUID"))] += 1
    if len(slices) > 1 and max(slices.values()) > 1:
        counts = ", ".join(map(str, slices.values()))
        raise UserError(
            f"{len(slices)} series, of {counts} files; expected one: put each in a folder of its own"
        )
    return len(files) > 1 and len(slices) == 1


def decode_series(contents: Sequence[bytes], names: Sequence[str] = ()) -> Scan:
    """Decode the files of a DICOM series, a slice each: one volume. Raises UserError, naming the file by `names`."""
    if not contents:
        raise UserError("a folder without DICOM files; expected those of one series")

    def named(read: Callable[[bytes], T], i: int) -> T:
        try:
            return read(contents[i])
        except UserError as error:
            raise UserError(f"{names[i] if names else f'file {i + 1}'}: {error}") from None

    headers = [named(read_header, i) for i in range(len(contents))]
    order, step = sort_series(headers)
    check_declared_bytes(sum(map(declared_bytes, headers)))
    scans = [named(decode_dicom, i) for i in order]
    if any(scan.pixels.shape != scans[0].pixels.shape for scan in scans):
        raise UserError("the files of the series have different numbers of frames or colours")
    spacing = scans[0].spacing_mm
    spacing = (step, *spacing[1:]) if spacing and step else spacing
    return replace(
        scans[0], pixels=np.concatenate([scan.pixels for scan in scans]), spacing_mm=spacing
    )
