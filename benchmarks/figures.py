"""Draw the pictures of the documentation: img/u-net-architecture.png, panel.png, panel-mri.png.

    python -m benchmarks.figures --data-dir $UNET_DATA/sunnybrook     all three
    python -m benchmarks.figures                                      without the MRI panel

The panels show test images by the drawing of predict.py: a synthetic chest X-ray by the pretrained
model, and a slice of the Sunnybrook cardiac MRI (CC0, Radau et al. 2009). The MRI model is trained
by train.py (3 to 5 minutes on two cores), or named by --model. Name an --out-dir to look at them
first.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import utils

if __name__ == "__main__":  # without TensorFlow's messages
    utils.load_keras()

import keras
from keras import layers
from PIL import Image

import data
import predict
from dataset.layouts import Pair
from dataset.phantoms import make_phantoms
from imaging import plots
from inference.models import BUNDLED_MODEL
from model import build_unet
from utils import UserError

PHANTOM = 3  # which phantom of seed 2 is shown; the pretrained model has seen seed 1
MRI_IMAGE = "SC-HF-I-11-IM-0001-0140"  # a test image, neither the best nor the worst
MRI_TRAINING = "--augmentation free --epochs 30 --val-fraction 0 --mirror"

# Colours of the network's drawing.
FEATURES, CONCATENATION, EDGE = "#7fb2e5", "#f2b46d", "#333333"
ARROWS = {
    "conv": ("#333333", "3×3 conv, norm, ReLU"),
    "pool": ("#c0392b", "2×2 max pool"),
    "up": ("#27ae60", "2×2 up-conv"),
    "last": ("#8e44ad", "1×1 conv, sigmoid"),
    "skip": ("#888888", "skip connection (copy)"),
}


@dataclass(frozen=True)
class Config:
    """What is drawn, and where to."""

    data_dir: str = ""  # Sunnybrook's folder; "" leaves the MRI panel out
    model: str = ""  # a model file trained on it; "" trains one
    out_dir: str = "img"  # where the pictures go


def main(config: Config) -> None:
    """Draw the pictures and print their paths."""
    out_dir = Path(config.out_dir)
    draw_network(build_unet((128, 128, 1)), out_dir / "u-net-architecture.png")
    print(out_dir / "u-net-architecture.png")
    with tempfile.TemporaryDirectory() as name:
        phantoms = make_phantoms(Path(name) / "phantoms", PHANTOM + 1, seed=2)
        pair = find_pair(phantoms, f"phantom_{PHANTOM:04d}")
        draw_panel(str(utils.ROOT / BUNDLED_MODEL), pair, out_dir / "panel.png")
        if config.data_dir:
            model = config.model or train_model(config.data_dir, f"{name}/run")
            draw_panel(model, find_pair(config.data_dir, MRI_IMAGE), out_dir / "panel-mri.png")


def train_model(data_dir: str, out_dir: str) -> str:
    """Train a model for the MRI panel; return its file. Raises UserError if that fails."""
    flags = ["--data-dir", data_dir, "--out-dir", out_dir, *MRI_TRAINING.split()]
    done = subprocess.run([sys.executable, utils.ROOT / "train.py", *flags], check=False)
    if done.returncode:
        raise UserError("the training failed; its message is above")
    return f"{out_dir}/model.h5"


def find_pair(data_dir: str | Path, stem: str) -> Pair:
    """Find an image and its mask by their name. Raises UserError if they are not there."""
    for pair in data.find_pairs(data_dir)[0]:
        if pair.stem == stem:
            return pair
    raise UserError(f"{data_dir} has no image {stem}; expected Sunnybrook's test images")


def draw_panel(model: str, pair: Pair, path: Path) -> None:
    """Segment a pair's image and draw its panel as predict.py does."""
    members = predict.load_members(predict.Config(model=model))
    with tempfile.TemporaryDirectory() as folder:
        _, problems = predict.score_pairs(members, [pair], panel_dir=folder)
        if problems:
            raise UserError("\n".join(problems))
        panel = Image.open(Path(folder) / f"{pair.stem}.png")
        with utils.atomic(path) as temporary:
            # 256 colours need a fifth of the bytes, for those who clone the repository.
            panel.quantize(256).save(temporary, "PNG", optimize=True)
    print(path)


# ----------------------------------------------------------------------------------- the network


def draw_network(model: keras.Model, path: str | Path) -> None:
    """Draw a plain U-Net: a box per feature map, a row per resolution, an arrow per connection."""
    maps = feature_maps(model)
    places = place_maps(maps)
    figure = plots.new_figure(14, 7)
    axes = figure.subplots()
    for layer in maps:
        draw_map(axes, layer, places[layer.name], maps[0].output.shape[1])
    for one, two in pairwise(maps):
        colour = ARROWS[kind_of_arrow(one, two)][0]
        draw_arrow(axes, places[one.name], places[two.name], colour)
    for start, end in skip_connections(model):
        draw_arrow(axes, places[start], places[end], ARROWS["skip"][0], "--")
    for colour, label in ARROWS.values():
        axes.plot([], [], color=colour, label=label)
    sizes = "channels above, height×width below each feature map"
    axes.set_title(f"U-Net, {model.count_params():,} parameters ({sizes})")
    axes.legend(loc="lower right", frameon=False)
    axes.set_ylim(min(y for _, y in places.values()) - 1, 1.5)
    axes.set_axis_off()
    plots.write_figure(figure, path)


def feature_maps(model: keras.Model) -> list[keras.Layer]:
    """List the layers that are drawn: input, activations, concatenations, output."""
    drawn = (layers.InputLayer, layers.Activation, layers.Concatenate)
    last = model.layers[-1]
    return [layer for layer in model.layers if isinstance(layer, drawn) or layer is last]


def skip_connections(model: keras.Model) -> list[tuple[str, str]]:
    """List the names of each concatenation's encoder layer and of itself, from the built graph."""
    joins = [layer for layer in model.layers if isinstance(layer, layers.Concatenate)]
    return [(layer.input[0]._keras_history.operation.name, layer.name) for layer in joins]


def place_maps(maps: list[keras.Layer]) -> dict[str, tuple[float, float]]:
    """Place the feature maps from left to right, a row per resolution: name → (x, y)."""
    heights = sorted({layer.output.shape[1] for layer in maps}, reverse=True)
    places, last_level, x = {}, 0, 0.0
    for layer in maps:
        level = heights.index(layer.output.shape[1])
        x += 1.6 if level == last_level else 1.0
        places[layer.name] = x, -2.2 * level
        last_level = level
    return places


def kind_of_arrow(one: keras.Layer, two: keras.Layer) -> str:
    """Name the operation between two feature maps."""
    if two.name == "probabilities":
        return "last"
    before, after = one.output.shape[1], two.output.shape[1]
    if after < before:
        return "pool"
    return "up" if after > before else "conv"


def draw_map(axes: Any, layer: keras.Layer, place: tuple[float, float], full_height: int) -> None:
    """Draw a feature map as a box with its channels above and its size below."""
    x, y = place
    _, height, width, channels = layer.output.shape
    box = 0.8 + 0.9 * height / full_height
    colour = CONCATENATION if isinstance(layer, layers.Concatenate) else FEATURES
    style = {"width": 0.5, "color": colour, "edgecolor": EDGE, "linewidth": 0.8}
    axes.bar(x, box, bottom=y - box / 2, **style)
    axes.text(x, y + box / 2 + 0.06, channels, ha="center", va="bottom", fontsize=9)
    size = {"ha": "center", "va": "top", "fontsize": 7, "color": "#555555"}
    axes.text(x, y - box / 2 - 0.06, f"{height}×{width}", **size)


def draw_arrow(
    axes: Any,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    line: str = "-",
) -> None:
    """Draw an arrow from one box's right side to another's left side."""
    shape = {"arrowstyle": "-|>", "color": colour, "linestyle": line, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (end[0] - 0.27, end[1]), (start[0] + 0.27, start[1]), arrowprops=shape)


if __name__ == "__main__":
    utils.run_script(main, Config)
