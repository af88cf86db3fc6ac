"""What one kind of processor may do says nothing of another: the gate is measured on each."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT

import engines
import gate
import images
import metrics
import phantom
import predict
from images import UserError

BOX = ROOT / predict.IN_THE_BOX


@pytest.fixture
def elsewhere(tmp_path):
    """The model in the box, measured on another kind of processor only, and two images, one of them damaged."""
    shutil.copytree(BOX.parent, tmp_path / "box")
    place = tmp_path / "box" / "manifest.json"
    manifest = json.loads(place.read_text())
    manifest["precisions"] = {"another": dict.fromkeys(("onnxruntime int8", "openvino int8", "openvino bfloat16"), 1.0)}
    place.write_text(json.dumps(manifest))
    images.write(tmp_path / "scans" / "a.png", phantom.phantom(np.random.default_rng(0))[0])
    (tmp_path / "scans" / "b.png").write_bytes(b"\x89PNG?")
    return tmp_path / "box" / "unet.onnx"


def test_what_was_measured_elsewhere_does_not_count(elsewhere):
    assert engines.load(elsewhere)[0].precision == "float32"
    with pytest.raises(UserError, match=r"is not measured; .* run python gate\.py"):
        engines.load(elsewhere, "onnxruntime", "int8")


def test_measured_here_it_counts(elsewhere, script):
    done = script(elsewhere.parent, "gate.py", "--model", elsewhere, "--images", elsewhere.parent.parent / "scans")
    assert done.returncode == 0, done.stderr
    assert "b.png: " in done.stdout and "left out" in done.stdout
    noted = json.loads(elsewhere.with_name("manifest.json").read_text())["precisions"]
    assert set(noted) == {"another", engines.kind_of_cpu()}
    dice = noted[engines.kind_of_cpu()]["onnxruntime int8"]
    assert 0.9 < dice < 1  # of a phantom, which that model was not made for
    assert f"Dice {dice:.5f}" in done.stdout
    if dice < engines.GATE:
        with pytest.raises(UserError, match=f"is {dice:.4f}; expected at least"):
            engines.load(elsewhere, "onnxruntime", "int8")
    else:
        assert engines.load(elsewhere, "onnxruntime", "int8")[0].precision == "int8"


@pytest.mark.parametrize(("source", "told"), [("nothing", "no images at"), ("scans/b.png", "none of the 1 files")])
def test_without_images_nothing_is_noted(elsewhere, source, told):
    before = elsewhere.with_name("manifest.json").read_text()
    with pytest.raises(UserError, match=told):
        gate.main(gate.Config(images=str(elsewhere.parent.parent / source), model=str(elsewhere)))
    assert elsewhere.with_name("manifest.json").read_text() == before


def test_its_dice_is_that_of_the_metrics():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, (2, 40, 40))
    assert gate.mean_dice(truth, found, 2) == pytest.approx(metrics.score_classes(truth, found, ["a", "b"])["dice"])
    assert gate.mean_dice(truth * 0, found * 0, 2) == 1
