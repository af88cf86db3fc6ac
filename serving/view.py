"""What the web page shows of an image and its mask: a form that the browser takes apart itself."""

import json
from typing import Any

import cv2
import numpy as np

from imaging import formats
from imaging.labels import BITS, highest_class, plane
from imaging.preprocess import grey_range, to_channels, to_picture
from imaging.scan import Scan
from serving.errors import Problem, to_json_line
from utils import UserError

# Two random numbers, so that no file holds them by chance.
BOUNDARY = "unet-4c1d7be2a95f4e06-b3f08d5c7a2e4191"
MEDIA_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
MAX_SIDE = 2048  # pixels of a picture's longer side; a larger one is scaled
MAX_VOXELS = 2**27  # of a volume
RAW = "application/octet-stream"
INT16 = np.iinfo(np.int16)


def encode_part(name: str, content: bytes, media_type: str, file_name: str = "") -> bytes:
    """Write a part of the form. Browsers take one without a file name as text."""
    file_name = f'; filename="{file_name}"' if file_name else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file_name}\r\n'
    return f"{head}Content-Type: {media_type}\r\n\r\n".encode() + content + b"\r\n"


def encode_mask(ids: np.ndarray, description: dict[str, Any]) -> bytes:
    """Write the parts `description` (JSON) and `mask` (uint8, slices, rows, columns).

    Where classes overlap, the last one is shown. Raises Problem 413.
    """
    if len(ids) > 1 and ids.size > MAX_VOXELS:
        found, most = ids.size / 2**20, MAX_VOXELS // 2**20
        raise Problem(413, f"{found:.0f} million voxels; the page shows at most {most}")
    shown = ids
    if ids.dtype == BITS:
        shown = np.zeros(ids.shape, np.uint8)
        for number in range(1, highest_class(ids) + 1):
            shown[plane(ids, number)] = number
    shown = shown.astype(np.uint8, copy=False)
    if len(ids) == 1:
        height, width = shown_size(ids.shape[1:])
        shown = cv2.resize(shown[0], (width, height), interpolation=cv2.INTER_NEAREST)[None]
    description = description | {"shape": list(shown.shape)}
    return encode_part("description", to_json_line(description).encode(), "application/json") + (
        encode_part("mask", shown.tobytes(), RAW, "ids")
    )


def encode_image(content: bytes, max_bytes: int, window: str) -> bytes:
    """Write the parts `view` (JSON) and `image`, and the end of the form.

    The image is a PNG, or a volume's grey levels: int16, slices, rows, columns. `view` has the
    window in those levels, and whether rows and columns are shown backwards: as radiologists look
    at a patient, whose right side is on the left. Raises UserError.
    """
    scan = formats.decode_scan(content, max_bytes)
    if len(scan.pixels) == 1:
        shown = to_picture(scan, shown_size(scan.pixels.shape[1:3]), window)[0]
        done, encoded = cv2.imencode(".png", shown[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
        if not done:
            raise UserError("its picture cannot be written as PNG")
        return _finish({"flip": flips(scan)}, encoded.tobytes(), "image/png")
    grey = to_channels(np.asarray(scan.colours), 1)[..., 0]
    low, high = map(float, grey_range(grey[:: max(1, len(grey) // 32)], scan, window))
    levels = grey
    least, most = float(grey.min()), float(grey.max())
    if least < INT16.min or most > INT16.max or (grey != np.round(grey)).any():
        scale = INT16.max / max(most - least, 1e-9)
        levels = (grey.astype(np.float32) - least) * np.float32(scale)
        low, high = (low - least) * scale, (high - least) * scale
    view = {"window": [(low + high) / 2, max(high - low, 1.0)], "flip": flips(scan)}
    return _finish(view, np.ascontiguousarray(levels, "<i2").tobytes(), RAW)


def _finish(view: dict[str, Any], image: bytes, media_type: str) -> bytes:
    described = encode_part("view", json.dumps(view).encode(), "application/json")
    return (
        described
        + encode_part("image", image, media_type, "image")
        + f"--{BOUNDARY}--\r\n".encode()
    )


def shown_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Choose the (height, width) in which a picture is shown."""
    scale = min(1.0, MAX_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def flips(scan: Scan) -> list[bool]:
    """Say whether rows and columns run towards the patient's head, front or right.

    They are shown the other way round. An image that does not lie in a patient is shown as it is.
    """
    if scan.affine is None:
        return [False, False]
    directions = scan.affine[:3, 1:3]
    largest = np.abs(directions).argmax(axis=0)
    return [bool(directions[largest[i], i] > 0) for i in range(2)]
