"""A model adapted to other images without masks."""

import keras
import numpy as np
import pytest

import predict
import utils
from imaging import formats, pictures
from inference import adapt
from inference.inputs import list_inputs
from inference.problems import Problems
from utils import UserError

RNG = np.random.default_rng(0)


def save_network(path, normalization=True):
    """Bright is inside, after batch normalization: mean 0.38 and variance 0.01 at home."""
    inputs = keras.Input((16, 16, 1))
    x = keras.layers.BatchNormalization(name="norm")(inputs) if normalization else inputs
    outputs = keras.layers.Conv2D(1, 1, activation="sigmoid", name="probabilities")(x)
    model = keras.Model(inputs, outputs)
    if normalization:
        model.get_layer("norm").set_weights(np.array([[1], [0], [0.38], [0.01]]))
    model.get_layer("probabilities").set_weights([np.full((1, 1, 1, 1), 9.0), np.zeros(1)])
    utils.save_model(model, path, utils.make_metadata(["x"], (16, 16), 1, window="127.5,255"))
    return path


def write_images(folder, count=20):
    """Write images whose left half is brighter."""
    for number in range(count):
        image = RNG.integers(105, 116, (16, 16), dtype=np.uint8)
        image[:, :8] += 100
        pictures.write_picture(folder / f"{number}.png", image)
    return folder


def run(folder, model, output=""):
    predict.main(predict.Config(str(model), adapt=str(folder), output=str(output)))


def adapted(tmp_path):
    path = save_network(tmp_path / "model.h5")
    run(write_images(tmp_path / "in"), path)
    return utils.load_model(tmp_path / "adapted.h5")


def test_the_statistics_go_halfway_to_those_of_the_images(tmp_path, capsys):
    model, metadata = adapted(tmp_path)
    windows, count = adapt.read_windows(list_inputs(tmp_path / "in").items, metadata, Problems())
    mean, variance = model.get_layer("norm").get_weights()[2:]
    assert count == 20 and mean == pytest.approx((0.38 + windows.mean() / 255) / 2, abs=1e-3)
    assert variance == pytest.approx((0.01 + windows.var() / 255**2) / 2, rel=0.02)
    assert metadata["adapted_to"] == {"images": 20, "folder": "in"}
    assert "validation images of its run are not here" in capsys.readouterr().out


def test_networks_in_networks_are_adapted_and_frozen_layers_are_not():
    inner = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.BatchNormalization()])
    frozen = keras.layers.BatchNormalization(trainable=False)
    inputs = keras.Input((4, 4, 1))
    model = keras.Model(inputs, frozen(inner(inputs)))
    assert adapt.set_statistics(model, iter([np.ones((2, 4, 4, 1), np.float32)])) == 1
    assert inner.layers[0].moving_mean.numpy() == pytest.approx(0.5)
    assert frozen.moving_mean.numpy() == 0


def test_masks_follow(tmp_path):
    """At home the whole image is bright; adapted, its left half is."""
    adapted(tmp_path)
    masks = {}
    for name in ("model", "adapted"):
        model, source, output = (str(tmp_path / one) for one in (f"{name}.h5", "in", name))
        predict.main(predict.Config(model, source, output, panels=False))
        masks[name] = formats.read_mask(tmp_path / name / "3.png") > 0
    assert masks["model"].all()
    assert masks["adapted"][:, :8].all() and not masks["adapted"][:, 8:].any()


def test_mistakes_get_a_line(tmp_path):
    path = save_network(tmp_path / "model.h5")
    few = write_images(tmp_path / "few", 15)
    (few / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"15 usable images; expected at least 16[^$]*broken.png"):
        run(few, path)
    with pytest.raises(UserError, match="name another --output"):
        run(few, path, path)
    with pytest.raises(UserError, match="adapt its .h5 file"):
        run(few, "files/lungs/unet.onnx")
    plain = save_network(tmp_path / "plain.h5", normalization=False)
    with pytest.raises(UserError, match="no batch normalization"):
        run(write_images(tmp_path / "in"), plain)
    assert not (tmp_path / "adapted.h5").exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(0.9, 0.8979, "warning"), (0.9, 0.8981, "Dice"), (None, 0.9, "note")],
)
def test_a_loss_on_validation_images_is_told(before, after, said):
    assert adapt.describe_change(before, after).startswith(said)
