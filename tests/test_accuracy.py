import numpy as np
import pandas as pd
import pytest

from benchmarks import accuracy, corruptions
from dataset.phantoms import draw_phantom, make_phantoms
from utils import UserError

TINY = "--image-size 32 --filters 2 --depth 2 --epochs 1 --epoch-images 0 --precision float32 --phantoms 10"


@pytest.fixture(scope="module")
def chest():
    image, masks = draw_phantom(np.random.default_rng(3))
    return image[..., None] if image.ndim == 2 else image, masks.max(-1).astype(np.uint8)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_a_corruption_is_seeded_and_keeps_the_mask_on_the_lungs(chest, name):
    image, ids = chest
    spoilt, spoilt_ids = corruptions.corrupt(name, image, ids, seed=1)
    again, again_ids = corruptions.corrupt(name, image, ids, seed=1)
    np.testing.assert_array_equal(spoilt, again)
    np.testing.assert_array_equal(spoilt_ids, again_ids)
    assert spoilt.dtype == np.uint8 and spoilt.shape == (*spoilt_ids.shape, 1)
    assert set(np.unique(spoilt_ids)) == {0, 1}
    if name == "clean":
        np.testing.assert_array_equal(spoilt, image)
    else:
        assert spoilt.shape != image.shape or not np.array_equal(spoilt, image)
    if name in (
        "dark (gamma 2.5)",
        "bright (gamma 0.4)",
        "turned by 12 degrees",
        "80 % of the width",
        "inverted",
    ):
        darker = spoilt[spoilt_ids > 0].mean() < np.median(spoilt[spoilt_ids == 0])
        clean_darker = image[ids > 0].mean() < np.median(image[ids == 0])
        assert darker == (clean_darker != (name == "inverted"))


def test_twelve_bits_in_sixteen_are_spoilt_as_eight():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 1), dtype=np.uint8)
    image[0, 0] = 255
    ids = np.pad(np.ones((20, 20), np.uint8), 10)
    one, _ = corruptions.corrupt("inverted", image, ids, 0)
    other, _ = corruptions.corrupt("inverted", image.astype(np.uint16) * 16, ids, 0)
    np.testing.assert_array_equal(one, other)


def test_an_image_without_lungs_is_spoilt_too():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 1), dtype=np.uint8)
    for name in corruptions.CORRUPTIONS:
        assert not corruptions.corrupt(name, image, np.zeros((40, 40), np.uint8), 0)[1].any()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, and small numbers: two folds, one count, one seed."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"FOLDS": 2, "LABELLED": (2,), "SEEDS": (1,)}.items():
        monkeypatch.setattr(accuracy, name, value)
    return tmp_path


def test_ablation_and_corruptions(workplace, script):
    """Every table has its rows; what is trained is not trained again."""
    chests = str(make_phantoms("chests", 20, seed=5))
    accuracy.ablation(
        chests, rows="another seed,not cleaned,both seeds averaged", jobs=2, flags=TINY
    )
    table = pd.read_csv("results/ablation-rows.csv").set_index("change")
    assert table.index.tolist() == ["default", "another seed", "not cleaned", "both seeds averaged"]
    assert table.loc["default", "gain"] == 0 and table.loc["default", "p"] == 1
    assert table.loc["another seed", "flags"] == "--seed 1" and (table["seconds a fold"] > 0).all()
    model = workplace / "files" / "ablation" / "default" / "fold0" / "model.h5"
    stamp = model.stat().st_mtime_ns
    done = script(workplace, "-m", "benchmarks.accuracy", "corruptions", "--run", model.parents[1])
    assert done.returncode == 0, done.stderr
    spoilt = pd.read_csv("results/corruptions-default.csv")
    assert spoilt.corruption.tolist() == [*corruptions.CORRUPTIONS, "mean, without clean"]
    accuracy.uncertainty(model.parents[1])
    votes = pd.read_csv("results/uncertainty-default.csv")
    assert len(votes) == 20 and votes.disagreement.between(0, 1).all()
    assert spoilt.loss.iloc[0] == 0 and model.stat().st_mtime_ns == stamp
    (model.parents[1] / "fold0").rename(model.parents[1] / "fold7")
    with pytest.raises(UserError, match="does not hold all folds of one cross-validation"):
        path = model.parents[1] / "fold7" / "config.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 9'))
        accuracy.corrupted(model.parents[1])


def test_few_images(workplace):
    chests = str(make_phantoms("chests", 10, seed=5))
    accuracy.few(chests, flags=TINY, jobs=2)
    table = pd.read_csv("results/few.csv")
    assert table.labelled.tolist() == [2] and table.gain[0] == pytest.approx(
        table.phantoms[0] - table.scratch[0]
    )
    split = pd.read_csv("files/few/phantoms-2-seed1/fold0/split.csv")
    assert split.subset.value_counts().to_dict() == {"test": 5, "train": 2}


def test_what_a_failed_training_said_is_told(workplace):
    with pytest.raises(UserError, match=r"train.py --epochs 0 failed:\nerror: epochs is 0"):
        accuracy.run_all([["--epochs", "0"]], 1)
    with pytest.raises(UserError, match=r"holds no fold0/model.h5; train it with"):
        accuracy.corrupted(workplace)
