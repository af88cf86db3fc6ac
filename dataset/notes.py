"""What a user must know of how files were read, a line for each kind of note."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataset.cache import Dataset

MAX_NAMED = 3  # files that a line names

# A sentence, or a sentence and how many pixels it is about.
Note = str | tuple[str, int]


def summarize_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Write the notes of many files: a line for each note, with the count and the first names.

    rows: of `Dataset.info`, or any with "image", a path, and "notes".
    """
    files: dict[str, list[str]] = {}
    pixels: dict[str, int] = {}
    for row in rows:
        for note in row.get("notes") or ():
            text, count = (note, 0) if isinstance(note, str) else note
            files.setdefault(text, []).append(str(row["image"]))
            pixels[text] = pixels.get(text, 0) + int(count)
    return [_line(text, names, pixels[text]) for text, names in files.items()]


def _line(text: str, names: list[str], pixels: int) -> str:
    shown = names[0]
    if len(names) > 1:
        first = ", ".join(Path(name).name for name in names[:MAX_NAMED])
        more = ", …" if len(names) > MAX_NAMED else ""
        shown = f"{len(names)} files ({first}{more})"
    counted = f" ({pixels} pixels)" if pixels else ""
    return f"{shown}: {text}{counted}"


# ------------------------------------------------------------------------------- odd sets of masks

# Masks are taken for inverted if so many of them cover most of the image and its border.
INVERTED_FILES, INVERTED_SHARE, INVERTED_BORDER = 0.9, 0.5, 0.9


def describe_masks(dataset: Dataset) -> list[str]:
    """Say what is odd in a data set's masks: inverted ones, classes that never occur."""
    info, names = dataset.info, dataset.classes.names
    lines = []
    if not len(info):
        return lines
    absent = [name for name in names if not info[f"share: {name}"].any()]
    for name in absent:
        lines.append(f"class {name} never occurs in {len(info)} masks; check --classes")
    share = info[f"share: {names[0]}"]
    if len(names) == 1 and (share == 1).all():
        lines.append(
            f"class {names[0]} covers every pixel of all {len(info)} masks: there is no background "
            "to learn"
        )
    inverted = (share > INVERTED_SHARE) & (share < 1) & (info.border > INVERTED_BORDER)
    if len(names) == 1 and inverted.mean() >= INVERTED_FILES:
        lines.append(
            f"inverted? The class covers {share.mean():.0%} of the pixels and the border in "
            f"{inverted.sum()} of {len(info)} masks. If the object is 0: "
            f'--classes "{names[0]}=0,background=255"'
        )
    return lines


def describe_subsets(dataset: Dataset, val: np.ndarray) -> list[str]:
    """Say what is missing in the masks of the validation pairs `val`: objects, or some class."""
    names, info = dataset.classes.names, dataset.info.iloc[val]
    empty = [name for name in names if not info[f"share: {name}"].any()]
    if not len(val) or not empty:
        return []
    if len(empty) == len(names):
        return [
            f"all {len(val)} val masks are empty: validation Dice says nothing of objects, and "
            "cannot choose the best epoch. Put images with objects into val"
        ]
    return [f"class {name} is empty in all {len(val)} val masks" for name in empty]
