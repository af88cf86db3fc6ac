"""Recognise patients in file names, and copies among images: what may leak from train to test."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.cache import Dataset
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
# Names that say which of a patient's images it is: case7_slice3, x-z012, x_ses-2, x_frame_4.
PART = re.compile(
    r"^(.*?\d.*?)[-_ .]+(?:slice|sl|slc|frame|fr|img|image|im|view|visit|scan|ses|session|time|"
    r"tile|patch|crop|roi|z|t|s)[-_ .]?\d+\b",
    re.IGNORECASE,
)
# Names of two sides: 01L, 01R, 07_left, 07_OS.
SIDE = re.compile(r"^(.*\d)[-_ ]?(?:L|R|OD|OS|left|right)$", re.IGNORECASE)
# Names that end in a second number: IMG_0007_2.
NUMBERED = re.compile(r"^(.*\d.*?)[-_ .]\(?[a-z]?\d+\)?$", re.IGNORECASE)
MIN_GROUPS = 3  # fewer are no patients
MAX_LISTED = 3
SMALL = 16  # pixels of the images that are compared
ALIKE = 0.999  # correlation of images that are nearly the same
BLOCK = 1024  # images that are compared at once


def find_leaks(pairs: Sequence[Pair], dataset: Dataset) -> list[str]:
    """Warn of images that should not be in different subsets: of one patient, or nearly the same.

    pairs: may be more than those that are in `dataset`, which are in the same order.
    """
    return [*warn_of_patients(pairs), *warn_of_copies(pairs, dataset)]


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
        f"them together (stem,patient / {row})"
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


# ---------------------------------------------------------------------------------------- copies


def warn_of_copies(pairs: Sequence[Pair], dataset: Dataset) -> list[str]:
    """Warn of images that are nearly the same, such as one saved twice, in several subsets."""
    by_image = {str(pair.image): pair for pair in pairs}
    known = [by_image.get(image) for image in dataset.info["image"]] if len(dataset.info) else []
    guesses = dict(zip(by_image, guess_patients(pairs), strict=True))
    first = np.searchsorted(dataset.pair, np.arange(len(known)), "left")
    last = np.searchsorted(dataset.pair, np.arange(len(known)), "right") - 1
    small = shrink(dataset, (first + last) // 2)
    found = []
    for i, j in nearly_same(small):
        one, other = known[i], known[j]
        if one is None or other is None or _belong_together(one, other, guesses):
            continue
        if dataset.info.digest[i] != dataset.info.digest[j]:  # copies are told as problems
            found.append((one, other))
    if not found:
        return []
    some = ", ".join(f"{a.image.name} and {b.image.name}" for a, b in found[:MAX_LISTED])
    some += ", …" if len(found) > MAX_LISTED else ""
    count = "1 pair of images is" if len(found) == 1 else f"{len(found)} pairs of images are"
    return [
        f"{count} nearly the same ({some}): one may be trained on and the other tested. "
        "Remove one, or give both the same patient"
    ]


def _belong_together(one: Pair, other: Pair, guesses: dict[str, str]) -> bool:
    """Say whether two images stay in one subset, or will once their patient is named."""
    if one.subset and one.subset == other.subset:
        return True
    names = [pair.patient or guesses.get(str(pair.image), "") for pair in (one, other)]
    return names[0] == names[1] != ""


def shrink(dataset: Dataset, slices: np.ndarray) -> np.ndarray:
    """Shrink slices to SMALL x SMALL pixels of mean 0 and length 1: float32 (n, pixels)."""
    height, width = dataset.size
    rows = np.minimum(np.arange(SMALL + 1) * height // SMALL, height)
    columns = np.minimum(np.arange(SMALL + 1) * width // SMALL, width)
    small = np.zeros((len(slices), SMALL * SMALL), np.float32)
    for start in range(0, len(slices), 64):
        images = dataset.take(slices[start : start + 64])[0].astype(np.float32).mean(-1)
        sums = np.add.reduceat(np.add.reduceat(images, rows[:-1], axis=1), columns[:-1], axis=2)
        small[start : start + 64] = sums.reshape(len(images), -1)
    small -= small.mean(1, keepdims=True)
    length = np.linalg.norm(small, axis=1, keepdims=True)
    return np.divide(small, length, out=small, where=length > 0)


def nearly_same(small: np.ndarray) -> list[tuple[int, int]]:
    """List pairs (i, j), i < j, of images whose correlation is above ALIKE."""
    found = []
    for start in range(0, len(small), BLOCK):
        block = small[start : start + BLOCK]
        i, j = np.nonzero(block @ small[start:].T > ALIKE)
        found += [(start + a, start + b) for a, b in zip(i, j, strict=True) if a < b]
    return found
