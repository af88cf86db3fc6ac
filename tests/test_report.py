"""The page that describes a data set, and the hyperparameters that it proposes."""

import dataclasses
import json
import shlex
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from test_volumes import ct

import data
import train
from dataset import loading, report
from dataset.loading import Preprocessing
from imaging import pictures
from imaging.labels import Classes
from inference.sampler import Sampler
from utils import UserError


def described(folder: Path, classes: str = "foreground"):
    pairs, problems = data.find_pairs(folder)
    dataset, unreadable = loading.load_pairs(
        pairs, Preprocessing(Classes(classes), Sampler((128, 128)))
    )
    return dataset, dataset.classes.names, problems + unreadable


def test_the_page_shows_pictures_problems_and_proposals(discs, tmp_path, script):
    (discs / "images" / "disc03.png").write_bytes(b"no picture")
    done = script(tmp_path, "data.py", "check", discs, "--output", "page")
    assert done.returncode == 2 and "disc03.png" in done.stdout
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 11 and "all 12 are shown" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    # What is wrong stands above everything else, and first among the pictures.
    assert page.index("1 problem to repair first") < page.index("Then train with")
    assert page.index("cannot be read") < page.index("data:image/webp")
    proposed = json.loads((tmp_path / "page" / "report.json").read_text())
    assert proposed["data_dir"] == str(discs) and proposed["classes"] == "foreground"
    assert set(proposed) <= {field.name for field in dataclasses.fields(train.Config)}
    for name, value in proposed.items():
        assert name in ("data_dir", "classes") or f"<th scope=row>{name}<td>{value}<td>" in page


def test_file_names_are_no_html(discs, tmp_path):
    (discs / "images" / "<b>bold<b>.png").write_bytes(b"")
    with pytest.raises(UserError):
        data.check(discs, output=tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in page and "&lt;b&gt;bold" in page


def test_an_empty_data_set_has_a_page_too(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "set" / name).mkdir(parents=True)
    with pytest.raises(UserError):
        data.check(tmp_path / "set", output=tmp_path / "page")
    assert "no image" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


def write_discs(folder: Path, side: int, radius: int) -> Path:
    for i in range(10):
        mask = np.zeros((side, side), np.uint8)
        cv2.circle(mask, (side // 2 + i, side // 2), radius, 255, cv2.FILLED)
        pictures.write_picture(folder / "images" / f"{i}.png", np.uint8(mask // 2 + 50 + i))
        pictures.write_picture(folder / "masks" / f"{i}.png", mask)
    return folder


@pytest.mark.parametrize(
    ("radius", "size", "loss"), [(200, 128, None), (30, 224, None), (12, 512, "tversky")]
)
def test_small_objects_ask_for_large_inputs(tmp_path, radius, size, loss):
    dataset, names, problems = described(write_discs(tmp_path, 1024, radius))
    chosen = report.suggest(dataset, names)
    assert problems == [] and chosen["image_size"] == size and chosen.get("loss") == loss
    assert "window" not in chosen and chosen["channels"] == 1


def test_of_ct_a_window_is_proposed_that_holds_the_organs(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        for name, voxels in zip(("images", "masks"), ct(i), strict=True):
            nibabel.save(
                nibabel.Nifti1Image(voxels, np.diag((1.6, 1.6, 5, 1))),
                tmp_path / name / f"{i}.nii.gz",
            )
    dataset, names, _ = described(tmp_path, "liver,kidney,spine")
    chosen = report.suggest(dataset, names)
    centre, width = map(float, chosen["window"].split(","))
    assert (
        -200 < centre - width / 2 < 110 - 45 and 500 < centre + width / 2 < 900
    )  # organs have 110 to 500 HU
    assert set(chosen) <= set(report.REASONS)
    assert f"--window {chosen['window']}" in report.train_command(chosen)


def test_the_command_is_quoted_for_a_shell():
    fields = {"data_dir": "my images", "classes": "left lung,heart", "window": "-600,1500"}
    words = shlex.split(report.train_command(fields))
    assert words[2:6] == ["--data-dir", "my images", "--classes", "left lung,heart"]
    assert words[6:] == ["--window=-600,1500", "--out-dir", "files/mine"]


@pytest.mark.slow
def test_check_then_the_command_it_prints(discs, tmp_path, script):
    done = script(tmp_path, "data.py", "check", discs)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"next: python train.py --data-dir {discs} --image-size 128")
    words = shlex.split(last.removeprefix("next: python "))
    small = "--image-size 32 --filters 4 --depth 2 --epochs 1"
    done = script(tmp_path, *words, *small.split())
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "files" / "mine" / "config.json").read_text())
    assert settings["data_dir"] == str(discs)
    proposed = json.loads((tmp_path / "results" / "check" / "report.json").read_text())
    assert settings["batch_size"] == proposed["batch_size"]
