"""An archive over a cluster of two nodes on this machine: every image once, whoever dies."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK
from conftest import ROOT

import utils
from benchmarks.scripts import wait_until
from benchmarks.speed.archive import TwoNodes, count_masks
from imaging import formats, pictures
from inference import archive
from inference.archive_items import Item, plan_masks, read_joined
from inference.exported_model import load_exported
from utils import UserError

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    running = TwoNodes()
    yield running
    running.stop()


@pytest.mark.slow
def test_machines_name_their_processors(cluster):
    code = "from inference import archive; archive.connect(); print(archive.kinds_of_cpu())"
    asked = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=cluster.settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert repr({utils.kind_of_cpu()}) in asked.stdout, asked.stdout + asked.stderr


@pytest.mark.slow
def test_every_image_has_its_mask_whoever_dies(cluster, exported, phantoms, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "masks"
    files = sorted((phantoms / "CXR_png").iterdir())
    for ward in range(24):
        shutil.copytree(phantoms / "CXR_png", scans / f"ward{ward}")
    (scans / "ward0" / "broken.png").write_bytes(files[0].read_bytes()[:999])
    flags = (
        "--input",
        scans,
        "--output",
        out,
        "--model",
        exported / "unet.onnx",
        "--batch",
        8,
        "--engine",
        "onnxruntime",
    )
    running = cluster.start(*flags)
    wait_until(lambda: cluster.workers(0) and cluster.workers(1))
    wait_until(lambda: count_masks(out) > 80)
    os.kill(cluster.workers(0)[0], signal.SIGKILL)
    done = count_masks(out)
    wait_until(lambda: count_masks(out) > done + 80)
    cluster.lose_a_node()
    said = running.communicate(timeout=90)[0]
    assert (
        running.returncode == 2 and "384 masks" in said and "1 problem, see problems.csv" in said
    ), said
    assert "ward0/broken.png,unreadable" in (out / "problems.csv").read_text()
    assert count_masks(out) == 384
    network, run = load_exported(exported / "unet.onnx", 1, "onnxruntime")
    prepared = network.read(files[3].read_bytes())
    expected = 255 * network.predict(prepared, run).ids[0]
    for ward in (0, 23):
        assert np.array_equal(formats.read_mask(out / f"ward{ward}" / files[3].name), expected)

    (scans / "ward0" / "broken.png").unlink()
    (out / "ward0" / ".123.half.png").write_bytes(
        files[0].read_bytes()[:999]
    )  # as a killed worker may leave
    written = {path: path.stat().st_mtime_ns for path in out.rglob("[!.]*.png")}
    again = cluster.start(*flags)
    assert "384 masks" in again.communicate(timeout=60)[0] and again.returncode == 0
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}


WHOLE = {"image_size": [32, 32]}


def test_plan_gives_each_mask_one_image():
    names = ["b/x.nii.gz", "b/x.NII", "b/x.mhd", "a/x.PNG", "a/x.dcm", "a/.y.png", "notes.txt"]
    plan = plan_masks([*names, "x.png"], WHOLE, "scans")
    assert {mask: item.files for mask, item in plan.images.items()} == {
        "a/x.png": ("a/x.PNG",),
        "b/x.nii.gz": ("b/x.NII",),
        "b/x.mha": ("b/x.mhd",),
        "x.png": ("x.png",),
    }
    assert list(plan.problems) == ["a/x.dcm", "b/x.nii.gz"]


def test_plan_joins_what_is_one_image():
    names = ["1.dcm", "2.DCM", "ct/1.dcm", "ct/2.dcm", "ct/a.nii", "ct/a_t2.nii", "ct/b_t2.nii"]
    names += ["ct/a_t1.nii.gz", "ct/c_t1.png", "ct/c_t2.png"]
    metadata = {"image_size": [32, 32], "channel_endings": ["_t1", "_t2"]}
    plan = plan_masks(names, metadata | {"neighbours": 1}, "scans")
    assert plan.images == {
        "ct/a.nii.gz": Item("ct/a.nii", ("ct/a.nii",)),
        "ct/c.png": Item("ct/c_t1.png", ("ct/c_t1.png", "ct/c_t2.png")),
        "ct.dcm": Item("ct", ("ct/1.dcm", "ct/2.dcm")),
        "scans.dcm": Item("scans", ("1.dcm", "2.DCM")),
    }
    assert plan.problems == {
        "ct/a_t1.nii.gz": "ct/a.nii has the same name, and gets the mask",
        "ct/b_t2.nii": "channels are missing; this model expects _t1, _t2",
    }
    assert "ct/1.png" in plan_masks(names, metadata, "scans").images


def test_plan_keeps_what_belongs_together_and_leaves_litter():
    names = ["@eaDir/x.jpg", "__MACOSX/y.png", "notes.txt", "a/t1.nii", "a/t2.nii", "t1.mhd"]
    names += ["t1.raw", "t2.mhd", "t2.raw", "a/b.mhd", "a/b.RAW", "a/c.raw", "d_t1.png", "d_t1.jpg"]
    names += ["d_t2.png"]
    plan = plan_masks(names, WHOLE | {"channel_endings": ["t1", "t2"]}, "scans")
    assert {mask: item.files for mask, item in plan.images.items()} == {
        "a/b.mha": ("a/b.mhd", "a/b.RAW"),
        "a.nii.gz": ("a/t1.nii", "a/t2.nii"),
        "scans.mha": ("t1.mhd", "t2.mhd", "t1.raw", "t2.raw"),
        "d_.png": ("d_t1.jpg", "d_t2.png"),
    }
    assert plan.problems == {"d_t1.png": "d_t1.jpg has the same name, and gets the mask"}
    assert [str(path) for path in plan.passed_over] == ["a/c.raw", "notes.txt"]


def test_a_header_and_its_voxels_are_read(tmp_path):
    voxels = np.arange(2 * 16 * 20, dtype=np.int16).reshape(2, 16, 20)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(tmp_path / "a.mhd"))
    scan = read_joined([tmp_path / "a.mhd", tmp_path / "a.raw"], False, "")
    np.testing.assert_array_equal(scan.pixels[..., 0], voxels)


def test_channels_in_files_of_their_own_are_joined(tmp_path):
    paths = [tmp_path / "a_t1.png", tmp_path / "a_t2.png"]
    for level, path in enumerate(paths, 1):
        pictures.write_picture(path, np.full((16, 20), level, np.uint8))
    assert read_joined(paths, False, "").pixels[0, 3, 4].tolist() == [1, 2]
    pictures.write_picture(paths[1], np.zeros((16, 24), np.uint8))
    with pytest.raises(UserError, match=r"^a_t2.png: 16x24 pixels; a_t1.png is 16x20 pixels"):
        read_joined(paths, False, "")


@pytest.mark.slow
def test_mistakes_get_a_line(script, exported, phantoms, tmp_path):
    model = ("--model", exported / "unet.onnx")
    inside = script(
        tmp_path,
        "-m",
        "inference.archive",
        "--input",
        phantoms,
        "--output",
        phantoms / "masks",
        *model,
    )
    assert inside.returncode == 2 and "name another --output" in inside.stderr
    missing = script(
        tmp_path,
        "-m",
        "inference.archive",
        "--input",
        tmp_path / "x",
        "--output",
        tmp_path / "masks",
        *model,
    )
    assert missing.returncode == 2 and "cannot be listed" in missing.stderr
    nothing = script(
        tmp_path,
        "-m",
        "inference.archive",
        "--input",
        tmp_path,
        "--output",
        tmp_path.parent / "masks",
        *model,
    )
    assert nothing.returncode == 2 and "has no image" in nothing.stderr
    strange = script(
        tmp_path, "-m", "inference.archive", "--input", "nosuch://x", "--output", "masks", *model
    )
    assert strange.returncode == 2 and "cannot be opened" in strange.stderr


@pytest.mark.slow
def test_all_machines_compute_in_a_precision_that_each_allows(exported, monkeypatch, capsys):
    def load(path, engine, precision, threads):
        return (
            SimpleNamespace(
                engine="openvino", precision="float32" if precision == "float32" else "bfloat16"
            ),
            {},
            "x",
        )

    monkeypatch.setattr(archive.engines, "load_engine", load)
    monkeypatch.setattr(archive, "connect", lambda: None)
    monkeypatch.setattr(archive, "kinds_of_cpu", lambda: {"here", "there"})
    config = archive.Config("scans", "masks", model=str(exported / "unet.onnx"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert (
        archive.load_for_all(config)[0].precision == "bfloat16"
    )  # this machine alone, which load asked for
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert archive.load_for_all(config)[0].precision == "float32"
    assert "openvino bfloat16 is not allowed on here, there" in capsys.readouterr().out
    with pytest.raises(UserError, match="use --precision float32"):
        archive.load_for_all(replace(config, precision="bfloat16"))
    monkeypatch.setattr(archive.engines, "MIN_DICE_VS_FLOAT32", 0.0)
    assert archive.load_for_all(config)[0].precision == "bfloat16"
