"""The pretrained model, files/lungs.h5 and files/lungs/, finds lungs on a fresh clone."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import export
import metrics
import predict
import utils
from dataset.phantoms import draw_phantom
from imaging import formats, pictures
from imaging.scan import Scan
from inference import models, segment
from inference.merging import merge_metadata
from inference.models import BUNDLED_MODEL
from utils import UserError

BUNDLED = ROOT / "files" / "lungs.h5"


@pytest.fixture(scope="module")
def members():
    return predict.load_members(predict.Config(model=str(BUNDLED)))


def test_it_is_small_and_says_what_it_is(members):
    assert BUNDLED.stat().st_size <= 8 * 2**20
    facts = members[0][1]
    assert facts["classes"] == ["left lung", "right lung"]
    assert facts["channels"] == 1 and facts["mirror"] and facts["quality"]


def test_the_exported_files_are_of_that_model():
    manifest = json.loads((ROOT / "files" / "lungs" / "manifest.json").read_text())
    assert manifest["model_sha256"] == export.file_sha256(BUNDLED)
    assert manifest["facts"] == merge_metadata(utils.load_metadata(BUNDLED), "lungs")
    assert (ROOT / BUNDLED_MODEL).stat().st_size <= 8 * 2**20


def test_it_finds_lungs_in_fresh_phantoms(members):
    scores = []
    for i in range(20):
        image, masks = draw_phantom(np.random.default_rng((12345, i)))
        scan = Scan(image.reshape(1, *image.shape[:2], 1))
        found = segment.segment_scans(members, [scan])[0]
        truth = masks[..., 0] + 2 * masks[..., 1]
        scores.append(metrics.score_classes(truth, found.ids[0], members[0][1]["classes"])["dice"])
    assert np.mean(scores) > 0.95 and min(scores) > 0.85


@pytest.fixture
def xray(tmp_path):
    """A folder with an X-ray to segment; returns its lungs (H, W)."""
    image, masks = draw_phantom(np.random.default_rng(4))
    pictures.write_picture(tmp_path / "my_xray.png", image)
    return masks.max(-1)


def own_model(folder, **more):
    """Write files/model.h5, as a run of the user's own would."""
    model, metadata = utils.load_model(BUNDLED)
    del metadata["phantoms"]  # older files do not say it
    (folder / "files").mkdir(exist_ok=True)
    utils.save_model(model, folder / "files" / "model.h5", metadata | more)


def test_a_fresh_clone_segments_a_file_without_training(tmp_path, script, xray):
    shutil.copytree(ROOT / "files" / "lungs", tmp_path / "files" / "lungs")
    done = script(tmp_path, "predict.py", "--input", "my_xray.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        f"model: {BUNDLED_MODEL}, pretrained on chest X-rays (no files/model.h5 yet)"
    )
    found = formats.read_image(tmp_path / "results" / "masks" / "my_xray.png")[..., 0] > 0
    assert metrics.score_mask(xray, found)["dice"] > 0.8


def first_line(capsys):
    return capsys.readouterr().out.splitlines()[0]


def test_a_model_of_phantoms_is_not_taken_for_the_users_image(tmp_path, xray, monkeypatch, capsys):
    """The trap of the quick start: its model has never seen a real X-ray."""
    monkeypatch.chdir(tmp_path)
    config = predict.Config(input="my_xray.png")
    own_model(tmp_path, phantoms=True)
    predict.main(config)
    assert first_line(capsys) == (
        f"model: {ROOT / BUNDLED_MODEL}, pretrained on chest X-rays "
        "(files/model.h5 knows synthetic images only; name it with --model to use it)"
    )
    predict.main(dataclasses.replace(config, model="files/model.h5"))
    assert first_line(capsys) == "model: files/model.h5"


def test_the_users_own_model_is_taken(tmp_path, xray, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own_model(tmp_path, phantoms=False)
    predict.main(predict.Config(input="my_xray.png"))
    assert first_line(capsys) == "model: files/model.h5, trained on your own images"


@pytest.mark.parametrize(
    ("config", "phantoms_only"),
    [
        ({"data_dir": ""}, True),
        ({"data_dir": "", "extra_dir": "xrays"}, False),
        ({"data_dir": "xrays", "extra_dir": ""}, False),
        ({"data_dir": "drawn"}, True),
        ({"data_dir": "xrays", "extra_dir": "drawn"}, False),
        (None, False),
    ],
)
def test_older_models_are_judged_by_the_config_beside_them(
    tmp_path, monkeypatch, config, phantoms_only
):
    monkeypatch.chdir(tmp_path)
    own_model(tmp_path)
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "phantoms.json").write_text("{}")
    place = tmp_path / "files" / "config.json"
    if config:
        place.write_text(json.dumps(config))
    assert models.knows_phantoms_only(Path("files/model.h5")) == phantoms_only
    path, _ = models.choose_model()
    assert path == (str(ROOT / BUNDLED_MODEL) if phantoms_only else "files/model.h5")
    for damaged in ("{", "[]", "{}"):
        place.write_text(damaged)
        with pytest.raises(UserError, match=r"config\.json cannot be read"):
            models.choose_model()


def test_the_pretrained_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert models.choose_model()[0] == str(ROOT / BUNDLED_MODEL)
    assert models.choose_model(uncertainty=True)[0] == str(BUNDLED)
    assert models.expand_paths("files/lungs.h5") == [str(BUNDLED)]
    monkeypatch.chdir(ROOT)
    assert models.choose_model()[0] == BUNDLED_MODEL
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no pretrained model at .*; name a model with --model"):
        models.choose_model()
