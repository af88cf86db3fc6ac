import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pytest
from test_data import damage

import data
import metrics
import predict
import train
import utils
from dataset.layouts import Pair
from dataset.phantoms import make_phantoms
from dataset.split_table import read_split, write_split
from imaging import formats, pictures, plots
from imaging.grid import resize
from imaging.labels import Classes
from imaging.scan import Scan
from inference import postprocess, segment
from model import build_unet
from utils import UserError


def scan(image):
    """Make a scan of one image (H, W, C)."""
    return Scan(image[None])


def probabilities(members, image, **options):
    """Return the probabilities (H, W, K) of one image (H, W, C)."""
    kept = segment.Options(probabilities=True, **options)
    return segment.segment_scans(members, [scan(image)], kept)[0].probs[0]


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    """A run folder with a small model that finds lungs in phantoms, more or less."""
    folder = tmp_path_factory.mktemp("run")
    train.train(
        train.Config(
            data_dir=str(phantoms),
            image_size=32,
            filters=4,
            depth=3,
            epochs=25,
            batch_size=8,
            precision="float32",
            out_dir=str(folder),
        )
    )
    return folder


def test_the_test_subset_is_scored_and_drawn(run, tmp_path, script):
    done = script(tmp_path, "predict.py", "--model", run / "model.h5")
    assert done.returncode == 0, done.stderr
    split = pd.read_csv(run / "split.csv")
    tested = split[split.subset == "test"].image
    table = pd.read_csv(tmp_path / "results" / "metrics.csv")
    assert sorted(table.image) == sorted(tested)
    assert set(metrics.METRICS) <= set(table)
    for image in tested:
        panel = formats.read_image(tmp_path / "results" / f"{Path(image).stem}.png")
        assert panel.shape[1] > 2.8 * panel.shape[0]  # four pictures side by side
    assert done.stdout.startswith(f"model: {run / 'model.h5'}")
    assert f"scoring {len(tested)} test images (Keras, float32)" in done.stdout
    assert "95 % interval" in done.stdout and f"{table.dice.mean():.4f}" in done.stdout
    worst = table.loc[table.dice.idxmin()]
    assert f"lowest Dice: {worst.dice:.4f}, {worst.image}" in done.stdout
    assert f"next: python export.py --model {run / 'model.h5'}" in done.stdout


def test_scores_are_those_of_the_written_masks(run, phantoms, tmp_path):
    """metrics.csv says what an independent reader of the written masks finds."""
    members = [utils.load_model(run / "model.h5")]
    pairs, _ = data.find_pairs(phantoms)
    table, problems = predict.score_pairs(members, pairs[:5])
    assert problems == [] and table.dice.mean() > 0.5
    predict.segment_files(members, list((phantoms / "CXR_png").iterdir()), tmp_path)
    for pair, row in zip(pairs[:5], table.itertuples(), strict=True):
        truth = sum(cv2.imread(str(path), 0).astype(int) for path in pair.masks) > 0
        found = cv2.imread(str(tmp_path / f"{pair.stem}.png"), cv2.IMREAD_UNCHANGED)
        assert set(np.unique(found)) <= {0, 255} and found.shape == truth.shape
        dice = 2 * ((found > 0) & truth).sum() / ((found > 0).sum() + truth.sum())
        assert row.dice == pytest.approx(dice)


def test_images_of_a_patient_are_also_scored_as_a_stack(own_run, tmp_path):
    """The patients are those of split.csv; an older one, that names none, is read as ever."""
    model, split = tmp_path / "run" / "model.h5", tmp_path / "run" / "split.csv"
    pairs, _ = read_split(split)
    assert "patient" not in predict.score_run(tmp_path / "run")
    known = [replace(pair, patient="ab"[i % 2]) for i, pair in enumerate(pairs)]
    write_split(split, known, ["test"] * 5 + ["train"] * (len(pairs) - 5))
    table = predict.score_run(tmp_path / "run")
    assert table.patient.tolist() == ["a", "b", "a", "b", "a"]
    assert pd.read_csv(tmp_path / "run" / "metrics.csv").columns[:3].tolist() == [
        "image",
        "patient",
        "dice",
    ]
    segmented = predict.segment_files(
        [utils.load_model(model)], [pair.image for pair in pairs[:5]], tmp_path / "masks"
    )
    assert segmented == (5, [])
    dice = {}
    for patient in "ab":
        own = [pair for pair in known[:5] if pair.patient == patient]
        truth = [sum(cv2.imread(str(mask), 0).astype(int) for mask in p.masks) > 0 for p in own]
        found = [cv2.imread(str(tmp_path / "masks" / f"{p.stem}.png"), 0) > 0 for p in own]
        both = sum((one & other).sum() for one, other in zip(truth, found, strict=True))
        dice[patient] = 2 * both / sum(mask.sum() for mask in (*truth, *found))
    summary = metrics.summarize(table)
    assert summary.loc["dice per patient", "mean"] == pytest.approx((dice["a"] + dice["b"]) / 2)
    text = split.read_text().replace("subset,patient,", "subset,other,")
    split.write_text(text)
    assert "patient" not in predict.score_run(tmp_path / "run")


@pytest.mark.parametrize("size", [(16, 16), (17, 301), (333, 100), (1000, 900)])
def test_masks_have_the_images_own_size(run, tmp_path, size):
    members = [utils.load_model(run / "model.h5")]
    path = tmp_path / "in" / "x.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    pictures.write_picture(path, pixels)
    assert predict.segment_files(members, [path], tmp_path / "out") == (1, [])
    assert formats.read_image(tmp_path / "out" / "x.png").shape == (*size, 1)
    assert (tmp_path / "out" / "panels" / "x.png").is_file()


def test_a_stretched_picture_gets_the_same_mask_stretched(run, phantoms):
    """The mask of an enlarged image is nearly the enlarged mask."""
    members = [utils.load_model(run / "model.h5")]
    image = formats.read_image(data.find_pairs(phantoms)[0][0].image)
    padded = np.pad(image, ((0, 0), (64, 64), (0, 0)))  # another aspect ratio, other letterbox
    large = resize(image, (512, 512))
    unclean = [(members[0][0], members[0][1] | {"clean": None})]
    results = segment.segment_scans(unclean, [scan(image), scan(large)])
    small_ids, large_ids = (result.ids[0] for result in results)
    assert small_ids.any()
    enlarged = resize(small_ids.astype(np.float32), (512, 512)) >= 0.5
    assert metrics.score_mask(enlarged, large_ids)["dice"] > 0.97
    assert probabilities(members, padded).shape == (256, 384, 1)


def test_bad_files_are_named_and_the_others_done(run, discs, tmp_path, script):
    damage(discs)
    done = script(
        tmp_path,
        "predict.py",
        "--model",
        run / "model.h5",
        "--input",
        discs / "images",
        "--output",
        "out",
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    bad = {"disc00", "disc01", "disc02"}
    for stem in bad:
        assert f"{stem}.png" in done.stderr
    written = {path.stem for path in (tmp_path / "out").glob("*.png")}
    both = {"disc06", "disc06_jpg"} & written  # disc06.png and disc06.jpg
    assert len(both) == 2 and written - both == {f"disc{i:02d}" for i in range(12)} - bad - both
    assert {path.stem for path in (tmp_path / "out" / "panels").iterdir()} == written


def test_another_data_set_is_scored_whole(run, tmp_path):
    output, others = str(tmp_path / "here"), make_phantoms(tmp_path / "others", 4, seed=9)
    predict.main(predict.Config(model=str(run / "model.h5"), data_dir=str(others), output=output))
    assert len(pd.read_csv(tmp_path / "here" / "metrics.csv")) == 4


def test_a_moved_data_set_is_scored_without_what_was_trained_on(run, phantoms, tmp_path, capsys):
    shutil.copytree(phantoms, tmp_path / "moved")
    split = pd.read_csv(run / "split.csv")
    for subset in ("test", "train"):
        config = predict.Config(
            model=str(run / "model.h5"), data_dir=str(tmp_path / "moved"), subset=subset
        )
        pairs, problems = predict.pairs_to_score(config)
        expected = {Path(image).name for image in split.image[split.subset == subset]}
        assert {pair.image.name for pair in pairs} == expected and problems == []
    left_out = (split.subset != "test").sum()
    out = capsys.readouterr().out
    assert f"{left_out} of 16 images are left out: they were trained on or chose the epoch" in out


@pytest.fixture
def own_run(run, phantoms, tmp_path):
    """The run, its data where they may be spoiled."""
    (tmp_path / "run").mkdir()
    shutil.copy(run / "model.h5", tmp_path / "run" / "model.h5")
    shutil.copytree(phantoms, tmp_path / "set")
    split = (run / "split.csv").read_text().replace(str(phantoms), str(tmp_path / "set"))
    (tmp_path / "run" / "split.csv").write_text(split)
    config = predict.Config(model=str(tmp_path / "run" / "model.h5"))
    return config, predict.pairs_to_score(config)[0]


def test_a_test_image_that_changed_is_left_out(own_run):
    config, pairs = own_run
    spoilt = pairs[0].image
    pictures.write_picture(spoilt, formats.read_image(spoilt)[::-1, :, 0])
    left, problems = predict.pairs_to_score(config)
    assert left == pairs[1:]
    assert problems == [f"{spoilt}: changed since the run, so it may not be a test image"]
    for pair in pairs:
        pictures.write_picture(pair.image, formats.read_image(pair.image)[:, ::-1, 0])
        pair.image.write_bytes(pair.image.read_bytes() + b"x")
    with pytest.raises(UserError, match="all . test images of .* changed since the run"):
        predict.pairs_to_score(config)


def test_the_split_of_another_run_is_not_taken(own_run, tmp_path, capsys):
    config = own_run[0]
    split = tmp_path / "run" / "split.csv"
    table = pd.read_csv(split)
    table.iloc[1:].to_csv(split, index=False)
    with pytest.raises(UserError, match="no split.csv of its run beside"):
        predict.pairs_to_score(config)
    config = dataclasses.replace(config, data_dir=str(tmp_path / "set"))
    assert len(predict.pairs_to_score(config)[0]) == len(table)
    assert "images of the training may be among them" in capsys.readouterr().out
    with pytest.raises(UserError, match="--subset train: no split.csv"):
        predict.pairs_to_score(dataclasses.replace(config, subset="train"))


def test_images_that_changed_places_are_not_scored(own_run, tmp_path):
    config, pairs = own_run
    split = pd.read_csv(tmp_path / "run" / "split.csv")
    trained = split.image[split.subset == "train"].iloc[0]
    shutil.copy(trained, pairs[0].image)
    with pytest.raises(UserError, match="changed since the run: its content is that of another"):
        predict.pairs_to_score(config)
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which is gone .* name their folder with --data-dir"):
        predict.pairs_to_score(config)


@pytest.mark.parametrize(
    ("text", "names", "value"),
    [("0.3", ["a"], 0.3), ("0.3", ["a", "b"], [0.3, 0.3]), ("0.3,0.6", ["a", "b"], [0.3, 0.6])],
)
def test_thresholds(text, names, value):
    assert predict.parse_threshold(text, names) == value
    for wrong in ("x", "0", "1", "0.3,0.3,0.3", "", "nan"):
        with pytest.raises(UserError, match="expected a number between 0 and 1, or one for each"):
            predict.parse_threshold(wrong, names)


def test_a_threshold_for_each_class():
    probs = np.float32([[0.5, 0.35, 0.15], [0.2, 0.38, 0.42], [0.9, 0.05, 0.05], [0.1, 0.5, 0.4]])
    assert postprocess.to_ids(probs, 0.5).tolist() == [0, 2, 0, 1]
    assert postprocess.to_ids(probs, [0.3, 0.3]).tolist() == [1, 2, 0, 1]
    assert postprocess.to_ids(probs, [0.3, 0.41]).tolist() == [1, 2, 0, 1]
    assert postprocess.to_ids(probs, [0.6, 0.1]).tolist() == [2, 2, 0, 2]
    assert postprocess.to_ids(probs[:, :1], 0.5).tolist() == [1, 0, 1, 0]


def test_panels_of_one_name_keep_their_folders(tmp_path):
    pairs = [Pair(tmp_path / "p1" / "images" / "0.png", ()), Pair(tmp_path / "p2" / "0.png", ())]
    assert predict.panel_names(pairs) == ["p1/images/0", "p2/0"]
    assert predict.panel_names(pairs[:1]) == ["0"]


@pytest.mark.slow
def test_several_classes_are_written_as_ids(phantoms, tmp_path):
    config = train.Config(
        data_dir=str(phantoms),
        classes="left lung,right lung",
        image_size=32,
        filters=4,
        depth=3,
        epochs=4,
        batch_size=2,
        precision="float32",
        out_dir=str(tmp_path),
    )
    train.train(config)
    members = [utils.load_model(tmp_path / "model.h5")]
    table, _ = predict.score_pairs(
        members, data.find_pairs(phantoms)[0], panel_dir=tmp_path / "panels"
    )
    assert {"dice: left lung", "hd95: right lung"} <= set(table)
    np.testing.assert_allclose(
        table.dice, (table["dice: left lung"] + table["dice: right lung"]) / 2
    )
    predict.segment_files(members, list((phantoms / "CXR_png").iterdir()), tmp_path / "out")
    ids = formats.read_image(tmp_path / "out" / "phantom_0000.png")
    assert set(np.unique(ids)) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "nowhere"}, "nowhere does not exist; --input takes an image file or a folder"),
        ({"model": "nowhere.h5"}, "no model at nowhere.h5; run `python train.py` first"),
        ({"subset": "holdout"}, "subset is 'holdout'; expected one of train, val, test"),
        ({"input": "."}, "has no image, it is empty; expected files ending in .dcm"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"input": ".", "data_dir": "."}, "expected one of them"),
    ],
)
def test_mistakes_get_a_line(run, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        predict.main(predict.Config(**{"model": str(run / "model.h5"), **change}))


def write_patients(folder):
    """Write two patients' images and masks, p1/images/0.png and so on; return the folder."""
    for patient in ("p1", "p2"):
        for kind in ("images", "masks"):
            pictures.write_picture(folder / patient / kind / "0.png", np.eye(32, dtype=np.uint8))
    return folder


def test_the_images_are_never_overwritten(run, discs):
    patients = write_patients(discs.parent / "by_patient")
    before = {path: path.read_bytes() for path in discs.glob("*/*")}
    (discs / "images").rename(discs / "panels")
    (discs / "images").symlink_to(discs / "panels")
    there = str(discs / "images")
    for change in (
        {"input": there, "output": there},
        {"input": f"{there}/disc00.png", "output": there},
        {"input": there, "output": str(discs)},  # whose panels/ they are
        {"data_dir": str(discs), "output": there},
        {"data_dir": str(discs), "output": str(discs / "masks")},
        {"data_dir": str(patients), "output": str(patients)},
    ):
        with pytest.raises(UserError, match="holds the images; name another folder"):
            predict.main(predict.Config(model=str(run / "model.h5"), **change))
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("change", [{"input": "nowhere"}, {"data_dir": "nowhere"}, {}])
def test_an_output_that_is_a_file_is_refused_before_anything_is_read(tmp_path, change):
    (tmp_path / "taken").write_text("")
    for output in (tmp_path / "taken", tmp_path / "taken" / "below"):
        config = predict.Config(model="nowhere.h5", output=str(output), **change)
        with pytest.raises(UserError, match="taken is a file; expected a folder for --output"):
            predict.main(config)


# ---------------------------------------------------------------------------------------- panels


def count_colour(panel, colour):
    return (panel == colour).all(-1).sum()


def test_a_long_thin_image_gets_a_panel_of_bearable_size(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4000, 16, 1), dtype=np.uint8)
    mask = np.zeros((1, 4000, 16), np.uint8)
    plots.draw_panel(tmp_path / "a.png", scan(image), mask, ["lung"], "a.png")
    assert max(formats.read_image(tmp_path / "a.png").shape) < 2000


def test_missed_and_wrong_pixels_have_colours_of_their_own(tmp_path):
    truth, found = np.zeros((2, 1, 100, 100), np.uint8)
    truth[0, 10:40, 10:40] = 1
    found[0, 60:80, 60:80] = 1
    place, image = tmp_path / "a.png", picture(shape=(100, 100))
    plots.draw_panel(place, scan(image), found, ["a"], "a", found)
    same = formats.read_image(place)
    plots.draw_panel(place, scan(image), found, ["a"], "a", truth)
    drawn = formats.read_image(place)
    missed = count_colour(drawn, plots.MISSED) - count_colour(same, plots.MISSED)
    extra = count_colour(drawn, plots.EXTRA) - count_colour(same, plots.EXTRA)
    scale = (plots.TILE_SIDE / 100) ** 2
    assert missed == pytest.approx(30**2 * scale, rel=0.05)
    assert extra == pytest.approx(20**2 * scale, rel=0.05)


def test_several_classes_get_a_legend(tmp_path):
    ids = np.zeros((1, 64, 64), np.uint8)
    for names in (["a"], ["a", "b"], [f"a rather long name {i}" for i in range(30)]):
        plots.draw_panel(tmp_path / f"{len(names)}.png", scan(picture()), ids, names, "x")
    one, two, many = (formats.read_image(tmp_path / f"{i}.png") for i in (1, 2, 30))
    assert not count_colour(one, plots.COLOURS[1]) and count_colour(two, plots.COLOURS[1])
    assert many.shape[0] > two.shape[0] > one.shape[0]  # a long legend takes several lines
    assert many.shape[1] == one.shape[1]


@pytest.mark.parametrize("title", ["Röntgen_肺_Ωж.png", "line\nbreak", "\udcff.png", "x" * 999, ""])
def test_any_file_name_can_be_a_title(tmp_path, title):
    ids = np.zeros((1, 40, 50), np.uint8)
    plots.draw_panel(tmp_path / "a.png", scan(picture()), ids, [title or "a", "b"], title)
    assert formats.read_image(tmp_path / "a.png").shape[1] < 1100


def test_curves_show_the_later_epochs(tmp_path):
    epochs = np.arange(1, 81)
    dice = 0.97 - 0.9 * np.exp(-epochs / 4)
    low, high = plots.interesting_range([pd.Series(dice)])
    assert low > 0.9 and high > dice.max()
    log = pd.DataFrame({"epoch": epochs, "loss": 1 - dice, "dice": dice, "seconds": 1.0})
    more = log.assign(val_loss=1 - dice, val_dice=dice, learning_rate=0.1)
    widths = []
    for number, table in enumerate((log, more, log[:1], more.assign(val_loss=np.nan))):
        plots.draw_curves(table, len(table), tmp_path / f"{number}.png")
        widths.append(formats.read_image(tmp_path / f"{number}.png").shape[1])
    assert widths == [1000, 1500, 1000, 1500]  # the third picture is the learning rate
    assert plots.curves_title(more, 80) == "epoch 80 of 80 is saved, validation Dice 0.9700"


def test_a_model_without_its_split(run, tmp_path):
    (tmp_path / "model.h5").write_bytes((run / "model.h5").read_bytes())
    with pytest.raises(UserError, match="name images with --input, or a data set with --data-dir"):
        predict.pairs_to_score(predict.Config(model=str(tmp_path / "model.h5")))


def test_an_unreadable_test_image_costs_only_itself(run, phantoms, tmp_path):
    pairs, _ = data.find_pairs(phantoms)
    missing = Pair(tmp_path / "gone.png", pairs[0].masks)
    table, problems = predict.score_pairs(
        [utils.load_model(run / "model.h5")], [pairs[0], missing, pairs[1]]
    )
    assert len(table) == 2 and len(problems) == 1 and "gone.png: cannot be opened" in problems[0]


# -------------------------------------------------------------- ensembles, mirroring, uncertainty


def make_member(tmp_path, name="m.h5", classes=("lung",), **facts):
    """A member with random weights."""
    keras.utils.set_random_seed(len(name))
    network = build_unet((32, 32, 1), Classes(",".join(classes)).num_channels, filters=2, depth=2)
    utils.save_model(
        network, tmp_path / name, utils.make_metadata(list(classes), (32, 32), 1, **facts)
    )
    return utils.load_model(tmp_path / name)


def picture(seed=0, shape=(40, 50)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 1), dtype=np.uint8)


WITH_UNCERTAINTY = segment.Options(uncertainty=True, probabilities=True)


def test_an_ensemble_is_the_mean_of_its_members(tmp_path):
    members = [make_member(tmp_path, "a.h5"), make_member(tmp_path, "bb.h5")]
    together = segment.segment_scans(members, [scan(picture())], WITH_UNCERTAINTY)[0]
    alone = [probabilities([member], picture()) for member in members]
    np.testing.assert_allclose(together.probs[0], np.mean(alone, axis=0), atol=1e-5)
    spread = np.std(alone, axis=0)[..., 0]
    np.testing.assert_allclose(
        together.uncertainty[0], spread, atol=0.05
    )  # resized before, not after
    assert together.disagreement >= 0


def test_asking_for_the_uncertainty_changes_no_mask(tmp_path):
    member = make_member(tmp_path)
    asked = segment.segment_scans([member], [scan(picture())], WITH_UNCERTAINTY)[0]
    plain = segment.segment_scans([member], [scan(picture())])[0]
    np.testing.assert_array_equal(asked.probs[0], probabilities([member], picture()))
    np.testing.assert_array_equal(asked.ids, plain.ids)
    assert asked.uncertainty.max() > 0
    assert plain.uncertainty is None and np.isnan(plain.disagreement) and plain.probs is None


def test_scans_of_a_chunk_share_batches_and_keep_their_slices(tmp_path):
    """Scans of several sizes and numbers of slices give what each gives alone."""
    members = [make_member(tmp_path)]
    scans = []
    for number, shape in enumerate([(3, 40, 50), (1, 64, 20), (4, 33, 33)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*shape, 1), dtype=np.uint8)
        scans.append(Scan(pixels))
    kept = segment.Options(batch_size=3, uncertainty=True, probabilities=True)
    together = segment.segment_scans(members, scans, kept)
    for one, found in zip(scans, together, strict=True):
        alone = segment.segment_scans(members, [one], kept)[0]
        assert found.ids.shape == found.uncertainty.shape == one.pixels.shape[:3]
        np.testing.assert_allclose(found.probs, alone.probs, atol=1e-5)
    assert segment.segment_scans(members, []) == []


def test_mirroring_is_symmetric(tmp_path):
    """The mirrored image gets the mirrored probabilities, left and right exchanged."""
    member = make_member(tmp_path, classes=("left lung", "right lung"), mirror=True)
    image = picture(shape=(32, 32))
    straight = probabilities([member], image)
    mirrored = probabilities([member], image[:, ::-1].copy())
    np.testing.assert_allclose(mirrored[:, ::-1][..., [0, 2, 1]], straight, atol=1e-5)
    one_way = [(member[0], member[1] | {"mirror": False})]
    unlike = probabilities(one_way, image)
    assert not np.allclose(unlike, straight, atol=1e-4)


def test_disagreement_is_one_minus_dice():
    votes = np.zeros((2, 4, 4, 1), np.float32)
    votes[0, :2] = 1.0
    decided = np.zeros((4, 4, 1), np.float32)
    decided[:1] = 1
    counter = segment.Disagreement(0.5, overlap=False)
    for rows in (slice(0, 1), slice(1, 4)):
        counter.add(0, votes[:, rows], decided[rows])
    assert counter.mean == pytest.approx(((1 - 2 * 4 / 12) + 1) / 2)
    empty = segment.Disagreement(0.5, overlap=False)
    empty.add(0, votes[1:], 0 * decided)
    assert empty.mean == 0


@pytest.mark.slow
def test_an_ensemble_is_scored_on_images_that_no_member_saw(run, tmp_path):
    """Two runs of other splits share some test images, or none: then it is said."""
    table = pd.read_csv(run / "split.csv")
    other = table.assign(subset=table.subset.replace({"test": "train", "val": "test"}))
    for name, split in (("a", table), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.h5").write_bytes((run / "model.h5").read_bytes())
        split.to_csv(tmp_path / name / "split.csv", index=False)
    with pytest.raises(UserError, match="no image is test in the split.csv of every model"):
        predict.pairs_to_score(predict.Config(model=f"{tmp_path}/*/model.h5"))
    other.loc[table.subset == "test", "subset"] = ["test"] + ["train"] * (
        (table.subset == "test").sum() - 1
    )
    other.to_csv(tmp_path / "b" / "split.csv", index=False)
    pairs, _ = predict.pairs_to_score(predict.Config(model=f"{tmp_path}/*/model.h5"))
    assert [pair.image.as_posix() for pair in pairs] == table.image[
        table.subset == "test"
    ].tolist()[:1]


def test_a_path_with_a_comma_is_one_model(tmp_path):
    (tmp_path / "a,b").mkdir()
    make_member(tmp_path / "a,b")
    assert len(predict.load_members(predict.Config(model=str(tmp_path / "a,b" / "m.h5")))) == 1


def test_members_that_clean_differently_do_not_clean(tmp_path):
    for name, clean in (("a.h5", [2]), ("bb.h5", [2]), ("ccc.h5", None)):
        make_member(tmp_path, name, clean=clean)
    two, three = (
        predict.load_members(predict.Config(model=f"{tmp_path}/{pattern}.h5"))
        for pattern in ("[ab]*", "*")
    )
    assert two[0][1]["clean"] == [2] and three[0][1]["clean"] is None


def test_uncertainty_adds_a_column_a_panel_and_a_rank_correlation(run, tmp_path, capsys):
    config = predict.Config(
        model=str(run / "model.h5"), subset="train", output=str(tmp_path / "with"), uncertainty=True
    )
    predict.main(config)
    table = pd.read_csv(tmp_path / "with" / "metrics.csv")
    assert table.disagreement.between(0, 1).all() and table.disagreement.std() > 0
    assert "rank correlation of disagreement with 1 - Dice" in capsys.readouterr().out
    panel = formats.read_image(tmp_path / "with" / f"{Path(table.image[0]).stem}.png")
    assert panel.shape[1] > 3.8 * panel.shape[0]  # five pictures side by side


def test_models_that_do_not_fit_together_are_refused(tmp_path):
    make_member(tmp_path, "a.h5")
    make_member(tmp_path, "bb.h5", classes=("heart",))
    with pytest.raises(
        UserError,
        match=r"the models' classes are .*heart.* and .*lung.*; an ensemble needs the same",
    ):
        predict.load_members(predict.Config(model=f"{tmp_path}/a.h5,{tmp_path}/bb.h5"))
    make_member(tmp_path, "ccc.h5", classes=("left lung", "heart"))
    with pytest.raises(
        UserError, match="needs several models, because a class with one side cannot be mirrored"
    ):
        predict.load_members(predict.Config(model=f"{tmp_path}/ccc.h5", uncertainty=True))
    assert len(predict.load_members(predict.Config(model=f"{tmp_path}/a*.h5,{tmp_path}/a.h5"))) == 2


# ------------------------------------------------------------------------------------------ tiles


def test_tiles_give_masks_of_the_images_own_size(tmp_path):
    make_member(tmp_path)
    pictures.write_picture(tmp_path / "in" / "large.png", picture(shape=(150, 90)))
    pictures.write_picture(tmp_path / "in" / "small.png", picture(shape=(20, 90)))
    config = predict.Config(
        model=str(tmp_path / "m.h5"),
        input=str(tmp_path / "in"),
        output=str(tmp_path / "out"),
        tile=True,
    )
    predict.main(config)
    assert formats.read_image(tmp_path / "out" / "large.png").shape == (150, 90, 1)
    assert formats.read_image(tmp_path / "out" / "small.png").shape == (20, 90, 1)
