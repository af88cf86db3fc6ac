import re

import keras
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

import metrics
from utils import UserError

TRUTH = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]], np.float32)[
    ..., None
]
PROBS = np.array(
    [[[0.9, 0.2, 0.7, 0.1]], [[0.1, 0.0, 0.2, 0.3]], [[0.9, 0, 0, 0]], [[0, 0, 0, 0]]], np.float32
)[..., None]
EXPECTED = {
    "dice": [1 / 2, 1, 0, 0],
    "iou": [1 / 3, 1, 0, 0],
    "precision": [1 / 2, 1, 0, 0],
    "recall": [1 / 2, 1, 0, 0],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_training_metrics_on_literal_arrays(name):
    """One hit, one miss, one false alarm; both empty; truth empty; prediction empty."""
    values = np.asarray(getattr(metrics, name)(TRUTH, PROBS))
    np.testing.assert_allclose(values, EXPECTED[name], atol=1e-6)


def test_several_channels_leave_the_background_out():
    ids, found = np.array([[[0, 1, 1, 2]]]), np.array([[[0, 1, 2, 2]]])
    truth, probs = (np.eye(3, dtype=np.float32)[x] for x in (ids, found))
    assert float(metrics.dice(truth, probs)[0]) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert float(metrics.iou(truth, probs)[0]) == pytest.approx(0.5)
    assert float(metrics.dice_loss(truth, probs)[0]) == pytest.approx(1 - 1.01 / 1.51)


def test_losses_on_literal_arrays():
    truth = np.array([1, 0], np.float32).reshape(1, 1, 2, 1)
    probs = np.array([0.8, 0.4], np.float32).reshape(1, 1, 2, 1)
    entropy = -(np.log(0.8) + np.log(0.6)) / 2
    dice = 1 - (0.8 + 0.01) / (0.8 + 0.5 * 0.4 + 0.5 * 0.2 + 0.01)
    expected = {
        "bce_dice": entropy + dice,
        "dice": dice,
        "focal": -(0.2**2 * np.log(0.8) + 0.4**2 * np.log(0.6)) / 2,
        "tversky": 1 - (0.8 + 0.01) / (0.8 + 0.3 * 0.4 + 0.7 * 0.2 + 0.01),
    }
    for name, value in expected.items():
        assert float(metrics.LOSSES[name](truth, probs)[0]) == pytest.approx(value, rel=1e-5), name


def test_an_empty_mask_is_no_reward_where_there_is_an_object():
    truth, empty = np.zeros((2, 64, 64, 1), np.float32), np.zeros((2, 64, 64, 1), np.float32)
    truth[0, 5:7, 5:7] = 1
    found = np.asarray(metrics.dice_loss(truth, empty))
    assert found[0] > 0.99 and found[1] == 0
    assert np.asarray(metrics.dice_loss(truth, empty + 0.001))[1] > 0.5  # it has a gradient


@pytest.mark.parametrize("name", metrics.LOSSES)
def test_losses_want_the_share_of_a_border_pixel(name):
    truth = np.array([1, 0.3, 0], np.float32).reshape(1, 1, 3, 1)
    probs = [np.array([1, p, 0], np.float32).reshape(1, 1, 3, 1) for p in np.linspace(0, 1, 11)]
    assert np.argmin([float(metrics.LOSSES[name](truth, prob)[0]) for prob in probs]) == 3
    truth = np.array([[1, 0, 0], [0.2, 0.5, 0.3]], np.float32).reshape(1, 1, 2, 3)
    probs = [truth + p * np.array([[0, 0, 0], [0.1, -0.1, 0]], np.float32) for p in range(-2, 6)]
    assert np.argmin([float(metrics.LOSSES[name](truth, prob)[0]) for prob in probs]) == 2


def test_a_true_border_pixel_counts_where_most_of_it_is():
    truth, probs = (
        np.array(x, np.float32).reshape(1, 1, 3, 1) for x in ([0.6, 0.4, 1], [0.9, 0.1, 0.7])
    )
    assert float(metrics.dice(truth, probs)[0]) == float(metrics.iou(truth, probs)[0]) == 1
    truth = np.array([[0.4, 0.6, 0], [0.5, 0.2, 0.3]], np.float32).reshape(1, 1, 2, 3)
    assert float(metrics.dice(truth, np.round(truth + 0.05))[0]) == 1


def test_cross_entropy_is_kerass():
    rng = np.random.default_rng(0)
    truth, probs = (
        rng.integers(0, 2, (2, 5, 6, 1)).astype(np.float32),
        rng.random((2, 5, 6, 1), np.float32),
    )
    ours, theirs = (
        metrics.cross_entropy(truth, probs),
        keras.losses.binary_crossentropy(truth, probs),
    )
    np.testing.assert_allclose(ours, ops.mean(theirs, axis=(1, 2)), rtol=1e-4)
    ids, soft = (
        rng.integers(0, 3, (2, 5, 6)),
        rng.dirichlet(np.ones(3), (2, 5, 6)).astype(np.float32),
    )
    truth = np.eye(3, dtype=np.float32)[ids]
    ours, theirs = (
        metrics.cross_entropy(truth, soft),
        keras.losses.categorical_crossentropy(truth, soft),
    )
    np.testing.assert_allclose(ours, ops.mean(theirs, axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize("name", metrics.LOSSES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_losses_stay_finite_in_half_precision(name, dtype):
    """512x512 all-foreground: the sums overflow float16 (65504) unless they are made in float32."""
    for truth_value, prob in ((1, 1.0), (1, 0.0), (0, 1.0), (0, 0.0)):
        truth = ops.full((1, 512, 512, 1), truth_value, dtype=dtype)
        loss = metrics.LOSSES[name](truth, ops.full((1, 512, 512, 1), prob, dtype=dtype))
        assert keras.backend.standardize_dtype(loss.dtype) == "float32"
        assert np.isfinite(float(loss[0])) and float(loss[0]) >= -1e-6


@pytest.mark.parametrize("name", metrics.LOSSES)
def test_losses_fall_as_the_prediction_improves(name):
    truth = np.random.default_rng(0).integers(0, 2, (1, 16, 16, 1)).astype(np.float32)
    losses = [
        float(metrics.LOSSES[name](truth, 0.5 + sharpness * (truth - 0.5))[0])
        for sharpness in (-1, 0, 0.5, 1)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01


def brute_force_surface(mask: np.ndarray) -> np.ndarray:
    """Border pixels found the slow way: foreground with a background (or outside) 4-neighbour."""
    padded = np.pad(mask, 1)
    points = []
    for y, x in np.argwhere(mask):
        around = (padded[y, x + 1], padded[y + 2, x + 1], padded[y + 1, x], padded[y + 1, x + 2])
        if not all(around):
            points.append((y, x))
    return np.array(points)


masks = arrays(bool, (9, 11), elements=st.booleans())


@settings(max_examples=150, deadline=None)
@given(masks, masks)
def test_scores_agree_with_independent_implementations(truth, found):
    scores = metrics.score_mask(truth, found)
    if not truth.any() or not found.any():
        both = not truth.any() and not found.any()
        assert (
            scores["dice"]
            == scores["iou"]
            == scores["precision"]
            == scores["recall"]
            == float(both)
        )
        assert scores["hd95"] == scores["assd"] == (0 if both else pytest.approx(np.hypot(9, 11)))
        return
    one, two = truth.ravel(), found.ravel()
    pairs = [
        ("dice", f1_score),
        ("iou", jaccard_score),
        ("precision", precision_score),
        ("recall", recall_score),
    ]
    for name, judge in pairs:
        assert scores[name] == pytest.approx(judge(one, two)), name
    apart = cdist(brute_force_surface(truth), brute_force_surface(found))
    there, back = apart.min(1), apart.min(0)
    assert scores["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert scores["assd"] == pytest.approx((there.sum() + back.sum()) / (len(there) + len(back)))


def test_a_shift_has_the_distance_of_the_shift():
    truth, found = np.zeros((60, 60), bool), np.zeros((60, 60), bool)
    truth[20:40, 20:40] = True
    found[20:40, 27:47] = True
    assert metrics.score_mask(truth, found)["hd95"] == 7


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.score_mask(np.zeros((3, 4)), np.zeros((4, 3)))


def test_classes_are_scored_apart_and_averaged():
    row = metrics.score_classes(
        np.array([[0, 1, 1, 2]]), np.array([[0, 1, 1, 0]]), ["left", "right"]
    )
    assert row["dice: left"] == 1 and row["dice: right"] == 0 and row["dice"] == 0.5


def test_summary_is_seeded_and_covers_the_mean():
    table = pd.DataFrame(
        {"image": list("abcde"), "dice": [0.9, 0.8, 0.95, 0.7, 0.85], "iou": [0.5] * 5}
    )
    summary = metrics.summarize(table)
    assert summary.equals(metrics.summarize(table))
    low, mean, high = summary.loc["dice", ["low", "mean", "high"]]
    assert low < mean < high and mean == pytest.approx(0.84)
    assert summary.loc["iou"].tolist() == [0.5, 0.5, 0.5]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        row = metrics.summarize(pd.DataFrame({"x": rng.normal(0.9, 0.05, 40)})).loc["x"]
        inside += row["low"] <= 0.9 <= row["high"]
    assert 50 <= inside <= 60


def test_nsd_counts_border_pixels_within_the_tolerance():
    """Two squares, one shifted by three pixels: of each border, count by hand what lies within two
    pixels.
    """
    truth, found = np.zeros((2, 40, 40), np.uint8)
    truth[10:20, 10:20] = 1
    found[10:20, 13:23] = 1
    there = [(y, x) for y in range(10, 20) for x in range(10, 20) if y in (10, 19) or x in (10, 19)]
    back = [(y, x + 3) for y, x in there]
    near = [
        min((y - v) ** 2 + (x - u) ** 2 for v, u in other) <= metrics.NSD_TOLERANCE**2
        for one, other in ((there, back), (back, there))
        for y, x in one
    ]
    assert metrics.score_mask(truth, found)["nsd"] == pytest.approx(np.mean(near))
    assert 0 < np.mean(near) < 1
    assert metrics.score_mask(truth, truth)["nsd"] == 1


def test_two_runs_are_compared_image_by_image(tmp_path, script):
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(30)]
    one = pd.DataFrame({"image": names, "dice": rng.uniform(0.8, 0.9, 30), "hd95": 5.0})
    other = one.assign(dice=one.dice + rng.normal(0.02, 0.01, 30)).sample(frac=1, random_state=0)
    one.to_csv(tmp_path / "a.csv", index=False)
    other.to_csv(tmp_path / "b.csv", index=False)
    table = metrics.compare(tmp_path / "a.csv", tmp_path / "b.csv")
    dice = table.loc["dice"]
    assert dice["B - A"] == pytest.approx(other.dice.mean() - one.dice.mean())
    assert dice.low < dice["B - A"] < dice.high and dice.low > 0.01
    expected = stats.wilcoxon(one.dice, other.sort_index().dice).pvalue
    assert dice.p == pytest.approx(expected) and dice.p < 1e-4
    assert table.loc["hd95", "p"] == 1
    done = script(tmp_path, "metrics.py", "compare", "a.csv", "b.csv")
    assert done.returncode == 0 and "30 images" in done.stdout and "hd95" in done.stdout


def test_runs_on_other_images_are_not_compared(tmp_path, script):
    pd.DataFrame({"image": ["a", "b"], "dice": [0.5, 0.6]}).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame({"image": ["a", "c"], "dice": [0.5, 0.6]}).to_csv(tmp_path / "b.csv", index=False)
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    (tmp_path / "e.csv").write_text("image,dice\na,0.5\nb,\n")
    (tmp_path / "f.csv").write_text("image,dice\n")
    for other, message in (
        ("b.csv", "2 image(s) are in one table only"),
        ("c.csv", "is not a metrics.csv"),
        ("d.csv", "cannot be read"),
        ("e.csv", "column dice holds other things than numbers"),
        ("f.csv", "is not a metrics.csv"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            metrics.compare(tmp_path / "a.csv", tmp_path / other)
    done = script(tmp_path, "metrics.py", "compare", "a.csv", "c.csv")
    assert done.returncode == 2 and done.stderr.startswith("error: c.csv is not a metrics.csv")


def test_distances_in_different_units_are_not_averaged():
    table = pd.DataFrame(
        {"dice": [0.8, 0.9], "nsd": [0.5, 0.6], "hd95": [10.0, 30.0], "unit": ["mm", "pixels"]}
    )
    assert list(metrics.summarize(table).index) == ["dice"]
    assert list(metrics.summarize(table.assign(unit="mm")).index) == ["dice", "nsd", "hd95"]
