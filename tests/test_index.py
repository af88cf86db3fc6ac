"""index.csv as spreadsheets save it; patients in file names; copies."""

import re

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import load

import data
from dataset import copies, loading, patients
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from imaging import formats, pictures
from imaging.labels import Classes
from inference.sampler import Sampler


def folder_of(root, names):
    for i, name in enumerate(names):
        for place, value in (("images", 10 * i), ("masks", 1)):
            path = root / place / f"{name}.png"
            pictures.write_picture(path, np.full((20, 20), value, np.uint8))
    return root


# -------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "stem", ["größe {}", "größe {}.png", "images/größe {}", "images\\größe {}.png"]
)
def test_index_csv_as_spreadsheets_save_it(tmp_path, delimiter, encoding, stem):
    folder_of(tmp_path, [f"größe {i}" for i in range(4)])
    rows = [["Stem", "Patient"], *([stem.format(i), f"P{i // 2}"] for i in range(4)), ["", ""]]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "index.csv").write_bytes(text.encode(encoding))
    layout = data.find_data(tmp_path)
    assert layout.problems == [] and layout.notes == []
    assert [pair.patient for pair in layout.pairs] == ["P0", "P0", "P1", "P1"]


def test_a_stem_of_several_images_is_written_with_its_folder(tmp_path):
    for patient in ("p1", "p2"):
        folder_of(tmp_path / patient, ["a", "b"])
    (tmp_path / "index.csv").write_text("stem,split\na,train\nb,train\n")
    problems = data.find_data(tmp_path).problems
    assert (
        "stem a is the name of 2 images; write it with its folder, as p1/images/a.png"
        in problems[0]
    )
    rows = "p1/a,train\np1/b,train\np2/images/a.png,test\np2/b.png,validation\n"
    (tmp_path / "index.csv").write_text(f"stem,split\n{rows}")
    layout = data.find_data(tmp_path)
    assert layout.problems == []
    assert [pair.subset for pair in layout.pairs] == ["train", "train", "test", "val"]
    assert [pair.patient for pair in layout.pairs] == ["p1", "p1", "p2", "p2"]


def test_rows_without_an_image_are_told(tmp_path):
    folder_of(tmp_path, ["a"])
    (tmp_path / "index.csv").write_text("image,patient\na,P1\nb,P1\nc,P2\n")
    layout = data.find_data(tmp_path)
    assert layout.notes == ["2 rows of index.csv name no image: b, c"] and not layout.problems
    (tmp_path / "index.csv").write_text("stem,patient\na,P1\na.png,P2\n")
    assert "stem a.png twice; keep one row" in data.find_data(tmp_path).problems[0]


def test_columns_without_a_meaning_are_told(tmp_path):
    folder_of(tmp_path, ["a", "b"])
    (tmp_path / "index.csv").write_text("stem,patients,mask\na,1,masks/a.png\nb,1,b\n")
    layout = data.find_data(tmp_path)
    assert layout.problems == []
    assert layout.notes == [
        "columns of index.csv that are not used: patients; those that count are stem, patient, "
        "label, split"
    ]


def test_a_row_that_names_another_mask_is_a_problem(tmp_path):
    folder_of(tmp_path, ["a", "b"])
    (tmp_path / "index.csv").write_text("image,mask\na.png,b.png\nb.png,b.png\n")
    (problem,) = data.find_data(tmp_path).problems
    assert "mask of a is b.png; by its name it is a.png" in problem


def test_a_first_line_for_excel_and_other_names_of_columns(tmp_path):
    folder_of(tmp_path, ["a", "b"])
    (tmp_path / "index.csv").write_text("sep=;\nFilename;Patient ID;Subset\na;7;Train\nb;8;TEST\n")
    layout = data.find_data(tmp_path)
    assert layout.problems == []
    assert [(p.patient, p.subset) for p in layout.pairs] == [("7", "train"), ("8", "test")]


# ------------------------------------------------------------------------------------ patients


def guesses(*stems):
    pairs = [Pair(patients.Path(f"set/{stem}.png"), ()) for stem in stems]
    return dict(zip(stems, patients.guess_patients(pairs), strict=True))


@pytest.mark.parametrize(
    ("pattern", "patient"),
    [
        ("patient{p:02}_slice{i}", "patient{p:02}"),
        ("P{p:02}-{i}", "P{p:02}"),
        ("sub-{p:02}_ses-{i}", "sub-{p:02}"),
        ("study_sub-{p:02}_T1w_{i}", "sub-{p:02}"),
        ("TCGA-A{p}-0001_{i}", "TCGA-A{p}-0001"),
        ("TCGA_CS_494{p}_19960909_{i}", "TCGA_CS_494{p}"),
        ("case{p}_slice_{i:03}", "case{p}"),
        ("case{p}_slice_{i:03}_rgb", "case{p}"),
        ("slide{p}_x{i}_y0", "slide{p}"),
        ("lung{p}-z{i:03}", "lung{p}"),
        ("IMG_000{p}_{i}", "IMG_000{p}"),
        ("SC-HF-I-0{p}-IM-0001-00{i}", "SC-HF-I-0{p}"),
    ],
)
def test_patients_in_file_names(pattern, patient):
    stems = [(p, pattern.format(p=p, i=i)) for p in range(5) for i in range(3)]
    found = guesses(*(stem for _, stem in stems))
    assert [found[stem] for _, stem in stems] == [patient.format(p=p) for p, _ in stems]


@pytest.mark.parametrize("sides", [("L", "R"), ("_left", "_right"), ("_OD", "_OS")])
def test_both_sides_of_a_patient(sides):
    found = guesses(*(f"Image_{i:02}{side}" for i in range(5) for side in sides))
    assert found[f"Image_03{sides[0]}"] == found[f"Image_03{sides[1]}"] == "Image_03"


@pytest.mark.parametrize(
    "stems",
    [
        [f"scan{i}" for i in range(12)],
        [f"hippocampus_{i:03}" for i in range(12)],
        [f"MCUCXR_{i:04}_{i % 2}" for i in range(12)],
        [f"2019_{i:03}" for i in range(12)],
        [f"patient{i:02}" for i in range(12)],
        [f"{i * 7919:x}" for i in range(12)],
    ],
)
def test_names_that_tell_no_patient(stems):
    assert set(guesses(*stems).values()) <= {"", *stems}
    assert (
        patients.warn_of_patients([Pair(patients.Path(f"{stem}.png"), ()) for stem in stems]) == []
    )


def slices_of_patients(root):
    random = np.random.default_rng(0)
    for p in range(6):
        for i in range(3):
            for place, pixels in (
                ("images", random.integers(0, 255, (32, 32))),
                ("masks", np.eye(32)),
            ):
                path = root / place / f"patient{p:02}_slice{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), pixels.astype(np.uint8))
    return root


def test_check_warns_and_writes_the_index_that_repairs_it(tmp_path, capsys):
    root = slices_of_patients(tmp_path / "set")
    data.check(root, output=tmp_path / "page")
    said = capsys.readouterr().out
    assert "warning    the subsets would share images of one patient: 6 patients" in said
    assert "patient00: patient00_slice0.png, patient00_slice1.png" in said
    assert f"copy {tmp_path / 'page' / 'index.csv'} to {root / 'index.csv'}" in said
    (tmp_path / "page" / "index.csv").rename(root / "index.csv")
    pairs = data.find_pairs(root)[0]
    assert [pair.patient for pair in pairs[:4]] == ["patient00"] * 3 + ["patient01"]
    data.check(root, output=tmp_path / "page")
    assert "warning" not in capsys.readouterr().out


def test_training_warns_too(tmp_path, capsys):
    root = slices_of_patients(tmp_path / "set")
    load(root)
    said = capsys.readouterr().out
    assert "warning: the subsets would share images of one patient" in said
    assert "python data.py check writes it" in said


def test_given_subsets_that_share_patients_are_warned_of(tmp_path):
    root = slices_of_patients(tmp_path)
    rows = [
        f"patient{p:02}_slice{i},{'test' if i else 'train'}" for p in range(6) for i in range(3)
    ]
    (root / "index.csv").write_text("\n".join(["stem,split", *rows]))
    (warning,) = patients.warn_of_patients(data.find_pairs(root)[0])
    assert "6 patients have images in several subsets" in warning
    rows = [
        f"patient{p:02}_slice{i},{'test' if p else 'train'}" for p in range(6) for i in range(3)
    ]
    (root / "index.csv").write_text("\n".join(["stem,split", *rows]))
    assert patients.warn_of_patients(data.find_pairs(root)[0]) == []


# --------------------------------------------------------------------------------------- copies


def test_nearly_the_same_images_are_named(discs):
    image = formats.read_image(discs / "images" / "disc03.png")[..., 0]
    cv2.imwrite(str(discs / "images" / "again.jpg"), np.uint8(image * 0.9 + 5))
    (discs / "masks" / "again.png").write_bytes((discs / "masks" / "disc03_mask.png").read_bytes())
    pairs = data.find_pairs(discs)[0]
    dataset, _ = loading.load_pairs(pairs, Preprocessing(Classes("x"), Sampler((32, 32))))
    (warning,) = copies.warn_of_copies(pairs, dataset)
    assert "again.jpg and disc03.png" in warning and warning.startswith("1 pair of images is")
    table = pd.DataFrame({"stem": [pair.stem for pair in pairs], "split": "train"})
    table.to_csv(discs / "index.csv", index=False)
    assert copies.warn_of_copies(data.find_pairs(discs)[0], dataset) == []


def copy_disc(discs, name, new):
    for place, ending in (("images", ".png"), ("masks", "_mask.png")):
        content = (discs / place / f"{name}{ending}").read_bytes()
        (discs / place / f"{new}{ending}").write_bytes(content)


def test_copies_are_named_and_drawn_into_one_subset(discs, capsys):
    for i in range(5):
        copy_disc(discs, f"disc0{i}", f"zcopy{i}")
    pairs, _ = load(discs)
    said = capsys.readouterr().out
    for i in range(5):
        line = rf"warning: \S*zcopy{i}\.png: the same image as \S*disc0{i}\.png; they stay in one"
        assert re.search(line, said)
    for seed in range(5):
        subsets = data.split(pairs, 0.2, 0.2, seed)
        by_stem = {pair.stem: subset for pair, subset in zip(pairs, subsets, strict=True)}
        assert all(by_stem[f"disc0{i}"] == by_stem[f"zcopy{i}"] for i in range(5))


def test_copies_of_several_patients_join_them(discs, capsys):
    copy_disc(discs, "disc00", "zcopy")
    rows = [f"disc{i:02},p{i // 2}" for i in range(12)]
    (discs / "index.csv").write_text("\n".join(["stem,patient", *rows, "zcopy,p5"]))
    pairs, _ = load(discs)
    together = {pair.stem for pair in pairs if pair.patient == pairs[0].patient}
    assert together == {"disc00", "disc01", "disc10", "disc11", "zcopy"}


def test_copies_in_given_subsets_are_named(discs, capsys):
    copy_disc(discs, "disc00", "zcopy")
    rows = [f"disc{i:02},train" for i in range(12)]
    (discs / "index.csv").write_text("\n".join(["stem,split", *rows, "zcopy,test"]))
    pairs, _ = load(discs)
    assert "disc00.png; one is test, the other train: remove it" in capsys.readouterr().out
    assert data.split(pairs, 0, 0.2)[-1] == "test" and not any(pair.patient for pair in pairs)
