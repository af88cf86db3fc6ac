"""A mask comes with a predicted Dice, and images of another kind are flagged."""

import csv
import json

import keras
import numpy as np
import pandas as pd
import pytest

import metrics
import predict
import train
import utils
from dataset.phantoms import draw_phantom, make_phantoms
from imaging import pictures
from imaging.labels import Classes
from inference import quality
from inference.evidence import Evidence, rank, small_image
from inference.quality import Judge, Kind, Quality
from inference.segment import average
from inference.windows import Band
from training.calibration import Sample, fit

RNG = np.random.default_rng(0)
LUNG = Classes("lung")


def band(probs, row=0):
    return Band(0, row, np.asarray(probs, np.float32))


def evidence(probs, classes=LUNG):
    probs = np.asarray(probs, np.float32)
    found = Evidence(RNG.integers(0, 255, (1, *probs.shape[:2], 1), np.uint8), classes, 0.5)
    found.add(band(probs))
    return found


def test_sure_masks_have_a_soft_dice_of_one_and_unsure_ones_less():
    sure = np.zeros((32, 48, 1))
    sure[8:24, 8:24] = 1
    assert evidence(sure).soft_dice == pytest.approx(1)
    assert evidence(sure).area == pytest.approx(16 * 16 / (32 * 48))
    # Half of the pixels at 0.6: p = 0.6 * 768, m = 768.
    unsure = np.zeros((32, 48, 1))
    unsure[:16] = 0.6
    assert evidence(unsure).soft_dice == pytest.approx(2 * 0.6 / 1.6)
    assert evidence(np.full((32, 48, 1), 0.1)).soft_dice < 0.01


def test_the_small_mask_has_the_share_of_each_cell():
    probs = np.zeros((24, 48, 1))
    probs[:3, :4] = 1
    small = evidence(probs).mask
    assert small.shape == (12, 12)
    np.testing.assert_allclose(small[:2, 0], [1, 0.5])
    assert small.sum() == pytest.approx(1.5)


def test_bands_give_what_the_whole_gives():
    probs = RNG.random((20, 30, 3), np.float32)
    probs /= probs.sum(-1, keepdims=True)
    case, classes = RNG.integers(0, 255, (1, 20, 30, 1), np.uint8), Classes("a,b")
    whole, parts = (Evidence(case, classes, 0.5) for _ in range(2))
    whole.add(band(probs))
    passed = list(parts.watch(iter([band(probs[:7]), band(probs[7:], 7)])))
    assert [len(one.probs) for one in passed] == [7, 13]
    np.testing.assert_allclose(parts.mask, whole.mask, atol=1e-6)
    assert parts.soft_dice == pytest.approx(whole.soft_dice)


def test_votes_that_differ_have_a_spread():
    one, two = np.zeros((16, 16, 1)), np.zeros((16, 16, 1))
    one[:8], two[:8], two[8] = 1, 1, 1
    (mean,) = average(iter([(band(one), band(two))]), 2, None)
    found = Evidence(np.zeros((1, 16, 16, 1), np.uint8), LUNG, 0.4)
    found.add(mean)
    assert found.spread == pytest.approx(0.5 * 16 / (9 * 16 + 1))


def test_exposure_does_not_change_the_small_image_and_turning_does():
    image = draw_phantom(np.random.default_rng(1))[0][None, ..., None]
    darker = np.uint8(255 * (image / 255) ** 1.3)
    same = np.abs(small_image(darker) - small_image(image)).mean()
    turned = np.abs(small_image(image[:, ::-1]) - small_image(image)).mean()
    assert same < 0.05 < 0.15 < turned
    assert len(small_image(RNG.integers(0, 255, (5, 17, 40, 3), np.uint8))) == 2 * 12 * 12


def test_ranks_share_ties():
    np.testing.assert_allclose(rank(np.array([3, 1, 1, 9.0])), [1 / 6, -1 / 3, -1 / 3, 0.5])
    assert not np.ptp(rank(np.zeros(5)))


def test_a_kind_knows_its_own_and_survives_being_packed():
    basis = RNG.normal(size=(3, 40))
    usual = RNG.normal(size=(200, 3)) @ basis + 0.1 * RNG.normal(size=(200, 40))
    kind = Kind.learn(usual[:100])
    own = [kind.distance(one) for one in usual[100:]]
    other = kind.distance(RNG.normal(size=40) * usual.std())
    assert other > 3 * max(own)
    again = Kind.unpack(json.loads(json.dumps(kind.pack())))
    assert again.distance(usual[150]) == pytest.approx(own[50], rel=0.1)


def make_judge(count=60):
    """Learn from samples whose loss is exp of the first feature, and noise."""
    images = RNG.normal(size=(50, 288))
    kinds = Kind.learn(images), Kind.learn(RNG.random((50, 144)))
    samples = []
    for number in range(count):
        features = RNG.normal(size=5)
        loss = np.exp(features[0] - 4 + 0.2 * RNG.normal())
        samples.append(Sample(number, number % 2 == 0, features, (1.0, 1.0 + number), 1 - loss))
    return fit(kinds, samples), samples


def test_the_predicted_dice_and_its_interval():
    judge, samples = make_judge(200)
    features = np.array([sample.features for sample in samples])
    losses = np.array([1 - sample.dice for sample in samples])
    found = features @ judge.weights + judge.bias
    low, high = (np.exp(found + error) - quality.MIN_DICE_LOSS for error in judge.errors)
    assert np.mean((losses > low) & (losses < high)) == pytest.approx(0.9, abs=0.04)
    assert np.corrcoef(np.exp(found), losses)[0, 1] > 0.9
    assert judge.limits == pytest.approx((1, 199 - 0.01 * 198), abs=2)  # of the unchanged
    packed = json.loads(json.dumps(judge.pack()))
    seen = evidence(RNG.random((32, 32, 1)))
    assert Judge.unpack(packed).judge(seen).dice == pytest.approx(judge.judge(seen).dice, abs=0.05)


def test_a_flat_image_is_unusual():
    judge, _ = make_judge()
    flat = np.full((1, 48, 48, 1), 7, np.uint8)
    nearly = flat.copy()
    nearly[:, 8:16, 8:20] = RNG.integers(0, 255, (1, 8, 12, 1))
    for image in (flat, nearly):
        found = Evidence(image, LUNG, 0.5)
        found.add(band(np.zeros((48, 48, 1))))
        assert judge.judge(found).is_unusual


def test_what_is_written_of_it():
    usual = Quality(0.96123, 0.93, 0.98, 0.4)
    assert usual.describe() == {
        "predicted_dice": 0.9612,
        "predicted_dice_low": 0.93,
        "predicted_dice_high": 0.98,
        "unusual": False,
    }
    assert not usual.note and str(usual) == "predicted Dice 0.96 (0.93 to 0.98)"
    other = usual._replace(strangeness=1.1)
    assert "unlike the images" in other.note and str(other).endswith("an unusual image")
    table = pd.DataFrame(
        [{"dice": 0.95, **usual.describe()}, {"dice": 0.97, **usual.describe()}]
        + [{"dice": 0.5, **other._replace(dice=0.8).describe()}]
    )
    line = metrics.format_predictions(table)
    assert (
        "off by 0.1067" in line
        and "correlation 0.87" in line
        and "67% within" in line
        and "1 unusual" in line
    )
    assert "predicted_dice" not in metrics.summarize(table).index


def test_from_training_to_measurements(tmp_path):
    """A photograph of noise is flagged, phantoms are not; a model without it says nothing."""
    run = tmp_path / "run"
    chests = make_phantoms(tmp_path / "chests", 40, seed=5)
    sizes = {"image_size": 32, "filters": 4, "depth": 3, "epochs": 3, "val_fraction": 0.5}
    train.train(train.Config(str(chests), str(run), mirror=True, **sizes))
    assert utils.load_metadata(run / "model.h5")["quality"]["limits"]
    for number in range(6):
        image, _ = draw_phantom(np.random.default_rng((8, number)))
        pictures.write_picture(tmp_path / "in" / f"xray{number}.png", image)
    noise = RNG.integers(0, 255, (64, 64), np.uint8)
    pictures.write_picture(tmp_path / "in" / "noise.png", noise)
    output = tmp_path / "out"
    flags = {"model": str(run / "model.h5"), "input": str(tmp_path / "in"), "output": str(output)}
    predict.main(predict.Config(**flags))
    with (output / "tables/measurements.csv").open() as file:
        rows = {row["image"].rpartition("/")[2]: row for row in csv.DictReader(file)}
    assert rows["noise.png"]["unusual"] == "True" and "unlike" in rows["noise.png"]["notes"]
    assert sum(row["unusual"] == "True" for row in rows.values()) <= 3
    for row in rows.values():
        low, middle, high = (float(row[f"predicted_dice{end}"]) for end in ("_low", "", "_high"))
        assert 0 <= low <= middle <= high <= 1
    utils.update_metadata(run / "model.h5", quality=None)
    predict.main(predict.Config(**flags))
    with (output / "tables/measurements.csv").open() as file:
        assert not any(row["predicted_dice"] for row in csv.DictReader(file))


def test_the_export_tells_the_spread_too(tmp_path):
    """ONNX has the mirrored vote's difference as a second output; SavedModel and Keras agree."""
    pytest.importorskip("tf2onnx")
    import export
    from exporting.onnx_export import write_onnx
    from inference import engines

    inputs = keras.Input((16, 16, 1))
    probs = keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")(inputs)
    network, votes = export.with_mirror(
        keras.Model(inputs, probs), {"mirror": True, "classes": ["a"]}
    )
    write_onnx(votes, {}, tmp_path / "unet.onnx")
    images = RNG.random((3, 16, 16, 1), np.float32)
    content = (tmp_path / "unet.onnx").read_bytes()
    opened = [engines.open_onnxruntime(content)]
    if engines.has_openvino():
        opened.append(engines.open_openvino(content))
    mean, spread = votes.predict_on_batch(images)
    np.testing.assert_allclose(network.predict_on_batch(images), mean, atol=1e-6)
    assert spread.max() > 0.001
    for engine in opened:
        found = engine.run(images)
        assert engine.output_channels == 1 and found.shape == (3, 16, 16, 2)
        np.testing.assert_allclose(found, np.concatenate([mean, spread], -1), atol=1e-3)
        np.testing.assert_allclose(engine.run(images[:1]), found[:1], atol=1e-3)
