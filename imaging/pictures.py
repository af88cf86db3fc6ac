"""PNG, JPEG and BMP, read and written by OpenCV."""

import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from imaging.scan import Mask, Scan, check_declared_bytes
from utils import UserError, atomic

PNG, JPEG, BMP = b"\x89PNG", b"\xff\xd8", b"BM"
PNG_MAGIC, JPEG_MAGIC, BMP_MAGIC = ((0, PNG),), ((0, JPEG),), ((0, BMP),)
# Decoding takes up to four channels of 16 bits, and a copy.
BYTES_PER_PIXEL = 16

# Start of a frame, with its size. 0xC4, 0xC8 and 0xCC have another meaning.
JPEG_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Not followed by a length.
JPEG_LONE_MARKERS = {0x00, 0x01, *range(0xD0, 0xD8), 0xFF}


def declared_pixels(content: bytes) -> int:
    """Read the number of pixels in the header of a PNG, JPEG or BMP; 0 if it has none."""
    if content.startswith(PNG):
        height, width = struct.unpack_from(">II", content.ljust(24, b"\0"), 16)
    elif content.startswith(BMP):
        height, width = struct.unpack_from("<ii", content.ljust(26, b"\0"), 18)
    elif content.startswith(JPEG):
        height, width = jpeg_size(content)
    else:
        return 0
    return abs(height * width)


def jpeg_size(content: bytes) -> tuple[int, int]:
    """Read (height, width) of the first frame of a JPEG; (0, 0) if there is none."""
    # A JPEG is a chain of segments: 0xFF, a marker, and for most a length. Decoders skip stray
    # bytes between them.
    place = content.find(b"\xff", 2)
    while 0 <= place < len(content) - 9:
        marker = content[place + 1]
        if marker in JPEG_FRAME_MARKERS:
            return struct.unpack_from(">HH", content, place + 5)
        length = int.from_bytes(content[place + 2 : place + 4])
        place = content.find(b"\xff", place + (1 if marker in JPEG_LONE_MARKERS else 2 + length))
    return 0, 0


def check_png_chunks(content: bytes) -> None:
    """Raise UserError for a PNG that is animated, or has a chunk that ends after the file.

    OpenCV would allocate what the chunk declares, and decode all frames.
    """
    place = 8
    while place < len(content) and content[place - 8 : place - 4] != b"IEND":
        if content[place + 4 : place + 8] == b"acTL":
            raise UserError("an animated PNG; expected one image")
        place += 12 + int.from_bytes(content[place : place + 4])
    if place > len(content):
        raise UserError(f"unreadable or truncated ({len(content)} bytes); expected a whole PNG")


def decode_picture(content: bytes, max_bytes: int) -> Scan:
    """Decode PNG, JPEG or BMP as stored: one slice, C is 1, 3 (RGB) or 4 (RGBA).

    Raises UserError.
    """
    check_declared_bytes(max_bytes, declared_pixels(content), BYTES_PER_PIXEL)
    if content.startswith(PNG):
        check_png_chunks(content)
    # OpenCV's own messages do not name the file; ours do.
    cv2.utils.logging.setLogLevel(0)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"unreadable or truncated ({len(content)} bytes); expected a whole file")
    image = image.reshape(*image.shape[:2], -1)
    if image.shape[-1] > 1:
        # OpenCV's order is BGR.
        image = image[..., [2, 1, 0, 3][: image.shape[-1]]]
    return Scan(image[None])


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask of one slice as PNG."""
    return encode_pages(".png", mask.pages)


def encode_pages(suffix: str, pages: Sequence[np.ndarray]) -> bytes:
    """Encode pages (H, W), uint8 or uint16, in the format of an ending. A PNG has one page."""
    return cv2.imencodemulti(suffix, pages)[1].tobytes()


def mask_to_png(ids: np.ndarray, names: Sequence[str]) -> bytes:
    """Encode class ids (H, W) as PNG: 0/255 for one class, else the ids."""
    return cv2.imencode(".png", (255 if len(names) == 1 else 1) * ids)[1].tobytes()


def write_picture(path: str | Path, image: np.ndarray) -> None:
    """Write an image in the format of the path's ending, atomically.

    image: (H, W), (H, W, 1) or RGB (H, W, 3), uint8 or uint16.
    """
    stored = image[..., ::-1] if image.ndim == 3 and image.shape[-1] == 3 else image
    with atomic(path) as temporary:
        temporary.write_bytes(cv2.imencode(Path(path).suffix, stored)[1].tobytes())
