"""Write DICOM secondary captures: pictures of an image with the outlines of its mask.

Any viewer shows them, also one that knows no segmentations.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from imaging import preprocess
from imaging.dicom.dicom_seg import complete_headers, derive_uid
from imaging.plots import COLOURS, draw_contours, resize_ids
from imaging.scan import Mask, Scan
from utils import UserError, first_line

SERIES_NUMBER = 102
MIN_SIDE, MAX_SIDE = 512, 1024  # pixels of a picture's longer side
LINE, MARGIN = 22, 8  # pixels of a line of text, and around it
MARK = "U-Net, not for diagnosis"
# Where an axis of RAS coordinates leads, backwards and forwards.
DIRECTIONS = ("LR", "PA", "FH")


def encode_overlays(mask: Mask, image: Scan, source: str, window: str = "") -> Iterator[bytes]:
    """Encode each slice that has some mask as a secondary capture; the middle one if none has.

    source: the segmentation's SOPInstanceUID, from which the pictures' follow. window: see
    `preprocess.prepare_scan`. Raises UserError if the headers lack what a picture needs.
    """
    shown = np.flatnonzero(mask.ids.any(axis=(1, 2)))
    shown = shown if len(shown) else [len(mask.ids) // 2]
    header = complete_headers(image.header)[0]
    image = with_window(image, window)
    for number in map(int, shown):
        picture = draw(mask, image, number)
        try:
            capture = _make_capture(header, picture, source, number)
            capture.PatientOrientation = find_orientation(image, header)
            buffer = io.BytesIO()
            capture.save_as(buffer, enforce_file_format=True)
        except MemoryError:
            raise
        except Exception as error:  # a damaged header causes errors of many kinds
            raise UserError(f"no DICOM picture can refer to it ({first_line(error)})") from error
        yield buffer.getvalue()


def _make_capture(header: Any, picture: np.ndarray, source: str, number: int) -> Any:
    """Make the DICOM object of a picture, without its orientation."""
    import highdicom as hd

    capture = hd.sc.SCImage.from_ref_dataset(
        header,
        picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),  # is replaced
        series_instance_uid=derive_uid("overlay series", source),
        series_number=SERIES_NUMBER,
        sop_instance_uid=derive_uid(f"overlay {number}", source),
        instance_number=number + 1,
        manufacturer="none",
        specific_character_set="ISO_IR 192",  # the source's may be none that exists
    )
    capture.ConversionType = "WSD"  # a workstation has drawn it
    capture.Laterality = header.get("Laterality") or ""
    return capture


def find_orientation(image: Scan, header: Any) -> list[str] | None:
    """Say to which side of the patient columns and rows run, as DICOM does; None if unknown."""
    found = header.get("PatientOrientation")
    if found:
        return found
    if image.affine is None:
        return None
    letters = []
    for axis in (2, 1):  # along a row, then along a column
        direction = image.affine[:3, axis]
        largest = int(np.abs(direction).argmax())
        letters.append(DIRECTIONS[largest][int(direction[largest] > 0)])
    return letters


def with_window(image: Scan, window: str) -> Scan:
    """Fix the grey levels that are shown, so that all slices have the same ones."""
    if image.colours.shape[-1] != 1 or window == "file":
        return image
    some = image.colours[:: max(1, len(image.pixels) // 32)]
    low, high = map(float, preprocess.grey_range(some, image, window))
    return replace(image, window=((low + high) / 2, max(high - low, 1e-6)), voi_curve=None)


def draw(mask: Mask, image: Scan, number: int) -> np.ndarray:
    """Draw a slice with the outlines of its classes and their names: RGB (H, W, 3)."""
    height, width = mask.ids.shape[1:]
    side = min(max(MIN_SIDE, height, width), MAX_SIDE)
    scale = side / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    window = "file" if image.window else ""
    picture = preprocess.to_picture(image.slice(number), size, window)[0]
    drawn = draw_contours(picture, resize_ids(mask.ids[number], size))
    return np.ascontiguousarray(np.concatenate([drawn, draw_legend(mask.names, size[1])]))


def draw_legend(names: Sequence[str], width: int) -> np.ndarray:
    """Draw the classes' names in their colours, and what the picture is, a line each."""
    lines = [(MARK, (255, 255, 255))]
    for i, name in enumerate(names):
        # OpenCV's font has ASCII alone.
        lines.append((name.encode("ascii", "replace").decode(), COLOURS[i % len(COLOURS)]))
    legend = np.zeros((LINE * len(lines) + 2 * MARGIN, width, 3), np.uint8)
    for i, (text, colour) in enumerate(lines):
        place = (MARGIN, MARGIN + LINE * i + LINE - 6)
        cv2.putText(legend, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
    return legend
