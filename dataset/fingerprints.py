"""Tell whether a file is still the same: a fingerprint of its size and content."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from imaging.partners import voxels_of

# Of larger files only the size and both ends are read, so that 10,000 files take seconds.
WHOLE_BYTES = 2**22
END_BYTES = 2**20


def fingerprint(path: Path) -> str:
    """Return size and hash of a file, or of all files of a folder; "" if it is not there.

    The voxels that belong to a header count, too.
    """
    if path.is_dir():
        return _join({file.name: fingerprint(file) for file in sorted(path.iterdir())})
    try:
        if voxels := voxels_of(path):
            return _join({file.name: _of_file(file) for file in (path, voxels)})
        return _of_file(path)
    except OSError:
        return ""


def _join(marks: dict[str, str]) -> str:
    """Make one fingerprint of those of several files, by their names."""
    parts = [f"{name} {mark}" for name, mark in marks.items()]
    return f"{len(parts)}-{hashlib.sha256(os.fsencode(repr(parts))).hexdigest()[:16]}"


def _of_file(path: Path) -> str:
    stat = path.stat()
    return _fingerprint(str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


# The folds of a cross-validation ask for the same files again. The times are only part of the key.
@cache
def _fingerprint(path: str, size: int, _mtime_ns: int, _ctime_ns: int) -> str:
    with Path(path).open("rb") as file:
        if size <= WHOLE_BYTES:
            content = file.read()
        else:
            content = file.read(END_BYTES)
            file.seek(-END_BYTES, os.SEEK_END)
            content += file.read()
    return f"{size}-{hashlib.sha256(content).hexdigest()[:16]}"


def fingerprints(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the fingerprint of each file, by its path."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(distinct, pool.map(fingerprint, distinct), strict=True))
