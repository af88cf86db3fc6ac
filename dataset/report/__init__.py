"""Describe a data set before the training: lines of text, and the hyperparameters that follow.

`python data.py check DIR` prints them; report_page.py makes its page. That hyperparameters follow
from a data set's fingerprint is the idea of nnU-Net (Isensee et al. 2021).
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.cache import Dataset
from dataset.layouts import Pair

if TYPE_CHECKING:
    import pandas as pd

MIN_OBJECT_PIXELS = 12  # size of the smallest objects in the network's input
SIZES = (128, 512)  # pixels; the least and the most that is proposed
SIZE_STEP = 32  # so that the image can be halved five times
HOUNSFIELD_BELOW = -200  # only CT has grey levels below: air is -1000
RARE = 0.002  # share of the pixels
REASONS = {
    "image_size": f"nine of ten objects measure {MIN_OBJECT_PIXELS} pixels or more at this size",
    "channels": "most images are grey (1), in colour (3) or have as many channels",
    "batch_size": "less for larger images, to stay within a few GB",
    "window": "CT, as grey levels are negative: the objects' range and a margin on both sides",
    "loss": "the objects are less than 0.2 % of the pixels: missed pixels count more",
}


# ----------------------------------------------------------------------------------- description


def describe(pairs: Sequence[Pair], dataset: Dataset, names: Sequence[str]) -> list[str]:
    """Describe a data set in lines of text: sizes, channels, classes, patients, odd files."""
    info = dataset.info
    lines = [_line("pairs", len(info))]
    if not len(info):
        return lines
    # Of pictures, a single slice goes without saying. Of stacks of channels it does not.
    are_pictures = set(info.slices) == {1} and set(info.channels) <= {1, 3}
    for column in ("size", "slices", "spacing", "bits", "channels"):
        counts = Counter(info[column].dropna())
        if counts and not (column == "slices" and are_pictures):
            lines.append(_line(column, _most_common(counts, 6)))
    said = {1: "no, so 1", 3: "yes, so 3"}.get(dataset.channels, f"{dataset.channels} channels")
    lines.append(_line("colour", f"{said} to train with (--channels)"))
    for name in names:
        share = info[f"share: {name}"]
        empty = f"empty in {(share == 0).sum()} of {len(share)} masks"
        lines.append(_line("class", f"{name}: {share.mean():.2%} of the pixels, {empty}"))
    for name in ("patient", "label", "subset"):
        counts = Counter(getattr(pair, name) for pair in pairs if getattr(pair, name))
        if counts:
            lines.append(_line(f"{name}s", f"{len(counts)}: {_most_common(counts, 4)}"))
    return lines + _odd_files(info)


def _line(title: str, text: Any) -> str:
    return f"{title:10} {text}"


def _most_common(counts: Counter, most: int) -> str:
    """List the most common values with their counts."""
    shown = ", ".join(f"{value} ({count})" for value, count in counts.most_common(most))
    return shown + (f", … {len(counts)} kinds" if len(counts) > most else "")


def _odd_files(info: "pd.DataFrame") -> list[str]:
    """Name the files that differ from the rest. What most files have in common is no note."""
    notes = [
        ("constant image, nothing to see", info.constant),
        ("16 bits or more, stretched to 8 between its own percentiles", info.bits > 8),
        ("has an alpha channel, which is ignored", info.alpha),
    ]
    lines = []
    for text, is_odd in notes:
        if is_odd.sum() <= max(5, len(info) // 10):
            lines += [_line("note", f"{path}: {text}") for path in info.image[is_odd]]
    return lines


# ------------------------------------------------------------------------------- hyperparameters


def suggest(dataset: Dataset, names: Sequence[str]) -> dict[str, Any]:
    """Propose fields of `train.Config`; the reasons are in REASONS. Nothing for no images."""
    info = dataset.info
    if not len(info):
        return {}
    size = _suggest_size(info, names)
    batch_size = int(np.clip(4 * (8 * 128**2 // size**2), 2, 8))
    chosen = {"image_size": size, "channels": dataset.channels, "batch_size": batch_size}
    if window := _suggest_window(dataset):
        chosen["window"] = window
    shares = info[[f"share: {name}" for name in names]].to_numpy()
    if shares.any() and np.median(shares[shares > 0]) < RARE:
        chosen["loss"] = "tversky"
    return chosen


def _suggest_size(info: "pd.DataFrame", names: Sequence[str]) -> int:
    """Choose the image size at which nine of ten objects are large enough."""
    extents = info[[f"extent: {name}" for name in names]].to_numpy()
    small = np.quantile(extents[extents > 0], 0.1) if extents.any() else 1.0
    sides = [max(map(int, size.split("x"))) for size in info["size"]]
    largest = np.clip(np.median(sides), *SIZES)
    size = int(np.clip(MIN_OBJECT_PIXELS / small, SIZES[0], largest))
    return SIZE_STEP * -(-size // SIZE_STEP)  # rounded up


def _suggest_window(dataset: Dataset) -> str:
    """Choose the grey levels of CT that hold the objects, with a margin; "" for other images."""
    info = dataset.info
    objects = np.concatenate([np.ravel(levels) for levels in info["object"]])
    lowest = min(levels[0] for levels in info["quantiles"])
    if not len(objects) or lowest >= HOUNSFIELD_BELOW or dataset.channels == 3:
        return ""
    low, high = np.percentile(objects, (0.5, 99.5))
    margin = max(50.0, 0.25 * (high - low))
    return f"{(low + high) / 2:.0f},{high - low + 2 * margin:.0f}"


def train_command(fields: dict[str, Any]) -> str:
    """Write the command that trains with these fields of `train.Config`."""
    words = ["python", "train.py"]
    for name, value in fields.items():
        is_default = name == "channels" or (name, value) == ("classes", "foreground")
        is_default |= value is False or value == ""
        if not is_default:  # train.py looks at the images for the number of channels
            flag = f"--{name.replace('_', '-')}"
            # A value such as -600,1500 would be read as a flag if it stood alone.
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
            if value is True:
                words.pop()
    return shlex.join([*words, "--out-dir", "files/mine"])
