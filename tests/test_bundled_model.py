"""The model in the box, files/lungs.h5 and files/lungs/: it finds lungs that it has never seen, on a fresh clone."""

import json
import shutil

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
from inference import postprocess, segment
from inference.bundled import BUNDLED_MODEL

BOX = ROOT / "files" / "lungs.h5"


@pytest.fixture(scope="module")
def members():
    return predict.load_members(predict.Config(model=str(BOX)))


def test_it_is_small_and_says_what_it_is(members):
    assert BOX.stat().st_size <= 8 * 2**20
    facts = members[0][1]
    assert facts["classes"] == ["lungs"] and facts["channels"] == 1 and facts["mirror"]


def test_what_is_exported_in_the_box_is_that_model():
    manifest = json.loads((ROOT / "files" / "lungs" / "manifest.json").read_text())
    assert manifest["model_sha256"] == export.checksum(BOX) and manifest[
        "facts"
    ] == utils.load_metadata(BOX)
    assert (ROOT / BUNDLED_MODEL).stat().st_size <= 8 * 2**20


def test_it_finds_lungs_in_fresh_phantoms(members):
    scores = []
    for i in range(20):
        image, masks = draw_phantom(np.random.default_rng((12345, i)))
        result = next(segment.segment_scans(members, [Scan(image.reshape(1, *image.shape[:2], 1))]))
        found = postprocess.decide(result.probs, members[0][1])
        scores.append(metrics.score_mask(masks.max(-1), found)["dice"])
    assert np.mean(scores) > 0.95 and min(scores) > 0.85


def test_a_fresh_clone_segments_a_file_without_training(tmp_path, script):
    shutil.copytree(ROOT / "files" / "lungs", tmp_path / "files" / "lungs")
    image, masks = draw_phantom(np.random.default_rng(4))
    pictures.write_picture(tmp_path / "my_xray.png", image)
    done = script(tmp_path, "predict.py", "--input", "my_xray.png")
    assert done.returncode == 0, done.stderr
    assert "no files/model.h5 of your own yet: taking files/lungs/unet.onnx" in done.stdout
    found = formats.read_image(tmp_path / "results" / "masks" / "my_xray.png")[..., 0] > 0
    assert metrics.score_mask(masks.max(-1), found)["dice"] > 0.8
    utils.save_model(
        *utils.load_model(BOX)[:1], tmp_path / "files" / "model.h5", utils.load_model(BOX)[1]
    )
    assert "lungs" not in script(tmp_path, "predict.py", "--input", "my_xray.png").stdout
