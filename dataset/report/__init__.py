"""Describe a data set before the training: lines of text, and the command that trains on it.

`python data.py check DIR` prints them; report_page.py makes its page. fingerprint.py measures the
masks, plan.py proposes hyperparameters, consequences.py says what the data ask for.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.cache import Dataset
from dataset.layouts import Pair
from dataset.report.fingerprint import Fingerprint, resampled_ceiling
from dataset.report.plan import Proposal, ceiling_sizes, floor_dice, working_spacing
from imaging.labels import Classes

if TYPE_CHECKING:
    import pandas as pd

MAX_CHANNELS = 8  # whose grey levels are told


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
            unit = ", height x width" if column == "size" else ""
            lines.append(_line(column, _most_common(counts, 6) + unit))
    if set(info.channels) <= {1, 3}:
        lines.append(_line("colour", f"in {info.in_colour.sum()} of {len(info)} images"))
    lines += _describe_levels(info)
    for name in names:
        share = info[f"share: {name}"]
        empty = f"empty in {(share == 0).sum()} of {len(share)} masks"
        lines.append(_line("class", f"{name}: {share.mean():.2%} of the pixels, {empty}"))
    for name in ("patient", "label", "subset"):
        counts = Counter(getattr(pair, name) for pair in pairs if getattr(pair, name))
        if counts:
            lines.append(_line(f"{name}s", f"{len(counts)}: {_most_common(counts, 4)}"))
    return lines + _odd_files(info)


def describe_objects(fingerprint: Fingerprint, ceilings: dict[str, np.ndarray]) -> list[str]:
    """Describe the objects in lines of text: number, size, thickness, and ceilings.

    ceilings: the Dice (K,) that masks keep when they are scaled to each size and back.
    """
    lines = []
    for class_id, name in enumerate(fingerprint.names, 1):
        diameters = fingerprint.diameters(class_id)
        if not len(diameters):
            continue
        small, usual = np.quantile(diameters, (0.1, 0.5))
        count = len(diameters) / fingerprint.slices(class_id)
        text = f"{count:.3g} a slice (mean), {usual:.0f} pixels across (median), one in ten below"
        lines.append(_line("objects", f"{name}: {text} {small:.0f}"))
        half, tenth = (fingerprint.width(class_id, share) for share in (0.5, 0.1))
        if np.isfinite(half):
            text = f"half of it is thinner than {half:.0f} pixels, a tenth than {tenth:.0f}"
            lines.append(_line("thickness", f"{name}: {text}"))
        found = [f"{floor_dice(dice[class_id - 1])} at {size}" for size, dice in ceilings.items()]
        lines.append(_line("ceiling", f"{name}: Dice {', '.join(found)} (scaled there and back)"))
    return lines


def measure_ceilings(
    pairs: Sequence[Pair],
    info: "pd.DataFrame",
    fingerprint: Fingerprint,
    proposals: Sequence[Proposal],
    classes: Classes,
) -> dict[str, np.ndarray]:
    """Give each class's ceiling (K,) at the size that is proposed, and at the next smaller one."""
    if not fingerprint.pairs:
        return {}
    fields = {name for name, _, _ in proposals}
    ceilings = {}
    if "patch_size" in fields:
        ceilings["their own resolution"] = np.ones(len(classes.names))
    if spacing := working_spacing(info, proposals):
        name = " x ".join(f"{one:.3g}" for one in spacing if one) + " mm"
        ceilings = {name: resampled_ceiling(pairs, info, classes, spacing)}
    for size in ceiling_sizes(proposals):
        ceilings[f"{size} pixels"] = fingerprint.ceiling(size)
    return ceilings


def describe_proposals(proposals: Sequence[Proposal]) -> list[str]:
    """List the proposed hyperparameters with their reasons."""
    return [_line("proposed", f"{name} {value}: {reason}") for name, value, reason in proposals]


def _line(title: str, text: Any) -> str:
    return f"{title:10} {text}"


def _most_common(counts: Counter, most: int) -> str:
    """List the most common values with their counts."""
    shown = ", ".join(f"{value} ({count})" for value, count in counts.most_common(most))
    return shown + (f", … {len(counts)} kinds" if len(counts) > most else "")


def _describe_levels(info: "pd.DataFrame") -> list[str]:
    """Give the grey levels of each channel, medians of the files, where there are several."""
    channels = info["channels"].mode().iloc[0]
    alike = info[info["channels"] == channels]
    if not 1 < channels <= MAX_CHANNELS:
        return []
    found = []
    for channel in range(channels):
        levels = alike["quantiles"]
        if channel:
            levels = alike["more_quantiles"].str[channel - 1]
        low, middle, high = np.median(np.array(levels.tolist())[:, [1, 10, 19]], axis=0)
        found.append(f"{low:.4g} … {middle:.4g} … {high:.4g}")
    return [_line("levels", f"{'; '.join(found)} (5, 50 and 95 % of each channel's pixels)")]


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


def train_command(fields: dict[str, Any], report: Path | None = None) -> str:
    """Write the command that trains with these fields of `train.Config`.

    report: the file that holds them; the shorter one of both commands is given.
    """
    words = []
    for name, value in fields.items():
        if value is False or value == "" or (name, value) == ("classes", "foreground"):
            continue
        flag = f"--{name.replace('_', '-')}"
        # A value such as -600,1500 would be read as a flag if it stood alone.
        words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
        if value is True:
            words.pop()
    if report and len(shlex.join(words)) > len(f"--from-report {report}"):
        words = ["--from-report", str(report)]
    return shlex.join(["python", "train.py", *words, "--out-dir", "files/mine"])
