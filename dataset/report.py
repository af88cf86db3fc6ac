"""Describe a data set before the training: lines of text, a page with pictures, hyperparameters.

`python data.py check DIR` writes the page. That hyperparameters follow from a data set's
fingerprint is the idea of nnU-Net (Isensee et al. 2021).
"""

import base64
import html
import io
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.cache import Dataset
from dataset.layouts import Pair
from imaging import plots, preprocess
from utils import atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SHEET_IMAGES = 24  # images of the contact sheet
SHEET_COLUMNS = 6
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
        if not is_default:  # train.py looks at the images for the number of channels
            flag = f"--{name.replace('_', '-')}"
            # A value such as -600,1500 would be read as a flag if it stood alone.
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return shlex.join([*words, "--out-dir", "files/mine"])


# --------------------------------------------------------------------------------------- the page


def write_report(
    folder: Path,
    dataset: Dataset,
    names: Sequence[str],
    lines: Sequence[str],
    problems: Sequence[str],
    fields: dict[str, Any],
) -> Path:
    """Write report.html and report.json into `folder`; return the page.

    fields: of `train.Config`: data_dir, classes, and what `suggest` proposes.
    """
    title, text = html.escape(fields["data_dir"]), html.escape("\n".join(lines))
    listed = "".join(f"<li>{html.escape(problem)}" for problem in problems) or "<li>none"
    rows = ""
    for name in REASONS:
        if name in fields:
            rows += f"<tr><td>{name}<td>{fields[name]}<td>{REASONS[name]}"
    pictures = ""
    for figure in draw_figures(dataset, names) if len(dataset.info) else []:
        pictures += f'<img alt="" src="data:image/png;base64,{_to_base64(figure)}">'
    page = f"""<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; max-width: 1100px; margin: 2em auto }}
img {{ max-width: 100% }} td {{ padding: 0.2em 1em 0.2em 0 }}</style>
<h1>{title}</h1><pre>{text}</pre>
<h2>Problems</h2><ul>{listed}</ul>
<h2>Proposed hyperparameters</h2><table>{rows}</table>
<p><code>{html.escape(train_command(fields))}</code></p>
<h2>Pictures</h2>{pictures}
"""
    with atomic(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(fields, indent=2))
    return folder / "report.html"


def draw_figures(dataset: Dataset, names: Sequence[str]) -> "list[Figure]":
    """Draw the page's pictures: a contact sheet; sizes, grey levels and shares of the classes."""
    from matplotlib.figure import Figure

    info, sheet = dataset.info, contact_sheet(dataset)
    first = Figure(figsize=(12, 12 * sheet.shape[0] / sheet.shape[1]), dpi=90)
    axes = first.add_axes((0, 0, 1, 1))
    axes.imshow(sheet)
    axes.set_axis_off()
    second = Figure(figsize=(12, 3.4), dpi=90, layout="constrained")
    sizes, levels, shares = second.subplots(1, 3)
    sides = np.array([size.split("x") for size in info["size"]], int)
    sizes.scatter(sides[:, 1], sides[:, 0], alpha=0.4)
    sizes.set(title="sizes", xlabel="width", ylabel="height")
    for column, label in (("quantiles", "all pixels"), ("object", "foreground")):
        values = np.concatenate([np.ravel(one) for one in info[column]])
        if len(values):
            levels.hist(values, bins=60, density=True, alpha=0.6, label=label)
    levels.set(title="grey levels, as stored")
    levels.legend(frameon=False)
    percent = [100 * info[f"share: {name}"] for name in names]
    shares.boxplot(percent, tick_labels=names, orientation="horizontal")
    shares.set(title="share of the pixels, %")
    return [first, second]


def contact_sheet(dataset: Dataset) -> np.ndarray:
    """Draw outlines over images spread over the data set; of volumes the slice with most of it."""
    last = len(dataset.info) - 1
    tiles = []
    for pair in np.unique(np.linspace(0, last, SHEET_IMAGES).round().astype(int)):
        images, masks = dataset.take(dataset.slices_of([pair]))
        fullest = int(np.argmax(masks.sum((1, 2, 3), dtype=np.int64)))
        image = preprocess.to_rgb(images[fullest])
        tiles.append(plots.draw_contours(image, preprocess.shares_to_ids(masks[fullest])))
    columns = min(SHEET_COLUMNS, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def _to_base64(figure: "Figure") -> str:
    """Draw a figure as PNG, in base64."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()
