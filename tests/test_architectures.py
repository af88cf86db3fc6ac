"""Every architecture trains, is saved, is read without our code and predicts the same."""

import functools
import http.server
import threading

import h5py
import keras
import numpy as np
import pytest

import metrics
import utils
from model import ARCHITECTURES, BACKBONES, NORMALIZATIONS, build_unet, normalize
from utils import UserError

SHAPE = (64, 64, 1)


def batch(classes=1, shape=SHAPE):
    rng = np.random.default_rng(0)
    x = rng.random((2, *shape), np.float32)
    y = (x > 0.5).astype(np.float32)
    return x, y if classes == 1 else np.concatenate([1 - y, y], axis=-1)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(BACKBONES)))
def test_it_trains_is_saved_and_predicts_the_same(name, tmp_path):
    check_architecture(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_a_pretrained_encoder_trains_is_saved_and_predicts_the_same(name, tmp_path):
    check_architecture(name, tmp_path)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(BACKBONES)))
def test_for_volumes_it_trains_is_saved_and_predicts_the_same(name, tmp_path):
    """Thick slices: the kernels and poolings of the first level stay within a slice."""
    check_architecture(name, tmp_path, shape=(6, 16, 24, 1), depth=2, spacing=(3, 1, 1))


def check_architecture(name, tmp_path, shape=SHAPE, depth=3, spacing=None):
    network = build_unet(shape, 2, filters=2, depth=depth, architecture=name, spacing=spacing)
    network.compile(keras.optimizers.AdamW(1e-3), metrics.bce_dice_loss, run_eagerly=True)
    x, y = batch(2, shape)
    before = [weight.numpy() for weight in network.trainable_weights]
    assert np.isfinite(network.train_on_batch(x, y))
    moved = [
        not np.array_equal(old, now)
        for old, now in zip(before, network.trainable_weights, strict=True)
    ]
    assert np.mean(moved) > 0.9  # a ReLU of these few channels may be dead
    utils.save_model(network, tmp_path / "model.h5", utils.make_metadata(["x"], shape[-3:-1], 1))
    loaded = keras.models.load_model(tmp_path / "model.h5", compile=False)
    assert loaded.output.shape == (None, *shape[:-1], 2)
    np.testing.assert_allclose(loaded(x), network(x), atol=1e-5)


@pytest.mark.parametrize("change", [{"normalization": kind} for kind in NORMALIZATIONS])
def test_blocks_can_be_varied(change, tmp_path):
    network = build_unet(SHAPE, filters=4, depth=2, architecture="residual", **change)
    probs = np.asarray(network(batch()[0]))
    assert probs.shape == (2, 64, 64, 1) and np.isfinite(probs).all()
    kinds = {type(layer).__name__ for layer in network.layers}
    assert ("BatchNormalization" in kinds) == (change.get("normalization", "batch") == "batch")


def test_instance_normalization_forgets_each_channels_brightness():
    x = keras.Input((8, 8, 3))
    layer = keras.Model(x, normalize(x, "instance", "n"))
    image = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(layer(image), layer(image * (1, 5, 9) + (0, 2, 7)), atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vnet"}, "architecture is 'vnet'; expected one of unet, residual"),
        (
            {"normalization": "layer"},
            "normalization is 'layer'; expected one of batch, group, instance, none",
        ),
        (
            {"encoder_weights": "imagenet"},
            "unet has no pretrained encoder, .*; expected one of efficientnetv2b0, efficient",
        ),
    ],
)
def test_unknown_names_are_clear_errors(change, message):
    with pytest.raises(UserError, match=message):
        build_unet(SHAPE, **change)


def test_a_pretrained_encoder_is_for_images():
    with pytest.raises(UserError, match="resnet50v2 has an encoder for images, and the data are"):
        build_unet((16, 64, 64, 1), architecture="resnet50v2")


@pytest.mark.parametrize(
    ("side", "depth", "message"),
    [
        (
            72,
            4,
            "image size 72 is not a multiple of 16 .*, as a pretrained .* needs; take 64",
        ),
        (32, 5, "image size 32 is not a multiple of 32 .* and at least 64, .*; take 64"),
        (64, 6, "depth is 6; a pretrained encoder halves the image 5 times at most"),
    ],
)
def test_a_pretrained_encoder_needs_sides_it_can_halve(side, depth, message):
    with pytest.raises(UserError, match=message):
        build_unet((side, side, 1), depth=depth, architecture="mobilenetv3")


@pytest.mark.parametrize("depth", [3, 5])
def test_a_pretrained_encoder_is_left_out_below_the_depth(depth):
    network = build_unet((96, 64, 1), depth=depth, architecture="efficientnetlite0")
    assert network.get_layer(f"decoder{depth - 1}_up").input.shape[1:3] == (
        96 // 2**depth,
        64 // 2**depth,
    )


def test_an_encoders_weights_come_from_a_file(tmp_path):
    donor = BACKBONES["mobilenetv3"].build(include_top=False, weights=None, input_shape=(64, 64, 3))
    donor.save_weights(tmp_path / "encoder.weights.h5")
    network = build_unet(
        SHAPE,
        filters=2,
        depth=5,
        architecture="mobilenetv3",
        encoder_weights=str(tmp_path / "encoder.weights.h5"),
    )
    for layer in donor.layers:
        if layer.weights:
            for one, other in zip(
                layer.get_weights(), network.get_layer(layer.name).get_weights(), strict=True
            ):
                np.testing.assert_array_equal(one, other)


def test_grey_is_colour_thrice():
    """The grey network sees what the colour network sees in the same image, repeated."""
    grey = build_unet(SHAPE, filters=2, architecture="resnet50v2")
    colour = build_unet((64, 64, 3), filters=2, architecture="resnet50v2")
    level = "conv3_block4_1_relu"
    grey_to_level = keras.Model(grey.inputs, grey.get_layer(level).output)
    colour_to_level = keras.Model(colour.inputs, colour.get_layer(level).output)
    for one, other in zip(grey_to_level.layers[2:], colour_to_level.layers[1:], strict=True):
        other.set_weights(one.get_weights())
    x = batch()[0]
    np.testing.assert_allclose(
        grey_to_level([x]), colour_to_level([np.repeat(x, 3, -1)]), atol=1e-4
    )


@pytest.fixture
def server(tmp_path):
    """A web server on loopback that offers tmp_path/served; the address and the list of what was
    asked for.
    """
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "served")
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", asked
        httpd.shutdown()


def test_imagenet_weights_are_downloaded_once(server, tmp_path, monkeypatch):
    """Keras's own download, its address turned to a server on this machine."""
    from keras.src.applications import mobilenet_v3
    from keras.src.legacy.saving import legacy_h5_format
    from keras.src.utils import file_utils

    address, asked = server
    donor = BACKBONES["mobilenetv3"].build(include_top=False, weights=None, input_shape=(64, 64, 3))
    name = "weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5"
    with h5py.File(tmp_path / "served" / name, "w") as file:  # the format of the published files
        legacy_h5_format.save_weights_to_hdf5_group(file, donor)
    digest = file_utils.hash_file(tmp_path / "served" / name, algorithm="md5")
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(tmp_path / "home"))
    monkeypatch.setattr(mobilenet_v3, "BASE_WEIGHT_PATH", address)
    monkeypatch.setitem(mobilenet_v3.WEIGHTS_HASHES, "large_224_1.0_float", ("", digest))
    for _ in range(2):
        network = build_unet(
            SHAPE, filters=2, architecture="mobilenetv3", encoder_weights="imagenet"
        )
        some = next(layer for layer in donor.layers if layer.weights)
        np.testing.assert_array_equal(
            some.get_weights()[0], network.get_layer(some.name).get_weights()[0]
        )
    assert len(asked) == 1


def test_no_internet_is_a_clear_error(tmp_path, monkeypatch):
    from keras.src.applications import mobilenet_v3
    from keras.src.utils import file_utils

    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(tmp_path / "home"))
    monkeypatch.setattr(mobilenet_v3, "BASE_WEIGHT_PATH", "http://127.0.0.1:9/")
    with pytest.raises(
        UserError, match="encoder weights 'imagenet' cannot be loaded .* or a weights file"
    ):
        build_unet(SHAPE, architecture="mobilenetv3", encoder_weights="imagenet")
    with pytest.raises(UserError, match=r"encoder weights 'nowhere.h5' cannot be loaded"):
        build_unet(SHAPE, architecture="mobilenetv3", encoder_weights="nowhere.h5")


def test_weights_are_copied_as_far_as_they_fit(tmp_path, capsys):
    source = build_unet(SHAPE, 1, filters=2, depth=2)
    utils.save_model(source, tmp_path / "model.h5", utils.make_metadata(["x"], SHAPE[:2], 1))
    target = build_unet((32, 32, 3), 3, filters=2, depth=2)
    utils.copy_weights(tmp_path / "model.h5", target)
    said = capsys.readouterr().out
    assert "new: encoder0_conv1, probabilities" in said
    for layer in target.layers:
        if layer.weights and layer.name not in ("encoder0_conv1", "probabilities"):
            for one, other in zip(
                layer.get_weights(), source.get_layer(layer.name).get_weights(), strict=True
            ):
                np.testing.assert_array_equal(one, other)


def test_weights_of_quite_another_network_are_refused(tmp_path):
    """Other filters; or volumes, whose normalizations alone would fit."""
    utils.save_model(
        build_unet(SHAPE, filters=2, depth=2),
        tmp_path / "model.h5",
        utils.make_metadata(["x"], SHAPE[:2], 1),
    )
    for other in (
        build_unet(SHAPE, filters=3, depth=2),
        build_unet((8, *SHAPE), filters=2, depth=2),
    ):
        with pytest.raises(UserError, match="none of its weights fit"):
            utils.copy_weights(tmp_path / "model.h5", other)
