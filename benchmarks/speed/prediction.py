"""Measure prediction: every engine beside OpenVINO's own benchmark, and predict.py on a folder."""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

import utils
from benchmarks.scripts import is_installed, run_script
from benchmarks.table import make_row, write_rows
from benchmarks.timing import isolated_processes, run_interleaved, steps_per_second
from dataset.phantoms import make_phantoms
from inference import engines
from inference.models import BUNDLED_MODEL
from utils import UserError

REFERENCE = "onnxruntime float32"


def prediction(
    *, model: Path = utils.ROOT / BUNDLED_MODEL, rounds: int = 5, count: int = 200
) -> None:
    """Measure every engine and precision, and predict.py on a folder, in images per second.

    Args:
        model: what export.py wrote
        rounds: how often each is measured
        count: phantoms of 512x512 pixels in the folder
    """
    with isolated_processes(engine_calls(model)) as calls:
        found = run_interleaved(calls, rounds)
    height, width = read_metadata(model)["image_size"]
    rows = []
    for name, rates in found.items():
        figure = f"{model.parent.name}, {height}x{width}: {name}"
        for reference in references_of(name, found):
            what = f"{figure}, beside {reference}"
            rows.append(make_row(what, "images/s", rates, reference, found[reference]))
    write_rows(rows + folder_rows(model, count, rounds))


def read_metadata(model: Path) -> dict:
    """Read an exported model's metadata from the manifest beside it."""
    return json.loads(model.with_name("manifest.json").read_text())["facts"]


def engine_calls(model: Path) -> dict[str, tuple]:
    """List the engines and precisions that this machine may use, with the calls to measure them."""
    kinds = [("onnxruntime", "float32"), ("onnxruntime", "int8")]
    if is_installed("openvino"):
        kinds += [("openvino", precision) for precision in ("float32", "bfloat16", "int8")]
    calls = {}
    for kind, precision in kinds:
        # An engine that is missing, or a precision that the manifest does not allow here.
        with contextlib.suppress(UserError):
            engines.load_engine(model, kind, precision)
            calls[f"{kind} {precision}"] = engine_rate, model, kind, precision
            if kind == "openvino":
                calls[f"benchmark_app {precision}"] = benchmark_app_rate, model, precision
    return calls


def references_of(name: str, found: dict[str, list[float]]) -> list[str]:
    """List what an engine is compared with: ONNX Runtime, and benchmark_app for OpenVINO."""
    own = name.replace("openvino", "benchmark_app")
    return [REFERENCE, own] if own != name and own in found else [REFERENCE]


def engine_rate(model: Path, kind: str, precision: str) -> float:
    """Measure an engine on batches of 8: images per second."""
    engine = load_once(model, kind, precision)
    batch = np.random.default_rng(0).random((8, *engine.input_shape), np.float32)
    return len(batch) * steps_per_second(lambda: engine.run(batch), 12)


@cache
def load_once(model: Path, kind: str, precision: str) -> engines.Engine:
    """Load a model when its process first needs it."""
    return engines.load_engine(model, kind, precision)[0]


def benchmark_app_rate(model: Path, precision: str) -> float:
    """Run OpenVINO's benchmark_app: images per second by the better of its two hints."""
    metadata = read_metadata(model)
    shape = [1, *metadata["image_size"], metadata["channels"]]
    path = model.with_name("unet-int8.onnx") if precision == "int8" else model
    app = Path(sys.executable).with_name("benchmark_app")
    command = [app, "-m", path, "-d", "CPU", "-t", "3", "-shape", str(shape)]
    command += ["-infer_precision", "bf16" if precision == "bfloat16" else "f32"]
    rates = []
    for hint in ("latency", "throughput"):
        done = subprocess.run([*command, "-hint", hint], capture_output=True, text=True, check=True)
        rates.append(float(re.search(r"Throughput:\s+([\d.]+) FPS", done.stdout)[1]))
    return max(rates)


def folder_rows(model: Path, count: int, rounds: int) -> list[dict]:
    """Measure predict.py on a folder, start and end included, with and without panels."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        images = make_phantoms(Path(name) / "phantoms", count, seed=0) / "CXR_png"
        command = ["predict.py", "--model", str(model), "--input", str(images)]
        command += ["--output", f"{name}/out"]
        for panels in ("--no-panels", "--panels"):
            rates = [count / run_script(*command, panels)[1] for _ in range(rounds)]
            rows.append(
                make_row(f"predict.py on a folder of {count} images, {panels}", "images/s", rates)
            )
    return rows
