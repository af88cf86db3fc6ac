"""Draw pictures: a network, the curves of a training, a result panel."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import images
from images import Scan

if TYPE_CHECKING:  # predictions do without both
    import keras
    import pandas as pd


def new_figure(width: float, height: float) -> Any:
    """Make an empty matplotlib figure, sizes in inches."""
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def write(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with images.atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def feature_maps(model: "keras.Model") -> list["keras.Layer"]:
    """List the layers whose outputs the picture shows: input, each activation, each concatenation, the output."""
    from keras import layers

    shown = (layers.InputLayer, layers.Activation, layers.Concatenate)
    return [layer for layer in model.layers if isinstance(layer, shown) or layer is model.layers[-1]]


def skip_connections(model: "keras.Model") -> list[tuple[str, str]]:
    """List (from, to) layer names of each concatenation's encoder side, read off the built graph."""
    from keras import layers

    joins = [layer for layer in model.layers if isinstance(layer, layers.Concatenate)]
    return [(layer.input[0]._keras_history.operation.name, layer.name) for layer in joins]


def draw_network(model: "keras.Model", path: str | Path) -> None:
    """Draw a built network as the U it is: a box per feature map, a row per resolution, arrows for the connections."""
    maps = feature_maps(model)
    from keras import layers

    heights = sorted({layer.output.shape[1] for layer in maps}, reverse=True)
    place, last_level, x = {}, 0, 0.0
    for layer in maps:
        level = heights.index(layer.output.shape[1])
        x += 1.6 if level == last_level else 1.0
        place[layer.name], last_level = (x, -2.2 * level), level
    figure = new_figure(14, 7)
    axes = figure.subplots()
    for layer in maps:
        (x, y), (_, height, width, channels) = place[layer.name], layer.output.shape
        tall = 0.8 + 0.9 * height / heights[0]
        colour = "#f2b46d" if isinstance(layer, layers.Concatenate) else "#7fb2e5"
        axes.bar(x, tall, width=0.5, bottom=y - tall / 2, color=colour, edgecolor="#333333", linewidth=0.8)
        axes.text(x, y + tall / 2 + 0.06, channels, ha="center", va="bottom", fontsize=9)
        axes.text(x, y - tall / 2 - 0.06, f"{height}×{width}", ha="center", va="top", fontsize=7, color="#555555")
    styles = {0: ("#333333", "3×3 conv, norm, ReLU"), 1: ("#c0392b", "2×2 max pool"), -1: ("#27ae60", "2×2 up-conv")}
    last = ("#8e44ad", f"1×1 conv, {maps[-1].activation.__name__}")

    def arrow(start: str, end: str, colour: str, style: str = "-") -> None:
        (x0, y0), (x1, y1) = place[start], place[end]
        shape = {"arrowstyle": "-|>", "color": colour, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x1 - 0.27, y1), (x0 + 0.27, y0), arrowprops=shape)

    for one, two in pairwise(maps):
        down = heights.index(two.output.shape[1]) - heights.index(one.output.shape[1])
        arrow(one.name, two.name, last[0] if two is maps[-1] else styles[down][0])
    for start, end in skip_connections(model):
        arrow(start, end, "#888888", "--")
    for colour, label in (*styles.values(), last, ("#888888", "skip connection (copy)")):
        axes.plot([], [], color=colour, label=label)
    axes.set_title(f"U-Net, {model.count_params():,} parameters (channels above, height×width below each feature map)")
    axes.legend(loc="lower right", frameon=False)
    axes.set_ylim(-2.2 * (len(heights) - 1) - 1, 1.5)
    axes.set_axis_off()
    write(figure, path)


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
    write(figure, path)


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
    picture = images.prepare_scan(slices, size, 3, window)[0]
    parts = {"input" if len(scan.pixels) == 1 else f"input, slice {chosen + 1} of {len(scan.pixels)}": picture}
    for title, ids in masks.items():
        small = images.shares_to_ids(images.prepare_mask(ids[chosen], size, max(1, int(ids.max()))))
        parts[title] = images.draw_contours(picture, small)
    if uncertainty is not None:
        parts["uncertainty"] = images.resize(uncertainty[chosen], size)
    tall = min(12, max(1, 4 * size[0] / size[1]))  # inches
    figure = new_figure(4 * len(parts), tall + 0.4)
    for axes, (title, part) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        shown = axes.imshow(part, **({"cmap": "inferno", "vmin": 0} if part.ndim == 2 else {}))
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
        if part.ndim == 2:
            figure.colorbar(shown, ax=axes, shrink=0.8)
    if len(names) > 1:
        colours = [np.divide(images.COLOURS[i % len(images.COLOURS)], 255) for i in range(len(names))]
        lines = [Line2D([], [], color=colour) for colour in colours]
        figure.legend(lines, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    write(figure, path)
