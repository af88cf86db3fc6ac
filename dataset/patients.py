"""Recognise patients in file names: their images must not be in several subsets."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from dataset.folder import split_name
from dataset.pairs import Pair
from utils import atomic

# Names that say who it is: patient07, sub-01, P07, TCGA-xx-yyyy.
PATIENT = re.compile(
    r"^(?:.*?[-_ .])?((?:patient|pat|pt|subject|subj|sub|person|id)[-_ ]?\d+)(?=[-_ .]|$)|"
    r"^(?:.*?[-_ .])?(TCGA[-_][A-Z0-9]{2}[-_][A-Z0-9]{4})|"
    r"^([PS]\d+)(?=[-_ .])",
    re.IGNORECASE,
)
# Names that say which of a patient's images it is: case7_slice3, x-z012, x_ses-2, s1_x64_y0.
PART = re.compile(
    r"^(.*?\d.*?)[-_ .]+(?:slice|sl|slc|frame|fr|img|image|im|view|visit|scan|ses|session|time|"
    r"tile|patch|crop|roi|row|col|x|y|z|t|s)[-_ .]?\d+(?![A-Za-z0-9])",
    re.IGNORECASE,
)
# Names of two sides: 01L, 01R, 07_left, 07_OS.
SIDE = re.compile(r"^(.*\d)[-_ ]?(?:L|R|OD|OS|left|right)$", re.IGNORECASE)
# Names that end in a second number: IMG_0007_2.
NUMBERED = re.compile(r"^(.*\d.*?)[-_ .]\(?[a-z]?\d+\)?$", re.IGNORECASE)
MIN_GROUPS = 3  # fewer are no patients
MAX_LISTED = 3


def warn_of_patients(pairs: Sequence[Pair]) -> list[str]:
    """Warn if file names tell patients with several images each, and the pairs name no patient."""
    names = guess_patients(pairs)
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair, name in zip(pairs, names, strict=True):
        if name:
            groups[name].append(pair)
    shared = {name: found for name, found in groups.items() if len(found) > 1}
    torn = {name: found for name, found in shared.items() if _is_torn(found)}
    if not torn:
        return []
    name, found = next(iter(torn.items()))
    some = ", ".join(pair.image.name for pair in found[:MAX_LISTED])
    some += ", …" if len(found) > MAX_LISTED else ""
    if all(pair.subset for pair in pairs):
        what = f"{len(torn)} patients have images in several subsets"
    else:
        what = f"the subsets would share images of one patient: {len(torn)} patients"
    row = f"{split_name(found[0].image.name)[0]},{name}"
    return [
        f"{what}, by the file names ({name}: {some}). An index.csv with a column patient keeps "
        f"them together (stem,patient / {row}); python data.py check writes it"
    ]


def _is_torn(pairs: Sequence[Pair]) -> bool:
    """Say whether a group of images may be in several subsets."""
    subsets = {pair.subset for pair in pairs}
    return len(subsets) > 1 or "" in subsets


def guess_patients(pairs: Sequence[Pair]) -> list[str]:
    """Guess each pair's patient from its file name; "" where it is known or nothing is clear."""
    stems = [split_name(pair.image.name)[0].removesuffix("_0000") for pair in pairs]
    unknown = [i for i, pair in enumerate(pairs) if not pair.patient]
    guesses = [""] * len(pairs)
    for pattern in (PATIENT, PART, SIDE, NUMBERED):
        found = {}
        for i in unknown:
            match = pattern.match(stems[i])
            if match:
                found[i] = next(group for group in match.groups() if group).rstrip("-_ .")
        if _is_clear(list(found.values()), len(unknown)):
            for i, name in found.items():
                guesses[i] = name
            break
    return guesses


def _is_clear(names: Sequence[str], count: int) -> bool:
    """Say whether names group images: most have one, into several groups of more than one."""
    sizes = Counter(names)
    several = sum(size for size in sizes.values() if size > 1)
    return len(names) > 0.8 * count and len(sizes) >= MIN_GROUPS and several > 0.5 * len(names)


def write_index(path: Path, root: Path, pairs: Sequence[Pair]) -> Path:
    """Write an index.csv that names the patients that the file names tell."""
    import pandas as pd

    counts = Counter(split_name(pair.image.name)[0] for pair in pairs)
    rows = []
    for pair, patient in zip(pairs, guess_patients(pairs), strict=True):
        stem = split_name(pair.image.name)[0]
        if counts[stem] > 1:
            stem = split_name(pair.image.relative_to(root).as_posix())[0]
        rows.append((stem, pair.patient or patient or stem, pair.label, pair.subset))
    table = pd.DataFrame(rows, columns=["stem", "patient", "label", "split"])
    for column in ("label", "split"):
        if not table[column].any():
            table = table.drop(columns=column)
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)
    return path
