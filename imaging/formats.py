"""The table of file formats, and how any image or mask file is read and written.

A new format is a file beside this one with a decoder, and a line in FORMATS.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from imaging import arrays, dicom, jpeg2000, metaimage, nifti, nrrd, partners, pictures, tiff
from imaging.alignment import place_in
from imaging.dicom import dicom_masks, dicom_seg, dicom_series, dicom_zip
from imaging.masks import encodings
from imaging.scan import (
    MAX_BYTES,
    MAX_CHANNELS,
    MIN_SIDE,
    Mask,
    Scan,
    name_in_errors,
    read_bytes,
)
from utils import UserError, first_line

# Endings of volumes whose header and voxels are in two files.
IN_TWO_FILES = (".hdr", ".hdr.gz", *partners.HEADERS)
# So much of a file says of which format it is.
HEAD_BYTES = 1024
# Larger numbers mean that there is none, as in maps with -3.4e38 outside.
NO_MEASUREMENT = 1e30


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
    # (float32 (S, H, W), image) → content.
    encode_floats: Callable[[np.ndarray, Scan], bytes] | None = None
    # As `decode`, for a mask of the image: ids as they are stored, not the greys that show them.
    decode_mask: Callable[[bytes, int, Scan | None], Scan] | None = None
    # (header, its path, max_bytes) → one content, for a header whose pixels are in another file.
    join: Callable[[bytes, Path, int], bytes] | None = None

    # (content) → whether it is of this format, where marks are not enough.
    recognise: Callable[[bytes], bool] | None = None
    # (path, max_bytes) → Scan: as `decode`, of a file that is not read into memory first.
    open: Callable[[Path, int], Scan] | None = None

    def matches(self, content: bytes) -> bool:
        """Say whether a file's content is of this format."""
        if self.recognise is not None and self.recognise(content):
            return True
        return any(content.startswith(mark, offset) for offset, mark in self.magic)


PNG = Format(
    "PNG",
    (".png",),
    pictures.PNG_MAGIC,
    pictures.decode_picture,
    ".png",
    pictures.encode_mask,
    decode_mask=pictures.decode_ids,
)
TIFF = Format(
    "TIFF",
    (".tif", ".tiff"),
    tiff.MAGIC,
    tiff.decode_tiff,
    ".tif",
    tiff.encode_mask,
    tiff.encode_floats,
    tiff.decode_mask,
    open=tiff.open_tiff,
)
DICOM = Format(
    "DICOM",
    (".dcm", ".dicom", ".ima"),
    dicom.MAGIC,
    dicom.decode_dicom,
    ".dcm",
    dicom_seg.encode_mask,
    recognise=dicom.is_dicom,
)
ZIPPED_DICOM = Format(
    "zipped DICOM series",
    (),  # a zip beside images is no image: it is looked into when it is named
    (),
    dicom_zip.decode_zip,
    ".dcm",
    dicom_seg.encode_mask,
    recognise=dicom_zip.is_zip_of_dicom,
)
NIFTI = Format(
    "NIfTI",
    (".nii", ".nii.gz", ".hdr", ".hdr.gz"),
    nifti.MAGIC,
    nifti.decode_nifti,
    ".nii.gz",
    nifti.encode_mask,
    nifti.encode,
    nifti.decode_mask,
    nifti.join,
    open=nifti.open_nifti,
)
NRRD = Format(
    "NRRD",
    (".nrrd", ".nhdr", ".seg.nrrd"),
    nrrd.MAGIC,
    nrrd.decode_nrrd,
    ".nrrd",
    nrrd.encode_mask,
    nrrd.encode,
    join=nrrd.join,
)
METAIMAGE = Format(
    "MetaImage",
    (".mha", ".mhd"),
    metaimage.MAGIC,
    metaimage.decode_metaimage,
    ".mha",
    metaimage.encode_mask,
    metaimage.encode,
    join=metaimage.join,
)

BMP = Format(
    "BMP",
    (".bmp",),
    pictures.BMP_MAGIC,
    pictures.decode_picture,
    decode_mask=pictures.decode_ids,
)
GIF = Format(
    "GIF",
    (".gif",),
    pictures.GIF_MAGIC,
    pictures.decode_picture,
    decode_mask=pictures.decode_ids,
)

# The first that matches is taken. DICOM is the first: the bytes before its mark can be anything.
FORMATS = (
    DICOM,
    TIFF,
    NIFTI,
    NRRD,
    METAIMAGE,
    PNG,
    Format("JPEG", (".jpg", ".jpeg"), pictures.JPEG_MAGIC, pictures.decode_picture),
    BMP,
    GIF,
    Format("WebP", (".webp",), pictures.WEBP_MAGIC, pictures.decode_picture),
    Format("JPEG 2000", jpeg2000.SUFFIXES, jpeg2000.MAGIC, jpeg2000.decode_jpeg2000),
    Format("NPY", (".npy",), arrays.NPY_MAGIC, arrays.decode_npy),
    ZIPPED_DICOM,
    Format("NPZ", (".npz",), arrays.NPZ_MAGIC, arrays.decode_npz),
)
# They say where in the patient they lie, so that a mask may cover a part of its image.
PLACED = (DICOM, ZIPPED_DICOM, NIFTI, NRRD, METAIMAGE)
# They may have a palette.
PALETTES = (PNG, TIFF, BMP, GIF)
# What `write_mask` can be asked for.
KINDS = {"png": PNG, "tiff": TIFF, "nifti": NIFTI, "nrrd": NRRD, "seg": DICOM}
SUFFIXES = tuple(suffix for kind in FORMATS for suffix in kind.suffixes)


def find_format(content: bytes) -> Format:
    """Recognise a file by its content, not by its name. Raises UserError."""
    for kind in FORMATS:
        if kind.matches(content):
            return kind
    known = ", ".join(kind.name for kind in FORMATS)
    raise UserError(f"unreadable ({len(content)} bytes of another kind); expected one of {known}")


def decode_scan(content: bytes, max_bytes: int = MAX_BYTES) -> Scan:
    """Decode an image file of any format in FORMATS. NaN becomes the lowest finite level.

    Raises UserError for a file that is unreadable, truncated, not finite, smaller than MIN_SIDE, or
    takes more than `max_bytes` when decoded.
    """
    form = find_format(content)
    return _decode(form, lambda: form.decode(content, max_bytes))


def decode_mask_scan(content: bytes, image: Scan | None = None, max_bytes: int = MAX_BYTES) -> Scan:
    """Decode a mask of `image`: its ids as stored, not a palette's colours; NaN is background.

    Raises UserError, see `decode_scan`.
    """
    form = find_format(content)
    decode = form.decode_mask
    if decode is None:
        return _decode(form, lambda: form.decode(content, max_bytes), nan=0)
    return _decode(form, lambda: decode(content, max_bytes, image), nan=0)


def _decode(form: Format, decode: Callable[[], Scan], nan: float | None = None) -> Scan:
    with _errors_of(form):
        scan = decode()
    scan = _fill_nan(scan, nan)
    check_pixels(scan.pixels)
    return replace(scan, format=form.name)


@contextmanager
def _errors_of(form: Format) -> Iterator[None]:
    """Turn an error of any kind into a UserError: libraries raise many for a damaged file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"unreadable as {form.name} ({first_line(error)})") from None


def _fill_nan(scan: Scan, value: float | None) -> Scan:
    """Fill pixels that are no measurement: NaN, infinite, or the fill value of a mapping tool.

    value: what they become; None is the lowest level. They count as padding. Raises UserError.
    """
    if scan.pixels.dtype.kind != "f" or _largest(scan.pixels) < NO_MEASUREMENT:
        return scan
    missing = ~(np.abs(scan.pixels) < NO_MEASUREMENT)
    if missing.all():
        raise UserError("NaN or infinite numbers in all pixels; expected finite ones")
    lowest = value
    if value is None:
        # Of each channel, as they may be measurements of different kinds.
        lowest = np.where(missing, np.inf, scan.pixels).min((0, 1, 2))
        lowest = np.where(np.isinf(lowest), 0, lowest)
    pixels = np.where(missing, np.asarray(lowest, scan.pixels.dtype), scan.pixels)
    padding = missing.all(-1) if scan.padding is None else missing.all(-1) | scan.padding
    note = "NaN pixels are taken as background"
    if not np.isnan(scan.pixels[missing]).all():
        note = f"pixels that are NaN, infinite or beyond {NO_MEASUREMENT:g} are taken as background"
    return replace(scan, pixels=pixels, padding=padding, notes=(*scan.notes, note))


def _largest(pixels: np.ndarray) -> float:
    """Give the largest magnitude; NaN if there is one. Nothing is copied."""
    return np.maximum(pixels.max(), -pixels.min())


def check_pixels(pixels: np.ndarray) -> None:
    """Raise UserError unless decoded pixels (S, H, W, C) are an image that a network can take."""
    height, width, channels = pixels.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{height}x{width} pixels; expected at least {MIN_SIDE}x{MIN_SIDE}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise UserError(f"{channels} channels; expected 1 to {MAX_CHANNELS}")
    kind = pixels.dtype.kind
    if kind not in "buif" or (kind == "f" and not np.isfinite(_largest(pixels))):
        raise UserError("NaN or infinite pixels; expected finite numbers")


def read_content(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file; of a header and its voxels in another file both. Raises UserError."""
    path = Path(path)
    if path.name.lower().endswith(tuple(partners.HEADERS)):
        path = partners.header_of(path) or path
    content = read_bytes(path)
    for form in FORMATS:
        if form.join and path.name.lower().endswith(form.suffixes) and form.matches(content):
            with _errors_of(form):
                return form.join(content, path, max_bytes)
    return content


def read_scan(
    path: str | Path, window: str = "", max_bytes: int = MAX_BYTES, is_lazy: bool = False
) -> Scan:
    """Read an image file, or a folder that holds a DICOM series.

    window: as in `prepare_scan`; "file" needs a file that proposes one. is_lazy: pixels of a large
    file may be LazyPixels. Raises UserError, its message without the path.
    """
    if Path(path).is_dir():
        scan = replace(dicom_series.read_folder(path, max_bytes), format=DICOM.name)
    elif is_lazy and (form := _format_to_open(Path(path))):
        scan = _decode(form, lambda: form.open(Path(path), max_bytes))
    else:
        scan = decode_scan(read_content(path, max_bytes), max_bytes)
    return check_window(scan, window)


def _format_to_open(path: Path) -> Format | None:
    """Recognise a file that need not be read into memory; None for another."""
    try:
        form = find_format(read_bytes(path, HEAD_BYTES))
    except UserError:
        return None
    return form if form.open and not path.name.lower().endswith(IN_TWO_FILES) else None


def check_window(scan: Scan, window: str) -> Scan:
    """Return a scan. Raises UserError if `window` is "file" and its file proposes none."""
    if window == "file" and scan.window is None:
        raise UserError(
            "its header proposes no window; expected one, or --window centre,width or percentiles"
        )
    return scan


def read_named_scan(path: Path, window: str = "", is_lazy: bool = False) -> Scan:
    """Read an image as `read_scan` does. Raises UserError, its message begins with the path."""
    with name_in_errors(path):
        return read_scan(path, window, is_lazy=is_lazy)


def decode_image(content: bytes) -> np.ndarray:
    """Decode a file of one image: (H, W, C) as stored. Raises UserError."""
    return _only_slice(decode_scan(content).pixels, "image")


def read_image(path: str | Path) -> np.ndarray:
    """Read a file of one image: (H, W, C) as stored. Raises UserError without the path."""
    return decode_image(read_bytes(path))


def read_mask_scan(
    path: str | Path,
    image: Scan | None = None,
    names: Sequence[str] = (),
    overlap: bool = False,
    in_colour: bool = False,
) -> Scan:
    """Read a mask: its values or colours as stored, see `encodings.decode`.

    A DICOM segmentation of `image`, or its RTSTRUCT, is read as ids of the classes `names`, as BITS
    with `overlap`. in_colour: a palette's colours are meant, not its indices. Raises UserError
    without the path.
    """
    if Path(path).is_dir():
        scan = read_scan(path)
    else:
        content = read_content(path)
        if DICOM.matches(content):
            mask = dicom_masks.decode_mask(content, image, names, overlap)
            if mask is not None:
                return replace(mask, format=encodings.IDS)
        if in_colour and find_format(content) in PALETTES:
            return decode_scan(content)
        scan = decode_mask_scan(content, image)
    return scan if image is None else place_in(image, scan)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask of one image: (H, W), values as stored. Raises UserError without the path."""
    pixels = _only_slice(encodings.without_alpha(read_mask_scan(path), []), "mask")
    if not (pixels == pixels[..., :1]).all():
        raise UserError("a colour picture; expected a mask with one value per pixel")
    return pixels[..., 0]


def _only_slice(pixels: np.ndarray, what: str) -> np.ndarray:
    if len(pixels) > 1:
        raise UserError(f"{len(pixels)} pages or slices; expected one {what}")
    return pixels[0]
