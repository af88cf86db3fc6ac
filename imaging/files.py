"""Names, folders and sizes of image files."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from imaging.dicom import dicom_series
from imaging.formats import DICOM, SUFFIXES
from utils import UserError

# A file of more bytes is decoded alone, so that several volumes do not fill the memory.
LARGE_FILE_BYTES = 2**24
LITTER = {
    *("@eadir", "#recycle", "__macosx", "$recycle.bin", "lost+found", "dicomdir"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,9}")
# Endings of files that hold no DICOM. They need not be opened to see that.
OTHER_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix not in DICOM.suffixes)


def is_litter(name: str) -> bool:
    """Say whether a NAS, macOS or Windows left a file or folder of this name, or it is hidden."""
    return name.startswith((".", "~$")) or name.lower() in LITTER


def is_image(path: Path) -> bool:
    """Say whether a file is an image, by its ending. Hidden files, as macOS leaves, are not."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def is_image_file(path: Path) -> bool:
    """Say whether a file is an image, by its ending, or DICOM by its first bytes."""
    return is_image(path) or (not path.name.startswith(".") and is_dicom(path))


def is_series(path: Path) -> bool:
    """Say whether a folder holds a DICOM series: one of its files is DICOM."""
    if not path.is_dir() or path.name.startswith("."):
        return False
    try:
        return any(is_dicom(file) for file in path.iterdir())
    except OSError:
        # A folder that cannot be opened.
        return False


def is_dicom(path: Path) -> bool:
    """Say whether a file is DICOM; one that cannot be opened is not."""
    if not path.is_file() or path.name.lower().endswith(OTHER_SUFFIXES):
        return False
    try:
        return dicom_series.is_dicom_file(path)
    except UserError:
        return False


def file_stem(path: Path) -> str:
    """Give the name that image, mask and prediction share: the file's name without its ending."""
    # A series: its folder may have any name, such as 1.2.840.
    return path.name if path.is_dir() else name_stem(path.name)


def name_stem(name: str) -> str:
    """Give a file's name without its ending."""
    # ".nii.gz" is one ending.
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    # What follows the last dot of a name such as 1.2.840.1 is no ending.
    path = PurePath(name)
    return path.stem if ENDING.fullmatch(path.suffix) else name


def normalize_name(name: str) -> str:
    """Compose accents. macOS stores é as two characters, so the same name would not be found."""
    return unicodedata.normalize("NFC", name)


def is_large(path: Path) -> bool:
    """Say whether a file has many megabytes, or is a folder of slices."""
    return not path.is_file() or path.stat().st_size > LARGE_FILE_BYTES


def split_by_size(paths: Sequence[Path], count: int) -> Iterator[slice]:
    """Split a list of files into parts of at most `count`; a part with a large file has no other.

    So several volumes that are decoded at once do not fill the memory.
    """
    large = [is_large(path) for path in paths]
    start = 0
    while start < len(paths):
        end = start + (1 if any(large[start : start + count]) else count)
        yield slice(start, end)
        start = end
