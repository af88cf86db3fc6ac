"""The networks: U-Net (Ronneberger et al. 2015, arXiv 1505.04597, section 2) and its successors.

    python model.py [--architecture unet] [--image-size 128] [--filters 8] [--depth 4]

prints a network layer by layer. With 64 filters, depth 4 and 512x512 pixels the plain U-Net is the
paper's network (31 million parameters), with same padding and normalization.

Every network is an encoder and a decoder. The encoder gives one feature map per level, each half
the size of the one before. The decoder joins them again, the coarsest first. The names of the
decoder's layers start with "decoder"; the last layer is "probabilities".

Images (N, H, W, C) and volumes (N, D, H, W, C) share the code. The comments on shapes are for
images. Volumes with thick slices are halved within the slices first (nnU-Net, Isensee et al. 2021).

To add an architecture, write a function (input, settings) → feature map and name it in
ARCHITECTURES. A network of one's own stays in a file of one's own: `build_own`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import utils

if __name__ == "__main__":
    utils.load_keras()

import keras
from keras import KerasTensor, layers

from networks import efficientnet_lite
from networks.levels import Level, plan_levels
from networks.own import build_own, is_own, last_activation
from utils import UserError, check_size

NORMALIZATIONS = ("batch", "group", "instance", "none")


class Settings(NamedTuple):
    """What an architecture is built with."""

    levels: tuple[Level, ...]  # the finest first; its last stride is not used
    normalization: str  # one of NORMALIZATIONS
    encoder_weights: str = "none"  # of a pretrained encoder: imagenet, a weights file, or none


# ----------------------------------------------------------------------------------------- blocks


def spatial(kind: str, x: KerasTensor) -> type[keras.Layer]:
    """Return Keras's layer of a kind for images or volumes: Conv2D or Conv3D for "Conv"."""
    return getattr(layers, f"{kind}{len(x.shape) - 2}D")


def normalize(x: KerasTensor, kind: str, name: str) -> KerasTensor:
    """Normalize (N, H, W, C) over the batch, over groups of channels or over each channel."""
    if kind == "none":
        return x
    if kind == "batch":
        return layers.BatchNormalization(momentum=0.9, name=name)(x)
    channels = x.shape[-1]
    # GroupNorm: at most 8 groups, at least 4 channels each.
    max_groups = channels if kind == "instance" else min(8, max(1, channels // 4))
    groups = max(count for count in range(1, max_groups + 1) if channels % count == 0)
    return layers.GroupNormalization(groups, name=name)(x)


def convolve(
    x: KerasTensor, settings: Settings, level: Level, name: str, number: int
) -> KerasTensor:
    """Convolve and normalize: (N, H, W, C) → (N, H, W, F)."""
    x = spatial("Conv", x)(
        level.filters,
        level.kernel,
        padding="same",
        use_bias=settings.normalization == "none",  # a normalization has a bias of its own
        kernel_initializer="he_normal",
        name=f"{name}_conv{number}",
    )(x)
    return normalize(x, settings.normalization, f"{name}_norm{number}")


def conv_block(x: KerasTensor, settings: Settings, level: Level, name: str) -> KerasTensor:
    """Apply twice: 3x3 convolution, normalization, ReLU. (N, H, W, C) → (N, H, W, F)."""
    for number in (1, 2):
        x = convolve(x, settings, level, name, number)
        x = layers.Activation("relu", name=f"{name}_relu{number}")(x)
    return x


def residual_block(x: KerasTensor, settings: Settings, level: Level, name: str) -> KerasTensor:
    """Like `conv_block`, with a shortcut around both convolutions (He et al. 2016, figure 2)."""
    shortcut = x
    if x.shape[-1] != level.filters:
        pointwise = level._replace(kernel=(1,) * len(level.kernel))
        shortcut = convolve(x, settings, pointwise, name, 0)
    x = convolve(x, settings, level, name, 1)
    x = layers.Activation("relu", name=f"{name}_relu1")(x)
    x = convolve(x, settings, level, name, 2)
    x = layers.Add(name=f"{name}_add")([x, shortcut])
    return layers.Activation("relu", name=f"{name}_relu2")(x)


def upsample(x: KerasTensor, level: Level, name: str) -> KerasTensor:
    """Go up to `level` by a learned 2x2 up-convolution: (N, H, W, C) → (N, 2H, 2W, F)."""
    layer = layers.Conv2DTranspose if len(x.shape) == 4 else layers.Conv3DTranspose
    return layer(level.filters, level.stride, strides=level.stride, name=f"{name}_up")(x)


Block = Callable[[KerasTensor, Settings, Level, str], KerasTensor]


# --------------------------------------------------------------------------------------- encoders


def encode(x: KerasTensor, settings: Settings, block: Block) -> list[KerasTensor]:
    """Run the contracting path: a feature map per level, the finest first."""
    features = []
    *upper, lowest = settings.levels
    for number, level in enumerate(upper):  # F is the filters of the first level
        name = f"encoder{number}"
        x = block(x, settings, level, name)  # (N, H/2^l, W/2^l, 2^l F)
        features.append(x)
        x = spatial("MaxPooling", x)(level.stride, name=f"{name}_pool")(x)  # half the size
    x = block(x, settings, lowest, "bottleneck")  # (N, H/2^d, W/2^d, 2^d F)
    return [*features, x]


@dataclass(frozen=True)
class Backbone:
    """An encoder, built as those of keras.applications, and how it wants its pixels."""

    build: Callable[..., keras.Model]
    scale: float  # applied to pixels in [0, 1]
    offset: float


BACKBONES = {
    "efficientnetv2b0": Backbone(keras.applications.EfficientNetV2B0, 255.0, 0.0),
    "efficientnetlite0": Backbone(efficientnet_lite.build, 255 / 128, -127 / 128),
    "mobilenetv3": Backbone(keras.applications.MobileNetV3Large, 255.0, 0.0),
    "resnet50v2": Backbone(keras.applications.ResNet50V2, 2.0, -1.0),
}


def encode_pretrained(
    x: KerasTensor, backbone: Backbone, weights: str, halvings: int
) -> list[KerasTensor]:
    """Run an ImageNet classifier's layers: the last feature map of each size, H/2, H/4, …

    A grey image is repeated as three colours; for the first convolution this is the same as the
    sum of its three kernels. Raises UserError if the weights cannot be had.
    """
    height, width = x.shape[1:3]
    if x.shape[-1] == 1:
        x = layers.Concatenate(name="grey_to_colour")([x, x, x])  # (N, H, W, 3)
    x = layers.Rescaling(backbone.scale, backbone.offset, name="pixel_range")(x)
    named = None if weights == "none" else weights
    try:
        network = backbone.build(include_top=False, weights=named, input_tensor=x)
    except Exception as error:  # Keras raises this very class when a download fails
        if weights == "none":
            raise
        raise UserError(
            f"encoder weights {weights!r} cannot be loaded ({error}); expected imagenet (needs the "
            "internet once) or a weights file that Keras wrote for this encoder"
        ) from error
    clone = keras.models.clone_model(
        network, input_tensors=network.inputs, call_function=call_as_layer
    )
    clone.set_weights(network.get_weights())
    last_of_size = {layer.output.shape[1:3]: layer.output for layer in clone.layers}
    levels = range(1, halvings + 1)
    return [last_of_size[height // 2**level, width // 2**level] for level in levels]


def call_as_layer(step: keras.Operation, *args: Any, **kwargs: Any) -> Any:
    """Call a step of a network; `x + number` and `x * number` (MobileNetV3) become a layer.

    An HDF5 file names a step by its class alone, and Keras then mistakes the operation Add for
    the layer Add.
    """
    if isinstance(step, keras.Layer):
        return step(*args, **kwargs)
    x, number = args
    if type(step).__name__ == "Add":
        return layers.Rescaling(1.0, offset=number)(x)
    if type(step).__name__ == "Multiply":
        return layers.Rescaling(number)(x)
    raise ValueError(f"{type(step).__name__} is not a layer; HDF5 cannot store it")


# --------------------------------------------------------------------------------------- decoders


def decode(features: list[KerasTensor], settings: Settings, block: Block) -> KerasTensor:
    """Run the expanding path: up-convolution, skip connection, block; the finest map is left."""
    x = features[-1]
    for number in reversed(range(len(features) - 1)):
        name, level, skip = f"decoder{number}", settings.levels[number], features[number]
        x = upsample(x, level, name)  # (N, H/2^l, W/2^l, 2^l F)
        x = layers.Concatenate(name=f"{name}_skip")([skip, x])  # (N, H/2^l, W/2^l, 2^(l+1) F)
        x = block(x, settings, level, name)  # (N, H/2^l, W/2^l, 2^l F)
    return x


def decode_nested(features: list[KerasTensor], settings: Settings, block: Block) -> KerasTensor:
    """Decode every level at every step, from all its earlier maps (Zhou et al. 2018, figure 1)."""
    maps = [[x] for x in features]  # maps[level][step]
    for step in range(1, len(features)):
        for number in range(len(features) - step):
            name, level = f"decoder{number}_{step}", settings.levels[number]
            below = upsample(maps[number + 1][step - 1], level, name)
            joined = layers.Concatenate(name=f"{name}_skip")([*maps[number], below])
            maps[number].append(block(joined, settings, level, name))
    return maps[0][-1]


# ---------------------------------------------------------------------------------- architectures


def plain_unet(x: KerasTensor, settings: Settings) -> KerasTensor:
    """U-Net: images (N, H, W, C) → feature map (N, H, W, F)."""
    return decode(encode(x, settings, conv_block), settings, conv_block)


def residual_unet(x: KerasTensor, settings: Settings) -> KerasTensor:
    """U-Net of residual blocks."""
    return decode(encode(x, settings, residual_block), settings, residual_block)


def nested_unet(x: KerasTensor, settings: Settings) -> KerasTensor:
    """U-Net++."""
    return decode_nested(encode(x, settings, conv_block), settings, conv_block)


def pretrained_unet(x: KerasTensor, settings: Settings, backbone: Backbone) -> KerasTensor:
    """U-Net with an encoder of keras.applications; a block adds the level that it lacks."""
    finest = conv_block(x, settings, settings.levels[0], "decoder_input")
    halvings = len(settings.levels) - 1
    features = [finest, *encode_pretrained(x, backbone, settings.encoder_weights, halvings)]
    return decode(features, settings, conv_block)


ARCHITECTURES: dict[str, Callable[[KerasTensor, Settings], KerasTensor]] = {
    "unet": plain_unet,
    "residual": residual_unet,
    "unet++": nested_unet,
    **{name: partial(pretrained_unet, backbone=one) for name, one in BACKBONES.items()},
}


def build_unet(
    input_shape: tuple[int | None, ...],
    classes: int = 1,
    filters: int = 8,
    depth: int = 4,
    *,
    architecture: str = "unet",
    normalization: str = "batch",
    encoder_weights: str = "none",
    overlap: bool = False,
    spacing: Sequence[float] | None = None,
) -> keras.Model:
    """Build a network: images (N, H, W, C) in [0, 1] → probabilities (N, H, W, classes), float32.

    input_shape: (H, W, C), or (D, H, W, C) for volumes; H and W are multiples of 2**depth, or None
        for any such size.
    classes: output channels; 1 ends in a sigmoid, more end in a softmax whose first channel is
        the background.
    overlap: whether the classes may overlap: each of them ends in a sigmoid, without background.
    filters: channels of the first level, doubled at each of the `depth` halvings.
    depth: of a pretrained encoder at most 5; what lies below is left out.
    architecture: a name in ARCHITECTURES, or file.py:function or package.module:function for a
        network of one's own, which chooses its own filters, depth and normalization.
    encoder_weights: of a pretrained encoder: imagenet (downloaded once), a weights file, or none.
    spacing: mm along D, H and W of a volume; by default they are alike.

    Raises UserError (a ValueError) for an unknown name, a size that cannot be halved so often, or
    a network of one's own that does not fit.
    """
    activation = last_activation(classes, overlap)
    if is_own(architecture):
        return build_own(architecture, input_shape, classes, activation)
    check_names(architecture, normalization, encoder_weights)
    if architecture in BACKBONES and len(input_shape) != 3:
        raise UserError(
            f"architecture {architecture} has an encoder for images, and the data are volumes; "
            "expected unet, residual or unet++, or --dimensions 2"
        )
    check_size(input_shape[:-1], depth, pretrained=architecture in BACKBONES)
    inputs = keras.Input(input_shape, name="image")  # (N, H, W, C)
    levels = plan_levels(input_shape[:-1], filters, depth, spacing)
    settings = Settings(levels, normalization, encoder_weights)
    features = ARCHITECTURES[architecture](inputs, settings)  # (N, H, W, F)
    outputs = spatial("Conv", features)(
        classes,
        1,
        activation=activation,
        dtype="float32",  # also where the layers before compute in bfloat16
        name="probabilities",
    )(features)
    return keras.Model(inputs, outputs, name=architecture.replace("+", "p"))


def check_names(architecture: str, normalization: str, encoder_weights: str = "none") -> None:
    """Raise UserError for a name that `build_unet` does not know."""
    if architecture not in ARCHITECTURES:
        expected = ", ".join(ARCHITECTURES)
        raise UserError(
            f"architecture is {architecture!r}; expected one of {expected}, or your own as "
            "file.py:function"
        )
    if normalization not in NORMALIZATIONS:
        expected = ", ".join(NORMALIZATIONS)
        raise UserError(f"normalization is {normalization!r}; expected one of {expected}")
    if encoder_weights != "none" and architecture not in BACKBONES:
        raise UserError(
            f"architecture {architecture} has no pretrained encoder, so {encoder_weights!r} does "
            f"not fit; expected one of {', '.join(BACKBONES)}"
        )


@dataclass(frozen=True)
class Config:
    """Which network to print."""

    architecture: str = "unet"  # unet, residual, unet++, or a pretrained encoder
    image_size: int | str = 128  # pixels; or height and width: 192,256
    channels: int = 1  # 1 grey, 3 colour
    classes: int = 1  # output channels
    filters: int = 8  # of the first level
    depth: int = 4  # halvings


def main(config: Config) -> None:
    """Print the network layer by layer."""
    shape = (*utils.parse_size(config.image_size), config.channels)
    model = build_unet(
        shape, config.classes, config.filters, config.depth, architecture=config.architecture
    )
    model.summary()


if __name__ == "__main__":
    utils.run_script(main, Config)
