"""Pictures of `data.py check`'s page: images as they are stored, outlines of their masks over them.

Outlines are vectors, so that they stay thin when a picture is enlarged.
"""

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from dataset.layouts import Pair
from dataset.loading import Preprocessing, read_as_stored
from imaging import formats, preprocess
from imaging.grid import resize
from imaging.labels import plane
from imaging.scan import Scan
from utils import UserError, cores

SIDE = 640  # pixels of a picture's longer side
# A page has at most so many pictures: it stays below 5 MB.
MOST = 24
MAX_IMAGE_BYTES = 100_000
MAX_OUTLINE_LENGTH = 40_000  # characters
QUALITIES = (82, 65, 45, 25)


@dataclass(frozen=True)
class Thumbnail:
    """A picture of a pair."""

    pair: Pair
    reason: str  # why it is shown; "" for one of many
    size: tuple[int, int] = (SIDE, SIDE)  # (H, W) of the picture
    webp: str = ""  # the image in base64; "" if it cannot be read
    outlines: tuple[str, ...] = ()  # of each class, as an SVG path
    note: str = ""  # which slice or channel is shown


def draw_all(
    chosen: Sequence[tuple[Pair, str]], preprocessing: Preprocessing, window: str
) -> list[Thumbnail]:
    """Draw the pairs with their reasons, in parallel. window: as in `prepare_scan`."""

    def draw(one: tuple[Pair, str]) -> Thumbnail:
        return draw_thumbnail(*one, preprocessing, window)

    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(draw, chosen))


def draw_thumbnail(
    pair: Pair, reason: str, preprocessing: Preprocessing, window: str = ""
) -> Thumbnail:
    """Draw a pair; without outlines if its mask cannot be read, empty if its image cannot."""
    try:
        scan, truth = read_as_stored(pair, preprocessing)
        mask = truth.mask
    except UserError:
        try:
            scan = formats.read_scan(pair.image)
        except UserError:
            return Thumbnail(pair, reason)
        mask = None
    number = fullest_slice(mask) if mask is not None else len(scan.pixels) // 2
    picture, note = visible_slice(scan, number, window)
    outlines = ()
    if mask is not None:
        classes = range(1, len(preprocessing.classes.names) + 1)
        size = picture.shape[:2]
        outlines = tuple(outline_path(plane(mask[number], one), size) for one in classes)
    return Thumbnail(pair, reason, picture.shape[:2], encode_webp(picture), outlines, note)


def fullest_slice(ids: np.ndarray) -> int:
    """Number the slice of (S, H, W) with most foreground; the middle one if there is none."""
    foreground = np.count_nonzero(ids, axis=(1, 2))
    return int(np.argmax(foreground)) if foreground.any() else len(ids) // 2


def visible_slice(scan: Scan, number: int, window: str) -> tuple[np.ndarray, str]:
    """Make RGB (H, W, 3) of a slice, and say which slice and channels it shows."""
    count, height, width, _ = scan.pixels.shape
    channels = scan.colours.shape[-1]
    notes = [f"slice {number + 1} of {count}"] if count > 1 else []
    if channels == 2:
        notes.append("channels 1 and 2 in red and green")
    elif channels > 3:
        notes.append(f"channels 1 to 3 of {channels} in red, green and blue")
    scale = SIDE / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return preprocess.to_picture(scan.slice(number), size, window)[0], ", ".join(notes)


def encode_webp(picture: np.ndarray) -> str:
    """Encode RGB (H, W, 3) as WebP in base64, of at most MAX_IMAGE_BYTES."""
    while True:
        for quality in QUALITIES:
            options = [cv2.IMWRITE_WEBP_QUALITY, quality]
            content = cv2.imencode(".webp", picture[..., ::-1], options)[1].tobytes()
            if len(content) <= MAX_IMAGE_BYTES:
                return base64.b64encode(content).decode()
        picture = resize(picture, _half(picture.shape))


def outline_path(mask: np.ndarray, size: tuple[int, int]) -> str:
    """Outline a mask (H, W) of bool as an SVG path in a picture of `size` (H, W); "" if empty.

    A mask of very many parts is outlined coarsely.
    """
    shares = resize(np.uint8(255) * mask.astype(np.uint8), size)
    while True:
        path = _trace(shares, (size[0] / shares.shape[0], size[1] / shares.shape[1]))
        if len(path) <= MAX_OUTLINE_LENGTH:
            return path
        shares = resize(shares, _half(shares.shape))


def _trace(shares: np.ndarray, scale: tuple[float, float]) -> str:
    """Follow the borders of the pixels that are at least half in a mask. Holes are paths too."""
    # An object that is smaller than a pixel here is still seen.
    binary = (shares >= np.clip(shares.max(), 1, 128)).astype(np.uint8)
    contours, _ = cv2.findContours(binary, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, 0.7, closed=True)[:, 0]
        points = [f"{scale[1] * (x + 0.5):.0f} {scale[0] * (y + 0.5):.0f}" for x, y in corners]
        parts.append(f"M{'L'.join(points)}Z")
    return "".join(parts)


def _half(shape: Sequence[int]) -> tuple[int, int]:
    return max(1, shape[0] // 2), max(1, shape[1] // 2)
