"""Draw pictures: a network, the curves of a training, a result panel."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # predictions do without both
    import keras
from imaging import plots


def feature_maps(model: "keras.Model") -> list["keras.Layer"]:
    """List the layers whose outputs the picture shows: input, each activation, each concatenation, the output."""
    from keras import layers

    shown = (layers.InputLayer, layers.Activation, layers.Concatenate)
    return [
        layer for layer in model.layers if isinstance(layer, shown) or layer is model.layers[-1]
    ]


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
    figure = plots.new_figure(14, 7)
    axes = figure.subplots()
    for layer in maps:
        (x, y), (_, height, width, channels) = place[layer.name], layer.output.shape
        tall = 0.8 + 0.9 * height / heights[0]
        colour = "#f2b46d" if isinstance(layer, layers.Concatenate) else "#7fb2e5"
        axes.bar(
            x,
            tall,
            width=0.5,
            bottom=y - tall / 2,
            color=colour,
            edgecolor="#333333",
            linewidth=0.8,
        )
        axes.text(x, y + tall / 2 + 0.06, channels, ha="center", va="bottom", fontsize=9)
        axes.text(
            x,
            y - tall / 2 - 0.06,
            f"{height}×{width}",
            ha="center",
            va="top",
            fontsize=7,
            color="#555555",
        )
    styles = {
        0: ("#333333", "3×3 conv, norm, ReLU"),
        1: ("#c0392b", "2×2 max pool"),
        -1: ("#27ae60", "2×2 up-conv"),
    }
    last = ("#8e44ad", f"1×1 conv, {maps[-1].activation.__name__}")

    def arrow(start: str, end: str, colour: str, style: str = "-") -> None:
        (x0, y0), (x1, y1) = place[start], place[end]
        shape = {
            "arrowstyle": "-|>",
            "color": colour,
            "linestyle": style,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        axes.annotate("", (x1 - 0.27, y1), (x0 + 0.27, y0), arrowprops=shape)

    for one, two in pairwise(maps):
        down = heights.index(two.output.shape[1]) - heights.index(one.output.shape[1])
        arrow(one.name, two.name, last[0] if two is maps[-1] else styles[down][0])
    for start, end in skip_connections(model):
        arrow(start, end, "#888888", "--")
    for colour, label in (*styles.values(), last, ("#888888", "skip connection (copy)")):
        axes.plot([], [], color=colour, label=label)
    axes.set_title(
        f"U-Net, {model.count_params():,} parameters (channels above, height×width below each feature map)"
    )
    axes.legend(loc="lower right", frameon=False)
    axes.set_ylim(-2.2 * (len(heights) - 1) - 1, 1.5)
    axes.set_axis_off()
    plots.write_figure(figure, path)
