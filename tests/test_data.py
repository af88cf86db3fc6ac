"""Layouts, reading, the cache, splits."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import ROOT, images_of, load, masks_of
from pydicom.data import data_manager

import data
from dataset import layouts, loading, split_table
from dataset.folder import Folder
from dataset.layouts import SUBSETS, Layout, Pair
from dataset.loading import Preprocessing
from dataset.reading import read_truth
from dataset.split_table import read_split, write_split
from imaging import formats, pictures, preprocess
from imaging.grid import fit_grid
from imaging.labels import Classes
from inference.sampler import Sampler
from utils import UserError


def names_of(problems):
    return "\n".join(problems)


def test_pairs_are_made_by_stem_in_both_layouts(discs, phantoms):
    pairs, problems = data.find_pairs(discs)
    assert problems == [] and len(pairs) == 12
    assert all(pair.masks[0].stem == f"{pair.stem}_mask" for pair in pairs)
    pairs, problems = data.find_pairs(phantoms)
    assert problems == [] and len(pairs) == 16
    assert all([m.parent.name for m in p.masks] == ["leftMask", "rightMask"] for p in pairs)
    assert all(mask.stem == pair.stem for pair in pairs for mask in pair.masks)


def test_a_missing_file_does_not_shift_the_pairs(discs):
    """The defect of sorted globs: after a lost mask every later image would get its neighbour's."""
    (discs / "masks" / "disc03_mask.png").unlink()
    (discs / "images" / "disc07.png").unlink()
    pairs, problems = data.find_pairs(discs)
    assert all(pair.masks[0].stem.startswith(pair.stem) for pair in pairs) and len(pairs) == 10
    assert (
        len(problems) == 2
        and "disc03.png: no mask" in problems[0]
        and "disc07_mask.png: no image" in problems[1]
    )


def test_an_unknown_folder_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        data.find_pairs(tmp_path / "nowhere")


def test_a_missing_mask_folder_is_named(discs):
    shutil.rmtree(discs / "masks")
    with pytest.raises(UserError, match="images/ is there, masks/ lacks\nexpected images/"):
        data.find_pairs(discs)


def test_a_misspelt_folder_of_montgomery_is_named(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "set")
    masks = tmp_path / "set" / "ManualMask"
    (masks / "rightMask").rename(masks / "rightmasks")
    (problem,) = data.find_pairs(tmp_path / "set")[1]
    assert "leftMask, rightmasks; expected leftMask and rightMask" in problem


def test_names_that_differ_in_one_way_make_one_line(discs):
    for path in sorted((discs / "masks").iterdir())[:5]:
        path.rename(path.with_name(f"{path.stem.removesuffix('_mask')}final.png"))
    pairs, problems = data.find_pairs(discs)
    assert len(pairs) == 7 and len(problems) == 1
    said = "5 masks in .* end in final .* such as disc00final.png to disc00.png"
    assert re.search(said, problems[0])


def test_no_image_is_one_line(discs):
    for path in list((discs / "images").iterdir()):
        path.rename(path.with_suffix(".xyz"))
    pairs, problems = data.find_pairs(discs)
    assert pairs == [] and len(problems) == 1
    assert "images: no image, but disc00.xyz, disc01.xyz, disc02.xyz, …; expected" in problems[0]
    shutil.rmtree(discs / "images")
    (discs / "images").mkdir()
    assert "images: no image, it is empty; expected" in data.find_pairs(discs)[1][0]


def test_an_empty_mask_folder_is_one_line(discs):
    write_class_folders(discs, ["kidney"])
    (discs / "masks" / "liver").mkdir()
    problems = data.find_pairs(discs)[1]
    assert len(problems) == 1 and "liver: no mask, it is empty; expected" in problems[0]
    assert "If liver is not a class, remove the folder" in problems[0]
    shutil.rmtree(discs / "masks")
    (discs / "masks").mkdir()
    problems = data.find_pairs(discs)[1]
    assert len(problems) == 1 and "masks: no mask, it is empty; expected" in problems[0]


def test_a_class_folder_may_have_any_name(discs):
    write_class_folders(discs, ["kidney [left]", "cyst*"])
    pairs, problems = data.find_pairs(discs)
    assert problems == [] and len(pairs) == 12 and len(pairs[0].masks) == 2


def test_the_layout_of_the_contributing_page_works(tmp_path, monkeypatch):
    """The function and the line that docs/contributing.md adds are enough."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(def atlas.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(code, {"Folder": Folder, "Layout": Layout, "Pair": Pair}, names)
    monkeypatch.setattr(layouts, "LAYOUTS", (names["atlas"], *layouts.LAYOUTS))
    for place in ("plates/plate1.png", "plates/plate2.png", "drawings/drawing2.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    layout = data.find_data(tmp_path)
    assert [pair.masks[0].name for pair in layout.pairs] == ["drawing2.png"]
    assert "plate1.png: no drawing" in layout.problems[0] and layout.classes == "bone=1,muscle=2"


@pytest.mark.parametrize(
    "command", ["check nowhere", "check --help", "download --help", "phantoms --help"]
)
def test_a_wrong_path_and_help_are_answered_without_slow_imports(tmp_path, command):
    code = f"""import runpy, sys
sys.argv = ["data.py", *{command.split()}]
try:
    runpy.run_path({str(ROOT / "data.py")!r}, run_name="__main__")
except SystemExit as end:
    slow = {{"keras", "tensorflow", "pandas", "sklearn", "scipy", "matplotlib", "albumentations"}}
    print("loaded:", sorted(slow & set(sys.modules)), end.code)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    code = 2 if "nowhere" in command else 0
    assert f"loaded: [] {code}" in done.stdout, done.stdout + done.stderr
    assert code == 0 or "nowhere is not a folder; expected" in done.stderr


# --------------------------------------------------------------------------------------- problems


def damage(discs):
    """Damage one file of each kind; return what the report must say of it."""
    folder, masks = discs / "images", discs / "masks"
    (folder / "disc00.png").write_bytes((folder / "disc00.png").read_bytes()[:300])
    (folder / "disc01.png").write_text("not a picture")
    pictures.write_picture(folder / "disc02.png", np.zeros((1, 1), np.uint8))
    pictures.write_picture(masks / "disc03_mask.png", np.zeros((9 * 4, 40), np.uint8))
    (masks / "disc04_mask.png").unlink()
    mask = formats.read_image(masks / "disc05_mask.png")[..., 0] // 2
    mask[: len(mask) // 2] //= 2
    pictures.write_picture(masks / "disc05_mask.png", mask)
    pictures.write_picture(folder / "disc06.jpg", formats.read_image(folder / "disc06.png"))
    sixteen = formats.read_image(folder / "disc08.png").astype(np.uint16) * 200
    pictures.write_picture(folder / "disc08.png", sixteen)
    rgba = np.repeat(formats.read_image(folder / "disc09.png"), 4, axis=-1)
    cv2.imwrite(str(folder / "disc09.png"), rgba)
    return {
        "disc00.png": "truncated",
        "disc01.png": "expected one of DICOM, TIFF, NIfTI",
        "disc02.png": "1x1 pixels; expected at least",
        "disc03_mask.png": "36x40 pixels; its image disc03.png is 49x57 pixels",
        "disc04.png": "no mask of that name",
        "disc05_mask.png": "values 0, 63, 127; expected 0 and one other value",
        "disc06.png": "same stem as disc06.jpg",
        "disc08.png": "16 bits or more",
        "disc09.png": "alpha channel",
    }


def test_check_names_every_problem_and_exits_2(discs, script):
    said = damage(discs)
    done = script(discs, "data.py", "check", ".")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for name, what in said.items():
        assert any(name in line and what in line for line in done.stdout.splitlines()), (
            name,
            done.stdout,
        )


def test_check_of_a_good_set(discs, capsys):
    data.check(discs)
    said = capsys.readouterr().out
    assert "pairs      12" in said and "no problems" in said and "empty in 0 of 12 masks" in said


def test_training_stops_on_the_same_problems(discs):
    said = damage(discs)
    with pytest.raises(UserError, match="7 problems") as caught:
        load(discs, "disc")
    assert all(name in str(caught.value) for name in list(said)[:7])


def test_left_and_right_are_merged_or_kept(phantoms):
    pairs, _ = data.find_pairs(phantoms)
    merged, both = (
        read_truth(pairs[0], Classes("lung")).mask,
        read_truth(pairs[0], Classes("left lung,right lung")).mask,
    )
    left, right = (formats.read_mask(path)[None] > 0 for path in pairs[0].masks)
    np.testing.assert_array_equal(merged, left | right)  # 255 + 255 did not wrap around
    np.testing.assert_array_equal(both == 1, left)
    np.testing.assert_array_equal(both == 2, right)
    swapped = read_truth(pairs[0], Classes("right lung,left lung")).mask
    np.testing.assert_array_equal(swapped == 2, left)  # the name decides, not the order
    with pytest.raises(UserError, match="folders of masks for .*; --classes names l"):
        read_truth(pairs[0], Classes("lung,heart"))


def test_class_ids_up_to_the_number_of_names(discs):
    path = discs / "masks" / "disc00_mask.png"
    pictures.write_picture(path, (formats.read_image(path)[..., 0] > 0).astype(np.uint8) * 3)
    pair = data.find_pairs(discs)[0][0]
    assert set(np.unique(read_truth(pair, Classes("a,b,c")).mask)) == {0, 3}
    with pytest.raises(UserError, match=r"values 0, 3; expected 0, 1, 2, the values of --classes"):
        read_truth(pair, Classes("a,b"))


def test_mask_values_of_other_kinds_are_refused_with_advice(discs):
    path = discs / "masks" / "disc00_mask.png"
    pair = data.find_pairs(discs)[0][0]
    ids = np.random.default_rng(0).integers(0, 3, formats.read_image(path).shape[:2])
    pictures.write_picture(path, ids.astype(np.uint8))
    with pytest.raises(
        UserError,
        match=r"values 0, 1, 2; expected 0 and one other value \(if these are classes, name them: "
        r"--classes \"NAME1=1,NAME2=2\"",
    ):
        read_truth(pair, Classes("one"))
    for values, dtype in ((ids - 1, np.int32), (ids * 4, np.float32)):
        cv2.imwrite(str(path.with_suffix(".tif")), values.astype(dtype))
        pair = Pair(pair.image, (path.with_suffix(".tif"),))
        with pytest.raises(UserError, match=r"expected 0, 1, 2, the values of --classes"):
            read_truth(pair, Classes("one,two"))


def test_every_fault_of_a_pair_is_reported(discs):
    (discs / "images" / "disc00.png").write_text("text")
    (discs / "masks" / "disc00_mask.png").write_text("text")
    _, problems = loading.load_pairs(
        data.find_pairs(discs)[0], Preprocessing(Classes("disc"), Sampler((32, 32)))
    )
    assert len(problems) == 2 and "disc00.png" in problems[0] and "disc00_mask.png" in problems[1]


def test_names_that_a_table_cannot_hold_and_links_to_nowhere(discs):
    (discs / "images" / "gone.png").symlink_to("nowhere.png")
    (discs / "masks" / "gone.png").symlink_to("nowhere.png")
    with open(os.fsencode(discs / "images") + b"/\xff\xe9.png", "wb") as file:  # noqa: PTH123 (bytes are no Path)
        file.write(b"x")
    pairs, problems = data.find_pairs(discs)
    assert len(problems) == 1 and "unprintable" in problems[0]
    _, problems = loading.load_pairs(pairs, Preprocessing(Classes("disc"), Sampler((32, 32))))
    assert len(problems) == 2 and all(
        "gone.png: cannot be opened" in problem for problem in problems
    )


def test_accents_may_be_composed_or_not(discs):
    (discs / "images" / "disc00.png").rename(discs / "images" / "caf\u00e9.png")
    (discs / "masks" / "disc00_mask.png").rename(discs / "masks" / "cafe\u0301_mask.png")
    assert data.find_pairs(discs)[1] == []


def write_class_folders(discs, names):
    """Give each disc a mask for each class: of the first all of it, of the next the upper half."""
    whole = {path.name: formats.read_mask(path) for path in sorted((discs / "masks").iterdir())}
    shutil.rmtree(discs / "masks")
    for i, name in enumerate(names):
        for file, mask in whole.items():
            half = mask.copy()
            half[len(half) // 2 :] *= i == 0
            pictures.write_picture(discs / "masks" / name / file, half)
    return whole


def test_each_class_may_have_a_folder_and_the_last_named_wins_what_is_of_both(discs, tmp_path):
    whole = write_class_folders(discs, ["kidney", "cyst"])  # in the alphabet the other way round
    pairs, problems = data.find_pairs(discs)
    assert problems == []
    for pair in pairs[:3]:
        mask = whole[f"{pair.stem}_mask.png"] > 0
        upper = np.arange(len(mask))[:, None] < len(mask) // 2
        np.testing.assert_array_equal(
            read_truth(pair, Classes("kidney,cyst")).mask[0], mask * (1 + upper)
        )
        assert set(np.unique(read_truth(pair, Classes("either")).mask)) == {0, 1}
    write_split(tmp_path / "split.csv", pairs, ["train"] * len(pairs))
    assert read_split(tmp_path / "split.csv")[0] == [Pair(pair.image, pair.masks) for pair in pairs]
    with pytest.raises(
        UserError,
        match="folders of masks for cyst, kidney; --classes names kidney, stone, or one for all",
    ):
        read_truth(pairs[0], Classes("kidney,stone"))


def test_class_folders_that_become_one_class_are_reported(discs, tmp_path, capsys):
    write_class_folders(discs, ["kidney", "cyst"])
    load(discs, "x")
    said = 'the masks of cyst, kidney become one class; --classes "cyst,kidney" keeps them apart'
    assert said in capsys.readouterr().out
    data.check(discs, classes="x", output=tmp_path / "page")
    assert said in capsys.readouterr().out
    data.check(discs, output=tmp_path / "page")
    out = capsys.readouterr().out
    assert "become one" not in out and "cyst: " in out and "kidney: " in out
    load(discs, "kidney,cyst")
    assert "become one" not in capsys.readouterr().out


def test_a_window_that_shows_nothing_is_refused(discs):
    with pytest.raises(
        UserError, match=r"disc00\.png: nothing is seen in window 900,10 of grey levels \d+ to \d+"
    ):
        load(discs, "x", window="900,10")


def test_a_slice_of_air_is_a_note(discs, capsys):
    pictures.write_picture(discs / "images" / "air.png", np.uint8(np.eye(64)))
    pictures.write_picture(discs / "masks" / "air_mask.png", np.zeros((64, 64), np.uint8))
    load(discs, "x", window="128,200")
    assert "nothing is seen in window 128,200 of grey levels" in capsys.readouterr().out


def test_classes_may_be_grey_levels(discs):
    pair = data.find_pairs(discs)[0][0]
    mask = formats.read_mask(pair.masks[0]) > 0
    pictures.write_picture(pair.masks[0], np.uint8(63 * mask))
    for classes, expected in (("liver=63", mask), ("other=7,liver=63", 2 * mask)):
        np.testing.assert_array_equal(read_truth(pair, Classes(classes)).mask[0], expected)
    for classes in ("liver=62", "a=1,b=2"):
        with pytest.raises(UserError, match="values 0, 63; expected"):
            read_truth(pair, Classes(classes))
    for classes in ("a=x", "a=0", "a=3,b=3"):
        with pytest.raises(UserError, match="expected different grey levels"):
            Classes(classes)


def test_patients_of_dicom_headers_stay_together(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(6):
        header = pydicom.dcmread(Path(data_manager.__file__).parent / "test_files" / "CT_small.dcm")
        header.PatientID, header.PixelData = (
            f"patient {i // 2}",
            np.full((128, 128), i, np.int16).tobytes(),
        )
        header.save_as(tmp_path / "images" / f"{i}.dcm")
        pictures.write_picture(tmp_path / "masks" / f"{i}.png", np.eye(128, dtype=np.uint8))
    pairs, _ = load(tmp_path, "x", window="0,10")
    patients = [pair.patient for pair in pairs]
    assert patients[::2] == patients[1::2] and len(set(patients)) == 3
    assert "patient" not in "".join(patients)
    for path in (tmp_path / "images").iterdir():
        header = pydicom.dcmread(path)
        header.PatientID = "anonymous"
        header.save_as(path)
    pairs, _ = load(tmp_path, "x", window="0,10")
    assert {pair.patient for pair in pairs} == {""}


def test_an_image_without_the_window_asked_for_is_named(discs):
    pairs, _ = data.find_pairs(discs)
    _, problems = loading.load_pairs(
        pairs[:2], Preprocessing(Classes("disc"), Sampler((32, 32)), window="file")
    )
    assert len(problems) == 2 and "disc00.png: its header proposes no window" in problems[0]


@pytest.mark.parametrize("classes", [",", "a,,b", "a,a", "a\\b"])
def test_class_names_must_be_names(classes):
    with pytest.raises(UserError, match="expected 1 to 255 different names"):
        Classes(classes)


# -------------------------------------------------------------------------------------- the cache


def test_the_cache_gives_the_same_and_notices_a_changed_file(discs, tmp_path, monkeypatch):
    pairs, _ = data.find_pairs(discs)
    first, _ = loading.load_pairs(
        pairs, Preprocessing(Classes("disc"), Sampler((32, 32))), tmp_path / "cache"
    )
    reads = []
    for name in ("decode_scan", "decode_mask_scan"):
        decode = getattr(formats, name)
        counted = partial(lambda decode, *args: reads.append(1) or decode(*args), decode)
        monkeypatch.setattr(formats, name, counted)
    again, _ = loading.load_pairs(
        pairs, Preprocessing(Classes("disc"), Sampler((32, 32))), tmp_path / "cache"
    )
    assert reads == []
    np.testing.assert_array_equal(images_of(first), images_of(again))
    np.testing.assert_array_equal(masks_of(first), masks_of(again))
    pd.testing.assert_frame_equal(first.info, again.info)
    flipped = formats.read_image(pairs[5].image)[::-1]
    pictures.write_picture(pairs[5].image, flipped)
    os.utime(pairs[5].image, ns=(1, 1))
    reads.clear()
    changed, _ = loading.load_pairs(
        pairs, Preprocessing(Classes("disc"), Sampler((32, 32))), tmp_path / "cache"
    )
    assert len(reads) == 2  # that image and its mask
    np.testing.assert_array_equal(
        images_of(changed)[5], preprocess.prepare_image(flipped, (32, 32), 1)
    )
    np.testing.assert_array_equal(
        np.delete(images_of(changed), 5, 0), np.delete(images_of(first), 5, 0)
    )


def test_a_damaged_cache_is_made_anew(discs, tmp_path):
    pairs, _ = data.find_pairs(discs)
    first, _ = loading.load_pairs(
        pairs, Preprocessing(Classes("disc"), Sampler((32, 32))), tmp_path / "cache"
    )
    for path in (tmp_path / "cache").glob("*.cases"):
        path.write_bytes(path.read_bytes()[:-300])
    again, problems = loading.load_pairs(
        pairs, Preprocessing(Classes("disc"), Sampler((32, 32))), tmp_path / "cache"
    )
    np.testing.assert_array_equal(images_of(first), images_of(again))
    assert problems == []


def test_resized_masks_hold_the_share_of_each_pixel(discs):
    pairs, _ = data.find_pairs(discs)
    dataset, _ = loading.load_pairs(pairs, Preprocessing(Classes("disc"), Sampler((24, 24))))
    assert (
        images_of(dataset).shape == (12, 24, 24, 1)
        and images_of(dataset).dtype == masks_of(dataset).dtype == np.uint8
    )
    assert masks_of(dataset).shape == (12, 24, 24, 1) and len(np.unique(masks_of(dataset))) > 10
    for masks, ids in zip(
        masks_of(dataset), (read_truth(pair, Classes("disc")).mask for pair in pairs), strict=True
    ):
        grid = fit_grid(ids.shape, (24, 24))
        assert masks[grid.rows, grid.columns].mean() == pytest.approx(255 * ids.mean(), abs=0.5)


# ----------------------------------------------------------------------------------------- splits


def make_pairs(count, patients=None, labels=None, subsets=None):
    return [
        Pair(
            Path(f"images/p{i:03d}.png"),
            (Path(f"masks/p{i:03d}.png"),),
            patients[i] if patients else "",
            labels[i] if labels else "",
            subsets[i] if subsets else "",
        )
        for i in range(count)
    ]


def test_a_split_has_the_shares_asked_for_and_its_seed_decides():
    pairs = make_pairs(100)
    subsets = data.split(pairs, 0.15, 0.2, seed=0)
    counts = pd.Series(subsets).value_counts()
    assert counts["test"] == 20 and 10 <= counts["val"] <= 14 and counts.sum() == 100
    assert subsets == data.split(pairs, 0.15, 0.2, seed=0) != data.split(pairs, 0.15, 0.2, seed=1)


def test_labels_are_shared_out_equally():
    labels = ["1"] * 58 + ["0"] * 80  # Montgomery's tuberculosis and normal cases
    subsets = np.array(data.split(make_pairs(138, labels=labels), 0.15, 0.2, seed=0))
    shares = [np.mean(np.array(labels)[subsets == name] == "1") for name in SUBSETS]
    assert all(abs(share - 58 / 138) < 0.05 for share in shares)


def test_a_patient_is_in_one_subset_only():
    patients = [f"patient{i // 7}" for i in range(140)]
    for fold in range(5):
        subsets = data.split(make_pairs(140, patients=patients), 0.15, 0.2, 0, folds=5, fold=fold)
        assert pd.DataFrame({"p": patients, "s": subsets}).groupby("p").s.nunique().max() == 1
        assert set(subsets) == set(SUBSETS)


def test_every_image_is_tested_once_in_cross_validation():
    pairs = make_pairs(53)
    tested = [
        np.array(data.split(pairs, 0.15, 0.2, 0, folds=5, fold=i)) == "test" for i in range(5)
    ]
    assert (np.sum(tested, axis=0) == 1).all()


def test_cross_validation_leaves_a_fixed_test_set_alone():
    fixed = ["test" if i % 3 == 0 else "train" for i in range(60)]
    tested = np.zeros(60)
    for fold in range(4):
        subsets = np.array(
            data.split(make_pairs(60, subsets=fixed), 0.15, 0.2, seed=0, folds=4, fold=fold)
        )
        assert (subsets[np.array(fixed) == "test"] == "").all()
        tested += subsets == "test"
    assert (tested == (np.array(fixed) == "train")).all()


def test_a_fixed_test_set_is_kept():
    fixed = ["test" if i % 3 == 0 else "train" for i in range(60)]
    subsets = data.split(make_pairs(60, subsets=fixed), 0.15, 0.2, seed=0)
    assert [subset == "test" for subset in subsets] == [subset == "test" for subset in fixed]
    assert "val" in subsets


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 60), (0.34, 40), (0.2, 24), (0.15, 18)])
def test_the_validation_set_has_its_fraction(fraction, count):
    assert data.split(make_pairs(120), fraction, 0).count("val") == count


def test_a_patient_that_the_index_puts_in_two_subsets_is_named():
    pairs = make_pairs(
        40,
        patients=["p1", "p1", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL"],
        subsets=["test", *[""] * 39],
    )
    with pytest.raises(
        UserError, match=r"index.csv puts patient p1 in test and in \w+; name one subset for all"
    ):
        data.split(pairs, 0.15, 0.2, seed=0)


def test_many_patients_are_split_quickly_with_equal_shares_of_labels():
    """scikit-learn looks at each patient in each fold: 6 seconds for 10,000."""
    pairs = [Pair(Path(f"{i}.png"), (), f"p{i // 2}", f"{i // 2 % 3}") for i in range(6000)]
    subsets = np.array(data.split(pairs, 0.15, 0.2))
    assert abs(np.mean(subsets == "test") - 0.2) < 0.001
    assert abs(np.mean(subsets == "val") - 0.8 / 7) < 0.001
    for label in range(3):
        shares = np.array([pair.label == str(label) for pair in pairs])
        assert abs(shares[subsets == "test"].mean() - 1 / 3) < 0.001
    folds = [data.split(pairs, 0, 0, folds=3, fold=fold) for fold in range(3)]
    tested = [{i for i, one in enumerate(fold) if one == "test"} for fold in folds]
    assert set().union(*tested) == set(range(6000)) and sum(map(len, tested)) == 6000
    assert all(fold[i] == fold[i + 1] for fold in folds for i in range(0, 6000, 2))


def test_rare_labels_do_not_stop_a_split():
    labels = ["0"] * 6 + ["1"] * 5 + ["rare"]
    assert set(data.split(make_pairs(12, labels=labels), 0.15, 0.2, seed=0)) == set(SUBSETS)


def test_too_few_images_to_split():
    with pytest.raises(UserError, match="4 patients"):
        data.split(make_pairs(4), 0.15, 0.2, seed=0)


def test_index_csv_gives_patients_labels_and_split(discs):
    stems = [f"disc{i:02d}" for i in range(12)]
    table = pd.DataFrame(
        {"stem": stems, "patient": [s[-1] for s in stems], "split": ["Test"] * 3 + ["Train"] * 9}
    )
    table.to_csv(discs / "index.csv", index=False)
    pairs, problems = data.find_pairs(discs)
    assert problems == []
    assert pairs[2].patient == "2" and pairs[2].subset == "test" and pairs[5].subset == "train"
    (discs / "index.csv").write_text(
        "Stem, Patient , split\n" + "\n".join(f"{s}, {s[-1]}, Test " for s in stems)
    )
    pairs, problems = data.find_pairs(discs)
    assert problems == [] and pairs[2].patient == "2" and pairs[2].subset == "test"
    table.iloc[1:].assign(split="holdout").to_csv(discs / "index.csv", index=False)
    _, problems = data.find_pairs(discs)
    assert "no row for disc00" in names_of(problems) and "split is 'holdout'" in names_of(problems)


@pytest.mark.parametrize(
    "content",
    [b"", b"stem,patient\n\xff\xfe,1\n", b"stem\na,b\nc,d,e\n", b"name\na\n", b"stem,Stem\na,a\n"],
)
def test_an_index_that_is_no_table_is_refused(discs, content):
    (discs / "index.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"index.csv (cannot be read|has columns)"):
        data.find_pairs(discs)


def test_a_right_mask_of_another_ending_is_found_again(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "set")
    path = tmp_path / "set" / "ManualMask" / "rightMask" / "phantom_0000.png"
    path.rename(path.with_name("phantom_0000_mask.png"))
    pairs, problems = data.find_pairs(tmp_path / "set")
    assert problems == []
    write_split(tmp_path / "split.csv", pairs, ["test"] * len(pairs))
    assert read_split(tmp_path / "split.csv")[0][0].masks == pairs[0].masks


def test_the_split_is_reread_as_it_was_written(phantoms, discs, tmp_path):
    for folder in (phantoms, discs):
        pairs, _ = data.find_pairs(folder)
        subsets = data.split(pairs, 0.2, 0.2, seed=3)
        write_split(tmp_path / "split.csv", pairs, subsets)
        assert tuple(pd.read_csv(tmp_path / "split.csv").columns) == split_table.COLUMNS
        reread, again = read_split(tmp_path / "split.csv")
        assert again == subsets
        assert [(p.image, p.masks) for p in reread] == [(p.image, p.masks) for p in pairs]
