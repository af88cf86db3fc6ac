"""Find images that are there twice: one might be trained on and the other tested."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import cv2
import numpy as np

from dataset.cache import Dataset
from dataset.pairs import Pair
from dataset.patients import guess_patients

MAX_NAMED = 20  # copies that are named one by one
MAX_LISTED = 3
SMALL = 16  # pixels of the images that are compared
MAX_SIDE = 2048  # of larger images pixels are left out before
ALIKE = 0.999  # correlation of images that are nearly the same
BLOCK = 1024  # images that are compared at once
MAX_ALIKE = 10_000  # pairs of images; then no more are looked for


def find_copies(pairs: Sequence[Pair], dataset: Dataset) -> list[tuple[Pair, Pair]]:
    """List the pairs whose images are the same, each with the first of them.

    pairs: in the order of `dataset`; those that could not be read are not in it.
    """
    copies = []
    first: dict[str, Pair] = {}
    rows = dataset.info.to_dict("records")
    for pair, row in zip(read_pairs(pairs, dataset), rows, strict=True):
        # Blank images are alike without being copies.
        if row["digest"] in first and not row["constant"]:
            copies.append((pair, first[row["digest"]]))
        first.setdefault(row["digest"], pair)
    return copies


def read_pairs(pairs: Sequence[Pair], dataset: Dataset) -> list[Pair]:
    """List the pairs that are in `dataset`: all but those that could not be read."""
    images = list(dataset.info["image"]) if len(dataset.info) else []
    found = []
    for pair in pairs:
        if len(found) < len(images) and str(pair.image) == images[len(found)]:
            found.append(pair)
    return found


def copies_in_extra(pairs: Sequence[Pair], dataset: Dataset) -> list[str]:
    """Name the images that are in the data set and in the one for training alone, too."""
    problems = []
    for pair, other in find_copies(pairs, dataset):
        if (pair.subset == "extra") != (other.subset == "extra"):
            problems.append(f"{pair.image}: the same image as {other.image}; keep one of them")
    return problems


def keep_together(pairs: Sequence[Pair], dataset: Dataset) -> list[Pair]:
    """Give copies the same patient, so that the subsets that are drawn do not share them.

    Images whose subset is given stay where they are.
    """
    joined: dict[str, str] = {}

    def find(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for pair, other in find_copies(pairs, dataset):
        one, first = find(pair.group), find(other.group)
        if {pair.subset, other.subset} <= {"", "train"} and one != first:
            joined[one] = first
    changed = {*joined, *joined.values()}
    return [
        replace(pair, patient=find(pair.group)) if pair.group in changed else pair for pair in pairs
    ]


def warn_of_copies(pairs: Sequence[Pair], dataset: Dataset) -> list[str]:
    """Warn of images that are the same, a line each, and of those that are nearly the same."""
    copies = find_copies(pairs, dataset)
    lines = []
    for pair, other in copies[:MAX_NAMED]:
        if pair.subset in ("", "train") and other.subset in ("", "train"):
            what = "they stay in one subset"
        elif pair.subset == other.subset:
            what = "it counts twice"
        else:
            what = (
                f"one is {pair.subset or 'train'}, the other {other.subset or 'train'}: remove it"
            )
        lines.append(f"{pair.image}: the same image as {other.image}; {what}")
    if len(copies) > MAX_NAMED:
        lines.append(f"… and {len(copies) - MAX_NAMED} more images that are there twice")
    return [*lines, *_warn_of_similar(pairs, dataset)]


def _warn_of_similar(pairs: Sequence[Pair], dataset: Dataset) -> list[str]:
    """Warn of images that are nearly the same, such as one saved twice, in several subsets."""
    known = read_pairs(pairs, dataset)
    guesses = dict(zip((str(pair.image) for pair in pairs), guess_patients(pairs), strict=True))
    small = shrink(case.image for case in dataset.cases)
    found = []
    for i, j in nearly_same(small):
        one, other = known[i], known[j]
        is_copy = dataset.info.digest[i] == dataset.info.digest[j]
        if not is_copy and not _belong_together(one, other, guesses):
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


def shrink(images: Iterable[np.ndarray]) -> np.ndarray:
    """Shrink the middle slice of images (D, H, W, C): float32 (n, pixels), mean 0 and length 1."""
    small = [np.zeros((0, SMALL, SMALL), np.float32)]
    for image in images:
        step = -(-max(image.shape[1:3]) // MAX_SIDE)
        middle = image[len(image) // 2, ::step, ::step].mean(-1, dtype=np.float32)
        small.append(cv2.resize(middle, (SMALL, SMALL), interpolation=cv2.INTER_AREA)[None])
    small = np.concatenate(small).reshape(-1, SMALL * SMALL)
    small -= small.mean(1, keepdims=True)
    length = np.linalg.norm(small, axis=1, keepdims=True)
    return np.divide(small, length, out=small, where=length > 0)


def nearly_same(small: np.ndarray) -> list[tuple[int, int]]:
    """List pairs (i, j), i < j, of images that correlate by more than ALIKE, at most MAX_ALIKE."""
    found = []
    for start in range(0, len(small), BLOCK):
        block = small[start : start + BLOCK]
        i, j = np.nonzero(block @ small[start:].T > ALIKE)
        found += [(start + a, start + b) for a, b in zip(i, j, strict=True) if a < b][:MAX_ALIKE]
        if len(found) >= MAX_ALIKE:
            break
    return found
