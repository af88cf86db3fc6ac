"""U-Nets by name: the plain one of Ronneberger et al. 2015 (arXiv 1505.04597, section 2) and what came of it.

    python model.py [--architecture unet] [--image-size 128] [--filters 8] [--depth 4] [--classes 1]

Prints the summary; of the plain U-Net it also draws img/u-net-architecture.png. At 512x512 with 64 filters and depth 4
the plain one is the paper's network (31 million parameters), with same padding and normalization.

Every network is an encoder, which gives a feature map per level, each half the size of the one before, and a decoder,
which joins them again. Layers of the decoder have names that start with "decoder" or "probabilities".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
from keras import KerasTensor, layers

import utils
from benchmarks import figures
from utils import UserError

Block = Callable[
    [KerasTensor, int, str], KerasTensor
]  # (input, filters, name) → same size, `filters` channels

# ------------------------------------------------------------------------------------------------------------ blocks


def normalize(x: KerasTensor, kind: str, name: str) -> KerasTensor:
    """Normalize (N, H, W, C) over the batch, over groups of channels, over each channel (instance), or not at all."""
    if kind == "none":
        return x
    if kind == "batch":
        return layers.BatchNormalization(momentum=0.9, name=name)(x)
    channels = x.shape[-1]
    most = (
        channels if kind == "instance" else min(8, max(1, channels // 4))
    )  # a group has four channels at least
    groups = max(count for count in range(1, most + 1) if channels % count == 0)
    return layers.GroupNormalization(groups, name=name)(x)


def convolve(
    x: KerasTensor, filters: int, name: str, number: int, size: int, normalization: str
) -> KerasTensor:
    """Convolve and normalize: (N, H, W, C) → (N, H, W, filters)."""
    convolution = layers.Conv2D(
        filters,
        size,
        padding="same",
        use_bias=normalization == "none",  # a normalization has its own
        kernel_initializer="he_normal",
        name=f"{name}_conv{number}",
    )
    return normalize(convolution(x), normalization, f"{name}_norm{number}")


def conv_block(x: KerasTensor, filters: int, name: str, normalization: str) -> KerasTensor:
    """Apply twice: 3x3 convolution, normalization, ReLU. (N, H, W, C) → (N, H, W, filters)."""
    for i in (1, 2):
        x = convolve(x, filters, name, i, 3, normalization)
        x = layers.Activation("relu", name=f"{name}_relu{i}")(x)
    return x


def residual_block(x: KerasTensor, filters: int, name: str, normalization: str) -> KerasTensor:
    """Do as `conv_block`, with a shortcut around both convolutions (He et al. 2016, figure 2)."""
    shortcut = x if x.shape[-1] == filters else convolve(x, filters, name, 0, 1, normalization)
    x = convolve(x, filters, name, 1, 3, normalization)
    x = layers.Activation("relu", name=f"{name}_relu1")(x)
    x = convolve(x, filters, name, 2, 3, normalization)
    x = layers.Add(name=f"{name}_add")([x, shortcut])
    return layers.Activation("relu", name=f"{name}_relu2")(x)


def up(x: KerasTensor, filters: int, name: str) -> KerasTensor:
    """Double the size by a learned 2x2 up-convolution: (N, H, W, C) → (N, 2H, 2W, filters)."""
    return layers.Conv2DTranspose(filters, 2, strides=2, name=f"{name}_up")(x)


# ---------------------------------------------------------------------------------------------------------- encoders


def encode(x: KerasTensor, filters: int, depth: int, block: Block) -> list[KerasTensor]:
    """Run the contracting path: feature maps (N, H/2^l, W/2^l, 2^l F) of the levels l = 0 .. depth."""
    features = []
    for level in range(depth):
        x = block(x, filters * 2**level, f"encoder{level}")  # (N, H/2^l, W/2^l, 2^l F)
        features.append(x)
        x = layers.MaxPooling2D(2, name=f"encoder{level}_pool")(
            x
        )  # (N, H/2^(l+1), W/2^(l+1), 2^l F)
    return [*features, block(x, filters * 2**depth, "bottleneck")]  # (N, H/2^d, W/2^d, 2^d F)


@dataclass(frozen=True)
class Backbone:
    """An encoder of keras.applications, and how it wants its pixels."""

    build: Callable[..., keras.Model]
    scale: float  # applied to [0, 1]
    offset: float


BACKBONES = {
    "efficientnetv2b0": Backbone(keras.applications.EfficientNetV2B0, 255.0, 0.0),
    "mobilenetv3": Backbone(keras.applications.MobileNetV3Large, 255.0, 0.0),
    "resnet50v2": Backbone(keras.applications.ResNet50V2, 2.0, -1.0),
}


def encode_pretrained(x: KerasTensor, backbone: Backbone, weights: str) -> list[KerasTensor]:
    """Run an ImageNet classifier's layers: the last feature map of each of its sizes, H/2 .. H/32.

    Grey becomes colour by repeating it, which for the first convolution is the same as adding up its three kernels.
    weights: imagenet (downloaded by Keras, once), a weights file, or none. Raises UserError if they cannot be had.
    """
    height, width = x.shape[1:3]
    if x.shape[-1] == 1:
        x = layers.Concatenate(name="grey_to_colour")([x, x, x])  # (N, H, W, 3)
    x = layers.Rescaling(backbone.scale, backbone.offset, name="pixel_range")(x)
    try:
        network = backbone.build(
            include_top=False, weights=None if weights == "none" else weights, input_tensor=x
        )
    except Exception as error:  # Keras raises this very class when a download fails
        if weights == "none":
            raise
        raise UserError(
            f"encoder_weights {weights!r} cannot be loaded ({error}); expected imagenet (needs the internet once), a "
            "weights file that Keras wrote for this encoder, or none"
        ) from error
    clone = keras.models.clone_model(network, input_tensors=network.inputs, call_function=as_layer)
    clone.set_weights(network.get_weights())
    last = {layer.output.shape[1:3]: layer.output for layer in clone.layers}
    return [last[height // 2**level, width // 2**level] for level in range(1, 6)]


def as_layer(step: keras.Operation, *args: Any, **kwargs: Any) -> Any:
    """Call a step of a network; where it is `x + number` or `x * number` (MobileNetV3's), a layer does the same.

    An HDF5 file names a step by its class alone, and Keras then takes the operation Add for the layer Add.
    """
    if isinstance(step, keras.Layer):
        return step(*args, **kwargs)
    x, number = args
    kind = type(step).__name__
    return layers.Rescaling(
        **{"Add": {"scale": 1.0, "offset": number}, "Multiply": {"scale": number}}[kind]
    )(x)


# ---------------------------------------------------------------------------------------------------------- decoders
# Each takes the encoder's feature maps, the finest first, and gives its own finest one.


def decode(
    features: list[KerasTensor], filters: int, block: Block, attention: bool = False
) -> KerasTensor:
    """Run the expanding path of the U-Net: up-convolution, skip connection (gated by `attention`), block."""
    x = features[-1]
    for level in reversed(range(len(features) - 1)):
        name = f"decoder{level}"
        x = up(x, filters * 2**level, name)  # (N, H/2^l, W/2^l, 2^l F)
        skip = attention_gate(features[level], x, name) if attention else features[level]
        x = layers.Concatenate(name=f"{name}_skip")([skip, x])  # (N, H/2^l, W/2^l, 2^(l+1) F)
        x = block(x, filters * 2**level, name)  # (N, H/2^l, W/2^l, 2^l F)
    return x


def attention_gate(skip: KerasTensor, signal: KerasTensor, name: str) -> KerasTensor:
    """Attention gate: weigh each pixel of `skip` by what it and the coarser `signal` say (Oktay et al. 2018)."""
    inner = max(1, skip.shape[-1] // 2)
    both = [
        layers.Conv2D(inner, 1, name=f"{name}_gate_{part}")(x)
        for part, x in (("skip", skip), ("signal", signal))
    ]
    x = layers.Activation("relu", name=f"{name}_gate_relu")(
        layers.Add(name=f"{name}_gate_add")(both)
    )
    weight = layers.Conv2D(1, 1, activation="sigmoid", name=f"{name}_gate")(x)  # (N, H, W, 1)
    return layers.Multiply(name=f"{name}_gated")([skip, weight])


def decode_nested(features: list[KerasTensor], filters: int, block: Block) -> KerasTensor:
    """U-Net++: every level is decoded at every step, each from all its earlier maps (Zhou et al. 2018, figure 1)."""
    maps = [[x] for x in features]  # maps[level][step]
    for step in range(1, len(features)):
        for level in range(len(features) - step):
            name = f"decoder{level}_{step}"
            below = up(maps[level + 1][step - 1], filters * 2**level, name)
            joined = layers.Concatenate(name=f"{name}_skip")([*maps[level], below])
            maps[level].append(block(joined, filters * 2**level, name))
    return maps[0][-1]


def decode_full_scale(features: list[KerasTensor], filters: int, block: Block) -> KerasTensor:
    """U-Net 3+: every level is decoded from the maps of all sizes (Huang et al. 2020, equation 1)."""
    maps = list(features)  # encoder's maps, replaced by the decoder's from the coarsest on
    for level in reversed(range(len(features) - 1)):
        parts = []
        for other, x in enumerate(maps):
            name = f"decoder{level}_from{other}"
            if other < level:
                x = layers.MaxPooling2D(2 ** (level - other), name=f"{name}_pool")(x)
            elif other > level:
                x = layers.UpSampling2D(
                    2 ** (other - level), interpolation="bilinear", name=f"{name}_up"
                )(x)
            parts.append(
                layers.Conv2D(
                    filters, 3, padding="same", kernel_initializer="he_normal", name=name
                )(x)
            )
        joined = layers.Concatenate(name=f"decoder{level}_skip")(
            parts
        )  # (N, H/2^l, W/2^l, (d+1) F)
        maps[level] = block(joined, filters * len(parts), f"decoder{level}")
    return maps[0]


DECODERS = {
    "unet": decode,
    "residual": decode,
    "attention": partial(decode, attention=True),
    "unet++": decode_nested,
    "unet3+": decode_full_scale,
    **dict.fromkeys(BACKBONES, decode),
}
NORMALIZATIONS = ("batch", "group", "instance", "none")


# ------------------------------------------------------------------------------------------------------- the network


def build_unet(
    input_shape: tuple[int | None, int | None, int],
    classes: int = 1,
    filters: int = 8,
    depth: int = 4,
    *,
    architecture: str = "unet",
    normalization: str = "batch",
    encoder_weights: str = "none",
) -> keras.Model:
    """Build the network: images (N, H, W, C) in [0, 1] → probabilities (N, H, W, classes), float32.

    input_shape: (H, W, C), H and W multiples of 2**depth (or None, for any such size).
    classes: output channels; 1 ends in a sigmoid, more in a softmax (count the background as one then).
    filters: channels of the first level, doubled at each of the `depth` halvings (a pretrained encoder has 5).
    architecture: a name in DECODERS; encoder_weights: see `encode_pretrained`.
    Raises UserError (a ValueError) for an unknown name or a size that cannot be halved so often.
    """
    check_names(architecture, normalization, encoder_weights)
    backbone = BACKBONES.get(architecture)
    check_size(input_shape[:2], 5 if backbone else depth, fixed=backbone is not None)
    kind = residual_block if architecture == "residual" else conv_block
    block = partial(kind, normalization=normalization)
    inputs = keras.Input(input_shape, name="image")  # (N, H, W, C)
    if backbone:
        pretrained = encode_pretrained(inputs, backbone, encoder_weights)
        features = [
            block(inputs, filters, "decoder_input"),
            *pretrained,
        ]  # the finest level is not in the backbone
    else:
        features = encode(inputs, filters, depth, block)
    decoded = DECODERS[architecture](features, filters, block)
    return keras.Model(inputs, head(decoded, classes), name=architecture.replace("+", "p"))


def check_names(architecture: str, normalization: str, encoder_weights: str) -> None:
    """Raise UserError for a name that `build_unet` does not know."""
    choices = (
        ("architecture", architecture, DECODERS),
        ("normalization", normalization, NORMALIZATIONS),
    )
    for name, value, known in choices:
        if value not in known:
            raise UserError(f"{name} is {value!r}; expected {', '.join(known)}")
    if encoder_weights != "none" and architecture not in BACKBONES:
        raise UserError(
            f"encoder_weights are for {', '.join(BACKBONES)}; {architecture} has none, see --init-weights"
        )


def check_size(sides: tuple[int | None, int | None], depth: int, fixed: bool) -> None:
    """Raise UserError for sides that cannot be halved `depth` times, or are open although they have to be `fixed`."""
    step = 2**depth
    for side in sides:
        if side is None and fixed:
            raise UserError("a pretrained encoder needs a fixed image size")
        if side is not None and (side < step or side % step or (fixed and side == step)):
            near = max(2 * step if fixed else step, round(side / step) * step)
            if fixed:
                raise UserError(
                    f"image size is {side}; take {near} (a pretrained encoder halves it five times)"
                )
            raise UserError(
                f"image size {side} is not a multiple of {step} (2**depth); take {near} or another depth"
            )


def head(x: KerasTensor, classes: int) -> KerasTensor:
    """Turn a feature map into probabilities: (N, H, W, C) → (N, H, W, classes), float32."""
    activation = "sigmoid" if classes == 1 else "softmax"
    return layers.Conv2D(classes, 1, activation=activation, dtype="float32", name="probabilities")(
        x
    )


def freeze_encoder(model: keras.Model, frozen: bool) -> None:
    """Hold the encoder's weights fast, or let them go. To be followed by `compile`."""
    for layer in model.layers:
        if not layer.name.startswith(("decoder", "probabilities")):
            layer.trainable = not frozen


@dataclass(frozen=True)
class Config:
    """Which network to describe."""

    architecture: str = (
        "unet"  # unet, residual, attention, unet++, unet3+, or a pretrained encoder's name
    )
    image_size: int = 128  # pixels, height and width
    channels: int = 1  # 1 grey, 3 colour
    classes: int = 1  # output channels
    filters: int = 8  # of the first level
    depth: int = 4  # halvings
    picture: str = "img/u-net-architecture.png"  # where the drawing goes


def main(config: Config) -> None:
    """Print the summary and draw the picture."""

    shape = (config.image_size, config.image_size, config.channels)
    model = build_unet(
        shape, config.classes, config.filters, config.depth, architecture=config.architecture
    )
    model.summary()
    if config.architecture == "unet":
        figures.draw_network(model, Path(config.picture))
        print(config.picture)


if __name__ == "__main__":
    utils.run_script(main, Config)
