"""DICOM files of one frame or several, read by pydicom.

A file is opened once: `read_header` gives its elements, `decode_header` its pixels.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from imaging import dicom_codecs
from imaging.scan import Scan, check_declared_bytes
from utils import UserError, first_line

MAGIC = ((128, b"DICM"),)
HEAD_BYTES = 132
PIXEL_ELEMENTS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# DICOM's axes run to the left and back, RAS to the right and front.
LPS_TO_RAS = np.diag((-1, -1, 1, 1))
Numbers = tuple[float, ...]


def is_dicom(head: bytes) -> bool:
    """Say whether a file is DICOM, by its first HEAD_BYTES bytes."""
    return head.startswith(b"DICM", 128)


def read_header(content: bytes, max_bytes: float) -> Any:
    """Read a DICOM file's elements; the pixels among them are not yet decoded.

    Raises UserError if it is not DICOM, has no image, or declares more than `max_bytes`.
    """
    import pydicom

    try:
        header = pydicom.dcmread(io.BytesIO(content))
        size = declared_bytes(header)
    except Exception as error:
        raise UserError(f"unreadable as DICOM ({first_line(error)})") from None
    if not any(name in header for name in PIXEL_ELEMENTS):
        raise UserError(
            "a DICOM file without an image, perhaps a report or a plan; expected one with pixels"
        )
    check_declared_bytes(max_bytes, size)
    # pydicom would keep the whole file in memory as long as the header.
    header.buffer = None
    return header


def declared_bytes(header: Any) -> int:
    """Count the bytes that a file's pixels will take. Grey levels become float32."""
    frames = int(header.get("NumberOfFrames") or 1)
    rows, columns = int(header.get("Rows") or 1), int(header.get("Columns") or 1)
    samples = int(header.get("SamplesPerPixel") or 1)
    bytes_per_sample = -(-int(header.get("BitsAllocated") or 1) // 8)
    # A pixel of a palette becomes three colours of 16 bits: 6 bytes.
    return frames * rows * columns * max(6, bytes_per_sample * samples)


def decode_dicom(content: bytes, max_bytes: int) -> Scan:
    """Decode a DICOM file of one frame or several: grey levels rescaled, CT in HU.

    Raises UserError.
    """
    return decode_header(read_header(content, max_bytes))


def decode_header(header: Any) -> Scan:
    """Decode the pixels of a file that `read_header` opened, and drop them from the header.

    Raises UserError.
    """
    try:
        pixels, window = _decode_pixels(header)
        scan = Scan(
            pixels,
            spacing_mm(header),
            window,
            patient_hash(header),
            affine=slice_affine([header]),
            header=(header,),
        )
    except Exception as error:
        raise UserError(f"its pixels cannot be decoded ({first_line(error)})") from None
    for name in PIXEL_ELEMENTS:
        if name in header:
            delattr(header, name)
    return scan


def _decode_pixels(header: Any) -> tuple[np.ndarray, Numbers | None]:
    """Decode to (F, H, W, C), more is brighter; give the window that the file proposes too."""
    pixels = _decode_stored(header)
    if pixels.shape[-1] > 1:
        return pixels, None
    pixels = rescale(pixels, header)
    window = _window(header)
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        # Low is white, as on film: lowest and highest level change places.
        total = _sum_of_extremes(header)
        np.subtract(total, pixels, out=pixels)
        window = window and (total - window[0], window[1])
    return pixels, window


def _decode_stored(header: Any) -> np.ndarray:
    """Decode the pixels as stored, a palette's as colours: (F, H, W, C)."""
    from pydicom.pixels import apply_color_lut, pixel_array

    # Our decoders are used even if pydicom finds others.
    ours = header.file_meta.TransferSyntaxUID in dicom_codecs.register()
    stored = pixel_array(header, decoding_plugin=dicom_codecs.PLUGIN if ours else "")
    colours = int(header.get("SamplesPerPixel") or 1)
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        stored = apply_color_lut(stored, header)
        colours = stored.shape[-1]
    return stored.reshape(-1, header.Rows, header.Columns, colours)


def rescale(stored: np.ndarray, header: Any) -> np.ndarray:
    """Turn stored grey levels (F, H, W, 1) into those of the modality, float32: of CT into HU."""
    from pydicom.pixels import apply_modality_lut

    if header.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, header), np.float32)
    frames = range(len(stored))
    slopes = [(look_up(header, "RescaleSlope", i) or (1,))[0] for i in frames]
    intercepts = [(look_up(header, "RescaleIntercept", i) or (0,))[0] for i in frames]
    levels = stored.astype(np.float32)
    # In place, because volumes are large.
    levels *= np.float32(slopes)[:, None, None, None]
    levels += np.float32(intercepts)[:, None, None, None]
    return levels


def _sum_of_extremes(header: Any) -> float:
    """Add the lowest and the highest grey level that the file can store, rescaled."""
    bits = int(header.BitsStored)
    lowest = -int(header.PixelRepresentation) << bits - 1
    extremes = np.array([lowest, lowest + (1 << bits) - 1]).reshape(1, 1, 2, 1)
    return float(rescale(extremes, header).sum())


def _window(header: Any) -> Numbers | None:
    """Read the first window (centre, width) that the file proposes."""
    centre, width = look_up(header, "WindowCenter"), look_up(header, "WindowWidth")
    return (centre[0], width[0]) if centre and width and width[0] > 0 else None


def patient_hash(header: Any) -> str:
    """Hash the patient's ID; "" if there is none."""
    patient = str(header.get("PatientID") or "")
    return hashlib.sha256(patient.encode()).hexdigest()[:16] if patient else ""


def read_numbers(header: Any, name: str) -> Numbers:
    """Read an element's numbers; none if it is missing, or holds anything else."""
    value = header.get(name)
    if value is None:
        return ()
    try:
        numbers = np.atleast_1d(np.float64(value))
    except (ValueError, TypeError):
        return ()
    return tuple(numbers.tolist()) if np.isfinite(numbers).all() else ()


def look_up(header: Any, name: str, frame: int = 0) -> Numbers:
    """Read a frame's numbers of an element, wherever DICOM allows the element to stand."""
    for place in _places(header, frame):
        numbers = read_numbers(place, name)
        if numbers:
            return numbers
    return ()


def _places(header: Any, frame: int) -> Iterator[Any]:
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


def spacing_mm(header: Any) -> tuple[float, float, float] | None:
    """Read the distance between slices, rows and columns, where the file has it."""
    plane = look_up(header, "PixelSpacing") or look_up(header, "ImagerPixelSpacing")
    between = 1.0
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        found = look_up(header, name)
        if found and found[0] > 0:
            between = found[0]
            break
    spacing = (between, *plane)
    return spacing if len(spacing) == 3 and min(spacing) > 0 else None


def slice_affine(headers: Sequence[Any]) -> np.ndarray | None:
    """Give the affine (4, 4) of slices, rows and columns to RAS in mm, where the files have it.

    headers: one file of one frame or several, or a sorted series.
    """
    first, last = headers[0], headers[-1]
    frames = int(last.get("NumberOfFrames") or 1)
    count = len(headers) if len(headers) > 1 else frames
    start = look_up(first, "ImagePositionPatient")
    end = look_up(last, "ImagePositionPatient", frames - 1)
    directions = look_up(first, "ImageOrientationPatient")
    spacing = spacing_mm(first)
    if len(start) != 3 or len(end) != 3 or len(directions) != 6 or spacing is None:
        return None
    along_row, down_column = np.array(directions[:3]), np.array(directions[3:])
    if count > 1:
        slice_step = np.subtract(end, start) / (count - 1)
    else:
        slice_step = np.cross(along_row, down_column) * spacing[0]
    row_step, column_step = down_column * spacing[1], along_row * spacing[2]
    affine = np.eye(4)
    affine[:3] = np.stack([slice_step, row_step, column_step, start], axis=1)
    return LPS_TO_RAS @ affine
