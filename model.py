"""The U-Net of Ronneberger et al. 2015 (arXiv 1505.04597, section 2), with same padding and batch normalisation.

    python model.py [--image-size 128] [--filters 8] [--depth 4] [--classes 1]

Prints the summary and draws the network into img/u-net-architecture.png. At 512x512 with 64 filters and depth 4 it is
the paper's network (31 million parameters).
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import keras
from keras import layers

from images import UserError


def conv_block(x: keras.KerasTensor, filters: int, name: str) -> keras.KerasTensor:
    """Apply twice: 3x3 convolution, batch normalisation, ReLU. (N, H, W, C) → (N, H, W, filters)."""
    for i in (1, 2):
        x = layers.Conv2D(
            filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv{i}"
        )(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_norm{i}")(x)
        x = layers.ReLU(name=f"{name}_relu{i}")(x)
    return x


def build_unet(
    input_shape: tuple[int | None, int | None, int], classes: int = 1, filters: int = 8, depth: int = 4
) -> keras.Model:
    """Build the network: images (N, H, W, C) in [0, 1] → probabilities (N, H, W, classes), float32.

    input_shape: (H, W, C), H and W multiples of 2**depth (or None, for any such size).
    classes: output channels; 1 ends in a sigmoid, more in a softmax (count the background as one then).
    filters: channels of the first level, doubled at each of the `depth` poolings.
    Raises UserError (a ValueError) for a size that the poolings cannot halve.
    """
    step = 2**depth
    for side in input_shape[:2]:
        if side is not None and (side < step or side % step):
            near = max(step, round(side / step) * step)
            raise UserError(f"image size {side} is not a multiple of {step} (2**depth); take {near} or another depth")
    x = inputs = keras.Input(input_shape, name="image")  # (N, H, W, C)
    skips = []
    for level in range(depth):
        x = conv_block(x, filters * 2**level, f"encoder{level}")  # (N, H/2^l, W/2^l, 2^l F)
        skips.append(x)
        x = layers.MaxPooling2D(2, name=f"encoder{level}_pool")(x)  # (N, H/2^(l+1), W/2^(l+1), 2^l F)
    x = conv_block(x, filters * step, "bottleneck")  # (N, H/2^d, W/2^d, 2^d F)
    for level in reversed(range(depth)):
        x = layers.Conv2DTranspose(filters * 2**level, 2, strides=2, name=f"decoder{level}_up")(x)
        x = layers.Concatenate(name=f"decoder{level}_skip")([skips[level], x])  # (N, H/2^l, W/2^l, 2^(l+1) F)
        x = conv_block(x, filters * 2**level, f"decoder{level}")  # (N, H/2^l, W/2^l, 2^l F)
    activation = "sigmoid" if classes == 1 else "softmax"
    x = layers.Conv2D(classes, 1, activation=activation, dtype="float32", name="probabilities")(x)  # (N, H, W, K)
    return keras.Model(inputs, x, name="unet")


# ------------------------------------------------------------------------------------------------------- its picture


def feature_maps(model: keras.Model) -> list[keras.layers.Layer]:
    """List the layers whose outputs the picture shows: input, each ReLU, each concatenation, the output."""
    shown = (layers.InputLayer, layers.ReLU, layers.Concatenate)
    return [layer for layer in model.layers if isinstance(layer, shown) or layer is model.layers[-1]]


def skip_connections(model: keras.Model) -> list[tuple[str, str]]:
    """List (from, to) layer names of each concatenation's encoder side, read off the built graph."""
    joins = [layer for layer in model.layers if isinstance(layer, layers.Concatenate)]
    return [(layer.input[0]._keras_history.operation.name, layer.name) for layer in joins]


def draw(model: keras.Model, path: str | Path) -> None:
    """Draw a built network as the U it is: a box per feature map, a row per resolution, arrows for the connections."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only pictures need it
    from matplotlib.figure import Figure

    maps = feature_maps(model)
    heights = sorted({layer.output.shape[1] for layer in maps}, reverse=True)
    place, last_level, x = {}, 0, 0.0
    for layer in maps:
        level = heights.index(layer.output.shape[1])
        x += 1.6 if level == last_level else 1.0
        place[layer.name], last_level = (x, -2.2 * level), level
    figure = Figure(figsize=(14, 7), layout="constrained")
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


@dataclass(frozen=True)
class Config:
    """Which network to describe."""

    image_size: int = 128  # pixels, height and width
    channels: int = 1  # 1 grey, 3 colour
    classes: int = 1  # output channels
    filters: int = 8  # of the first level
    depth: int = 4  # poolings
    picture: str = "img/u-net-architecture.png"  # where the drawing goes


def main(config: Config) -> None:
    """Print the summary and draw the picture."""
    shape = (config.image_size, config.image_size, config.channels)
    model = build_unet(shape, config.classes, config.filters, config.depth)
    model.summary()
    draw(model, config.picture)
    print(config.picture)


if __name__ == "__main__":
    from utils import run

    run(main, Config)
