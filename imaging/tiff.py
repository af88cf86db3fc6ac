"""TIFF, whose pages are slices or channels, read by tifffile."""

import io
import logging
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from imaging import lazy, pictures, tiff_axes
from imaging.lazy import LazyPixels
from imaging.scan import NO_DISTANCE, Mask, Scan, check_declared_bytes
from imaging.tiff_regions import Planes
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
# So much of a mask is written at once.
STRIP_BYTES = 2**18
ORIENTATION_TAG = 274
ALPHA = (1, 2)  # kinds of extra samples: associated, unassociated


def decode_tiff(content: bytes, max_bytes: int) -> Scan:
    """Decode the pages of a TIFF: more is brighter. Raises UserError."""
    return _decode(io.BytesIO(content), max_bytes)


def open_tiff(path: Path, max_bytes: int) -> Scan:
    """Read a file as `decode_tiff` does. Many pixels are decoded when they are needed.

    max_bytes: of what is decoded at once; else, of a mask. Raises UserError.
    """
    with path.open("rb") as file:
        return _decode(file, max_bytes, path)


def decode_mask(content: bytes, max_bytes: int, image: Scan | None = None) -> Scan:
    """Decode a mask: values as stored, of a palette its indices. Raises UserError."""
    return _decode(io.BytesIO(content), max_bytes, is_mask=True)


def encode_mask(mask: Mask, image: Scan) -> bytes:
    """Encode a mask as TIFF, a page per slice, strip by strip."""
    import tifffile

    height, width = mask.ids.shape[1:]
    rows = max(1, STRIP_BYTES // width)

    def strips() -> Iterator[bytes]:
        for ids in mask.ids:
            for start in range(0, height, rows):
                yield zlib.compress(mask.picture(ids[start : start + rows]).tobytes())

    kind = mask.picture(mask.ids[:0]).dtype
    more = {"photometric": "minisblack", "compression": "zlib", "metadata": None}
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, strips(), shape=mask.ids.shape, dtype=kind, rowsperstrip=rows, **more)
    return buffer.getvalue()


def encode_floats(slices: np.ndarray, image: Scan) -> bytes:
    """Encode float32 (S, H, W) as TIFF, a page per slice."""
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, slices, photometric="minisblack", compression="zlib", metadata=None)
    return buffer.getvalue()


def _decode(
    content: BinaryIO, max_bytes: int, path: Path | None = None, is_mask: bool = False
) -> Scan:
    import tifffile

    # tifffile's own messages do not name the file; ours do.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    _check_page_count(content)
    # tifffile takes the place where it stands for the file's beginning.
    content.seek(0)
    with tifffile.TiffFile(content) as file:
        # A pyramid also holds smaller copies of its picture.
        pages = [page for page in file.pages if not page.is_reduced]
        check_declared_bytes(np.inf, len(pages))
        pages, notes = _same_size(pages)
        for page in pages:
            _check_compression(page)
        axes = tiff_axes.plane_axes(file, pages[0].samplesperpixel)
        planes = _lazy_planes(path, pages, axes, max_bytes) if path else None
        if planes is None:
            planes = _whole_planes(pages, axes, max_bytes)
        planes = _to_levels(planes, pages[0], is_mask)
        if len(planes) != prod(length for _, length in axes):
            notes += _note_on_planes(axes, len(planes))
            axes = [("Z", len(planes))]
        notes += _notes(pages[0], axes, is_mask)
        pixels = tiff_axes.arrange(planes, axes)
        has_alpha = _has_alpha(pages[0], pixels)
        is_colour = pages[0].photometric.name not in ("MINISBLACK", "MINISWHITE")
        spacing = tiff_axes.spacing_mm(file)
        if spacing and np.isnan(spacing[0]):
            notes += [NO_DISTANCE] if len(pixels) > 1 else []
            spacing = (1.0, *spacing[1:])
        scan = Scan(
            pixels,
            spacing,
            has_alpha=has_alpha,
            separate=pixels.shape[-1] > 1 and not is_colour,
            notes=tuple(notes),
        )
        return pictures.apply_orientation(scan, pages[0].tags.valueof(ORIENTATION_TAG) or 1)


def _whole_planes(pages: Sequence[Any], axes: tiff_axes.Axes, max_bytes: int) -> np.ndarray:
    """Decode all planes (P, H, W, C) as stored. Raises UserError."""
    check_declared_bytes(max_bytes, sum(map(_page_bytes, pages)))
    first, count = pages[0], prod(length for _, length in axes)
    if len(pages) < count == len(pages) * first.samplesperpixel and first.axes == "SYX":
        # tifffile stores 3 or 4 slices as the colours of a page, unless it is told not to.
        planes = np.concatenate([_decode_page(page) for page in pages], axis=-1)
        return np.moveaxis(planes, -1, 0)[..., None]
    if len(pages) == 1 < count:
        check_declared_bytes(max_bytes, count * _page_bytes(first))
        return _planes_behind(first, count)
    return np.stack([_decode_page(page) for page in pages])


# ----------------------------------------------------------------------------------------- pages


def _check_page_count(content: BinaryIO) -> None:
    """Raise UserError for more than MAX_PAGES pages, by following their chain alone."""
    content.seek(0)
    start = content.read(8)
    order = "<" if start.startswith(b"II") else ">"
    is_big = start[2:4] in (b"\x2b\0", b"\0\x2b")
    number, link, entry = ("Q", "Q", 20) if is_big else ("H", "I", 12)

    def read(place: int, kind: str) -> int:
        content.seek(place)
        found = content.read(struct.calcsize(f"<{kind}"))
        # A table that ends after the file is none.
        whole = len(found) == struct.calcsize(f"<{kind}")
        return struct.unpack(order + kind, found)[0] if whole else 0

    place = 8 if is_big else 4
    for _ in range(MAX_PAGES + 1):
        page = read(place, link)
        if page == 0:
            return
        place = page + struct.calcsize(f"<{number}") + read(page, number) * entry
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


def _lazy_planes(
    path: Path, pages: Sequence[Any], axes: tiff_axes.Axes, max_bytes: int
) -> LazyPixels | None:
    """Give planes (P, H, W, C) that are not decoded yet; None if they are few, or cannot be so.

    Raises UserError if a mask of them would take more than `max_bytes`.
    """
    first, count = pages[0], len(pages)
    if count == 1 and axes and first.axes == "YX":
        count = prod(length for _, length in axes)
        _check_planes_behind(first, count)
    elif count < prod(length for _, length in axes):
        return None
    if count * first.size * first.dtype.itemsize <= lazy.LARGE_BYTES:
        return None
    if first.dtype.kind == "i" and first.photometric.name == "MINISWHITE":
        # It is inverted between the levels that there are.
        return None
    planes = Planes(path, pages, count, _check_segment)
    if not planes.can_read():
        return None
    check_declared_bytes(max_bytes, count * first.imagelength * first.imagewidth)
    return planes.pixels


def _planes_behind(page: Any, count: int) -> np.ndarray:
    """Read planes (P, H, W, C) of which only the first has an entry in the table of pages.

    ImageJ writes stacks above 4 GB so. Raises UserError if they are not there.
    """
    _check_planes_behind(page, count)
    file = page.parent.filehandle
    file.seek(page.dataoffsets[0])
    stored = file.read_array(page.dtype.newbyteorder(page.parent.byteorder), count * page.size)
    planes = stored.astype(page.dtype, copy=False)
    return planes.reshape(count, page.imagelength, page.imagewidth, 1)


def _check_planes_behind(page: Any, count: int) -> None:
    """Raise UserError unless `count` planes as the page lie one after the other in the file."""
    last = page.dataoffsets[0] + count * page.size * page.dtype.itemsize
    is_plain = page.compression.name == "NONE" and page.bitspersample % 8 == 0 and page.axes == "YX"
    if not is_plain or last > page.parent.filehandle.size:
        raise UserError(f"1 page of the {count} that its metadata declare; expected all of them")


def _check_segment(page: Any, segment: bytes) -> None:
    """Raise an error if a strip or tile can be larger than its page declares."""
    if page.compression.name != "JPEG":
        return
    width = page.tilewidth or page.imagewidth
    height = page.tilelength or page.rowsperstrip or page.imagelength
    jpeg_height, jpeg_width = pictures.jpeg_size(segment)
    if jpeg_height * jpeg_width > 2 * max(width * height, 64):
        raise ValueError("a JPEG in it is larger than its page")
    pictures.check_jpeg_scans(segment, jpeg_height * jpeg_width)


def _check_compression(page: Any) -> None:
    """Raise ValueError for a compression whose decoded size is not known before."""
    compression = page.compression.name
    if compression not in (*LOSSLESS, "JPEG"):
        raise ValueError(f"compressed by {compression}; save it with deflate, LZW or JPEG")


def _decode_page(page: Any) -> np.ndarray:
    """Decode a page as stored: (H, W, C)."""
    if page.compression.name == "JPEG":
        file = page.parent.filehandle
        for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(start)
            _check_segment(page, file.read(count))
    pixels = page.asarray()
    if page.axes == "YX":
        return pixels[..., None]
    if page.axes == "SYX":
        return np.moveaxis(pixels, 0, -1)
    if page.axes != "YXS":
        raise ValueError(f"axes {page.axes}")
    return pixels


# ---------------------------------------------------------------------------------------- levels


def _to_levels(planes: Any, page: Any, is_mask: bool) -> Any:
    """Apply a palette; turn levels where low is white, but not those of a mask of ids.

    ImageJ shows masks through an inverting table: objects are stored as 255 and shown black.
    tifffile gives arrays of bool the tag and stores them as they are.
    """
    colours = getattr(page.photometric, "name", "")
    if colours not in COLOURS:
        raise ValueError(f"{colours or page.photometric} colours")
    is_inverted = colours == "MINISWHITE" and not _is_as_stored(page, is_mask)
    table = page.colormap if colours == "PALETTE" and not is_mask else None

    def change(part: np.ndarray) -> np.ndarray:
        if table is not None:
            return np.moveaxis(table[:, part[..., 0]], 0, -1)
        if colours == "SEPARATED" and part.shape[-1] == 4:
            return _cmyk_to_rgb(part)
        if part.dtype == bool:
            part = np.uint8(255) * part
        return _inverted(part) if is_inverted else part

    return planes.map(change) if isinstance(planes, LazyPixels) else change(planes)


def _inverted(planes: np.ndarray) -> np.ndarray:
    """Exchange low and high levels."""
    if planes.dtype.kind == "u":
        return np.iinfo(planes.dtype).max - planes
    # Between the levels that there are: NaN stays NaN.
    wide = planes.astype(np.int64) if planes.dtype.kind == "i" else planes
    return (np.nanmax(wide) + np.nanmin(wide) - wide).astype(planes.dtype)


def _is_as_stored(page: Any, is_mask: bool) -> bool:
    """Say whether a mask whose tag says that low is white means its values as they are stored."""
    is_bilevel = page.bitspersample == 1
    return is_mask and (not is_bilevel or page.software.startswith("tifffile"))


def _cmyk_to_rgb(planes: np.ndarray) -> np.ndarray:
    """Turn shares of cyan, magenta, yellow and black ink into red, green and blue."""
    most = float(np.iinfo(planes.dtype).max)
    light = most - planes.astype(np.float32)
    return np.round(light[..., :3] * light[..., 3:] / most).astype(planes.dtype)


def _has_alpha(page: Any, pixels: Any) -> bool:
    """Say whether the last channel is opacity: the file says so, or all of RGB's is opaque.

    An extra sample of no stated kind is a channel.
    """
    samples = page.samplesperpixel
    if samples != pixels.shape[-1] or not page.extrasamples:
        return False
    if page.extrasamples[-1] in ALPHA:
        return True
    if page.photometric.name != "RGB" or samples != 4 or pixels.dtype.kind != "u":
        return False
    most = np.iinfo(pixels.dtype).max
    return all((pixels[(*band, ..., 3)] == most).all() for band in lazy.bands(pixels.shape))


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
