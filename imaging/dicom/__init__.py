"""DICOM images of one frame or several, read by pydicom.

A file is opened once: `read_header` gives its elements, `decode_header` its pixels.
"""

import hashlib
from typing import Any

import numpy as np

from imaging.dicom import dicom_codecs
from imaging.dicom.dicom_elements import count_frames, knows_distance, spacing_mm
from imaging.dicom.dicom_file import MAGIC, PIXEL_ELEMENTS, SEGMENTATIONS, is_dicom, read_header
from imaging.dicom.dicom_geometry import (
    describe_gaps,
    slice_affine,
    sort_frames,
    sorted_positions_mm,
    usual_step_mm,
)
from imaging.dicom.dicom_grey import Proposal, fill_empty_slices, to_grey
from imaging.scan import NO_DISTANCE, Scan
from utils import UserError, first_line

__all__ = ["MAGIC", "decode_dicom", "decode_header", "is_dicom", "read_header"]


def is_seg(header: Any) -> bool:
    """Say whether a DICOM file is a segmentation."""
    return header.get("SOPClassUID") in SEGMENTATIONS


def decode_dicom(content: bytes, max_bytes: int) -> Scan:
    """Decode a DICOM file of one frame or several: grey levels rescaled, CT in HU.

    Raises UserError.
    """
    header = read_header(content, max_bytes)
    if is_seg(header):
        raise UserError(
            "a DICOM segmentation, which is a mask; expected an image, or the mask beside its image"
        )
    scan = decode_header(header)
    fill_empty_slices(scan.pixels)
    return scan


def decode_header(header: Any, first: Any = None) -> Scan:
    """Decode the pixels of a file that `read_header` opened, and drop them from the header.

    first: header of the first slice of its series, see `to_grey`.
    Frames are sorted by their positions. Raises UserError.
    """
    try:
        pixels, proposal, notes = _decode_pixels(header, first)
        spacing, more = _spacing_mm(header)
        scan = Scan(
            pixels,
            spacing,
            proposal.window,
            patient_hash(header),
            affine=slice_affine([header]),
            header=(header,),
            notes=(*notes, *more),
            voi_curve=proposal.curve,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"its pixels cannot be decoded ({first_line(error)})") from None
    drop_pixels(header)
    return scan


def drop_pixels(header: Any) -> None:
    """Remove the pixels, decoded or not, from a header."""
    for name in PIXEL_ELEMENTS:
        if name in header:
            delattr(header, name)


def _decode_pixels(header: Any, first: Any) -> tuple[np.ndarray, Proposal, tuple[str, ...]]:
    """Decode to (F, H, W, C), more is brighter; give what the file proposes to show, and notes."""
    # Frames that cannot be sorted are found before anything is decoded.
    order = sort_frames(header)
    pixels, proposal, notes = decode_stored(header), Proposal(), ()
    if pixels.shape[-1] == 1:
        pixels, proposal, notes = to_grey(pixels, header, first)
    if len(order) == len(pixels) and order != sorted(order):
        pixels = pixels[order]
        notes = (*notes, "its frames are sorted by their positions")
    return pixels, proposal, notes


def decode_stored(header: Any) -> np.ndarray:
    """Decode the pixels as stored, a palette's as colours: (F, H, W, C)."""
    from pydicom.pixels import apply_color_lut

    stored = decode_raw(header)
    colours = int(header.get("SamplesPerPixel") or 1)
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        stored = apply_color_lut(stored, header)
        colours = stored.shape[-1]
    return stored.reshape(-1, header.Rows, header.Columns, colours)


def decode_raw(header: Any) -> np.ndarray:
    """Decode the pixels as pydicom gives them, and leave out bits below the lowest one in use.

    pydicom takes the lowest bit to be the first. Before 2003 it could be another (HighBit).
    """
    from pydicom.pixels import pixel_array

    # Our decoders are used even if pydicom finds others.
    ours = header.file_meta.TransferSyntaxUID in dicom_codecs.register()
    plugin = dicom_codecs.PLUGIN if ours else ""
    bits, high = int(header.get("BitsStored") or 0), header.get("HighBit")
    unused = 0 if high is None else int(high) + 1 - bits
    is_compressed = header.file_meta.TransferSyntaxUID.is_compressed
    if unused <= 0 or is_compressed or int(high) >= int(header.BitsAllocated):
        return pixel_array(header, decoding_plugin=plugin)
    header.BitsStored = int(high) + 1
    try:
        return pixel_array(header, decoding_plugin=plugin) >> unused
    finally:
        header.BitsStored = bits


def _spacing_mm(header: Any) -> tuple[tuple[float, float, float] | None, tuple[str, ...]]:
    """Read the spacing, that between frames from their positions, and notes."""
    spacing, notes = spacing_mm(header)
    if count_frames(header) == 1:
        return spacing, notes
    positions = sorted_positions_mm([header]) or []
    step = usual_step_mm(positions)
    if spacing and step:
        spacing = (step, *spacing[1:])
    elif spacing and (positions or not knows_distance(header)):
        notes = (*notes, NO_DISTANCE)
    names = [f"frame {i + 1}" for i in range(len(positions))]
    return spacing, (*notes, *describe_gaps(positions, names))


def patient_hash(header: Any) -> str:
    """Hash the patient's ID; "" if there is none."""
    patient = str(header.get("PatientID") or "")
    return hashlib.sha256(patient.encode()).hexdigest()[:16] if patient else ""
