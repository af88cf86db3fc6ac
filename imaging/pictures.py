"""Read, prepare, restore and draw one image or mask: the only preprocessing, shared by training, prediction, serving.

Preparing keeps the aspect ratio: an image is scaled to fit the network's input, its intensities are stretched between
two percentiles (so 8-bit, 16-bit, dark and bright files look alike), and the rest of the input is padded with zeros.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from imaging.files import FORMATS
from imaging.scan import check_declared_bytes
from utils import UserError, atomic


def declared_pixels(data: bytes) -> int:
    """Read from a PNG's, BMP's or JPEG's header how many pixels it has; 0 if it does not say."""
    if data.startswith(b"\x89PNG"):
        sides = struct.unpack_from(">II", data.ljust(24, b"\0"), 16)
    elif data.startswith(b"BM"):
        sides = struct.unpack_from("<ii", data.ljust(26, b"\0"), 18)
    else:  # a JPEG is a chain of segments; those that start a frame (0xC0 to 0xCF, but for three) have its size
        place, sides = 2, (0, 0)
        while (place := data.find(b"\xff", place)) >= 0 and place + 9 < len(
            data
        ):  # decoders skip what is between
            kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
            if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
                sides = struct.unpack_from(">HH", data, place + 5)
                break
            place += (
                1 if kind in (0x00, 0xFF) or 0xD0 <= kind <= 0xD7 or kind == 0x01 else 2 + length
            )
    return abs(sides[0] * sides[1])


def check_chunks(data: bytes) -> None:
    """Raise UserError unless all chunks of a PNG file end within it, as OpenCV would set aside what they claim.

    Animated ones, whose frames it would all decode, are refused too.
    """
    place = 8
    while place < len(data) and data[place - 8 : place - 4] != b"IEND":
        if data[place + 4 : place + 8] == b"acTL":
            raise UserError("an animated PNG; expected one image")
        place += 12 + int.from_bytes(data[place : place + 4])
    if place > len(data):
        raise UserError(f"unreadable or truncated ({len(data)} bytes); expected a whole PNG file")


def decode_picture(data: bytes) -> np.ndarray:
    """Decode PNG, JPEG or BMP as stored: (H, W, C), C = 1, 3 (RGB) or 4 (RGBA). Raises UserError."""
    if not data.startswith(
        (b"\x89PNG", b"\xff\xd8", b"BM")
    ):  # OpenCV knows more formats; none checks its size
        raise UserError(f"unreadable ({len(data)} bytes of another kind); expected {FORMATS}")
    check_declared_bytes(declared_pixels(data), 16)  # 16 bits, four channels, a copy
    if data.startswith(b"\x89PNG"):
        check_chunks(data)
    cv2.utils.logging.setLogLevel(0)  # OpenCV's own complaints name no file; ours do
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(
            f"unreadable or truncated ({len(data)} bytes); expected a whole {FORMATS} file"
        )
    image = image.reshape(*image.shape[:2], -1)
    return (
        image if image.shape[-1] == 1 else image[..., [2, 1, 0, 3][: image.shape[-1]]]
    )  # OpenCV's order is BGR


def write_picture(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W), (H, W, 1) or RGB (H, W, 3) uint8/uint16 in the format of the path's ending, atomically."""
    stored = image[..., ::-1] if image.ndim == 3 and image.shape[-1] == 3 else image
    with atomic(path) as temporary:
        temporary.write_bytes(cv2.imencode(Path(path).suffix, stored)[1].tobytes())


def write_pages(path: Path, pages: list[np.ndarray]) -> Path:
    """Write pages (H, W), uint8 or uint16, of which a PNG has one, atomically; return the path."""
    with atomic(path) as temporary:
        temporary.write_bytes(cv2.imencodemulti(path.suffix, pages)[1].tobytes())
    return path


def mask_to_png(ids: np.ndarray, names: Sequence[str]) -> bytes:
    """Encode class ids (H, W): 0/255 for one class, else ids."""
    return cv2.imencode(".png", (255 if len(names) == 1 else 1) * ids)[1].tobytes()
