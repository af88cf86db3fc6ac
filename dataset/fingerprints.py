"""Tell whether a file is still the same: a fingerprint of its size and content.

What was computed is kept beside the decoded images, by path, size and times. So a file is read
again only after it changed.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from imaging.files import is_litter
from imaging.partners import voxels_of
from utils import atomic, cache_folder

NAME = "fingerprints.json"  # in the folder of the cache
MAX_KEPT = 200_000  # of more the oldest are dropped

# Size and times of a file, and its fingerprint.
Known = tuple[int, int, int, str]


def fingerprints(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the fingerprint of each file, by its path."""
    folder = cache_folder()
    known, distinct = _read_known(folder), list(dict.fromkeys(paths))
    before = dict(known)
    with ThreadPoolExecutor() as pool:
        marks = dict(zip(distinct, pool.map(fingerprint, distinct), strict=True))
    if folder and known != before:
        _write_known(Path(folder) / NAME, known)
    return marks


def fingerprint(path: Path) -> str:
    """Return size and hash of a file, or of all files of a folder; "" if it is not there.

    The voxels that belong to a header count, too.
    """
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if not is_litter(file.name)]
        return _join({file.name: fingerprint(file) for file in files})
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
    known, stat = _read_known(cache_folder()), path.stat()
    place, now = str(path.absolute()), (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if place not in known or known[place][:3] != now:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        known[place] = (*now, f"{stat.st_size}-{digest}")
    return known[place][3]


@cache
def _read_known(folder: str) -> dict[str, Known]:
    """Read what was computed before; nothing if that is not there, or damaged."""
    try:
        table = json.loads((Path(folder) / NAME).read_text()) if folder else {}
        return {place: tuple(known) for place, known in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write_known(path: Path, known: dict[str, Known]) -> None:
    while len(known) > MAX_KEPT:
        del known[next(iter(known))]
    try:
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(known))
    except OSError:
        pass  # loading.py says that nothing can be kept there
