"""TIFF, whose pages are the slices of a volume, read by tifffile."""

import io
import logging
from typing import Any

import numpy as np

from imaging import pictures
from imaging.scan import Mask, Scan, check_declared_bytes

# Little-endian, big-endian.
MAGIC = ((0, b"II"), (0, b"MM"))
# Compressions whose decoded size is the size of the page. JPEG has a size of its own.
LOSSLESS = (
    "NONE",
    "LZW",
    "DEFLATE",
    "ADOBE_DEFLATE",
    "PACKBITS",
    "CCITTRLE",
    "CCITT_T4",
    "CCITT_T6",
)
COLOURS = ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR")
# Units of ImageJ, in mm.
MM_PER_UNIT = {"mm": 1.0, "cm": 10.0, "um": 1e-3, "micron": 1e-3, "\\u00B5m": 1e-3, "µm": 1e-3}


def decode_tiff(content: bytes, max_bytes: int) -> Scan:
    """Decode the pages of a TIFF, after a check of the size that they declare."""
    import tifffile

    # tifffile's own messages do not name the file; ours do.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        # A pyramid also holds smaller copies of its picture.
        pages = [page for page in file.pages if not page.is_reduced]
        check_declared_bytes(max_bytes, sum(map(_page_bytes, pages)))
        pixels = np.stack([_decode_page(page, content) for page in pages])
        return Scan(pixels, _spacing_mm(file))


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask as TIFF, a page per slice."""
    return pictures.encode_pages(".tif", mask.pages)


def _page_bytes(page: Any) -> int:
    """Count the bytes that decoding a page takes."""
    # A pixel of a palette becomes three colours of 16 bits.
    return page.size * max(8, 2 * page.dtype.itemsize)


def _check_segments(page: Any, content: bytes) -> None:
    """Raise ValueError if a strip or tile can be larger than its page declares."""
    compression = page.compression.name
    if compression in LOSSLESS:
        return
    if compression != "JPEG":
        raise ValueError(f"compressed by {compression}; save it with deflate, LZW or JPEG")
    width = page.tilewidth or page.imagewidth
    height = page.tilelength or page.rowsperstrip or page.imagelength
    for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        jpeg_height, jpeg_width = pictures.jpeg_size(content[start : start + count])
        if jpeg_height * jpeg_width > 2 * max(width * height, 64):
            raise ValueError("a JPEG in it is larger than its page")


def _decode_page(page: Any, content: bytes) -> np.ndarray:
    """Decode a page as stored: (H, W, C), more is brighter. Its orientation tag is ignored."""
    _check_segments(page, content)
    pixels = page.asarray()
    if page.axes == "YX":
        pixels = pixels[..., None]
    elif page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    elif page.axes != "YXS":
        raise ValueError(f"axes {page.axes}")
    return _to_brightness(pixels, page)


def _to_brightness(pixels: np.ndarray, page: Any) -> np.ndarray:
    """Apply a page's palette; turn levels where low is white."""
    colours = getattr(page.photometric, "name", "")
    if colours not in COLOURS:
        raise ValueError(f"{colours or page.photometric} colours")
    if colours == "PALETTE":
        return np.moveaxis(page.colormap[:, pixels[..., 0]], 0, -1)
    if pixels.dtype == bool:
        pixels = np.uint8(255) * pixels
    if colours == "MINISWHITE":
        return np.iinfo(pixels.dtype).max - pixels
    return pixels


def _spacing_mm(file: Any) -> tuple[float, float, float] | None:
    """Read the distance between pages, rows and columns from the metadata of ImageJ.

    Without ImageJ's unit a TIFF's resolution is meant for printing.
    """
    page, metadata = file.pages[0], file.imagej_metadata or {}
    unit_mm = MM_PER_UNIT.get(metadata.get("unit"))
    resolutions = [page.tags.valueof(name) for name in ("YResolution", "XResolution")]
    if unit_mm is None or not all(resolutions):
        return None
    if not all(pixels and units for pixels, units in resolutions):
        return None
    rows, columns = (unit_mm * units / pixels for pixels, units in resolutions)
    slices = unit_mm * float(metadata.get("spacing", 1.0 / unit_mm))
    return slices, rows, columns
