"""Export: SavedModel and ONNX give the masks of the model file, from arrays and from files."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import keras
import nibabel
import numpy as np
import onnx
import pytest
from conftest import HEIGHT, ROOT, WIDTH

import export
import predict
import utils
from exporting import onnx_export, triton
from imaging import formats
from imaging.grid import fit_grid
from inference import engines, segment
from inference.merging import merge_metadata
from model import build_unet
from utils import UserError

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow writes SavedModels"
)
BUNDLED = ROOT / "files" / "lungs.h5"


def pictures(folder: Path) -> Path:
    """One picture of each kind: 8 and 16 bit, grey and colour, wide and tall, small and large."""
    rng = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(rng.uniform(0, 1, (300, 400)).astype(np.float32), (0, 0), 12)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    folder.mkdir()
    cv2.imwrite(str(folder / "grey.png"), np.uint8(255 * smooth))
    cv2.imwrite(str(folder / "deep.png"), np.uint16(20_000 + 900 * smooth.T))
    cv2.imwrite(str(folder / "small.bmp"), np.uint8(255 * smooth[:40, :50]))
    cv2.imwrite(
        str(folder / "colour.jpg"), np.uint8(255 * np.stack([smooth, smooth[::-1], 1 - smooth], -1))
    )
    cv2.imwrite(
        str(folder / "alpha.png"),
        np.dstack([np.uint8(255 * smooth)] * 3 + [np.full((300, 400), 255, np.uint8)]),
    )
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, phantoms):
    """The folder of the pretrained model, exported and checked on phantoms."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    export.export(
        export.Config(
            model=str(BUNDLED),
            merge="lungs",
            out_dir=str(folder),
            images=str(phantoms / "CXR_png"),
            checked=4,
        )
    )
    return folder


def test_the_masks_stay_the_same(exported):
    agreement = json.loads((exported / "manifest.json").read_text())["agreement"]
    assert agreement["images"] == 4
    assert (
        min(agreement["saved_model"], agreement["onnx"]) >= 0.9999
        and agreement["saved_model, encoded"] > 0.999
    )


def test_the_manifest_lists_what_was_written(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["model_sha256"] == export.file_sha256(BUNDLED)
    assert manifest["facts"] == merge_metadata(utils.load_metadata(BUNDLED), "lungs")
    assert {"unet.onnx", "unet/1/saved_model.pb"} < set(manifest["sha256"])
    for name, digest in manifest["sha256"].items():
        assert export.file_sha256(exported / name) == digest


def test_onnx_holds_the_facts_and_takes_any_batch(exported):
    graph = onnx.load(exported / "unet.onnx")
    onnx.checker.check_model(graph, full_check=True)
    facts = {prop.key: json.loads(prop.value) for prop in graph.metadata_props}
    assert facts == merge_metadata(utils.load_metadata(BUNDLED), "lungs")
    run = engines.open_onnxruntime((exported / "unet.onnx").read_bytes()).run
    batch = np.random.default_rng(0).uniform(size=(3, HEIGHT, WIDTH, 1)).astype(np.float32)
    together = run(batch)
    np.testing.assert_allclose(
        together, np.concatenate([run(batch[i : i + 1]) for i in range(3)]), atol=1e-5
    )


@pytest.mark.slow
def test_tensorflows_own_tool_sees_both_signatures(exported):
    tool = Path(sys.executable).with_name("saved_model_cli")
    shown = subprocess.run(
        [tool, "show", "--dir", exported / "unet" / "1", "--all"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("serving_default", "encoded", "image_bytes", "mask_png", "probabilities"):
        assert name in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "channels", "more"),
    [
        (["left lung", "right lung"], 1, {"mirror": True}),
        (["tumour"], 3, {}),
        (["organ"], 1, {"window": "128,100", "clean": [1]}),
    ],
)
def test_every_kind_of_model_and_picture(tmp_path, names, channels, more):
    keras.utils.set_random_seed(1)
    size = (48, 64)
    model = build_unet((*size, channels), 1 if len(names) == 1 else 3, 4, 2)
    model.layers[-1].set_weights(
        [10 * weights for weights in model.layers[-1].get_weights()]
    )  # so that masks are decided
    facts = utils.make_metadata(names, size, channels, **more)
    path = tmp_path / "model.h5"
    utils.save_model(model, path, facts)
    folder = pictures(tmp_path / "pictures")
    config = export.Config(model=str(path), out_dir=str(tmp_path / "out"), images=str(folder))
    agreement = export.export(config)["agreement"]
    assert agreement["images"] == 5 and agreement["saved_model, encoded"] > 0.995
    run = engines.open_onnxruntime((tmp_path / "out" / "unet.onnx").read_bytes()).run
    members = predict.load_members(predict.Config(str(path)))
    for picture in folder.iterdir():
        scan = formats.read_scan(picture)
        grid = fit_grid(scan.pixels.shape[:3], size)
        prepared = segment.prepare_inputs(scan, facts).astype(np.float32) / 255
        kept = segment.Options(probabilities=True)
        probs = segment.segment_scans(members, [scan], kept)[0].probs[0]
        found = next(grid.restore(run(prepared)))[..., : probs.shape[-1]]  # without the spread
        np.testing.assert_allclose(found, probs, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    model = build_unet((16, 16, 3), 1, 2, 1)
    with pytest.raises(UserError, match=r"no model at .*; run `python train\.py`"):
        export.export(export.Config(model=str(tmp_path / "none.h5")))
    with pytest.raises(UserError, match="version is -1; expected at least 1, or 0 for the next"):
        export.export(export.Config(version=-1))
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-export\.txt"):
        onnx_export.write_onnx(model, {}, tmp_path / "a.onnx")


def test_triton_gets_names_and_sizes(exported):
    text = (exported / "unet" / "config.pbtxt").read_text()
    network = engines.open_onnxruntime((exported / "unet" / "1" / "model.onnx").read_bytes())
    blocks = dict(re.findall(r"^(input|output) \[\n  \{\n(.*?)\n  \}\n\]", text, re.M | re.S))
    assert f'name: "{network.input_name}"' in blocks["input"]
    assert f'name: "{network.output_name}"' in blocks["output"]
    assert f"dims: [ {HEIGHT}, {WIDTH}, 1 ]" in blocks["input"] and "TYPE_FP32" in blocks["input"]
    assert f"dims: [ {HEIGHT}, {WIDTH}, 1 ]" in blocks["output"]
    assert 'name: "unet"' in text and 'backend: "onnxruntime"' in text
    assert (exported / "unet" / "labels.txt").read_text() == "lungs\n"
    assert triton.output_labels(["a", "b"], 3) == ["background", "a", "b"]
    assert triton.output_labels(["a", "b"], 2) == ["a", "b"]  # they overlap


def test_versions_are_counted(tmp_path):
    assert export.next_version(tmp_path) == 1
    for name in ("1", "3", ".4.unfinished", "x"):
        (tmp_path / name).mkdir()
    assert export.next_version(tmp_path) == 4


@pytest.mark.slow
def test_neighbours_are_exported_and_versions_kept(tmp_path):
    """A 2.5-D model: a volume gets its true neighbours, a picture stands for its own."""
    keras.utils.set_random_seed(1)
    model = build_unet((48, 64, 3), 1, 4, 2)
    model.layers[-1].set_weights([10 * weights for weights in model.layers[-1].get_weights()])
    utils.save_model(
        model, tmp_path / "m.h5", utils.make_metadata(["x"], (48, 64), 1, neighbours=1)
    )
    folder = pictures(tmp_path / "pictures")
    volume = np.random.default_rng(0).normal(100, 30, (40, 50, 12)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "volume.nii.gz")
    config = export.Config(
        model=str(tmp_path / "m.h5"), out_dir=str(tmp_path / "out"), images=str(folder)
    )
    manifest = export.export(config)
    assert manifest["agreement"]["images"] == 6 and manifest["version"] == 1
    assert manifest["agreement"]["saved_model, encoded"] > 0.995
    before = (tmp_path / "out" / "unet" / "1" / "saved_model.pb").stat().st_mtime_ns
    assert export.export(config)["version"] == 2
    assert (tmp_path / "out" / "unet" / "1" / "saved_model.pb").stat().st_mtime_ns == before
    scan = formats.read_scan(folder / "volume.nii.gz")
    kept, probs = segment.Options(probabilities=True), []
    for path in (tmp_path / "m.h5", tmp_path / "out" / "unet.onnx"):
        members = predict.load_members(predict.Config(str(path), precision="float32"))
        probs.append(segment.segment_scans(members, [scan], kept)[0].probs)
    np.testing.assert_allclose(probs[0], probs[1], atol=1e-4)
    assert np.ptp(probs[0]) > 0.01


@pytest.mark.slow
def test_a_format_with_other_masks_is_not_to_be_served(tmp_path, phantoms, monkeypatch):
    true = engines.open_onnxruntime

    def empty(content, threads=0):
        return dataclasses.replace(
            true(content, threads), run=lambda prepared: np.zeros((1, HEIGHT, WIDTH, 1), np.float32)
        )

    monkeypatch.setattr(engines, "open_onnxruntime", empty)
    monkeypatch.setattr(onnx_export, "check_batch", lambda network, content: None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unet.onnx").write_text("of an earlier export")
    with pytest.raises(UserError, match="the masks of a format are not those of"):
        export.export(
            export.Config(
                model=str(BUNDLED),
                out_dir=str(tmp_path / "out"),
                images=str(phantoms / "CXR_png"),
                checked=1,
            )
        )
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == ["unet.onnx"]
    assert (tmp_path / "out" / "unet.onnx").read_text() == "of an earlier export"
