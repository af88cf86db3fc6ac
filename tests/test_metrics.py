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
    (tmp_path / "g.csv").write_text("image,dice\na,0.5\nb,unknown\n")
    (tmp_path / "f.csv").write_text("image,dice\n")
    for other, message in (
        ("b.csv", "2 image(s) are in one table only"),
        ("c.csv", "is not a metrics.csv"),
        ("d.csv", "cannot be read"),
        ("e.csv", "column dice holds other things than numbers"),
        ("g.csv", "column dice holds other things than numbers"),
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
    table["image"] = ["a", "b"]
    mm = table.assign(unit="mm")
    for other in (table, mm.assign(unit="pixels")):
        assert list(metrics.compare_tables(mm, other).index) == ["dice"]
    assert list(metrics.compare_tables(mm, mm).index) == ["dice", "nsd", "hd95"]


def test_images_without_a_predicted_dice_are_no_misses():
    table = pd.DataFrame({"dice": [0.9, 0.8], "predicted_dice": [0.9, np.nan]})
    table["predicted_dice_low"] = table["predicted_dice_high"] = table.predicted_dice
    line = metrics.format_predictions(table.assign(unusual=False))
    assert "100% within their intervals" in line


# ---------------------------------------------------------------------------------------- volumes

EVERY_FUNCTION = [*metrics.LOSSES.values(), *metrics.TRAINING_METRICS]


def random_targets(shape, channels, ignored=False):
    """Truth and probabilities (…, K), and with `ignored` what does not count as a last channel."""
    rng = np.random.default_rng(0)
    truth = np.eye(channels, dtype=np.float32)[rng.integers(0, channels, shape)]
    probs = rng.dirichlet(np.ones(channels), shape).astype(np.float32)
    if channels == 2:
        truth, probs = truth[..., 1:], probs[..., 1:]
    if ignored:
        truth = np.concatenate([truth, rng.integers(0, 2, (*shape, 1))], -1).astype(np.float32)
    return truth, probs


@pytest.mark.parametrize("function", EVERY_FUNCTION, ids=lambda one: one.__name__)
@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_volume_is_scored_like_its_slices_side_by_side(function, channels, ignored):
    truth, probs = random_targets((2, 4, 6, 5), channels, ignored)
    planes = [one.reshape(2, 24, 5, -1) for one in (truth, probs)]
    values = np.asarray(function(truth, probs))
    assert values.shape == (2,)
    np.testing.assert_allclose(values, function(*planes), rtol=1e-5)
    overlapping = metrics.per_class(function)
    np.testing.assert_allclose(overlapping(truth, probs), overlapping(*planes), rtol=1e-5)


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_pooled_metrics_are_those_of_one_big_image(channels, overlap, ignored):
    """Batches one after the other score like all their pixels in one image; reset forgets."""
    truth, probs = random_targets((6, 4, 6, 5), channels, ignored)
    pooled = metrics.pooled_metrics(overlap)
    assert [one.name for one in pooled] == ["dice", "iou", "precision", "recall"]
    one_image = [one.reshape(1, 6 * 4, 6 * 5, -1) for one in (truth, probs)]
    for metric, function in zip(pooled, metrics.TRAINING_METRICS, strict=True):
        for _ in range(2):
            metric.reset_state()
            for start in range(0, 6, 2):
                metric.update_state(truth[start : start + 2], probs[start : start + 2])
            whole = metrics.per_class(function) if overlap else function
            assert float(metric.result()) == pytest.approx(float(whole(*one_image)[0]), rel=1e-5)


def test_pooled_metrics_weigh_images_and_score_absent_classes_one():
    metric = metrics.pooled_metrics(False)[0]
    metric.update_state(TRUTH, PROBS, sample_weight=np.array([1.0, 1, 0, 0]))
    assert float(metric.result()) == pytest.approx(1 / 2)  # the false alarms weigh nothing
    metric.reset_state()
    metric.update_state(np.zeros((1, 2, 2, 1)), np.zeros((1, 2, 2, 1)))
    assert float(metric.result()) == 1


def test_pooled_metrics_in_a_training():
    """The log names them as before; the last batch is smaller."""
    truth, probs = random_targets((5, 4, 4, 4), 3)
    inputs = keras.Input((4, 4, 4, 3))
    model = keras.Model(inputs, keras.layers.Identity()(inputs))
    model.compile(loss="mse", weighted_metrics=metrics.pooled_metrics(False), jit_compile=False)
    log = model.evaluate(probs, truth, batch_size=2, return_dict=True, verbose=0)
    whole = metrics.recall(truth.reshape(1, 20, 16, 3), probs.reshape(1, 20, 16, 3))
    assert log["recall"] == pytest.approx(float(whole[0]), rel=1e-5)
    history = model.fit(probs, truth, batch_size=2, epochs=2, validation_split=0.4, verbose=0)
    assert {"dice", "val_dice", "val_precision"} <= set(history.history)


# --------------------------------------------------------------------------------------- patients

SLICES = pd.DataFrame(
    {
        "image": ["a0", "a1", "a2", "b0", "c0"],
        "patient": ["a", "a", "a", "b", ""],
        "dice": [1.0, 0.0, 0.5, 0.8, 0.0],
        "true pixels": [10, 0, 2, 5, 0],
        "found pixels": [10, 4, 2, 5, 3],
        "shared pixels": [10, 0, 1, 4, 0],
    }
)


def test_a_patients_slices_are_scored_as_one_stack():
    """a: 12 true, 16 found, 11 shared; b: 5, 5, 4; c is nobody's: 0, 3, 0."""
    patients = metrics.score_patients(SLICES)
    assert patients["dice per patient"].tolist() == pytest.approx([22 / 28, 8 / 10, 0])
    assert patients["iou per patient"].tolist() == pytest.approx([11 / 17, 4 / 6, 0])
    summary = metrics.summarize(SLICES)
    assert summary.index.tolist() == ["dice", "dice per patient", "iou per patient"]
    assert summary.loc["dice", "mean"] == pytest.approx(2.3 / 5)
    assert summary.loc["dice per patient", "mean"] == pytest.approx((22 / 28 + 0.8) / 3)


def test_the_stack_of_several_classes_is_their_mean():
    columns = {f"{name}: {part}": [0, 0] for name in metrics.PIXELS for part in ("rim", "core")}
    table = pd.DataFrame(columns | {"patient": ["a", "a"]})
    for name, counts in zip(metrics.PIXELS, ([4, 2], [1, 3], [1, 2]), strict=True):
        table[f"{name}: rim"] = counts
    patients = metrics.score_patients(table)
    assert patients["dice per patient: rim"].tolist() == pytest.approx([6 / 10])
    assert patients["dice per patient: core"].tolist() == [1]  # there is none, and none was found
    assert patients["dice per patient"].tolist() == pytest.approx([0.8])
    assert patients["iou per patient"].tolist() == pytest.approx([(3 / 7 + 1) / 2])


def test_a_volumes_score_is_that_of_its_slices_stacked():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, (2, 6, 9, 8))
    whole = metrics.score_classes(truth, found, ["rim", "core"])
    slices = zip(truth, found, strict=True)
    rows = [metrics.score_classes(*planes, ["rim", "core"]) for planes in slices]
    patients = metrics.score_patients(pd.DataFrame(rows).assign(patient="a"))
    for name in ("dice", "iou", "dice: rim", "iou: core"):
        metric, _, part = name.partition(":")
        column = f"{metric} per patient:{part}" if part else f"{metric} per patient"
        assert patients[column].tolist() == pytest.approx([whole[name]])


def test_patients_with_one_image_each_are_summarised_as_images():
    alone = SLICES.assign(patient=["a", "b", "c", "", "d"])
    assert metrics.summarize(alone).equals(metrics.summarize(SLICES.drop(columns="patient")))
    assert metrics.summarize(alone).index.tolist() == ["dice"]
    nobody = metrics.summarize(SLICES.assign(patient=None))  # a fold without patients, joined
    assert nobody.equals(metrics.summarize(alone))
    numbers = SLICES.assign(patient=[0, 0, 0, 1, np.nan])  # as pandas reads metrics.csv
    assert metrics.summarize(numbers).equals(metrics.summarize(SLICES))


def test_the_interval_draws_patients():
    """Twenty slices of one patient that are all alike say no more than one."""
    rng = np.random.default_rng(0)
    patients = pd.DataFrame({"patient": [f"p{i}" for i in range(12)], "x": rng.normal(0, 1, 12)})
    slices = patients.loc[patients.index.repeat(20)].reset_index(drop=True)
    one, many = metrics.summarize(patients).loc["x"], metrics.summarize(slices).loc["x"]
    assert many.tolist() == pytest.approx(one.tolist())
    as_images = metrics.summarize(slices.drop(columns="patient")).loc["x"]
    assert as_images.high - as_images.low < 0.4 * (many.high - many.low)
    alone = metrics.summarize(slices.assign(patient="p")).loc["x"]
    assert np.isnan(alone[["low", "high"]]).all() and alone["mean"] == pytest.approx(one["mean"])


def test_the_interval_covers_the_truth_where_patients_differ():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        sizes = rng.integers(1, 8, 40)
        own = rng.normal(0.9, 0.05, 40).repeat(sizes)
        table = pd.DataFrame({"patient": np.arange(40).repeat(sizes).astype(str)})
        row = metrics.summarize(table.assign(x=own + rng.normal(0, 0.01, len(own)))).loc["x"]
        inside += row["low"] <= 0.9 <= row["high"]
    assert 50 <= inside <= 60


def test_the_summary_says_over_how_many_patients():
    text = metrics.format_summary(SLICES.assign(unit="pixels"))
    assert "95 % interval over 3 patient(s)" in text and "dice per patient" in text
    alone = metrics.format_summary(SLICES.assign(unit="pixels", patient="a"))
    assert "over 1 patient(s)" in alone and "nan" not in alone
    assert "patient" not in metrics.format_summary(SLICES.drop(columns="patient").assign(unit="mm"))


def test_two_runs_are_compared_patient_by_patient(tmp_path, capsys):
    """Six patients of ten slices; B is better by as much in each of a patient's slices."""
    names = [f"{patient:03}" for patient in range(6) for _ in range(10)]
    change = np.repeat([0.01, 0.02, -0.01, 0.03, 0.02, 0.04], 10)
    one = pd.DataFrame(
        {
            "image": [f"{i}.png" for i in range(60)],
            "patient": names,
            "dice": 0.5,
            "true pixels": 10,
            "found pixels": 10,
            "shared pixels": 5,
        }
    )
    other = one.assign(dice=0.5 + change).assign(**{"shared pixels": 6})
    one.to_csv(tmp_path / "a.csv", index=False)
    # An older table, without patients: those of the other are taken.
    other.sample(frac=1, random_state=0).drop(columns="patient").to_csv(
        tmp_path / "b.csv", index=False
    )
    for paths in (("a.csv", "b.csv"), ("b.csv", "a.csv")):
        table = metrics.compare(*(tmp_path / path for path in paths))
        sign = 1 if paths[0] == "a.csv" else -1
        assert table.loc["dice", "B - A"] == pytest.approx(sign * change.mean())
        assert table.loc["dice", "p"] == pytest.approx(stats.wilcoxon(change[::10]).pvalue)
        assert table.loc["dice", "low"] * table.loc["dice", "high"] > 0
        assert table.loc["dice per patient", "B - A"] == pytest.approx(sign * 0.1)
        assert "60 images of 6 patients" in capsys.readouterr().out
    width = table.loc["dice", "high"] - table.loc["dice", "low"]
    images = metrics.compare_tables(*(table.drop(columns="patient") for table in (one, other)))
    assert width > 2 * (images.loc["dice", "high"] - images.loc["dice", "low"])


def test_folds_without_patients_have_no_score_per_patient():
    """The rows of such a fold have no pixel counts, which are not those of empty masks."""
    known = pd.DataFrame({"dice": [0.5, 0.5], "patient": ["a", "a"]})
    for name in metrics.PIXELS:
        known[name] = 10
    table = pd.concat([known, pd.DataFrame({"dice": [0.1]})])
    assert not [name for name in metrics.summarize(table).index if "per patient" in name]
    assert [name for name in metrics.summarize(known).index if "per patient" in name]
