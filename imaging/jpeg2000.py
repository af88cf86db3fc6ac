"""JPEG 2000 pictures, read by imagecodecs."""

import struct

import numpy as np

from imaging.scan import Scan, check_declared_bytes
from utils import UserError

SUFFIXES = (".jp2", ".j2k", ".jpf", ".jpx", ".j2c")
# A codestream begins with two markers. In a JP2 file it is wrapped in boxes.
CODESTREAM = b"\xff\x4f\xff\x51"
MAGIC = ((0, CODESTREAM), (0, b"\0\0\0\x0cjP  \r\n\x87\n"))
# Most tiles: each costs memory of its own.
MAX_TILES = 2**14


def decode_jpeg2000(content: bytes, max_bytes: int) -> Scan:
    """Decode a picture: one slice, as stored. Raises UserError."""
    import imagecodecs

    height, width, channels, tiles = _declared(content)
    check_declared_bytes(max_bytes, height, width, max(4, channels), 8)
    if tiles > MAX_TILES:
        raise UserError(f"{tiles} tiles; expected at most {MAX_TILES}")
    image = imagecodecs.jpeg2k_decode(content)
    image = np.asarray(image).reshape(*image.shape[:2], -1)
    has_alpha = image.shape[-1] in (2, 4) and _has_opacity(content)
    is_colour = image.shape[-1] - has_alpha == 3
    return Scan(image[None], has_alpha=has_alpha, separate=image.shape[-1] > 1 and not is_colour)


def _declared(content: bytes) -> tuple[int, int, int, int]:
    """Read (height, width, channels, tiles) of the codestream. Raises UserError.

    If there seem to be several, the largest.
    """
    sizes, place = [], content.find(CODESTREAM)
    while 0 <= place <= len(content) - 44:
        # Size of the canvas, offset; size and offset of a tile; channels.
        words = struct.unpack_from(">8IH", content, place + 8)
        width, height, left, top, tile_width, tile_height = words[:6]
        tiles = -(-width // max(1, tile_width)) * -(-height // max(1, tile_height))
        sizes.append((max(0, height - top), max(0, width - left), words[8], tiles))
        place = content.find(CODESTREAM, place + 1)
    if not sizes:
        raise UserError("unreadable or truncated: its header declares no pixels")
    return max(sizes, key=np.prod)


def _has_opacity(content: bytes) -> bool:
    """Say whether a JP2 file's channel definition names an opacity channel (type 1 or 2)."""
    place = content.find(b"cdef")
    if place < 0:
        return False
    count = int.from_bytes(content[place + 4 : place + 6])
    kinds = [content[place + 8 + 6 * i : place + 10 + 6 * i] for i in range(min(count, 8))]
    return b"\0\1" in kinds or b"\0\2" in kinds
