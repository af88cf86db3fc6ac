"""Decode image/mask pairs, check them, split them, feed them.

python data.py check DIR                  reports on a data set, whose layouts `pairing.py` tells
python data.py download montgomery        fetches one
"""

from collections.abc import Sequence

import pandas as pd

from dataset.cache import Dataset
from dataset.layouts import Pair


def merged_note(pairs: Sequence[Pair], names: Sequence[str]) -> str:
    """Tell that class folders become one class, where one is asked for; else nothing."""
    folders = [path.parent.name for path in pairs[0].masks] if pairs else []
    if len(names) > 1 or len(folders) < 2 or folders == ["leftMask", "rightMask"]:
        return ""
    return f'the masks of {", ".join(folders)} become one class; --classes "{",".join(folders)}" keeps them apart'


def find_duplicates(dataset: Dataset) -> list[str]:
    """Name the images that are there twice: one could be trained on and the other tested."""
    found, firsts = [], {}
    for path, digest, constant in dataset.info.reindex(
        columns=["image", "digest", "constant"]
    ).itertuples(index=False):
        if digest in firsts and not constant:  # a blank one tells nothing
            found.append(f"{path}: the same image as {firsts[digest]}; keep one of them")
        firsts.setdefault(digest, path)
    return found


def describe(dataset: Dataset, names: Sequence[str]) -> str:
    """Describe a data set in lines of text: pairs, sizes, bit depths, channels, classes, and what deserves a look."""
    info = dataset.info
    lines = [f"{'pairs':10} {len(info)}"]
    for column in ("size", "slices", "spacing", "bits", "channels"):
        counts = info[column].value_counts() if len(info) else {}
        if not len(counts) or (column == "slices" and set(counts.index) == {1}):
            continue
        common = [f"{value} ({count})" for value, count in list(counts.items())[:6]]
        lines.append(
            f"{column:10} {', '.join(common)}"
            + (f", … {len(counts)} kinds" if len(counts) > 6 else "")
        )
    for name in names if len(info) else ():
        share = info[f"share: {name}"]
        lines.append(
            f"{'class':10} {name}: {share.mean():.2%} of the pixels, empty in {(share == 0).sum()} mask(s)"
        )
    notes = [
        ("constant image, nothing to see", info.get("constant") == True),  # noqa: E712  (None for no pairs)
        (
            "16 bits or more, stretched to 8 between its own percentiles",
            info.get("bits", pd.Series()) > 8,
        ),
        ("has an alpha channel, which is ignored", info.get("channels", pd.Series()) == 4),
    ]
    for text, where in notes:
        if len(info) and 0 < where.sum() <= max(
            5, len(info) // 10
        ):  # the odd ones out; else it is the rule
            lines += [f"{'note':10} {path}: {text}" for path in info.image[where]]
    return "\n".join(lines)
