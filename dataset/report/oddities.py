"""Find the images of a data set that a person should look at first, and say why."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dataset.report.charts import number

if TYPE_CHECKING:
    import pandas as pd

MOST_OF_A_KIND = 3  # images that are shown for one reason
FULL = 0.9  # share of the pixels above which a mask may be inverted
FAR = 5.0  # times the usual distance from the median
ENOUGH = 8  # images from which on "usual" means something

Found = list[tuple[int, str]]  # rows and reasons, the worst first


def find_oddities(info: "pd.DataFrame", names: Sequence[str]) -> dict[int, str]:
    """Give the reason why a row of `Dataset.info` is odd, by row, the worst first.

    Of each kind of reason a few rows are kept. A row may have several reasons.
    """
    if not len(info):
        return {}
    kinds = [
        _noted(info),
        [(row, "a constant image: nothing to see") for row in np.flatnonzero(info.constant)],
        _masks(info, names),
        _grey_levels(info),
        _unlike_most(info),
        _extremes(info, names),
    ]
    reasons: dict[int, list[str]] = {}
    for found in kinds:
        for row, reason in _few_of_each(found):
            reasons.setdefault(int(row), []).append(reason)
    return {row: "; ".join(listed) for row, listed in reasons.items()}


def _few_of_each(found: Found) -> Iterable[tuple[int, str]]:
    """Keep the first rows of every reason, which is the text before its numbers."""
    seen: dict[str, int] = {}
    for row, reason in found:
        kind = reason.partition(":")[0]
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= MOST_OF_A_KIND:
            yield row, reason


def _noted(info: "pd.DataFrame") -> Found:
    """Find the files whose reader noted something that few files have."""
    if "notes" not in info:
        return []
    found = []
    for row, notes in enumerate(info["notes"]):
        for note in notes or ():
            # A note may come with a count of pixels.
            found.append((row, note if isinstance(note, str) else note[0]))
    often = {note: sum(note == other for _, other in found) for _, note in found}
    return [(row, note) for row, note in found if often[note] <= max(3, len(info) // 10)]


def _masks(info: "pd.DataFrame", names: Sequence[str]) -> Found:
    """Find masks that are nearly full, and empty ones where most are not."""
    total = info[[f"share: {name}" for name in names]].to_numpy(float).sum(1)
    border = info["border"].to_numpy(float) if "border" in info else np.zeros(len(info))
    found = []
    for row in np.argsort(-total):
        if total[row] > FULL:
            found.append((row, f"nearly all is foreground: {total[row]:.0%}; inverted?"))
        elif total[row] > 0.5 and border[row] > FULL:
            found.append((row, f"foreground around the border: {total[row]:.0%}; inverted?"))
    empty = np.flatnonzero(total == 0)
    if len(empty) < len(info) / 2:
        found += [(row, f"no foreground: {len(empty)} of {len(info)} masks") for row in empty]
    return found


def _grey_levels(info: "pd.DataFrame") -> Found:
    """Find images that are much darker or brighter than most, or have hardly any contrast."""
    levels = np.array(info["quantiles"].tolist(), float)
    middle, spread = levels[:, 10], levels[:, 19] - levels[:, 1]
    found = []
    for row, distance in _outliers(middle, floor=0.05 * np.median(spread)):
        word = "brighter" if distance > 0 else "darker"
        level, usual = number(middle[row]), number(np.median(middle))
        found.append((row, f"{word} than most: median grey level {level}, usual {usual}"))
    if len(info) >= ENOUGH:
        for row in np.argsort(spread):
            if 0 < spread[row] < 0.2 * np.median(spread):
                levels, usual = number(spread[row]), number(np.median(spread))
                found.append((row, f"little contrast: a range of {levels}, usual {usual}"))
    return found


def _outliers(values: np.ndarray, floor: float) -> list[tuple[int, float]]:
    """Find values far from the median: rows and distances, the farthest first.

    floor: the least distance that counts as usual.
    """
    distances = values - np.median(values)
    usual = max(float(np.median(np.abs(distances))), floor, 1e-9)
    if len(values) < ENOUGH:
        return []
    order = np.argsort(-np.abs(distances))
    return [(row, distances[row]) for row in order if abs(distances[row]) > FAR * usual]


def _unlike_most(info: "pd.DataFrame") -> Found:
    """Find images whose size or kind of pixel is another than that of most."""
    found = []
    sides = np.array([max(map(int, size.split("x"))) for size in info["size"]], float)
    for row, distance in _outliers(np.log(sides), floor=0.1):
        word = "larger" if distance > 0 else "smaller"
        usual = f"usual {np.median(sides):.0f}"
        found.append((row, f"{word} than most: {info['size'].iloc[row]} pixels, {usual}"))
    for column, text in (("channels", "channels"), ("bits", "bits")):
        usual = info[column].mode().iloc[0]
        other = np.flatnonzero(info[column] != usual)
        if len(other) <= len(info) // 10:
            for row in other:
                value = info[column].iloc[row]
                found.append((row, f"other {text} than most: {value}, usual {usual}"))
    return found


def _extremes(info: "pd.DataFrame", names: Sequence[str]) -> Found:
    """Find the smallest and the largest object of each class."""
    found = []
    for name in names:
        share = info[f"share: {name}"].to_numpy(float)
        present = np.flatnonzero(share > 0)
        if len(present) < 3:
            continue
        order = present[np.argsort(share[present])]
        if share[order[0]] < share[order[-1]]:
            found.append((order[0], f"smallest {name}: {share[order[0]]:.2%} of the pixels"))
            found.append((order[-1], f"largest {name}: {share[order[-1]]:.2%} of the pixels"))
    return found
