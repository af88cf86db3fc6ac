"""Exported networks: each engine and precision gives the masks of float32, or is refused."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import HAS_EXACT_INT8, ROOT

import metrics
import predict
import utils
from dataset.phantoms import draw_phantom
from imaging import pictures
from imaging.grid import resize
from imaging.scan import Scan
from inference import engines, segment
from inference.models import BUNDLED_MODEL
from utils import UserError

BUNDLED = ROOT / BUNDLED_MODEL
KINDS = [
    ("onnxruntime", "float32"),
    ("onnxruntime", "int8"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
]


def skip_unless_here(engine, precision):
    if engine == "openvino":
        pytest.importorskip("openvino")
    if precision == "bfloat16" and not engines.has_bfloat16():
        pytest.skip("this processor has no bfloat16")


def masks(config):
    """Segment three phantoms of unlike sizes, in one call and so in one batch."""
    shapes = [(256, 256), (200, 300), (256, 256)]
    pictures = [
        resize(draw_phantom(np.random.default_rng(i))[0], shape) for i, shape in enumerate(shapes)
    ]
    members = predict.load_members(config)
    scans = [Scan(picture.reshape(1, *picture.shape[:2], 1)) for picture in pictures]
    return [found.ids[0] for found in segment.segment_scans(members, scans, config.options)]


@pytest.fixture(scope="module")
def from_keras():
    return masks(predict.Config(model=str(ROOT / "files" / "lungs.h5"), merge="lungs"))


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_every_engine_finds_what_keras_finds(engine, precision, from_keras, tmp_path):
    """Nearly, in reduced precision. The manifest is changed so that every precision is allowed."""
    skip_unless_here(engine, precision)
    shutil.copytree(BUNDLED.parent, tmp_path / "exported")
    place = tmp_path / "exported" / "manifest.json"
    measured = {utils.kind_of_cpu(): {f"{engine} {precision}": 1.0}}
    place.write_text(json.dumps(json.loads(place.read_text()) | {"precisions": measured}))
    found = masks(
        predict.Config(model=str(place.with_name("unet.onnx")), engine=engine, precision=precision)
    )
    least = 0.9999 if precision == "float32" else 0.98
    if precision == "int8" and not HAS_EXACT_INT8:
        least = 0.8
    for one, other in zip(from_keras, found, strict=True):
        assert metrics.score_mask(one, other)["dice"] >= least


def test_auto_takes_bfloat16_only_where_it_may(monkeypatch):
    monkeypatch.setattr(engines, "has_openvino", lambda: True)
    monkeypatch.setattr(engines, "has_bfloat16", lambda: True)
    good, bad = (
        {"openvino bfloat16": bfloat16, "openvino int8": int8, "onnxruntime int8": int8}
        for bfloat16, int8 in ((0.9995, 0.9991), (0.9989, 0.98))
    )
    assert engines.choose_engine("auto", "auto", good) == ("openvino", "bfloat16")
    assert (
        engines.choose_engine("auto", "auto", bad)
        == engines.choose_engine("auto", "auto", {})
        == ("onnxruntime", "float32")
    )
    assert engines.choose_engine("onnxruntime", "auto", good) == ("onnxruntime", "float32")
    assert engines.choose_engine("openvino", "auto", bad) == ("openvino", "float32")
    assert engines.choose_engine("auto", "int8", good) == ("openvino", "int8")
    assert engines.choose_engine("auto", "int8", good | {"openvino int8": 0.98}) == (
        "onnxruntime",
        "int8",
    )
    for precision, dice in (("bfloat16", "0.9989"), ("int8", "0.9800")):
        with pytest.raises(UserError, match=f"{dice}; expected at least 0.999"):
            engines.choose_engine("auto", precision, bad)
        with pytest.raises(UserError, match="is not measured"):
            engines.choose_engine("auto", precision, {})
    monkeypatch.setattr(engines, "has_bfloat16", lambda: False)
    assert engines.choose_engine("auto", "auto", good) == ("onnxruntime", "float32")
    with pytest.raises(UserError, match="a processor that has it"):
        engines.choose_engine("auto", "bfloat16", good)
    monkeypatch.setattr(engines, "has_openvino", lambda: False)
    assert engines.choose_engine("auto", "int8", good) == ("onnxruntime", "int8")
    for engine, precision, dice in (
        ("openvino", "auto", good),
        ("openvino", "int8", {}),
        ("auto", "bfloat16", {}),
    ):
        with pytest.raises(UserError, match="pip install openvino"):
            engines.choose_engine(engine, precision, dice)


def test_cuda_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(UserError, match="pip uninstall onnxruntime"):
        engines.choose_engine("cuda", "auto", {})
    monkeypatch.setattr(engines, "has_cuda", lambda: True)
    assert engines.choose_engine("cuda", "auto", {"openvino bfloat16": 1.0}) == ("cuda", "float32")
    with pytest.raises(UserError, match="cuda computes in float32, not in int8"):
        engines.choose_engine("cuda", "int8", {})
    # ONNX Runtime warns and goes on by the CPU; we do not.
    with pytest.raises(UserError, match="finds no NVIDIA GPU"):
        engines.open_network(BUNDLED, BUNDLED.read_bytes(), "cuda", "float32", 0)


def test_wrong_names_are_refused():
    for change, message in (
        (("tensorrt", "auto"), "engine is 'tensorrt'"),
        (("auto", "fp8"), "precision is 'fp8'"),
    ):
        with pytest.raises(UserError, match=message):
            engines.choose_engine(*change, {})
    with pytest.raises(UserError, match=r"runs in Keras and float32; `python export\.py"):
        predict.load_members(
            predict.Config(model=str(ROOT / "files" / "lungs.h5"), engine="openvino")
        )
    with pytest.raises(UserError, match="averages with the mirrored image itself"):
        predict.load_members(predict.Config(model=str(BUNDLED), uncertainty=True))


def test_changed_or_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"run `python export\.py"):
        engines.load_engine(tmp_path / "unet.onnx")
    with pytest.raises(UserError, match=r"lungs\.h5 is no \.onnx file"):
        engines.load_engine(ROOT / "files" / "lungs.h5")
    shutil.copytree(BUNDLED.parent, tmp_path / "exported")
    integers = tmp_path / "exported" / "unet-int8.onnx"
    integers.write_bytes(integers.read_bytes()[:-1] + b"?")
    manifest = json.loads((tmp_path / "exported" / "manifest.json").read_text())
    manifest["precisions"] = {utils.kind_of_cpu(): {"onnxruntime int8": 1.0}}
    (tmp_path / "exported" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="unet-int8.onnx has checksum"):
        engines.load_engine(tmp_path / "exported" / "unet.onnx", precision="int8")
    with pytest.raises(UserError, match="name its float32 file with --precision int8"):
        engines.load_engine(integers)
    integers.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        engines.load_engine(tmp_path / "exported" / "unet.onnx", precision="int8")
    for damaged in (
        [],
        {"facts": manifest["facts"]},
        manifest | {"sha256": {}},
        manifest | {"precisions": 3},
    ):
        (tmp_path / "exported" / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError):
            engines.load_engine(tmp_path / "exported" / "unet.onnx")


def test_files_are_segmented_without_keras(tmp_path, script, monkeypatch):
    pictures.write_picture(tmp_path / "a.png", draw_phantom(np.random.default_rng(4))[0])
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('keras', 'pandas', 'scipy.stats', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = "--model", BUNDLED, "--input", "a.png", "--output", "out", "--no-panels"
    done = script(tmp_path, "predict.py", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.png").is_file() and not (tmp_path / "out" / "panels").exists()


def test_openvino_is_an_extra():
    assert importlib.util.find_spec("onnxruntime") is not None
    wanted = (ROOT / "requirements.txt").read_text()
    assert "onnxruntime" in wanted and "openvino" not in wanted


def test_the_service_has_all_that_it_imports(tmp_path):
    """What .dockerignore lets into the image is enough, and Dockerfile copies all of it."""
    patterns = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!") and line.endswith(".py")
    ]
    for pattern in patterns:
        for path in ROOT.glob(pattern):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    # These come with requirements.txt, but not with requirements-serve.txt.
    code = """import sys
for name in ("keras", "tensorflow", "pandas", "scipy", "sklearn", "matplotlib", "SimpleITK"):
    sys.modules[name] = None
import serve, serving.app, serving.server"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    for pattern in patterns:
        assert re.search(rf"^COPY .*\b{pattern.partition('/')[0]}\b", dockerfile, re.M), pattern


def test_no_engine_sends_telemetry(tmp_path):
    """ONNX Runtime and OpenVINO would keep a file of what they send; so would quantization."""
    code = "from inference import engines; import onnxruntime.quantization; engines.has_bfloat16()"
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "ORT_DISABLE_TELEMETRY" and name != "CI"
    }
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert not list(tmp_path.rglob("*"))


def test_images_are_computed_alone_by_all_threads_or_side_by_side():
    calls, both = [], threading.Barrier(2, timeout=20)

    def compute(name):
        def run(images):
            calls.append(name)
            if len(calls) <= 2:
                both.wait()  # for the one beside it
            return images + 1

        return run

    lanes = engines.Lanes(2, compute("wide"), lambda: compute("narrow"))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lanes.run, np.zeros((1, 2)))
        while not calls:
            time.sleep(0.001)
        second = pool.submit(lanes.run, np.ones((1, 2)))
        assert (first.result() == 1).all() and (second.result() == 2).all()
    assert calls == ["wide", "narrow"]
    several = lanes.run(np.arange(5.0)[:, None])
    assert several.ravel().tolist() == [1, 2, 3, 4, 5] and calls[2:] == ["narrow"] * 5
