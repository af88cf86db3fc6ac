"""Read, prepare, restore and draw one image or mask: the only preprocessing, shared by training, prediction, serving.

Preparing keeps the aspect ratio: an image is scaled to fit the network's input, its intensities are stretched between
two percentiles (so 8-bit, 16-bit, dark and bright files look alike), and the rest of the input is padded with zeros.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MIN_SIDE = 16  # pixels; smaller files are thumbnails or accidents, never scans
PERCENTILES = (0.5, 99.5)  # of an image's own pixels: these become 0 and 1
PREPARATION = (
    f"letterbox, percentiles {PERCENTILES[0]}-{PERCENTILES[1]}"  # named in the model file, part of the cache key
)
COLOURS = ((230, 60, 60), (60, 140, 240), (250, 190, 40), (70, 190, 90), (170, 90, 220), (60, 200, 200))


class UserError(ValueError):
    """Something the user can put right: the message says what was found, what was expected, what to do."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends well, so no reader sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name with none of the bytes
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_image(path: Path) -> bool:
    """Tell an image file by its ending; hidden files (macOS leaves `._scan.png`) do not count."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def decode(data: bytes) -> np.ndarray:
    """Decode PNG, JPEG, TIFF or BMP bytes as stored: (H, W, C), C = 1, 3 (RGB) or 4 (RGBA), any bit depth.

    Raises UserError for anything unreadable, truncated, not finite or smaller than MIN_SIDE.
    """
    cv2.utils.logging.setLogLevel(0)  # OpenCV's own complaints name no file; ours do
    try:
        _, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else (False, ())
    except cv2.error:
        pages = ()
    if not pages:
        raise UserError(f"unreadable or truncated ({len(data)} bytes); expected a whole PNG, JPEG, TIFF or BMP file")
    if len(pages) > 1:
        raise UserError(f"{len(pages)} pages; expected one image per file")
    image = pages[0]
    image = image[..., None] if image.ndim == 2 else image
    height, width, channels = image.shape
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{height}x{width} pixels; expected at least {MIN_SIDE}x{MIN_SIDE}")
    if channels not in (1, 3, 4):
        raise UserError(f"{channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    if not np.isfinite(image).all():
        raise UserError("NaN or infinite pixels; expected finite numbers")
    return image if channels == 1 else image[..., [2, 1, 0, 3][:channels]]  # OpenCV's order is BGR


def read(path: str | Path) -> np.ndarray:
    """Read an image file as stored, see `decode`. Raises UserError, its message without the path."""
    try:
        return decode(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})") from error


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask file: (H, W), its values as stored. A colour file needs equal channels, else UserError."""
    mask = read(path)
    if mask.shape[-1] == 4 and np.ptp(mask[..., 3]) > 0:
        raise UserError("its alpha channel varies; expected a mask without one, its values in the picture itself")
    mask = mask[..., :3]
    if mask.shape[-1] == 3 and not (mask == mask[..., :1]).all():
        raise UserError("a colour picture; expected a mask with one value per pixel")
    return mask[..., 0]


def write(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W), (H, W, 1) or RGB (H, W, 3) uint8/uint16 in the format of the path's ending, atomically."""
    stored = image[..., ::-1] if image.ndim == 3 and image.shape[-1] == 3 else image
    with atomic(path) as temporary:
        temporary.write_bytes(cv2.imencode(Path(path).suffix, stored)[1].tobytes())


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Turn a decoded (H, W, 1|3|4) image into float32 (H, W, channels), channels 1 (grey) or 3 (RGB), without alpha."""
    image = image[..., :3].astype(np.float32)  # 8 bits would round before the stretch, 32 OpenCV does not resize
    if image.shape[-1] == 3 and channels == 1:
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[..., None]
    return np.broadcast_to(image, (*image.shape[:2], channels))


def fit(shape: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Give the rows and columns that an image of `shape` (H, W) takes up, centred, in a canvas of `size` (H, W)."""
    scale = min(size[0] / shape[0], size[1] / shape[1])
    inner = [min(size[i], max(1, round(shape[i] * scale))) for i in (0, 1)]
    start = [(size[i] - inner[i]) // 2 for i in (0, 1)]
    return slice(start[0], start[0] + inner[0]), slice(start[1], start[1] + inner[1])


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) or (H, W, C) to `size` (H, W): pixel areas averaged when shrinking, linear when growing."""
    shrinks = size[0] < image.shape[0] or size[1] < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=method)
    return resized.reshape(*size, *image.shape[2:])  # OpenCV drops a last axis of 1


def prepare(image: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Make the network's input of a decoded image: uint8 (size[0], size[1], channels); divided by 255 it is in [0, 1].

    A constant image becomes all zeros.
    """
    rows, columns = fit(image.shape[:2], size)
    inner = (rows.stop - rows.start, columns.stop - columns.start)
    small = resize(to_channels(image, channels), inner)
    low, high = np.percentile(small, PERCENTILES)
    if low == high:  # flat but for a few pixels
        low, high = small.min(), small.max()
    canvas = np.zeros((*size, channels), np.uint8)
    if high > low:
        canvas[rows, columns] = np.round(255 * np.clip((small - low) / (high - low), 0, 1))
    return canvas


def prepare_mask(ids: np.ndarray, size: tuple[int, int], classes: int) -> np.ndarray:
    """Resize class ids (H, W) in 0..classes like its image: uint8 (size[0], size[1], classes), each class's share.

    255 is a pixel that is all of that class. Shares keep where in a pixel a border runs; ids would round it away.
    """
    rows, columns = fit(ids.shape, size)
    inner = (rows.stop - rows.start, columns.stop - columns.start)
    canvas = np.zeros((*size, classes), np.uint8)
    for i in range(classes):
        canvas[rows, columns, i] = np.round(255 * resize((ids == i + 1).astype(np.float32), inner))
    return canvas


def shares_to_ids(shares: np.ndarray) -> np.ndarray:
    """Turn shares (..., K) of `prepare_mask` into uint8 class ids (...): the largest wins, background included."""
    background = np.maximum(255 - shares.sum(-1, dtype=np.int32), 0)
    return np.argmax(np.concatenate([background[..., None], shares], axis=-1), axis=-1).astype(np.uint8)


def restore(probs: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Undo the geometry of `prepare`: (H, W, K) of the network's size → (shape[0], shape[1], K), padding cropped."""
    rows, columns = fit(shape, probs.shape[:2])
    planes = [resize(probs[rows, columns, k], shape) for k in range(probs.shape[-1])]
    return np.stack(planes, axis=-1)


def to_ids(probs: np.ndarray, threshold: float) -> np.ndarray:
    """Decide each pixel: probs (..., K) → uint8 class ids (...); one channel by `threshold`, several by the largest."""
    if probs.shape[-1] == 1:
        return (probs[..., 0] >= threshold).astype(np.uint8)
    return np.argmax(probs, axis=-1).astype(np.uint8)


def _parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label the connected parts of a mask (H, W): labels 1.. (H, W), largest part first, and their sizes in pixels."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8))
    sizes = np.bincount(labels.ravel(), minlength=count)[1:]
    order = np.argsort(-sizes, kind="stable")
    rank = np.zeros(count, np.int32)
    rank[1 + order] = 1 + np.arange(count - 1)
    return rank[labels], sizes[order]


def usual_parts(masks: Iterable[np.ndarray]) -> int:
    """Count the connected parts that 95 % of the masks (H, W) do not exceed; at least 1."""
    return max(1, int(np.quantile([len(_parts(mask)[1]) for mask in masks], 0.95, method="inverted_cdf")))


def clean(ids: np.ndarray, parts: list[int]) -> np.ndarray:
    """Keep each class's `parts[class - 1]` largest parts in ids (H, W), then fill holes that hold no other class."""
    cleaned = ids.copy()
    for i, count in enumerate(parts, 1):
        cleaned[_parts(ids == i)[0] > count] = 0
    for i in range(1, len(parts) + 1):
        filled = (cleaned == i).astype(np.uint8)
        outlines, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
        cleaned[(filled > 0) & (cleaned == 0)] = i
    return cleaned


def draw_contours(picture: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return RGB `picture` (H, W, 3) with the outline of every class in `ids` (H, W) drawn in that class's colour."""
    drawn = np.ascontiguousarray(picture).copy()
    thickness = max(1, round(max(ids.shape) / 300))
    for i in np.unique(ids[ids > 0]):
        outlines, _ = cv2.findContours((ids == i).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, COLOURS[(int(i) - 1) % len(COLOURS)], thickness)
    return drawn
