"""Name results, so that none replaces another and every file system takes them."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from imaging.files import normalize_name

# Folders that predict.py makes in its output folder.
RESERVED = {"panels"}
# A file's name may have 255 bytes; the rest is for endings such as _probabilities.nii.gz.
MAX_BYTES = 245


def name_outputs(files: Sequence[tuple[str, str]]) -> list[str]:
    """Name the result of each file, without ending.

    files: the name without ending, below the output folder, and the file's own name. Of equal names
    x.png keeps its own, x.jpg becomes x_jpg. Names that differ in capitals only are equal, because
    some file systems do not tell them apart.
    """
    wanted = [_fit(name) for name, _ in files]
    groups = defaultdict(list)
    for number, name in enumerate(wanted):
        groups[_key(name)].append(number)
    # PNG first, because the mask of x.png is x.png.
    for group in groups.values():
        group.sort(key=lambda number: not files[number][1].lower().endswith(".png"))
    taken = {*groups}
    names = list(wanted)
    for group in groups.values():
        for number in group[1:]:
            names[number] = _free_name(wanted[number], files[number][1], taken)
    return names


def _free_name(name: str, file: str, taken: set[str]) -> str:
    """Find a name that is not taken: with the file's ending, else with a number."""
    ending = file.rpartition(".")[2] if "." in file else ""
    bases = [f"{name}_{ending}"] if ending and len(ending) <= 8 else []
    bases += [f"{name}_{number}" for number in range(2, len(taken) + 3)]
    free = next(base for base in bases if _key(base) not in taken)
    taken.add(_key(free))
    return free


def _key(name: str) -> str:
    return normalize_name(name).casefold()


def _fit(name: str) -> str:
    """Keep clear of reserved folders, and shorten what is too long for a file's name."""
    parts = list(PurePosixPath(os.path.normpath(name)).parts)
    if len(parts) > 1 and parts[0].casefold() in RESERVED:
        parts[0] += "_"
    short = []
    for part in parts:
        encoded = os.fsencode(part)
        if len(encoded) > MAX_BYTES:
            mark = hashlib.sha256(encoded).hexdigest()[:8]
            part = f"{encoded[: MAX_BYTES - 9].decode(errors='ignore')}_{mark}"
        short.append(part)
    return "/".join(short)
