"""Volumes of two files: a header, and the voxels beside it.

A header stands for both. Headers may name files beside them only.
"""

import gzip
import os
import re
import zlib
from pathlib import Path, PurePath

from utils import UserError

GZIP = b"\x1f\x8b"
# Endings of voxels whose header has the same stem → endings of that header.
HEADERS = {".img": (".hdr",), ".raw": (".mhd", ".nhdr"), ".zraw": (".mhd",)}
# How a header names its voxels in its text.
DATA_NAME = re.compile(rb"^(?:ElementDataFile *=|data ?file:) *(.+?)\s*$", re.MULTILINE)
HEADER_BYTES = 2**16


def header_of(path: Path) -> Path | None:
    """Find the header that stands for a file of voxels, such as x.hdr for x.img; else None."""
    stem, suffix = split(path)
    for end in HEADERS.get(suffix.lower(), ()):
        if found := _beside(path, stem, end):
            return found
    for header in sorted((*path.parent.glob("*.nhdr"), *path.parent.glob("*.mhd"))):
        try:
            with header.open("rb") as file:
                text = file.read(HEADER_BYTES)
        except OSError:  # a folder of that name, or a file that may not be read
            continue
        if path.name.encode() in DATA_NAME.findall(text):
            return header
    return None


def voxels_of(header: Path) -> Path | None:
    """Find the file of voxels that belongs to a header; None if they are in one file."""
    stem, suffix = split(header)
    endings = [end for end, headers in HEADERS.items() if suffix.lower() in headers]
    if ".img" in endings:
        return _beside(header, stem, ".img")
    if not endings:
        return None
    with header.open("rb") as file:
        names = DATA_NAME.findall(file.read(HEADER_BYTES))
    found = [header.parent / os.fsdecode(name) for name in names]
    return found[0] if found and found[0].is_file() else None


def read_beside(path: Path, suffix: str, count: int) -> bytes:
    """Read the first `count` bytes, unpacked, of the voxels beside a header. Raises UserError."""
    stem, _ = split(path)
    partner = _beside(path, stem, suffix)
    if partner is None:
        raise UserError(f"a header without voxels; expected {stem}{suffix} beside it")
    return _read(partner, count, unpack=True)


def read_named(path: Path, name: str, count: int) -> bytes:
    """Read at most `count` bytes of the file that a header names. Raises UserError.

    It must lie beside the header or below: a header from elsewhere must not read other files.
    """
    place = Path(name.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or ":" in name:
        raise UserError(f"its voxels are said to be in {name!r}; expected a file beside it")
    partner = path.parent / place
    if not partner.is_file():
        raise UserError(f"its voxels are said to be in {name!r}; there is no such file beside it")
    return _read(partner, count, unpack=False)


def split(path: PurePath) -> tuple[str, str]:
    """Split a name into stem and ending; .gz after the ending does not count."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    stem, dot, suffix = name.rpartition(".")
    return stem, dot + suffix


def _beside(path: Path, stem: str, suffix: str) -> Path | None:
    """Find the file of a stem and an ending, in lower or upper case, gzipped or not."""
    for end in (suffix, suffix.upper(), f"{suffix}.gz"):
        found = path.with_name(stem + end)
        if found.is_file():
            return found
    return None


def _read(path: Path, count: int, unpack: bool) -> bytes:
    try:
        with path.open("rb") as file:
            packed = unpack and file.read(2) == GZIP
            file.seek(0)
            return (gzip.GzipFile(fileobj=file) if packed else file).read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"its voxels in {path.name} cannot be read ({error})") from None
