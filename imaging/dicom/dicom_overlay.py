"""Write DICOM secondary captures: pictures of an image with the outlines of its mask.

Any viewer shows them, also one that knows no segmentations.
"""

import io
from collections.abc import Sequence

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


def encode_overlays(mask: Mask, image: Scan, source: str, window: str = "") -> list[bytes]:
    """Encode each slice that has some mask as a secondary capture; the middle one if none has.

    source: the segmentation's SOPInstanceUID, from which the pictures' follow. window: see
    `preprocess.prepare_scan`. Raises UserError if the headers lack what a picture needs.
    """
    import highdicom as hd

    shown = np.flatnonzero(mask.ids.any(axis=(1, 2)))
    shown = shown if len(shown) else [len(mask.ids) // 2]
    encoded = []
    try:
        header = complete_headers(image.header)[0]
        for number in map(int, shown):
            capture = hd.sc.SCImage.from_ref_dataset(
                header,
                draw(mask, image, number, window),
                photometric_interpretation="RGB",
                bits_allocated=8,
                coordinate_system="PATIENT",
                patient_orientation=header.get("PatientOrientation") or ("L", "P"),
                series_instance_uid=derive_uid("overlay series", source),
                series_number=SERIES_NUMBER,
                sop_instance_uid=derive_uid(f"overlay {number}", source),
                instance_number=number + 1,
                manufacturer="none",
            )
            capture.Laterality = header.get("Laterality") or ""
            buffer = io.BytesIO()
            capture.save_as(buffer, enforce_file_format=True)
            encoded.append(buffer.getvalue())
    except Exception as error:  # a damaged header causes errors of many kinds
        raise UserError(f"no DICOM picture can refer to it ({first_line(error)})") from error
    return encoded


def draw(mask: Mask, image: Scan, number: int, window: str = "") -> np.ndarray:
    """Draw a slice with the outlines of its classes and their names: RGB (H, W, 3)."""
    height, width = mask.ids.shape[1:]
    side = min(max(MIN_SIDE, height, width), MAX_SIDE)
    scale = side / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
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
