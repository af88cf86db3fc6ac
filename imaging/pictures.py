"""PNG, JPEG, BMP, GIF and WebP, read and written by OpenCV and Pillow."""

import io
import struct
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from imaging.labels import BITS
from imaging.lazy import LazyPixels, turn
from imaging.scan import OVERLAPPING, Mask, Scan, check_declared_bytes
from utils import UserError, atomic

if TYPE_CHECKING:
    from PIL.Image import Image

PNG, JPEG, BMP, GIF, RIFF, WEBP = b"\x89PNG", b"\xff\xd8", b"BM", b"GIF8", b"RIFF", b"WEBP"
PNG_MAGIC, JPEG_MAGIC, BMP_MAGIC = ((0, PNG),), ((0, JPEG),), ((0, BMP),)
GIF_MAGIC, WEBP_MAGIC = ((0, GIF),), ((8, WEBP),)
# Decoding takes up to four channels of 16 bits, and a copy.
BYTES_PER_PIXEL = 16
# A progressive JPEG goes through all its pixels in each scan.
USUAL_SCANS, MAX_SCANNED_PIXELS = 20, 2**31
# In the header of a PNG: samples per pixel are indices of a palette.
PNG_PALETTE = 3
# EXIF's number of the tag, and how often each of its values turns the rows left (np.rot90) after a
# flip of the columns.
ORIENTATION_TAG = 0x0112
TURNS = {
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (1, True),
    6: (3, False),
    7: (3, True),
    8: (1, False),
}

# Start of a frame, with its size. 0xC4, 0xC8 and 0xCC have another meaning.
JPEG_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Not followed by a length.
JPEG_LONE_MARKERS = {0x00, 0x01, *range(0xD0, 0xD8), 0xFF}
MAX_PNG_VALUE = 65535
# A panel takes 11.6 ms, where level 3 took 15.4; its file is a fifth larger.
PNG_FLAGS = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 2),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
)


def declared_pixels(content: bytes) -> int:
    """Read the number of pixels in the header of a picture; 0 if it has none."""
    start = content[:64].ljust(64, b"\0")
    if content.startswith(PNG):
        height, width = struct.unpack_from(">II", start, 16)
    elif content.startswith(BMP):
        height, width = struct.unpack_from("<ii", start, 18)
    elif content.startswith(JPEG):
        height, width = jpeg_size(content)
    elif content.startswith(GIF):
        height, width = struct.unpack_from("<HH", start, 6)
    elif content.startswith(RIFF):
        height, width = webp_size(start)
    else:
        return 0
    return abs(height * width)


def webp_size(start: bytes) -> tuple[int, int]:
    """Read (height, width) of a WebP from its first bytes; (0, 0) if they have none."""
    if start[12:16] == b"VP8X":
        width, height = (int.from_bytes(start[at : at + 3], "little") for at in (24, 27))
        return height + 1, width + 1
    if start[12:16] == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if start[12:16] == b"VP8 ":
        width, height = struct.unpack_from("<HH", start, 26)
        return height & 0x3FFF, width & 0x3FFF
    return 0, 0


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


def check_jpeg_scans(content: bytes, pixels: int) -> None:
    """Raise UserError for a JPEG that goes through its pixels thousands of times."""
    scans = content.count(b"\xff\xda")
    if scans > USUAL_SCANS and scans * pixels > MAX_SCANNED_PIXELS:
        raise UserError(f"a JPEG of {scans} scans; expected at most {USUAL_SCANS}: save it anew")


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
    """Decode a picture as viewers show it: one slice, C is 1, 3 (RGB) or 4 (RGBA).

    A tag that says how the camera was held (EXIF orientation) is applied. Raises UserError.
    """
    _check(content, max_bytes)
    decode = _decode_frame if content.startswith((GIF, RIFF)) else _decode_still
    return apply_orientation(decode(content), orientation_of(content))


def decode_ids(content: bytes, max_bytes: int, image: Scan | None = None) -> Scan:
    """Decode a mask: indices of a palette and few bits as stored, not as the greys shown.

    Raises UserError.
    """
    _check(content, max_bytes)
    if content.startswith(PNG):
        bits, kind = content[24], content[25]
        if kind != PNG_PALETTE and bits >= 8:
            return decode_picture(content, max_bytes)
    with _open(content) as picture:
        picture.seek(0)
        ids = np.asarray(picture)
    if content.startswith(GIF):
        # A GIF has a palette in any case. One of greys is a grey picture.
        frame = _decode_frame(content)
        if (frame.pixels == frame.pixels[..., :1]).all():
            return frame
    elif content.startswith(PNG) and kind != PNG_PALETTE:
        # Pillow, too, spreads 1, 2 and 4 bits over 0 to 255.
        ids = ids.astype(np.uint8) if bits == 1 else ids // (255 // (2**bits - 1))
    elif ids.ndim > 2 or ids.dtype == bool:
        return decode_picture(content, max_bytes)
    return apply_orientation(Scan(ids[None, ..., None]), orientation_of(content))


def apply_orientation(scan: Scan, orientation: int) -> Scan:
    """Turn a picture as its EXIF tag says, and note it; 1 and unknown values turn nothing."""
    if orientation not in TURNS:
        return scan
    turns, is_mirrored = TURNS[orientation]
    if isinstance(scan.pixels, LazyPixels):
        pixels = scan.pixels.turned(turns, is_mirrored)
    else:
        pixels = turn(scan.pixels, turns, is_mirrored)
    note = f"EXIF orientation {orientation} applied: it is turned as viewers show it"
    spacing = scan.spacing_mm
    if spacing and turns % 2:
        spacing = (spacing[0], spacing[2], spacing[1])
    return replace(scan, pixels=pixels, spacing_mm=spacing, notes=(*scan.notes, note))


def _check(content: bytes, max_bytes: int) -> None:
    """Raise UserError for a picture that is too large, or too dear to decode."""
    pixels = declared_pixels(content)
    check_declared_bytes(max_bytes, pixels, BYTES_PER_PIXEL)
    if content.startswith(PNG):
        check_png_chunks(content)
    if content.startswith(JPEG):
        check_jpeg_scans(content, pixels)


def _decode_still(content: bytes) -> Scan:
    """Decode PNG, JPEG or BMP by OpenCV."""
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
        has_alpha = image.shape[-1] == 4
        image = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if has_alpha else cv2.COLOR_BGR2RGB)
    return Scan(image[None], has_alpha=image.shape[-1] == 4)


def _decode_frame(content: bytes) -> Scan:
    """Decode the first frame of a GIF or WebP by Pillow."""
    with _open(content) as picture:
        check_declared_bytes(declared_pixels(content), *picture.size)
        note = "animated: its first frame is taken"
        notes = (note,) if getattr(picture, "is_animated", False) else ()
        picture.seek(0)
        has_alpha = picture.has_transparency_data
        image = np.asarray(picture.convert("RGBA" if has_alpha else "RGB"))
    return Scan(image[None], has_alpha=has_alpha, notes=notes)


def _open(content: bytes) -> "Image":
    from PIL import Image

    with warnings.catch_warnings():
        # The size is checked by now.
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(content))


def orientation_of(content: bytes) -> int:
    """Read how the camera was held: 1 to 8, 1 if a picture does not say."""
    if not any(mark in content for mark in (b"Exif\0\0", b"eXIf", b"EXIF")):
        return 1
    try:
        with _open(content) as picture:
            return picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        # A damaged tag causes errors of many kinds. The picture itself may be whole.
        return 1


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask of one slice as PNG. Raises UserError for values that it cannot hold."""
    if max(mask.levels, default=0) > MAX_PNG_VALUE:
        raise UserError(f"class value {max(mask.levels)}, and a PNG holds {MAX_PNG_VALUE} at most")
    return cv2.imencode(".png", mask.picture(mask.ids[0]))[1].tobytes()


def mask_to_png(ids: np.ndarray, names: Sequence[str]) -> bytes:
    """Encode class ids (H, W) as PNG: 0/255 for one class, else the ids.

    Raises UserError for classes that overlap.
    """
    if ids.dtype == BITS:
        raise UserError(OVERLAPPING)
    return cv2.imencode(".png", (255 if len(names) == 1 else 1) * ids)[1].tobytes()


def write_picture(path: str | Path, image: np.ndarray, is_lasting: bool = True) -> None:
    """Write an image in the format of the path's ending, atomically.

    image: (H, W), (H, W, 1) or RGB (H, W, 3), uint8 or uint16. is_lasting: see `utils.atomic`.
    """
    stored = image[..., ::-1] if image.ndim == 3 and image.shape[-1] == 3 else image
    flags = PNG_FLAGS if Path(path).suffix.lower() == ".png" else []
    with atomic(path, is_lasting) as temporary:
        temporary.write_bytes(cv2.imencode(Path(path).suffix, stored, flags)[1].tobytes())
