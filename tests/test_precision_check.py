"""Reduced precision is checked on each kind of processor: one says nothing about another."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT

import metrics
import utils
from dataset.phantoms import draw_phantom
from imaging import pictures
from inference import engines, precision_check
from inference.models import BUNDLED_MODEL
from inference.segment import Prediction
from utils import UserError

BUNDLED = ROOT / BUNDLED_MODEL


@pytest.fixture
def elsewhere(tmp_path):
    """The pretrained model, measured on another kind of processor; two images, one damaged."""
    shutil.copytree(BUNDLED.parent, tmp_path / "exported")
    place = tmp_path / "exported" / "manifest.json"
    manifest = json.loads(place.read_text())
    manifest["precisions"] = {
        "another": dict.fromkeys(("onnxruntime int8", "openvino int8", "openvino bfloat16"), 1.0)
    }
    place.write_text(json.dumps(manifest))
    pictures.write_picture(tmp_path / "scans" / "a.png", draw_phantom(np.random.default_rng(0))[0])
    (tmp_path / "scans" / "b.png").write_bytes(b"\x89PNG?")
    return tmp_path / "exported" / "unet.onnx"


def test_what_was_measured_elsewhere_does_not_count(elsewhere):
    assert engines.load_engine(elsewhere)[0].precision == "float32"
    with pytest.raises(UserError, match="is not measured; .* run python -m inference"):
        engines.load_engine(elsewhere, "onnxruntime", "int8")


def test_measured_here_it_counts(elsewhere, script):
    done = script(
        elsewhere.parent,
        "-m",
        "inference.precision_check",
        "--model",
        elsewhere,
        "--images",
        elsewhere.parent.parent / "scans",
    )
    assert done.returncode == 0, done.stderr
    assert "b.png: " in done.stdout and "left out" in done.stdout
    noted = json.loads(elsewhere.with_name("manifest.json").read_text())["precisions"]
    assert set(noted) == {"another", utils.kind_of_cpu()}
    dice = noted[utils.kind_of_cpu()]["onnxruntime int8"]
    assert noted[utils.kind_of_cpu()]["images"] == "1, scans"  # not the damaged one
    assert 0.9 < dice < 1  # of a phantom, which that model was not made for
    assert f"Dice {dice:.5f}" in done.stdout
    if dice < engines.MIN_DICE_VS_FLOAT32:
        with pytest.raises(UserError, match=f"is {dice:.4f}; expected at least"):
            engines.load_engine(elsewhere, "onnxruntime", "int8")
    else:
        assert engines.load_engine(elsewhere, "onnxruntime", "int8")[0].precision == "int8"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "no images at"),
        ("scans/b.png", "none of the 1 files"),
        ("black.png", "none of the 1 files"),
    ],
)
def test_without_images_that_show_something_nothing_is_noted(
    elsewhere, source, message, monkeypatch
):
    def find_nothing(*_):
        return [Prediction(np.zeros((1, 64, 64), np.uint8), None, float("nan"), None, None)]

    monkeypatch.setattr(precision_check, "segment_scans", find_nothing)
    folder, before = elsewhere.parent.parent, elsewhere.with_name("manifest.json").read_text()
    pictures.write_picture(
        folder / "black.png", np.zeros((64, 64), np.uint8)
    )  # two empty masks are the same in any precision
    with pytest.raises(UserError, match=message):
        precision_check.main(
            precision_check.Config(images=str(folder / source), model=str(elsewhere))
        )
    assert elsewhere.with_name("manifest.json").read_text() == before


def test_its_dice_is_that_of_the_metrics_without_absent_classes():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, (2, 40, 40))
    expected = pytest.approx(metrics.score_classes(truth, found, ["a", "b"])["dice"])
    assert (
        precision_check.mean_dice(truth, found, 2)
        == expected
        == precision_check.mean_dice(truth, found, 5)
    )
    assert precision_check.mean_dice(truth * 0, found, 2) == 0 and np.isnan(
        precision_check.mean_dice(truth * 0, found * 0, 2)
    )


@pytest.mark.parametrize(
    ("info", "machine", "expected"),
    [
        (
            {"vendor_id": "GenuineIntel", "flags": "fpu avx2 avx512f avx512_vnni amx_bf16"},
            "x86_64",
            "GenuineIntel amx_bf16",
        ),
        (
            {"vendor_id": "AuthenticAMD", "flags": "avx512_bf16 avx_vnni avx2"},
            "x86_64",
            "AuthenticAMD avx512_bf16",
        ),
        ({"vendor_id": "GenuineIntel", "flags": "fpu"}, "x86_64", "GenuineIntel"),
        (
            {"CPU implementer": "0x41", "CPU part": "0xd40", "Features": "i8mm"},
            "aarch64",
            "aarch64 0x41 0xd40",
        ),
        ({}, "AMD64", "AMD64 Intel64 Family 6 Model 143"),
    ],
)
def test_kinds_of_processors_are_distinguished(info, machine, expected, monkeypatch):
    monkeypatch.setattr(utils, "cpu_info", lambda: info)
    monkeypatch.setattr(utils.platform, "machine", lambda: machine)
    monkeypatch.setattr(
        utils.platform,
        "processor",
        lambda: "Intel64 Family 6 Model 143" if machine == "AMD64" else "",
    )
    assert utils.kind_of_cpu() == expected
