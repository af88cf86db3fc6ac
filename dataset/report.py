"""Describe a data set before it is trained on: a page with pictures, and the hyperparameters that follow from it.

`python data.py check DIR` writes it; `python train.py --from-report DIR/report.json` takes the hyperparameters over.
What follows from what is nnU-Net's idea of a fingerprint (Isensee et al. 2021), on one page.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dataset.cache import Dataset
from imaging import plots, preprocess
from utils import atomic

CONTACT_SHEET_IMAGES = 24  # images of the contact sheet
MIN_OBJECT_PIXELS = 12  # pixels that the smallest objects are to measure at the network's size
SIZES = (128, 512)  # pixels; the least and most that is proposed
STEP = 32  # so that five halvings work


def suggest(info: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Propose fields of `train.Config`, each with its reason in `explain`."""
    sides = info["size"].str.split("x", expand=True).astype(int).max(axis=1)
    extents = pd.concat([info[f"extent: {name}"] for name in names])
    small = extents[extents > 0].quantile(0.1) if (extents > 0).any() else 1.0
    size = int(
        np.clip(MIN_OBJECT_PIXELS / small, SIZES[0], min(SIZES[1], max(SIZES[0], sides.median())))
    )
    size = STEP * -(-size // STEP)
    chosen = {"image_size": size, "channels": 3 if (info.channels == 3).mean() > 0.5 else 1}
    chosen["batch_size"] = max(2, min(8, 8 * 128**2 // size**2 * 4))
    objects = np.concatenate([np.ravel(levels) for levels in info["object"]])
    everything = np.concatenate([np.ravel(levels) for levels in info["quantiles"]])
    if (
        len(objects) and everything.min() < -200 and chosen["channels"] == 1
    ):  # Hounsfield units: air is -1000
        low, high = np.percentile(objects, (0.5, 99.5))
        margin = max(50.0, 0.25 * (high - low))
        chosen["window"] = f"{(low + high) / 2:.0f},{high - low + 2 * margin:.0f}"
    shares = info[[f"share: {name}" for name in names]].to_numpy()
    if shares[shares > 0].size and np.median(shares[shares > 0]) < 0.002:
        chosen["loss"] = "tversky"
    return chosen


def explain(chosen: dict[str, Any]) -> dict[str, str]:
    """Give the reason of each proposal in a few words."""
    reasons = {
        "image_size": f"nine of ten objects measure {MIN_OBJECT_PIXELS} pixels or more at this size",
        "channels": "what most images have",
        "batch_size": "less for larger images, to stay within a few GB",
        "window": "negative grey levels, so CT: the objects' range and a margin on both sides",
        "loss": "the objects are less than 0.2 % of the pixels: misses count more than false alarms",
    }
    return {name: reasons[name] for name in chosen}


def contact_sheet(dataset: Dataset) -> np.ndarray:
    """Draw the outlines over SHOWN images, spread over the data set; of volumes the slice with most foreground."""
    pairs = np.unique(
        np.linspace(0, len(dataset.info) - 1, CONTACT_SHEET_IMAGES).round().astype(int)
    )
    tiles = []
    for pair in pairs:
        slices = dataset.slices_of([pair])
        pictures, masks = dataset.take(slices)
        best = int(np.argmax(masks.sum((1, 2, 3), dtype=np.int64)))
        picture = (
            np.repeat(pictures[best][..., :1], 3, axis=-1)
            if pictures.shape[-1] == 1
            else pictures[best]
        )
        tiles.append(plots.draw_contours(picture, preprocess.shares_to_ids(masks[best])))
    columns = min(6, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def figures(dataset: Dataset, names: Sequence[str]) -> list[str]:
    """Draw the page's pictures: contact sheet, sizes, grey levels, shares; each as a PNG in base64."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def as_text(figure: Figure) -> str:
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
        return base64.b64encode(buffer.getvalue()).decode()

    info, sheet = dataset.info, contact_sheet(dataset)
    first = Figure(figsize=(12, 12 * sheet.shape[0] / sheet.shape[1]), dpi=90)
    axes = first.add_axes((0, 0, 1, 1))
    axes.imshow(sheet)
    axes.set_axis_off()
    second = Figure(figsize=(12, 3.4), dpi=90, layout="constrained")
    sizes, levels, shares = second.subplots(1, 3)
    sides = info["size"].str.split("x", expand=True).astype(int)
    sizes.scatter(sides[1], sides[0], alpha=0.4)
    sizes.set(title="sizes", xlabel="width", ylabel="height")
    levels.hist(
        np.concatenate([np.ravel(q) for q in info["quantiles"]]),
        bins=60,
        density=True,
        label="all pixels",
    )
    inside = np.concatenate([np.ravel(q) for q in info["object"]])
    if len(inside):
        levels.hist(inside, bins=60, density=True, alpha=0.6, label="foreground")
    levels.set(title="grey levels, as stored")
    levels.legend(frameon=False)
    shares.boxplot(
        [100 * info[f"share: {name}"] for name in names],
        tick_labels=names,
        orientation="horizontal",
    )
    shares.set(title="share of the pixels, %")
    return [as_text(first), as_text(second)]


def write_report(
    folder: Path,
    dataset: Dataset,
    names: Sequence[str],
    lines: str,
    problems: list[str],
    given: dict[str, str],
) -> Path:
    """Write report.html and report.json into `folder`; return the page.

    given: the fields of `train.Config` that were told, data_dir among them; report.json has them too.
    """
    chosen = suggest(dataset.info, names) if len(dataset.info) else {}
    reasons, title = explain(chosen), html.escape(given["data_dir"])
    rows = "".join(
        f"<tr><td>{name}<td>{chosen[name]}<td>{reason}" for name, reason in reasons.items()
    )
    listed = "".join(f"<li>{html.escape(problem)}" for problem in problems) or "<li>none"
    pictures = figures(dataset, names) if chosen else []
    shown = "".join(f'<img alt="" src="data:image/png;base64,{picture}">' for picture in pictures)
    page = f"""<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; max-width: 1100px; margin: 2em auto }} img {{ max-width: 100% }}
td {{ padding: 0.2em 1em 0.2em 0 }}</style>
<h1>{title}</h1><pre>{html.escape(lines)}</pre>
<h2>Problems</h2><ul>{listed}</ul>
<h2>Proposed hyperparameters</h2><table>{rows}</table>
<p><code>python train.py --from-report {html.escape(str(folder / "report.json"))} --out-dir files/mine</code></p>
<h2>Pictures</h2>{shown}
"""
    with atomic(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(given | chosen, indent=2))
    return folder / "report.html"
