"""Draw pictures: a network, the curves of a training, a result panel."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # predictions do without both
    import pandas as pd
import cv2

from imaging import preprocess
from imaging.scan import Scan
from utils import atomic


def new_figure(width: float, height: float) -> Any:
    """Make an empty matplotlib figure, sizes in inches."""
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def write_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def draw_curves(log: "pd.DataFrame", path: Path) -> None:
    """Draw loss and Dice over the epochs, training and validation."""
    figure = new_figure(10, 3.6)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "dice"), strict=True):
        axes.plot(log.epoch, log[name], label="training (augmented)")
        if f"val_{name}" in log:
            axes.plot(log.epoch, log[f"val_{name}"], label="validation")
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    write_figure(figure, path)


def draw_panel(
    path: str | Path,
    scan: Scan,
    masks: dict[str, np.ndarray],
    names: Sequence[str] = (),
    uncertainty: np.ndarray | None = None,
    window: str = "",
) -> None:
    """Draw a scan and beside it, for each title, the outlines of those class ids (S, H, W) over it; write a PNG.

    Of a volume the slice with most foreground is drawn. uncertainty: (S, H, W) in [0, 1], drawn as a last part.
    """
    from matplotlib.lines import Line2D

    chosen = int(np.argmax(sum((ids > 0).sum((1, 2)) for ids in masks.values())))
    height, width = scan.pixels.shape[1:3]
    shrink = min(1, 640 / max(height, width))
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    slices = replace(scan, pixels=scan.pixels[chosen : chosen + 1])
    picture = preprocess.prepare_scan(slices, size, 3, window)[0]
    parts = {
        "input"
        if len(scan.pixels) == 1
        else f"input, slice {chosen + 1} of {len(scan.pixels)}": picture
    }
    for title, ids in masks.items():
        small = preprocess.shares_to_ids(
            preprocess.prepare_mask(ids[chosen], size, max(1, int(ids.max())))
        )
        parts[title] = draw_contours(picture, small)
    if uncertainty is not None:
        parts["uncertainty"] = preprocess.resize(uncertainty[chosen], size)
    tall = min(12, max(1, 4 * size[0] / size[1]))  # inches
    figure = new_figure(4 * len(parts), tall + 0.4)
    for axes, (title, part) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        shown = axes.imshow(part, **({"cmap": "inferno", "vmin": 0} if part.ndim == 2 else {}))
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
        if part.ndim == 2:
            figure.colorbar(shown, ax=axes, shrink=0.8)
    if len(names) > 1:
        colours = [np.divide(COLOURS[i % len(COLOURS)], 255) for i in range(len(names))]
        lines = [Line2D([], [], color=colour) for colour in colours]
        figure.legend(
            lines, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False
        )
    write_figure(figure, path)


COLOURS = (
    (230, 60, 60),
    (60, 140, 240),
    (250, 190, 40),
    (70, 190, 90),
    (170, 90, 220),
    (60, 200, 200),
)


def draw_contours(picture: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return RGB `picture` (H, W, 3) with the outline of every class in `ids` (H, W) drawn in that class's colour."""
    drawn = np.ascontiguousarray(picture).copy()
    thickness = max(1, round(max(ids.shape) / 300))
    for i in np.unique(ids[ids > 0]):
        outlines, _ = cv2.findContours(
            (ids == i).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(drawn, outlines, -1, COLOURS[(int(i) - 1) % len(COLOURS)], thickness)
    return drawn
