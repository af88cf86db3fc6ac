"""The table of file formats, and how any image or mask file is read and written.

A new format is a file beside this one with a decoder, and a line in FORMATS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imaging import dicom, dicom_masks, dicom_seg, dicom_series, nifti, pictures, tiff
from imaging.dicom import decode_dicom
from imaging.nifti import decode_nifti
from imaging.pictures import decode_picture
from imaging.scan import MAX_BYTES, MIN_SIDE, Mask, Scan, name_in_errors, read_bytes
from imaging.tiff import decode_tiff
from utils import UserError, atomic, first_line


@dataclass(frozen=True)
class Format:
    """A kind of file: how it is recognised and read, and how masks of its images are written."""

    name: str
    # Endings of such files, in lower case.
    suffixes: tuple[str, ...]
    # A file is of this format if one of these (offset, bytes) is found in it.
    magic: tuple[tuple[int, bytes], ...]
    # (content, max_bytes) → Scan. Raises UserError if the header declares more than max_bytes, and
    # an error of any kind if the file is damaged.
    decode: Callable[[bytes, int], Scan]
    # Ending of masks, and (mask, image) → content. Without them masks are PNG, or TIFF if there are
    # several slices.
    mask_suffix: str = ""
    encode_mask: Callable[[Mask, Scan], bytes] | None = None

    # (content) → whether it is of this format, where marks are not enough.
    recognise: Callable[[bytes], bool] | None = None

    def matches(self, content: bytes) -> bool:
        """Say whether a file's content is of this format."""
        if self.recognise is not None and self.recognise(content):
            return True
        return any(content.startswith(mark, offset) for offset, mark in self.magic)


PNG = Format("PNG", (".png",), pictures.PNG_MAGIC, decode_picture, ".png", pictures.encode_mask)
TIFF = Format("TIFF", (".tif", ".tiff"), tiff.MAGIC, decode_tiff, ".tif", tiff.encode_mask)
DICOM = Format(
    "DICOM",
    (".dcm", ".dicom", ".ima"),
    dicom.MAGIC,
    decode_dicom,
    ".dcm",
    dicom_seg.encode_mask,
    dicom.is_dicom,
)
NIFTI = Format(
    "NIfTI", (".nii", ".nii.gz"), nifti.MAGIC, decode_nifti, ".nii.gz", nifti.encode_mask
)

# The first that matches is taken. DICOM is the first: the bytes before its mark can be anything.
FORMATS = (
    DICOM,
    TIFF,
    NIFTI,
    PNG,
    Format("JPEG", (".jpg", ".jpeg"), pictures.JPEG_MAGIC, decode_picture),
    Format("BMP", (".bmp",), pictures.BMP_MAGIC, decode_picture),
)
KINDS = {"png": PNG, "tiff": TIFF, "nifti": NIFTI, "seg": DICOM}
SUFFIXES = tuple(suffix for kind in FORMATS for suffix in kind.suffixes)


def find_format(content: bytes) -> Format:
    """Recognise a file by its content, not by its name. Raises UserError."""
    for kind in FORMATS:
        if kind.matches(content):
            return kind
    known = ", ".join(kind.name for kind in FORMATS)
    raise UserError(f"unreadable ({len(content)} bytes of another kind); expected one of {known}")


def decode_scan(content: bytes, max_bytes: int = MAX_BYTES) -> Scan:
    """Decode an image file of any format in FORMATS.

    Raises UserError for a file that is unreadable, truncated, not finite, smaller than MIN_SIDE, or
    takes more than `max_bytes` when decoded.
    """
    kind = find_format(content)
    try:
        scan = kind.decode(content, max_bytes)
    except UserError:
        raise
    except Exception as error:
        # A damaged file causes errors of many kinds in the libraries that read it.
        raise UserError(f"unreadable as {kind.name} ({first_line(error)})") from None
    check_pixels(scan.pixels)
    return replace(scan, format=kind.name)


def check_pixels(pixels: np.ndarray) -> None:
    """Raise UserError unless decoded pixels (S, H, W, C) are an image that a network can take."""
    height, width, channels = pixels.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{height}x{width} pixels; expected at least {MIN_SIDE}x{MIN_SIDE}")
    if channels not in (1, 3, 4):
        raise UserError(f"{channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    kind = pixels.dtype.kind
    if kind not in "buif" or (kind == "f" and not np.isfinite(pixels).all()):
        raise UserError("NaN or infinite pixels; expected finite numbers")


def read_scan(path: str | Path, window: str = "", max_bytes: int = MAX_BYTES) -> Scan:
    """Read an image file, or a folder that holds a DICOM series.

    window: as in `prepare_scan`; "file" needs a file that proposes one. Raises UserError, its
    message without the path.
    """
    if Path(path).is_dir():
        scan = replace(dicom_series.read_folder(path, max_bytes), format=DICOM.name)
    else:
        scan = decode_scan(read_bytes(path), max_bytes)
    return check_window(scan, window)


def check_window(scan: Scan, window: str) -> Scan:
    """Return a scan. Raises UserError if `window` is "file" and its file proposes none."""
    if window == "file" and scan.window is None:
        raise UserError(
            "its header proposes no window; expected one, or --window centre,width or percentiles"
        )
    return scan


def read_named_scan(path: Path, window: str = "") -> Scan:
    """Read an image as `read_scan` does. Raises UserError, its message begins with the path."""
    with name_in_errors(path):
        return read_scan(path, window)


def decode_image(content: bytes) -> np.ndarray:
    """Decode a file of one image: (H, W, C) as stored. Raises UserError."""
    return _only_slice(decode_scan(content).pixels, "image")


def read_image(path: str | Path) -> np.ndarray:
    """Read a file of one image: (H, W, C) as stored. Raises UserError without the path."""
    return decode_image(read_bytes(path))


def read_mask_scan(path: str | Path, image: Scan | None = None, names: Sequence[str] = ()) -> Scan:
    """Read a mask: its values as stored, (S, H, W, 1). Raises UserError without the path.

    A colour file needs equal channels. A DICOM segmentation of `image`, or its RTSTRUCT, is read as
    ids of the classes `names`.
    """
    if Path(path).is_dir():
        scan = read_scan(path)
    else:
        content = read_bytes(path)
        if DICOM.matches(content):
            mask = dicom_masks.decode_mask(content, image, names)
            if mask is not None:
                return mask
        scan = decode_scan(content)
    return replace(scan, pixels=_single_channel(scan.pixels))


def _single_channel(pixels: np.ndarray) -> np.ndarray:
    """Reduce a mask (S, H, W, C) to one channel. Raises UserError if that loses something."""
    if pixels.shape[-1] == 4 and np.ptp(pixels[..., 3]) > 0:
        raise UserError(
            "its alpha channel varies; expected a mask without one, its values in the colours"
        )
    colours = pixels[..., :3]
    if colours.shape[-1] == 3 and not (colours == colours[..., :1]).all():
        raise UserError("a colour picture; expected a mask with one value per pixel")
    return colours[..., :1]


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask of one image: (H, W), values as stored. Raises UserError without the path."""
    return _only_slice(read_mask_scan(path).pixels, "mask")[..., 0]


def _only_slice(pixels: np.ndarray, what: str) -> np.ndarray:
    if len(pixels) > 1:
        raise UserError(f"{len(pixels)} pages or slices; expected one {what}")
    return pixels[0]


class Written(NamedTuple):
    """A mask's file, and why it is of another format than was asked for."""

    path: Path
    note: str = ""


def write_mask(
    path: str | Path,
    ids: np.ndarray,
    names: Sequence[str],
    image: Scan,
    levels: Sequence[int] = (),
    kind: str = "",
) -> Written:
    """Write a mask in the format of its image, or as `kind` says, one of KINDS.

    path: without an ending. ids: class ids (S, H, W). levels: the value of each class in the file;
    none means 1, 2 …, and 255 for a single class in a picture. Where a format cannot be made, the
    mask is a TIFF, and a note says why.
    """
    mask = Mask(ids, names, levels)
    wanted = KINDS[kind] if kind else _mask_format(image, len(ids))
    try:
        return Written(_write(f"{path}{wanted.mask_suffix}", wanted.encode_mask(mask, image)))
    except UserError as error:
        place = _write(f"{path}{TIFF.mask_suffix}", TIFF.encode_mask(mask, image))
        return Written(place, f"{error}; its mask is {place.name} instead")


def write_probabilities(
    path: str | Path, probs: np.ndarray, names: Sequence[str], image: Scan
) -> list[Path]:
    """Write a float32 TIFF per class."""
    import tifffile

    places = []
    for name, plane in zip(names, np.moveaxis(probs[..., -len(names) :], -1, 0), strict=True):
        with atomic(f"{path}_prob_{name}.tif") as temporary:
            tifffile.imwrite(temporary, np.float32(plane))
        places.append(Path(f"{path}_prob_{name}.tif"))
    return places


def _mask_format(image: Scan, num_slices: int) -> Format:
    """Choose the format of an image's mask."""
    for kind in FORMATS:
        if kind.name == image.format and kind.encode_mask:
            return kind
    return TIFF if num_slices > 1 else PNG


def _write(path: str, content: bytes) -> Path:
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)
