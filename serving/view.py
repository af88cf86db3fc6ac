"""What the web page shows of an image and its mask: a form that the browser takes apart itself."""

import json
import math
import secrets
from typing import Any

import cv2
import numpy as np

from imaging import formats
from imaging.labels import BITS, highest_class, plane
from imaging.preprocess import grey_range, to_channels, to_picture
from imaging.scan import Scan
from serving.errors import Problem, to_json_line
from utils import UserError

MAX_SIDE = 2048  # pixels of a picture's longer side; a larger one is scaled
MAX_VOXELS = 2**27  # of a volume
SAMPLE = 32  # slices that have a say in the window
RAW = "application/octet-stream"
INT16 = np.iinfo(np.int16)


def make_boundary() -> str:
    """Make what separates the parts; no file can hold it, because nobody knows it before."""
    return f"unet-{secrets.token_hex(16)}"


def read_boundary(parts: bytes) -> str:
    """Read it from the parts that are written."""
    return parts[2 : parts.index(b"\r\n")].decode()


def encode_part(
    boundary: str, name: str, content: bytes, media_type: str, file_name: str = ""
) -> bytes:
    """Write a part of the form. Browsers take one without a file name as text."""
    file_name = f'; filename="{file_name}"' if file_name else ""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file_name}\r\n'
    return f"{head}Content-Type: {media_type}\r\n\r\n".encode() + content + b"\r\n"


def check_size(shape: tuple[int, ...]) -> None:
    """Raise Problem 413 for a volume (slices, rows, columns) that a page cannot hold."""
    if shape[0] > 1 and math.prod(shape) > MAX_VOXELS:
        found, most = math.prod(shape) / 2**20, MAX_VOXELS // 2**20
        raise Problem(413, f"{found:.0f} million voxels; the page shows at most {most}")


def encode_mask(boundary: str, ids: np.ndarray, description: dict[str, Any]) -> bytes:
    """Write the parts `description` (JSON) and `mask` (uint8, slices, rows, columns).

    Where classes overlap, the last one is shown. Raises Problem 413.
    """
    check_size(ids.shape)
    shown = ids
    if ids.dtype == BITS:
        shown = np.zeros(ids.shape, np.uint8)
        for number in range(1, highest_class(ids) + 1):
            shown[plane(ids, number)] = number
    shown = shown.astype(np.uint8, copy=False)
    if len(ids) == 1:
        height, width = shown_size(ids.shape[1:])
        shown = cv2.resize(shown[0], (width, height), interpolation=cv2.INTER_NEAREST)[None]
    described = to_json_line(description | {"shape": list(shown.shape)}).encode()
    return encode_part(boundary, "description", described, "application/json") + (
        encode_part(boundary, "mask", shown.tobytes(), RAW, "ids")
    )


def encode_image(content: bytes, max_bytes: int, window: str, boundary: str) -> bytes:
    """Write the parts `view` (JSON) and `image`, and the end of the form.

    The image is a PNG, or a volume's grey levels: int16, slices, rows, columns. `view` has the
    window in those levels, and whether rows and columns are shown backwards: as radiologists look
    at a patient, whose right side is on the left. Raises UserError.
    """
    scan = formats.decode_scan(content, max_bytes)
    if len(scan.pixels) == 1:
        view, image, media_type = {}, encode_picture(scan, window), "image/png"
    else:
        levels, shown = to_levels(scan, window)
        view, image, media_type = {"window": shown}, levels.tobytes(), RAW
    described = json.dumps(view | {"flip": flips(scan)}).encode()
    return (
        encode_part(boundary, "view", described, "application/json")
        + encode_part(boundary, "image", image, media_type, "image")
        + f"--{boundary}--\r\n".encode()
    )


def encode_picture(scan: Scan, window: str) -> bytes:
    """Write a single image as PNG. Raises UserError."""
    shown = to_picture(scan, shown_size(scan.pixels.shape[1:3]), window)[0]
    done, encoded = cv2.imencode(".png", shown[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise UserError("its picture cannot be written as PNG")
    return encoded.tobytes()


def to_levels(scan: Scan, window: str) -> tuple[np.ndarray, list[float]]:
    """Turn a volume into int16 (S, H, W), slice by slice, and say which window shows it.

    Numbers that 16 bits do not hold are spread over 0 to 32767.
    """
    step = max(1, len(scan.pixels) // SAMPLE)
    greys = [to_grey(scan, number) for number in range(0, len(scan.pixels), step)]
    low, high = map(float, grey_range(np.stack(greys), scan, window))
    least, most, is_whole = np.inf, -np.inf, True
    for number in range(len(scan.pixels)):
        grey = to_grey(scan, number)
        least, most = min(least, float(grey.min())), max(most, float(grey.max()))
        is_whole &= grey.dtype.kind in "iub" or bool((grey == np.round(grey)).all())
    offset, scale = 0.0, 1.0
    if least < INT16.min or most > INT16.max or not is_whole:
        offset, scale = least, INT16.max / max(most - least, 1e-9)
    levels = np.empty(scan.pixels.shape[:3], "<i2")
    for number in range(len(levels)):
        levels[number] = (to_grey(scan, number).astype(np.float32) - offset) * scale
    low, high = (low - offset) * scale, (high - offset) * scale
    return levels, [(low + high) / 2, max(high - low, 1.0)]


def to_grey(scan: Scan, number: int) -> np.ndarray:
    """Show a slice in grey (H, W): colours as their brightness, else the first channel."""
    pixels = np.asarray(scan.colours[number])
    if pixels.shape[-1] == 3 and not scan.separate:
        return np.round(to_channels(pixels, 1)[..., 0])
    return pixels[..., 0]


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
