"""The pretrained model is made by one command."""

import json

import pytest

import utils
from benchmarks import lungs
from dataset.phantoms import make_phantoms
from inference import engines
from model import build_unet


@pytest.mark.slow
def test_from_trainings_to_the_exported_model(tmp_path, monkeypatch):
    """Folds, the model on all images, what it knows of its masks, the export of one class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lungs, "PHANTOMS", 4)
    monkeypatch.setattr(lungs, "FOLDS", 2)
    tiny = "--image-size 64 --filters 2 --depth 2 --epochs 1 --epoch-images 0 --val-fraction 0"
    recipe = ["--classes", "left lung,right lung", "--mirror", "--precision", "float32"]
    monkeypatch.setattr(lungs, "RECIPE", [*recipe, *tiny.split()])
    chests = make_phantoms("chests", 18, seed=5)
    weights = str(tmp_path / "start.h5")  # a U-Net: it starts in a third of the encoder's time
    network = build_unet((64, 64, 1), 3, filters=2, depth=2)
    utils.save_model(network, weights, utils.make_metadata(["left", "right"], (64, 64), 1))
    lungs.main(lungs.Config(str(chests), weights, "runs", "files", jobs=2))
    metadata = utils.load_metadata("files/lungs.h5")
    assert metadata["classes"] == ["left lung", "right lung"]
    assert len(metadata["quality"]["weights"]) == 5
    manifest = json.loads((tmp_path / "files/lungs/manifest.json").read_text())
    assert manifest["facts"]["classes"] == ["lungs"]
    assert manifest["facts"]["quality"] == metadata["quality"]
    network, *_ = engines.load_engine(tmp_path / "files/lungs/unet.onnx", "onnxruntime", "float32")
    assert network.output_channels == 1
