"""--ignore: pixels that count neither in the loss nor in any metric."""

import cv2
import keras
import numpy as np
import pytest
from conftest import masks_of

import data
import metrics
from dataset import loading
from dataset.batches import Batches
from dataset.loading import Preprocessing
from imaging.labels import Classes
from imaging.masks.encodings import decode
from imaging.scan import Scan
from inference.sampler import Sampler
from metrics import LOSSES, TRAINING_METRICS

FUNCTIONS = {**LOSSES, **{one.__name__: one for one in TRAINING_METRICS}}
rng = np.random.default_rng(0)


def one_hot(ids, channels):
    return np.eye(channels, dtype=np.float32)[ids]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_ignored_pixels_are_as_if_cut_off(name, channels):
    """The right half is ignored: what is predicted there makes no difference."""
    ids = rng.integers(0, max(2, channels), (2, 16, 16))
    truth = one_hot(ids, channels) if channels > 1 else ids[..., None].astype(np.float32)
    probs = rng.dirichlet(np.ones(max(2, channels)), (2, 16, 16)).astype(np.float32)[..., :channels]
    ignored = np.zeros((2, 16, 16, 1), np.float32)
    ignored[:, :, 8:] = 1
    function = FUNCTIONS[name]
    whole = np.asarray(function(np.concatenate([truth, ignored], -1), probs))
    half = np.asarray(function(truth[:, :, :8], probs[:, :, :8]))
    np.testing.assert_allclose(whole, half, rtol=1e-5)
    none = np.asarray(function(np.concatenate([truth, 0 * ignored], -1), probs))
    np.testing.assert_allclose(none, np.asarray(function(truth, probs)), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_of_which_nothing_counts(name):
    truth = np.zeros((1, 8, 8, 2), np.float32)
    truth[..., 1] = 1
    value = np.asarray(LOSSES[name](truth, np.full((1, 8, 8, 1), 0.3, np.float32)))
    np.testing.assert_allclose(value, 0, atol=1e-6)


def test_scores_leave_them_out():
    truth, found = np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 8), np.uint8)
    truth[0, :4], found[0, :4] = 1, 1
    found[0, 4:, 6:] = 1
    ignored = np.zeros((1, 8, 8), bool)
    ignored[0, :, 6:] = True
    assert metrics.score_classes(truth, found, ["x"])["dice"] == pytest.approx(64 / 72)
    assert metrics.score_classes(truth, found, ["x"], ignored=ignored)["dice"] == 1


def test_ignored_values_are_no_class():
    ids = np.zeros((1, 20, 20, 1), np.uint8)
    ids[0, :5], ids[0, 5:8], ids[0, 15:] = 1, 2, 255
    found = decode(Scan(ids), Classes("a,b", "255"))
    assert (found.ignored == (ids[..., 0] == 255)).all()
    assert [int(found.planes[i].sum()) for i in (1, 2)] == [100, 60]
    ids[0, 10] = 254
    found = decode(Scan(ids), Classes("a,b", "254|255"))
    assert found.ignored.sum() == 120
    colours = np.zeros((1, 20, 20, 3), np.uint8)
    colours[0, :5], colours[0, 15:] = (255, 0, 0), (255, 255, 255)
    found = decode(Scan(colours), Classes("a=#ff0000", "#ffffff"))
    assert found.ignored.sum() == found.planes[1].sum() == 100


@pytest.fixture
def discs_with_border(discs):
    """Discs of 1, the lower quarter of each mask is 255."""
    for path in (discs / "masks").iterdir():
        mask = (cv2.imread(str(path), 0) > 0).astype(np.uint8)
        mask[-len(mask) // 4 :] = 255
        cv2.imwrite(str(path), mask)
    return discs


@pytest.mark.parametrize("strength", ["", "mild"])
def test_targets_hold_what_does_not_count(discs_with_border, strength):
    pairs, _ = data.find_pairs(discs_with_border)
    classes = Classes("disc", "255")
    dataset, problems = loading.load_pairs(pairs, Preprocessing(classes, Sampler((32, 32))))
    assert not problems and masks_of(dataset).shape == (12, 32, 32, 2)
    truth, ignored = dataset.cases[0].truth(dataset.classes)
    assert truth.max() == 1 and not (truth.astype(bool) & ignored).any()
    _, targets = Batches(dataset, dataset.cover(np.arange(12)), 12, strength)[0]
    assert targets.shape == (12, 32, 32, 2)
    assert (targets.sum(-1) <= 1.01).all() and 0.1 < targets[..., 1].mean() < 0.3


@pytest.mark.slow
def test_a_training_does_not_learn_them(discs_with_border, tmp_path):
    import train

    config = train.Config(
        data_dir=str(discs_with_border),
        out_dir=str(tmp_path / "run"),
        classes="disc",
        ignore="255",
        image_size=32,
        filters=4,
        depth=2,
        epochs=2,
        epoch_images=8,
    )
    log = train.train(config)
    assert np.isfinite(log.val_dice).all()
    model = keras.models.load_model(tmp_path / "run" / "model.h5", compile=False)
    assert model.output_shape[-1] == 1
