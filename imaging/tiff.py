"""Decode DICOM, NIfTI and TIFF stacks, and write masks back in kind. `images.py` comes here for such files.

A NIfTI volume is turned so that its slices are those of the acquisition (across its coarsest axis, else axial) and
stand as radiologists look at them; its mask is turned back. A DICOM series is a folder of files, a slice each.
"""

import io
import logging
from typing import Any

import numpy as np

from imaging import pictures
from imaging.scan import Scan, check_declared_bytes
from utils import UserError, first_line

LOSSLESS = (
    "NONE",
    "LZW",
    "DEFLATE",
    "ADOBE_DEFLATE",
    "PACKBITS",
    "CCITTRLE",
    "CCITT_T4",
    "CCITT_T6",
)  # TIFF's


# -------------------------------------------------------------------------------------------------------------- TIFF


def decode_tiff(content: bytes) -> Scan:
    """Decode the pages of a TIFF, once its headers are known to promise no more than the memory holds."""
    import tifffile

    logging.getLogger("tifffile").setLevel(
        logging.CRITICAL
    )  # its own complaints name no file; ours do
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            pages = [
                page for page in file.pages if not page.is_reduced
            ]  # a pyramid's smaller copies
            check_declared_bytes(
                sum(page.size * max(8, 2 * page.dtype.itemsize) for page in pages)
            )  # 8: a palette's colours
            return Scan(
                np.stack([_tiff_page(page, content) for page in pages]), _tiff_spacing(file)
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"unreadable as TIFF ({first_line(error)})") from None


def _check_segments(page: Any, content: bytes) -> None:
    """Raise ValueError for a page whose parts have sizes of their own, not the page's: a bomb could hide there."""
    if page.compression.name not in LOSSLESS and page.compression.name != "JPEG":
        raise ValueError(
            f"compressed by {page.compression.name}; save it with deflate, LZW or JPEG"
        )
    largest = (page.tilewidth or page.imagewidth) * (
        page.tilelength or page.rowsperstrip or page.imagelength
    )
    parts = (
        zip(page.dataoffsets, page.databytecounts, strict=True)
        if page.compression.name == "JPEG"
        else ()
    )
    for start, count in parts:
        if pictures.declared_pixels(content[start : start + count]) > 2 * max(largest, 64):
            raise ValueError("a JPEG in it is larger than its page")


def _tiff_page(page: Any, content: bytes) -> np.ndarray:
    """Decode a page as stored: (H, W, C), more is brighter. Its orientation tag is ignored."""
    _check_segments(page, content)
    pixels = page.asarray()
    pixels = {
        "YX": lambda: pixels[..., None],
        "YXS": lambda: pixels,
        "SYX": lambda: np.moveaxis(pixels, 0, -1),
    }[page.axes]()
    kind = getattr(page.photometric, "name", "")
    if kind not in ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR"):
        raise ValueError(f"{kind or page.photometric} colours")
    if kind == "PALETTE":
        return np.moveaxis(page.colormap[:, pixels[..., 0]], 0, -1)
    if pixels.dtype == bool:
        pixels = np.uint8(255) * pixels
    return np.iinfo(pixels.dtype).max - pixels if kind == "MINISWHITE" else pixels


def _tiff_spacing(file: Any) -> tuple[float, float, float] | None:
    """Give the millimetres between pages, rows and columns, where ImageJ says so: a bare resolution is for printers."""
    page, notes = file.pages[0], file.imagej_metadata or {}
    units = {"mm": 1.0, "cm": 10.0, "um": 1e-3, "micron": 1e-3, "\\u00B5m": 1e-3, "µm": 1e-3}
    millimetres = units.get(notes.get("unit"))
    resolution = [page.tags.valueof(name) for name in ("YResolution", "XResolution")]
    if (
        millimetres is None
        or not all(resolution)
        or not all(pixels and count for pixels, count in resolution)
    ):
        return None
    plane = [millimetres * count / pixels for pixels, count in resolution]
    return (millimetres * float(notes.get("spacing", 1.0 / millimetres)), *plane)
