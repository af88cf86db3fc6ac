"""Read, prepare, restore and draw one image or mask: the only preprocessing, shared by training, prediction, serving.

Preparing keeps the aspect ratio: an image is scaled to fit the network's input, its intensities are stretched between
two percentiles (so 8-bit, 16-bit, dark and bright files look alike), and the rest of the input is padded with zeros.
"""

import os
import struct
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SUFFIXES = (*PICTURES, ".dcm", ".nii", ".nii.gz")
FORMATS = "PNG, JPEG, TIFF, BMP, DICOM or NIfTI"
MAX_BYTES = 2**31  # of one decoded file
MIN_SIDE = 16  # pixels; smaller files are thumbnails or accidents, never scans
PERCENTILES = (0.5, 99.5)  # of an image's own pixels: these become 0 and 1
PREPARATION = (
    f"letterbox, percentiles {PERCENTILES[0]}-{PERCENTILES[1]}"  # named in the model file, part of the cache key
)
COLOURS = ((230, 60, 60), (60, 140, 240), (250, 190, 40), (70, 190, 90), (170, 90, 220), (60, 200, 200))


class UserError(ValueError):
    """Something the user can put right: the message says what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Scan:
    """What an image file holds; a plain image is a volume of one slice."""

    pixels: np.ndarray  # (S, H, W, C) as stored; of DICOM rescaled, so that CT is in HU
    spacing_mm: tuple[float, float, float] | None = None  # between slices, rows, columns, where the file says so
    window: tuple[float, float] | None = None  # centre and width of grey levels that the file proposes
    patient: str = ""  # a DICOM file's, hashed


def brief(error: BaseException) -> str:
    """Shorten what another library said to its first line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}".splitlines()[0], 160, placeholder=" …")


def check_size(*factors: int) -> None:
    """Raise UserError if the product, bytes that a file's header promises, is nothing or more than MAX_BYTES."""
    size = float(np.prod(np.float64(factors)))
    if not size > 0:
        raise UserError("unreadable or truncated: its header promises no pixels")
    if size > MAX_BYTES:
        raise UserError(f"its header promises {size / 2**30:.2g} GiB; expected at most {MAX_BYTES / 2**30:.2g} GiB")


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
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """Give the name that image, mask and prediction share: without a file's ending, `.nii.gz` being one."""
    if path.is_dir():  # a series, named by anything, such as 1.2.840
        return path.name
    return path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem


def is_series(path: Path) -> bool:
    """Tell a folder that holds a DICOM series: one of its files is DICOM."""
    try:
        return path.is_dir() and not path.name.startswith(".") and any(_shows_dicom(file) for file in path.iterdir())
    except OSError:  # a folder that cannot be opened
        return False


def _shows_dicom(path: Path) -> bool:
    try:
        return path.is_file() and path.suffix.lower() not in PICTURES and is_dicom(path)
    except UserError:
        return False


def is_nifti(path: str | Path) -> bool:
    """Tell a NIfTI file by its ending."""
    return Path(path).name.lower().endswith((".nii", ".nii.gz"))


def is_dicom(path: str | Path) -> bool:
    """Tell a DICOM file by its first bytes. Raises UserError if it cannot be opened."""
    try:
        with Path(path).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror})") from None


def decode_scan(data: bytes) -> Scan:
    """Decode an image file of any supported format, told by its content, not by its name.

    Raises UserError for anything unreadable, truncated, not finite, smaller than MIN_SIDE or larger than MAX_BYTES.
    """
    if data[:2] in (b"II", b"MM") or data[128:132] == b"DICM" or data[:2] == b"\x1f\x8b" or data[344:348] == b"n+1\0":
        import medical  # here, because most users' images are none of these

        scan = medical.decode(data)
    else:
        scan = Scan(decode_picture(data)[None])
    height, width, channels = scan.pixels.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{height}x{width} pixels; expected at least {MIN_SIDE}x{MIN_SIDE}")
    if channels not in (1, 3, 4):
        raise UserError(f"{channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    kind = scan.pixels.dtype.kind
    if kind not in "buif" or (kind == "f" and not np.isfinite(scan.pixels).all()):
        raise UserError("NaN or infinite pixels; expected finite numbers")
    return scan


def promised_pixels(data: bytes) -> int:
    """Read from a PNG's, BMP's or JPEG's header how many pixels it has; 0 if it does not say."""
    if data.startswith(b"\x89PNG"):
        sides = struct.unpack_from(">II", data.ljust(24, b"\0"), 16)
    elif data.startswith(b"BM"):
        sides = struct.unpack_from("<ii", data.ljust(26, b"\0"), 18)
    else:  # a JPEG is a chain of segments; those that start a frame (0xC0 to 0xCF, but for three) have its size
        place, sides = 2, (0, 0)
        while (place := data.find(b"\xff", place)) >= 0 and place + 9 < len(data):  # decoders skip what is between
            kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
            if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
                sides = struct.unpack_from(">HH", data, place + 5)
                break
            place += 1 if kind in (0x00, 0xFF) or 0xD0 <= kind <= 0xD7 or kind == 0x01 else 2 + length
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
    if not data.startswith((b"\x89PNG", b"\xff\xd8", b"BM")):  # OpenCV knows more formats; none checks its size
        raise UserError(f"unreadable ({len(data)} bytes of another kind); expected {FORMATS}")
    check_size(promised_pixels(data), 16)  # 16 bits, four channels, a copy
    if data.startswith(b"\x89PNG"):
        check_chunks(data)
    cv2.utils.logging.setLogLevel(0)  # OpenCV's own complaints name no file; ours do
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"unreadable or truncated ({len(data)} bytes); expected a whole {FORMATS} file")
    image = image.reshape(*image.shape[:2], -1)
    return image if image.shape[-1] == 1 else image[..., [2, 1, 0, 3][: image.shape[-1]]]  # OpenCV's order is BGR


def decode(data: bytes) -> np.ndarray:
    """Decode a file that holds one image: (H, W, C) as stored, see `decode_scan`. Raises UserError."""
    pixels = decode_scan(data).pixels
    if len(pixels) > 1:
        raise UserError(f"{len(pixels)} pages or slices; expected one image")
    return pixels[0]


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})") from error


def read(path: str | Path) -> np.ndarray:
    """Read a file of one image, see `decode`. Raises UserError, its message without the path."""
    return decode(_read_bytes(path))


def read_scan(path: str | Path, window: str = "") -> Scan:
    """Read an image file, or a folder that holds a DICOM series, for `window`, see `prepare_scan`.

    Raises UserError, its message without the path.
    """
    if Path(path).is_dir():
        import medical

        files = medical.series_files(path)
        scan = medical.decode_series([_read_bytes(file) for file in files], [file.name for file in files])
    else:
        scan = decode_scan(_read_bytes(path))
    if window == "file" and scan.window is None:
        raise UserError("its header proposes no window; expected one, or --window centre,width or percentiles")
    return scan


def _source_bytes(path: str | Path) -> list[bytes]:
    """Read the file, or the files of a folder that holds a DICOM series."""
    import medical

    return [_read_bytes(file) for file in (medical.series_files(path) if Path(path).is_dir() else [path])]


def is_one_volume(folder: Path) -> bool:
    """Tell a folder whose DICOM files are the slices of one series, not images of their own. Raises UserError."""
    import medical

    return is_series(folder) and medical.is_one_volume(medical.series_files(folder))


def check_place(image: str | Path, mask: str | Path) -> None:
    """Raise UserError if a NIfTI mask lies elsewhere in the patient than its image, NIfTI or DICOM."""
    if is_nifti(mask) and (Path(image).is_dir() or is_nifti(image) or is_dicom(image)):
        import medical

        medical.check_place(_source_bytes(image), _read_bytes(mask))


def read_mask_scan(path: str | Path, source: str | Path = "", names: Sequence[str] = ()) -> np.ndarray:
    """Read a mask file: (S, H, W), its values as stored. A colour file needs equal channels, else UserError.

    source, names: the image and the classes, which a DICOM segmentation refers to; it gives class ids.
    """
    if source and Path(path).suffix.lower() == ".dcm":
        import medical

        content = _read_bytes(path)
        if medical.is_seg(content):
            return medical.decode_seg(content, _source_bytes(source), names)
    mask = read_scan(path).pixels
    if mask.shape[-1] == 4 and np.ptp(mask[..., 3]) > 0:
        raise UserError("its alpha channel varies; expected a mask without one, its values in the picture itself")
    mask = mask[..., :3]
    if mask.shape[-1] == 3 and not (mask == mask[..., :1]).all():
        raise UserError("a colour picture; expected a mask with one value per pixel")
    return mask[..., 0]


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask file of one image: (H, W), see `read_mask_scan`. Raises UserError."""
    mask = read_mask_scan(path)
    if len(mask) > 1:
        raise UserError(f"{len(mask)} pages or slices; expected one mask")
    return mask[0]


def write(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W), (H, W, 1) or RGB (H, W, 3) uint8/uint16 in the format of the path's ending, atomically."""
    stored = image[..., ::-1] if image.ndim == 3 and image.shape[-1] == 3 else image
    with atomic(path) as temporary:
        temporary.write_bytes(cv2.imencode(Path(path).suffix, stored)[1].tobytes())


def write_mask(
    path: str | Path, ids: np.ndarray, names: Sequence[str], source: str | Path, levels: Sequence[int] = ()
) -> Path:
    """Write class ids (S, H, W) of `source` (see `read_scan`) in its own kind; return the file.

    path: without an ending; NIfTI gets NIfTI with the same affine, DICOM a segmentation object that refers to it, TIFF
    TIFF, anything else PNG. levels: each class's value there, if not 1, 2 …; pictures of one class have 255. Raises
    UserError where a DICOM header lacks what a segmentation must tell; the mask is then a TIFF.
    """
    levels = list(levels) or list(range(1, len(names) + 1))
    valued = np.array([0, *levels], np.uint8 if max(levels) < 256 else np.uint16)[ids.astype(int)]
    pages = list(np.uint8(255) * ids.astype(np.uint8) if levels == [1] else valued)
    if Path(source).is_dir() or is_dicom(source):
        import medical

        try:
            medical.write_seg(Path(f"{path}.dcm"), ids, names, _source_bytes(source))
        except UserError as error:
            write_pages(Path(f"{path}.tif"), pages)
            raise UserError(f"{error}; its mask is {path}.tif instead") from None
        return Path(f"{path}.dcm")
    if is_nifti(source):
        import medical

        medical.write_nifti(Path(f"{path}.nii.gz"), valued, _read_bytes(source))
        return Path(f"{path}.nii.gz")
    return write_pages(
        Path(f"{path}.tif" if Path(source).suffix.lower() in (".tif", ".tiff") else f"{path}.png"), pages
    )


def write_pages(path: Path, pages: list[np.ndarray]) -> Path:
    """Write pages (H, W), uint8 or uint16, of which a PNG has one, atomically; return the path."""
    with atomic(path) as temporary:
        temporary.write_bytes(cv2.imencodemulti(path.suffix, pages)[1].tobytes())
    return path


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


def grey_range(small: np.ndarray, scan: Scan, window: str) -> tuple[float, float]:
    """Choose the grey levels that become 0 and 1: by `window`, see `prepare_scan`."""
    if window:
        centre, width = scan.window if window == "file" else parse_window(window)
        return centre - width / 2, centre + width / 2
    low, high = np.percentile(small, PERCENTILES)
    return (low, high) if low < high else (small.min(), small.max())  # flat but for a few pixels


def parse_window(window: str) -> tuple[float, float]:
    """Read "centre,width", such as 40,400 for the soft tissue of CT. Raises UserError."""
    try:
        centre, width = map(float, window.split(","))
    except ValueError:
        centre, width = 0.0, np.nan
    if not np.isfinite(centre) or not 0 < width < np.inf:
        raise UserError(f"window is {window!r}; expected centre,width (40,400), file, or nothing for percentiles")
    return centre, width


def prepare_scan(scan: Scan, size: tuple[int, int], channels: int, window: str = "") -> np.ndarray:
    """Make the network's input of a scan: uint8 (S, size[0], size[1], channels); divided by 255 it is in [0, 1].

    window: the grey levels that become 0 and 1: "centre,width" in the file's units (HU for CT), "file" for what its
    header proposes, "" for two percentiles of the whole scan. A constant scan becomes all zeros then. Raises UserError.
    """
    rows, columns = fit(scan.pixels.shape[1:3], size)
    inner = (rows.stop - rows.start, columns.stop - columns.start)
    small = np.stack([resize(to_channels(image, channels), inner) for image in scan.pixels])
    low, high = grey_range(small, scan, window)
    canvas = np.zeros((len(small), *size, channels), np.uint8)
    if high > low:
        canvas[:, rows, columns] = np.round(255 * np.clip((small - low) / (high - low), 0, 1))
    return canvas


def prepare(image: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Do as `prepare_scan` for one decoded image (H, W, C): uint8 (size[0], size[1], channels)."""
    return prepare_scan(Scan(image[None]), size, channels)[0]


def prepare_mask(ids: np.ndarray, size: tuple[int, int], classes: int) -> np.ndarray:
    """Resize class ids (H, W) in 0..classes like its image: uint8 (size[0], size[1], classes), each class's share.

    255 is a pixel that is all of that class. Shares keep where in a pixel a border runs; ids would round it away.
    """
    rows, columns = fit(ids.shape, size)
    inner = (rows.stop - rows.start, columns.stop - columns.start)
    canvas = np.zeros((*size, classes), np.uint8)
    for i in range(classes):
        canvas[rows, columns, i] = resize(cv2.compare(ids, i + 1, cv2.CMP_EQ), inner)
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


def usual_parts(masks: Iterable[np.ndarray]) -> int:
    """Count the connected parts that 95 % of the masks (H, W) do not exceed; at least 1."""
    counts = [cv2.connectedComponents(mask.astype(np.uint8))[0] - 1 for mask in masks]
    return max(1, int(np.quantile(counts, 0.95, method="inverted_cdf")))


def clean(ids: np.ndarray, parts: list[int]) -> np.ndarray:
    """Keep each class's `parts[class - 1]` largest parts in ids (H, W), then fill holes that hold no other class."""
    cleaned = ids.copy()
    for i, count in enumerate(parts, 1):
        found, labels = cv2.connectedComponents((ids == i).astype(np.uint8))
        if found - 1 > count:
            sizes = np.bincount(labels.ravel())[1:]
            cleaned[np.isin(labels, 1 + np.argsort(-sizes, kind="stable")[count:])] = 0
    for i in range(1, len(parts) + 1):
        filled = (cleaned == i).astype(np.uint8)
        outlines, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
        cleaned[(filled > 0) & (cleaned == 0)] = i
    return cleaned


def decide(probs: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
    """Turn probabilities (H, W, K) into class ids (H, W), cleaned as the model file says."""
    ids = to_ids(probs, facts["threshold"])
    return clean(ids, facts["clean"]) if facts.get("clean") else ids


def draw_contours(picture: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return RGB `picture` (H, W, 3) with the outline of every class in `ids` (H, W) drawn in that class's colour."""
    drawn = np.ascontiguousarray(picture).copy()
    thickness = max(1, round(max(ids.shape) / 300))
    for i in np.unique(ids[ids > 0]):
        outlines, _ = cv2.findContours((ids == i).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, COLOURS[(int(i) - 1) % len(COLOURS)], thickness)
    return drawn
