"""All classes of a model can be shown as one."""

import keras
import numpy as np
import pytest

import predict
import utils
from dataset.pairs import Pair
from imaging import formats, pictures
from imaging.labels import Classes
from inference.merging import Merged, merge_metadata, merge_probs
from utils import UserError

RNG = np.random.default_rng(0)
SIDES = ["left lung", "right lung"]
BOTH = Classes(",".join(SIDES))


def test_probabilities_of_any_class():
    probs = RNG.random((2, 4, 5, 3), np.float32)
    probs /= probs.sum(-1, keepdims=True)
    merged = merge_probs(probs, Classes("a,b"))
    np.testing.assert_allclose(merged[..., 0], probs[..., 1:].sum(-1), rtol=1e-5)
    spread = np.concatenate([probs, np.full((2, 4, 5, 1), 0.25, np.float32)], -1)
    np.testing.assert_array_equal(merge_probs(spread, Classes("a,b"))[..., 1], 0.25)
    overlapping = merge_probs(probs[..., :2], Classes("a,b", overlap=True))
    np.testing.assert_array_equal(overlapping[..., 0], probs[..., :2].max(-1))
    np.testing.assert_array_equal(merge_probs(probs[..., :1], Classes("a")), probs[..., :1])


def test_metadata_of_one_class():
    metadata = {"classes": SIDES, "threshold": 0.5, "clean": [1, 2], "channels": 1}
    merged = merge_metadata(metadata, "lungs")
    assert merged["classes"] == ["lungs"] and merged["clean"] == [3]
    assert Classes.from_metadata(merged) == Classes("lungs") and merged["channels"] == 1
    with pytest.raises(UserError, match="expected one name"):
        merge_metadata(metadata, "a,b")


def save_sides(path):
    """Left is dark, right is bright, background grey."""
    inputs = keras.Input((16, 16, 1))
    logits = keras.layers.Conv2D(3, 1, name="logits")(inputs)
    model = keras.Model(inputs, keras.layers.Softmax(name="probabilities")(logits))
    model.get_layer("logits").set_weights(
        [np.array([[[[0, -40, 40]]]], np.float32), np.array([0, 10, -30], np.float32)]
    )
    utils.save_model(model, path, utils.make_metadata(SIDES, (16, 16), 1, window="127.5,255"))
    return str(path)


@pytest.fixture
def image(tmp_path):
    picture = np.full((16, 16), 127, np.uint8)
    picture[2:6, 2:6], picture[8:12, 8:14] = 0, 255
    pictures.write_picture(tmp_path / "in" / "images" / "x.png", picture)
    pictures.write_picture(tmp_path / "in" / "masks" / "x.png", np.uint8(255 * (picture != 127)))
    return picture


def test_masks_of_one_class_or_two(tmp_path, image):
    model = save_sides(tmp_path / "sides.h5")
    found = {}
    for name, merge in (("two", ""), ("one", "lungs")):
        config = predict.Config(model, str(tmp_path / "in" / "images"), str(tmp_path / name))
        predict.main(predict.replace(config, merge=merge, panels=False))
        found[name] = formats.read_mask(tmp_path / name / "x.png")
    assert np.unique(found["two"]).tolist() == [0, 1, 2]
    assert np.array_equal(found["one"], 255 * (image != 127))
    assert np.array_equal(found["two"] > 0, image != 127)


def test_masks_of_one_class_are_scored_with_a_model_of_two(tmp_path, image, capsys):
    model = save_sides(tmp_path / "sides.h5")
    output = tmp_path / "scores"
    predict.main(predict.Config(model, data_dir=str(tmp_path / "in"), output=str(output)))
    printed = capsys.readouterr().out
    assert "the masks have one class" in printed and "as one, lung" in printed
    assert "dice                       1.0000" in printed


def test_what_the_masks_have_decides(tmp_path):
    sides = np.zeros((16, 16), np.uint8)
    sides[2:6, 2:6], sides[8:12, 8:14] = 1, 2
    pictures.write_picture(tmp_path / "image.png", sides)
    for name, mask in (("two", sides), ("one", 255 * (sides > 0)), ("other", 9 * sides)):
        pictures.write_picture(tmp_path / f"{name}.png", np.uint8(mask))
    pairs = {
        name: [Pair(tmp_path / "image.png", (tmp_path / f"{name}.png",))]
        for name in ("two", "one", "other")
    }
    assert predict.name_of_all(BOTH, pairs["two"]) == ""
    assert predict.name_of_all(BOTH, pairs["one"]) == "lung"
    assert predict.name_of_all(Classes("a,b"), pairs["one"]) == "foreground"
    assert predict.name_of_all(Classes("lung"), pairs["one"]) == ""
    assert predict.name_of_all(BOTH, [*pairs["one"], *pairs["two"]]) == ""
    assert predict.name_of_all(BOTH, pairs["other"]) == ""


def test_a_merged_network_is_still_what_it_was():
    class Network:
        engine = "test"

        def predict_on_batch(self, images):
            return np.full((*images.shape[:3], 3), 1 / 3)

    merged = Merged(Network(), Classes("a,b"))
    assert merged.engine == "test"
    assert merged.predict_on_batch(np.zeros((1, 2, 2, 1))).shape == (1, 2, 2, 1)
