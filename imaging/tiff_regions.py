"""Regions of a large TIFF: strips and tiles are decoded one by one, when they are needed."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from imaging.lazy import Box, LazyPixels
from utils import UserError, first_line

# So much of what was decoded last is kept.
CACHE_BYTES = 2**27
# Larger strips and tiles are not decoded for the sake of a region.
MAX_BLOCK_BYTES = 2**27
# Rows that are read together of a file that is not compressed.
ROWS = 64


class Planes:
    """Planes of a TIFF: its pages, or what lies behind its only page.

    `pixels` are (P, H, W, C) as stored. Each page is a grid of blocks: strips or tiles.
    """

    def __init__(
        self, path: Path, pages: Sequence[Any], count: int, check: Callable[[Any, bytes], None]
    ) -> None:
        """check: (page, bytes of a block), raises an error if they must not be decoded."""
        page = pages[0]
        self.path, self.pages, self.check = path, pages, check
        self.size = page.imagelength, page.imagewidth
        # Whether samples lie in blocks of their own.
        self.is_separate = page.axes == "SYX"
        self.samples = 1 if self.is_separate else page.samplesperpixel
        self.stored = page.dtype.newbyteorder(page.parent.byteorder)
        self.is_plain = page.is_contiguous
        if self.is_plain:
            self.block = min(ROWS, page.imagelength), page.imagewidth
        elif page.is_tiled:
            self.block = page.tilelength, page.tilewidth
        else:
            self.block = min(page.rowsperstrip, page.imagelength), page.imagewidth
        self.block_bytes = prod(self.block) * self.samples * self.stored.itemsize
        # These are read while the file is open: how blocks are decoded, and tables that all JPEGs
        # of a page share.
        self.decode, self.nodata = page.decode, page.nodata
        self.tables = [one.jpegtables for one in pages]
        self.decoded = lru_cache(max(1, CACHE_BYTES // self.block_bytes))(self._decode)
        self.pixels = LazyPixels((count, *self.size, page.samplesperpixel), page.dtype, self._read)

    def can_read(self) -> bool:
        """Say whether the blocks can be decoded one by one, without much memory."""
        page = self.pages[0]
        if page.axes not in ("YX", "YXS", "SYX") or page.imagedepth > 1 or page.dtype.kind == "f":
            return False
        if page.jpegheader is not None or len({one.hash for one in self.pages}) > 1:
            return False
        if len(self.pixels) > len(self.pages) and not self.is_plain:
            return False
        if self.is_plain and (page.predictor != 1 or page.fillorder != 1):
            return False
        return self.block_bytes <= MAX_BLOCK_BYTES

    def _read(self, box: Box) -> np.ndarray:
        planes, rows, columns, samples = box
        pixels = np.empty([part.stop - part.start for part in box], self.pixels.dtype)
        groups = range(samples.start, samples.stop) if self.is_separate else [0]
        for plane, group in product(range(planes.start, planes.stop), groups):
            into = pixels[plane - planes.start]
            if self.is_separate:
                into = into[..., group - samples.start, None]
            for y, x in product(_starts(rows, self.block[0]), _starts(columns, self.block[1])):
                block = self.decoded(plane, group, y // self.block[0], x // self.block[1])
                block = block if self.is_separate else block[..., samples]
                down, across = _overlap(rows, y, self.block[0]), _overlap(columns, x, self.block[1])
                into[_moved(down, -rows.start), _moved(across, -columns.start)] = block[
                    _moved(down, -y), _moved(across, -x)
                ]
        return pixels

    def _decode(self, plane: int, group: int, row: int, column: int) -> np.ndarray:
        """Decode a block: (h, w, C). Raises UserError."""
        try:
            if self.is_plain:
                return self._plain_rows(plane, group, row)
            return self._segment(plane, group, row, column)
        except UserError:
            raise
        except Exception as error:
            # Libraries raise errors of many kinds for a damaged file.
            raise UserError(f"unreadable as TIFF ({first_line(error)})") from None

    def _plain_rows(self, plane: int, group: int, row: int) -> np.ndarray:
        height, width = self.size
        first = row * self.block[0]
        rows = min(self.block[0], height - first)
        # Planes without a page of their own lie behind the only one.
        own = plane < len(self.pages)
        skipped = ((0 if own else plane) + group) * height + first
        row_bytes = width * self.samples * self.stored.itemsize
        start = self.pages[plane if own else 0].dataoffsets[0] + skipped * row_bytes
        content = self._content(start, rows * row_bytes)
        return np.frombuffer(content, self.stored).reshape(rows, width, self.samples)

    def _segment(self, plane: int, group: int, row: int, column: int) -> np.ndarray:
        page = self.pages[plane]
        down, across = (-(-n // block) for n, block in zip(self.size, self.block, strict=True))
        number = (group * down + row) * across + column
        # A block that is not stored has no bytes.
        content = self._content(page.dataoffsets[number], page.databytecounts[number]) or None
        if content:
            self.check(page, content)
        more = {"jpegtables": self.tables[plane]} if page.compression.name == "JPEG" else {}
        decoded, _, shape = self.decode(content, number, **more)
        return np.full(shape[1:], self.nodata, page.dtype) if decoded is None else decoded[0]

    def _content(self, start: int, count: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(count)


def _starts(part: slice, side: int) -> range:
    """List where the blocks begin that a part of an axis touches."""
    return range(part.start // side * side, part.stop, side)


def _overlap(part: slice, start: int, side: int) -> slice:
    return slice(max(part.start, start), min(part.stop, start + side))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
