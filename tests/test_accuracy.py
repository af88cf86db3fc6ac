"""The accuracy studies, on a few phantoms: their tables have the rows that they should have."""

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from benchmarks.accuracy import corruptions, few, predicted, robustness, shift, trainings
from benchmarks.accuracy.ablation import ablation
from benchmarks.accuracy.trainings import run_trainings
from dataset import augmentation
from dataset.layouts import Pair
from dataset.phantoms import draw_phantom, make_phantoms
from imaging import pictures
from imaging.labels import Classes
from utils import UserError

TINY = "--image-size 32 --filters 2 --depth 2 --epochs 1 --epoch-images 0 --precision float32"


@pytest.fixture(scope="module")
def chest():
    image, masks = draw_phantom(np.random.default_rng(4))
    return image[..., None] if image.ndim == 2 else image, masks.max(-1).astype(np.uint8)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_a_corruption_is_seeded_and_keeps_the_mask_on_the_lungs(chest, name):
    image, ids = chest
    corrupted, new_ids = corruptions.corrupt(name, image, ids, seed=1)
    again, again_ids = corruptions.corrupt(name, image, ids, seed=1)
    np.testing.assert_array_equal(corrupted, again)
    np.testing.assert_array_equal(new_ids, again_ids)
    assert corrupted.dtype == np.uint8 and corrupted.shape == (*new_ids.shape, 1)
    assert set(np.unique(new_ids)) == {0, 1}
    if name == "clean":
        np.testing.assert_array_equal(corrupted, image)
    else:
        assert corrupted.shape != image.shape or not np.array_equal(corrupted, image)
    if name in (
        "dark (gamma 2.5)",
        "bright (gamma 0.4)",
        "turned by 12 degrees",
        "80 % of the width",
        "inverted",
    ):
        darker = corrupted[new_ids > 0].mean() < np.median(corrupted[new_ids == 0])
        clean_darker = image[ids > 0].mean() < np.median(image[ids == 0])
        assert darker == (clean_darker != (name == "inverted"))


def test_twelve_bits_in_sixteen_are_corrupted_like_eight():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 1), dtype=np.uint8)
    image[0, 0] = 255
    ids = np.pad(np.ones((20, 20), np.uint8), 10)
    one, _ = corruptions.corrupt("inverted", image, ids, 0)
    other, _ = corruptions.corrupt("inverted", image.astype(np.uint16) * 16, ids, 0)
    np.testing.assert_array_equal(one, other)


def test_an_image_without_lungs_is_corrupted_too():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 1), dtype=np.uint8)
    for name in corruptions.CORRUPTIONS:
        assert not corruptions.corrupt(name, image, np.zeros((40, 40), np.uint8), 0)[1].any()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, and small numbers: two folds, one count."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainings, "FOLDS", 2)
    monkeypatch.setattr(few, "LABELLED", (2, 0))
    monkeypatch.setattr(few, "PHANTOMS", 10)
    return tmp_path


@pytest.mark.slow
def test_ablation_and_corruptions(workplace, script):
    """Every table has its rows; what is trained is not trained again."""
    chests = str(make_phantoms("chests", 20, seed=5))
    rows = ["default", "another seed", "not cleaned", "both seeds averaged"]
    ablation(chests, rows=",".join(rows[1:]), jobs=2, flags=TINY)
    table = pd.read_csv("results/ablation-rows.csv").set_index("change")
    assert table.index.tolist() == rows
    assert table.loc["default", "gain"] == 0 and table.loc["default", "p"] == 1
    assert table.loc["another seed", "flags"] == "--seed 1"
    assert (table["seconds a fold"] > 0).all()
    run = workplace / "files" / "ablation" / "default"
    stamp = (run / "fold0" / "model.h5").stat().st_mtime_ns
    done = script(workplace, "-m", "benchmarks.accuracy", "corruptions", "--run", run)
    assert done.returncode == 0, done.stderr
    corrupted = pd.read_csv("results/corruptions-default.csv")
    assert corrupted.corruption.tolist() == [*corruptions.CORRUPTIONS, "mean, without clean"]
    assert corrupted.loss.iloc[0] == 0
    assert (run / "fold0" / "model.h5").stat().st_mtime_ns == stamp
    draw_discs(workplace / "others", [200] * 3)
    predicted.predicted(run, others=str(workplace / "others" / "images"))
    judged = pd.read_csv("results/predicted-default.csv")
    assert len(judged) == 20 * len(corruptions.CORRUPTIONS)
    assert judged.predicted_dice.between(0, 1).all() and judged.unusual.dtype == bool
    assert (judged.predicted_dice_low <= judged.predicted_dice).all()
    assert Path("results/predicted-default.png").stat().st_size > 5000
    (run / "fold0").rename(run / "fold7")
    path = run / "fold7" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 9'))
    with pytest.raises(UserError, match="does not hold all folds of one cross-validation"):
        robustness.corruptions(run)


def draw_discs(folder, greys):
    """Write an image for each grey level: a disc of that level on 100, and its mask."""
    for number, grey in enumerate(greys):
        mask = np.zeros((32, 32), np.uint8)
        cv2.circle(mask, (10 + number % 12, 16), 7, 255, -1)
        image = np.where(mask > 0, grey, 100).astype(np.uint8)
        pictures.write_picture(folder / "images" / f"{number}.png", image)
        pictures.write_picture(folder / "masks" / f"{number}.png", mask)


@pytest.mark.slow
def test_shift(workplace, monkeypatch):
    """Each shift has its rows; what is tested was never trained on."""
    monkeypatch.setattr(shift, "PHANTOMS", 10)
    monkeypatch.setattr(shift, "FOLDS", 2)
    kinds = {"noise": shift.KINDS["noise"], "borders": shift.KINDS["borders"]}
    monkeypatch.setattr(shift, "KINDS", kinds)
    chests = str(make_phantoms("chests", 20, seed=5))
    draw_discs(workplace / "nuclei", [200] * 16 + [20] * 17)
    shift.shift(chests, nuclei="nuclei", flags=TINY, jobs=2)
    table = pd.read_csv("results/shift.csv")
    assert table["shift"].tolist() == [
        "phantoms to X-rays",
        "phantoms to X-rays, adapted",
        "bright nuclei to dark ones, mild",
        "bright nuclei to dark ones, mild, adapted",
        "bright nuclei to dark ones, strong",
        "bright nuclei to dark ones, strong, adapted",
        "dark nuclei to bright ones, mild",
        "dark nuclei to bright ones, mild, adapted",
        "dark nuclei to bright ones, strong",
        "dark nuclei to bright ones, strong, adapted",
        "noise",
        *["borders"] * 4,
        "mean of the corruptions",
    ]
    assert table.test[:4].tolist() == ["20 images"] * 2 + ["17 images"] * 2
    assert table.dice.iloc[-1] == pytest.approx(table.dice[-6:-1].mean())
    config = json.loads(Path("files/shift/without-noise/fold0/config.json").read_text())
    assert config["augmentation"] == "strong-noise"


def test_every_corruption_is_left_out_once():
    names = [name for _, names in shift.KINDS.values() for name in names]
    assert sorted(names) == sorted(set(corruptions.CORRUPTIONS) - {"clean"})
    _, noise, texture, curve = augmentation.own_transforms(Classes("lung"))
    steps = set(augmentation.strong_steps(noise, texture, curve, cv2.BORDER_CONSTANT))
    for left_out, _ in shift.KINDS.values():
        assert set(left_out.split("-")) <= steps


@pytest.mark.slow
def test_few_images(workplace):
    chests = str(make_phantoms("chests", 10, seed=5))
    few.few(chests, starts="scratch,phantoms", seeds=1, flags=TINY, jobs=2)
    table = pd.read_csv("results/few.csv")
    assert table.labelled.tolist() == ["2"] * 2 + ["all"] * 2
    assert table.start.tolist() == ["scratch", "phantoms"] * 2
    assert table.gain[3] == pytest.approx(table.dice[3] - table.dice[2]) and table.gain[2] == 0
    split = pd.read_csv("files/few/phantoms-2-seed0/split.csv")
    assert split.subset.value_counts().to_dict() == {"test": 5, "train": 2}


def test_starts_of_the_few(tmp_path):
    """Only what is named is trained; a misspelt name is told before anything is."""
    weights = tmp_path / "w.h5"
    with pytest.raises(UserError, match="w.h5 does not exist; .*imagenet_weights"):
        few.choose_starts("imagenet,scratch", str(weights), Path("runs"))
    weights.touch()
    chosen = few.choose_starts("imagenet,scratch", str(weights), Path("runs"))
    assert list(chosen) == ["imagenet", "scratch"] and chosen["imagenet"][-1] == str(weights)
    with pytest.raises(UserError, match="starts has scrach; expected scratch, phantoms"):
        few.few("chests", starts="scrach")


def test_labelled_images_have_equal_shares_of_each_label():
    """Each seed draws others; a training image is never a test image."""
    pairs = [Pair(Path(f"{i}.png"), (Path(f"m{i}.png"),), label=str(i % 2)) for i in range(24)]
    first, second = few.choose_labelled(pairs, 4, seed=0), few.choose_labelled(pairs, 4, seed=1)
    assert first != second and first == few.choose_labelled(pairs, 4, seed=0)
    train = [pair.label for pair, subset in zip(pairs, first, strict=True) if subset == "train"]
    assert sorted(train) == ["0", "0", "1", "1"] and first.count("test") == 12
    assert few.choose_labelled(pairs, 12, seed=0).count("train") == 12
    assert few.choose_labelled(pairs, 0, seed=0) == few.choose_labelled(pairs, 12, seed=0)
    with pytest.raises(UserError, match="13 labelled images are needed; 12 are not for testing"):
        few.choose_labelled(pairs, 13, seed=0)


def test_the_message_of_a_failed_training_is_reported(workplace):
    with pytest.raises(UserError, match=r"train.py --epochs 0 failed:\nerror: epochs is 0"):
        run_trainings([["--epochs", "0"]], 1)
    with pytest.raises(UserError, match="jobs is 0; expected at least 1"):
        run_trainings([], 0)
    with pytest.raises(UserError, match=r"holds no fold0/model.h5; train it with"):
        robustness.corruptions(workplace)
    with pytest.raises(UserError, match="rows has typo; expected default"):
        ablation("chests", rows="typo")
