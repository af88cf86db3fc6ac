"""TIFF, whose pages are slices or channels, read by tifffile."""

import io
import logging
import struct
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from imaging import pictures, tiff_axes
from imaging.scan import Mask, Scan, check_declared_bytes
from utils import UserError

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
    # Names of tifffile: T4 and T6, as in one-bit masks.
    "CCITTFAX3",
    "CCITTFAX4",
    "LZMA",
    "ZSTD",
)
COLOURS = ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR", "SEPARATED")
# Each page costs time before anything of it is decoded.
MAX_PAGES = 10_000
ORIENTATION_TAG = 274
ALPHA = (1, 2)  # kinds of extra samples: associated, unassociated


def decode_tiff(content: bytes, max_bytes: int) -> Scan:
    """Decode the pages of a TIFF: more is brighter. Raises UserError."""
    return _decode(content, max_bytes, is_mask=False)


def decode_mask(content: bytes, max_bytes: int, image: Scan | None = None) -> Scan:
    """Decode a mask: values as stored, of a palette its indices. Raises UserError."""
    return _decode(content, max_bytes, is_mask=True)


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask as TIFF, a page per slice."""
    return pictures.encode_pages(".tif", mask.pages)


def encode_floats(slices: np.ndarray, image: Scan) -> bytes:
    """Encode float32 (S, H, W) as TIFF, a page per slice."""
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, slices, photometric="minisblack", compression="zlib", metadata=None)
    return buffer.getvalue()


def _decode(content: bytes, max_bytes: int, is_mask: bool) -> Scan:
    import tifffile

    # tifffile's own messages do not name the file; ours do.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    _check_page_count(content)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        # A pyramid also holds smaller copies of its picture.
        pages = [page for page in file.pages if not page.is_reduced]
        check_declared_bytes(max_bytes, sum(map(_page_bytes, pages)))
        pages, notes = _same_size(pages)
        axes = tiff_axes.plane_axes(file, pages[0].samplesperpixel)
        count = prod(length for _, length in axes)
        first, in_all = pages[0], len(pages) * pages[0].samplesperpixel
        if len(pages) < count == in_all and first.axes == "SYX":
            # tifffile stores 3 or 4 slices as the colours of a page, unless it is told not to.
            planes = np.concatenate([_decode_page(page, content) for page in pages], axis=-1)
            planes = np.moveaxis(planes, -1, 0)[..., None]
        elif len(pages) == 1 < count:
            check_declared_bytes(max_bytes, count * _page_bytes(pages[0]))
            planes = _planes_behind(pages[0], count, content, file.byteorder)
        else:
            planes = np.stack([_decode_page(page, content) for page in pages])
        planes = _to_levels(planes, pages[0], is_mask)
        if len(planes) != count:
            notes += _note_on_planes(axes, len(planes))
            axes = [("Z", len(planes))]
        notes += _notes(pages[0], axes, is_mask)
        pixels = tiff_axes.arrange(planes, axes)
        has_alpha = _has_alpha(pages[0], pixels)
        is_colour = pages[0].photometric.name not in ("MINISBLACK", "MINISWHITE")
        scan = Scan(
            pixels,
            tiff_axes.spacing_mm(file),
            has_alpha=has_alpha,
            separate=pixels.shape[-1] > 1 and not is_colour,
            notes=tuple(notes),
        )
        return pictures.apply_orientation(scan, pages[0].tags.valueof(ORIENTATION_TAG) or 1)


# ----------------------------------------------------------------------------------------- pages


def _check_page_count(content: bytes) -> None:
    """Raise UserError for more than MAX_PAGES pages, by following their chain alone."""
    order = "<" if content.startswith(b"II") else ">"
    is_big = content[2:4] in (b"\x2b\0", b"\0\x2b")
    number, link, entry = ("Q", "Q", 20) if is_big else ("H", "I", 12)
    size = struct.calcsize(f"<{number}")
    place = 8 if is_big else 4
    for _ in range(MAX_PAGES + 1):
        if place + struct.calcsize(f"<{link}") > len(content):
            return
        (page,) = struct.unpack_from(order + link, content, place)
        if page == 0 or page + size > len(content):
            return
        (count,) = struct.unpack_from(order + number, content, page)
        place = page + size + count * entry
    raise UserError(f"more than {MAX_PAGES} pages; expected fewer: split it into several files")


def _page_bytes(page: Any) -> int:
    """Count the bytes that decoding a page takes."""
    # A pixel of a palette becomes three colours of 16 bits.
    return page.size * max(8, 2 * page.dtype.itemsize)


def _same_size(pages: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Choose the pages that are like the largest one; a note names the others."""

    def kind(page: Any) -> tuple[Any, ...]:
        return (page.imagelength, page.imagewidth, page.samplesperpixel, page.dtype)

    largest = max(pages, key=lambda page: page.imagelength * page.imagewidth)
    chosen = [page for page in pages if kind(page) == kind(largest)]
    others = Counter(f"{page.imagelength}x{page.imagewidth}" for page in pages)
    others[f"{largest.imagelength}x{largest.imagewidth}"] -= len(chosen)
    notes = []
    for size, count in (+others).items():
        left_out = f"{count} page(s) of {size} pixels left out"
        notes.append(f"{left_out}: no slice of {largest.imagelength}x{largest.imagewidth}")
    return chosen, notes


def _planes_behind(page: Any, count: int, content: bytes, order: str) -> np.ndarray:
    """Read planes (P, H, W, C) of which only the first has an entry in the table of pages.

    ImageJ writes stacks above 4 GB so. Raises UserError if they are not there.
    """
    first, values = page.dataoffsets[0], count * page.size
    is_plain = page.compression.name == "NONE" and page.bitspersample % 8 == 0 and page.axes == "YX"
    if not is_plain or first + values * page.dtype.itemsize > len(content):
        raise UserError(f"1 page of the {count} that its metadata declare; expected all of them")
    stored = np.frombuffer(content, page.dtype.newbyteorder(order), values, first)
    planes = stored.astype(page.dtype.newbyteorder("="))
    return planes.reshape(count, page.imagelength, page.imagewidth, 1)


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
        segment = content[start : start + count]
        jpeg_height, jpeg_width = pictures.jpeg_size(segment)
        if jpeg_height * jpeg_width > 2 * max(width * height, 64):
            raise ValueError("a JPEG in it is larger than its page")
        pictures.check_jpeg_scans(segment, jpeg_height * jpeg_width)


def _decode_page(page: Any, content: bytes) -> np.ndarray:
    """Decode a page as stored: (H, W, C)."""
    _check_segments(page, content)
    pixels = page.asarray()
    if page.axes == "YX":
        return pixels[..., None]
    if page.axes == "SYX":
        return np.moveaxis(pixels, 0, -1)
    if page.axes != "YXS":
        raise ValueError(f"axes {page.axes}")
    return pixels


# ---------------------------------------------------------------------------------------- levels


def _to_levels(planes: np.ndarray, page: Any, is_mask: bool) -> np.ndarray:
    """Apply a palette; turn levels where low is white, but not those of a mask of ids.

    ImageJ shows masks through an inverting table: objects are stored as 255 and shown black.
    tifffile gives arrays of bool the tag and stores them as they are.
    """
    colours = getattr(page.photometric, "name", "")
    if colours not in COLOURS:
        raise ValueError(f"{colours or page.photometric} colours")
    if colours == "PALETTE" and not is_mask:
        return np.moveaxis(page.colormap[:, planes[..., 0]], 0, -1)
    if colours == "SEPARATED" and planes.shape[-1] == 4:
        return _cmyk_to_rgb(planes)
    is_bilevel = planes.dtype == bool
    if is_bilevel:
        planes = np.uint8(255) * planes
    if colours == "MINISWHITE" and not _is_as_stored(page, is_mask):
        if planes.dtype.kind == "u":
            return np.iinfo(planes.dtype).max - planes
        # Between the levels that there are: NaN stays NaN.
        wide = planes.astype(np.int64) if planes.dtype.kind == "i" else planes
        return (np.nanmax(wide) + np.nanmin(wide) - wide).astype(planes.dtype)
    return planes


def _is_as_stored(page: Any, is_mask: bool) -> bool:
    """Say whether a mask whose tag says that low is white means its values as they are stored."""
    is_bilevel = page.bitspersample == 1
    return is_mask and (not is_bilevel or page.software.startswith("tifffile"))


def _cmyk_to_rgb(planes: np.ndarray) -> np.ndarray:
    """Turn shares of cyan, magenta, yellow and black ink into red, green and blue."""
    most = float(np.iinfo(planes.dtype).max)
    light = most - planes.astype(np.float32)
    return np.round(light[..., :3] * light[..., 3:] / most).astype(planes.dtype)


def _has_alpha(page: Any, pixels: np.ndarray) -> bool:
    """Say whether the last channel is opacity: the file says so, or all of RGB's is opaque.

    An extra sample of no stated kind is a channel.
    """
    samples = page.samplesperpixel
    if samples != pixels.shape[-1] or not page.extrasamples:
        return False
    if page.extrasamples[-1] in ALPHA:
        return True
    is_rgb = page.photometric.name == "RGB" and samples == 4 and pixels.dtype.kind == "u"
    return is_rgb and bool((pixels[..., 3] == np.iinfo(pixels.dtype).max).all())


def _notes(page: Any, axes: tiff_axes.Axes, is_mask: bool) -> list[str]:
    notes = [f"{length} time points are taken as slices" for name, length in axes if name == "T"]
    if page.photometric.name == "MINISWHITE":
        if _is_as_stored(page, is_mask):
            notes.append("its tag says that low is white (MinIsWhite): values taken as stored")
        else:
            notes.append(
                "its tag says that low is white (MinIsWhite): inverted, as viewers show it"
            )
    return notes


def _note_on_planes(axes: tiff_axes.Axes, count: int) -> list[str]:
    if not axes:
        return []
    declared = " x ".join(f"{length} {name}" for name, length in axes)
    return [f"{count} page(s), its metadata declare {declared}: pages are taken as slices"]
