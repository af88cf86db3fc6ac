"""The page that describes a data set, and the hyperparameters that it proposes."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

import data
import train
from dataset import report
from utils import UserError


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


def test_the_command_is_quoted_for_a_shell():
    fields = {"data_dir": "my images", "classes": "left lung,heart", "window": "-600,1500"}
    words = shlex.split(report.train_command(fields))
    assert words[2:6] == ["--data-dir", "my images", "--classes", "left lung,heart"]
    assert words[6:] == ["--window=-600,1500", "--out-dir", "files/mine"]
    short = report.train_command(fields, Path("r s.json"))
    assert short == "python train.py --from-report 'r s.json' --out-dir files/mine"
    assert report.train_command({"data_dir": "a"}, Path("report.json")).split()[2] == "--data-dir"


@pytest.mark.slow
def test_check_then_the_command_it_prints(discs, tmp_path, script):
    done = script(tmp_path, "data.py", "check", discs)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    named = "results/check/report.json"
    assert last == f"next: python train.py --from-report {named} --out-dir files/mine"
    words = shlex.split(last.removeprefix("next: python "))
    small = "--image-size 32 --filters 4 --depth 2 --epochs 1"
    done = script(tmp_path, *words, *small.split())
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "files" / "mine" / "config.json").read_text())
    assert settings["data_dir"] == str(discs)
    proposed = json.loads((tmp_path / "results" / "check" / "report.json").read_text())
    assert settings["batch_size"] == proposed["batch_size"]
