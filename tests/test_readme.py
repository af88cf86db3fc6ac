"""The README is part of the product: what it names exists."""

import dataclasses
import inspect
import re

from conftest import ROOT

import export
import predict
import serve
import train
from benchmarks.accuracy.__main__ import COMMANDS as STUDIES
from benchmarks.speed.__main__ import COMMANDS as SPEEDS
from dataset.phantoms import Config
from inference import archive

CONFIGS = (train.Config, predict.Config, Config, export.Config, serve.Config, archive.Config)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_pictures_and_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    for script in ROOT.glob("*.py"):
        assert f"`{script.name}`" in README, script.name


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_every_flag_exists():
    fields = [field.name for config in CONFIGS for field in dataclasses.fields(config)]
    for call in (*STUDIES, *SPEEDS):
        fields += inspect.signature(call).parameters
    known = {"--" + name.replace("_", "-") for name in fields}
    known |= {flag.replace("--", "--no-", 1) for flag in known} | {"--help"}
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README):
        assert flag in known, flag


def test_the_three_numbers_to_change_are_fields():
    for name in ("image_size", "filters", "batch_size"):
        assert f"`{name} = " in README and name in {
            field.name for field in dataclasses.fields(train.Config)
        }
