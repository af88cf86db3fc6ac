"""Run a network that `export.py` wrote, without Keras: by ONNX Runtime or, where it is installed, by OpenVINO.

In float32, or in bfloat16 or int8 where the masks stay the same: the manifest tells their mean Dice with those of
float32 on each kind of processor where `gate.py` measured it, and less than GATE is refused.
"""

import hashlib
import hmac
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import utils
from utils import PREPARATION, UserError

os.environ["ORT_DISABLE_TELEMETRY"] = (
    "1"  # before its first import, or it tells Microsoft of it and keeps a file
)
MIN_DICE_VS_FLOAT32 = 0.999
ENGINES = ("auto", "onnxruntime", "openvino")
PRECISIONS = ("auto", "float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Engine:
    """A network that is ready to run."""

    engine: str
    precision: str
    run: Callable[
        [np.ndarray], np.ndarray
    ]  # images (N, h, w, C) float32 in [0, 1] → probabilities (N, h, w, K)
    input_name: str
    input_shape: tuple[int, ...]  # (h, w, C)
    output_name: str
    output_channels: int

    def predict_on_batch(self, prepared: np.ndarray) -> np.ndarray:
        """Do as a Keras model does."""
        return self.run(prepared)


def open_onnxruntime(content: bytes, threads: int = 0, precision: str = "float32") -> Engine:
    """Open an ONNX file with ONNX Runtime on the CPU; threads 0 takes every core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = (
        threads or utils.cores()
    )  # 0 would tie them to cores that others use too
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    entry, output = session.get_inputs()[0], session.get_outputs()[0]
    return Engine(
        "onnxruntime",
        precision,
        lambda prepared: session.run([output.name], {entry.name: prepared})[0],
        entry.name,
        tuple(entry.shape[1:]),
        output.name,
        output.shape[-1],
    )


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would tell Google Analytics of it and keep a file in $HOME."""
    sys.modules["openvino_telemetry"] = None  # as if it was not installed; OpenVINO does without
    import openvino

    return openvino


def open_openvino(content: bytes, threads: int = 0, precision: str = "float32") -> Engine:
    """Open an ONNX file with OpenVINO on the CPU, image by image: fixed sizes are twice as fast as batches."""
    openvino = import_openvino()
    core = openvino.Core()
    model = core.read_model(content)
    shape = [1, *(side.get_length() for side in list(model.inputs[0].partial_shape)[1:])]
    model.reshape(shape)
    hints = {
        "ENABLE_CPU_PINNING": False,  # several processes would share the same core
        "INFERENCE_NUM_THREADS": threads or utils.cores(),
        "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16"}.get(precision, "f32"),
    }
    alone = core.compile_model(model, "CPU", hints | {"PERFORMANCE_HINT": "LATENCY"})

    @cache
    def queue() -> Any:
        several = core.compile_model(model, "CPU", hints | {"PERFORMANCE_HINT": "THROUGHPUT"})
        # Twice as many as are computed at a time, so that none waits for Python.
        return openvino.AsyncInferQueue(
            several, 2 * several.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        )

    def run(prepared: np.ndarray) -> np.ndarray:
        if len(prepared) == 1:  # all threads on it; of several each has its own
            return alone(prepared)[0]
        found: list[Any] = [None] * len(prepared)
        queue().set_callback(
            lambda request, i: found.__setitem__(i, request.get_output_tensor(0).data.copy())
        )
        for i, image in enumerate(prepared):
            queue().start_async([image[None]], userdata=i)
        queue().wait_all()
        return np.concatenate(found)

    return Engine(
        "openvino",
        precision,
        run,
        model.inputs[0].any_name,
        tuple(shape[1:]),
        model.outputs[0].any_name,
        model.outputs[0].partial_shape[-1].get_length(),
    )


def has_openvino() -> bool:
    """Tell whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def has_bfloat16() -> bool:
    """Tell whether OpenVINO is installed and computes in bfloat16 on this processor."""
    if not has_openvino():
        return False
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def choose_engine(engine: str, precision: str, dice: dict[str, float]) -> tuple[str, str]:
    """Choose engine and precision: auto is OpenVINO in bfloat16 where that may be, else ONNX Runtime in float32.

    dice: of the masks with those of float32 on this kind of processor, by "openvino bfloat16", "openvino int8" and
    "onnxruntime int8". Raises UserError for what may not or cannot be.
    """
    for name, value, known in (("engine", engine, ENGINES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UserError(f"{name} is {value!r}; expected {', '.join(known)}")
    bfloat16 = dice.get("openvino bfloat16", 0) >= MIN_DICE_VS_FLOAT32 and has_bfloat16()
    if precision == "auto":
        precision = "bfloat16" if bfloat16 and engine != "onnxruntime" else "float32"
    if engine == "auto":
        integers = (
            precision == "int8"
            and has_openvino()
            and dice.get("openvino int8", 0) >= MIN_DICE_VS_FLOAT32
        )
        engine = "openvino" if precision == "bfloat16" or integers else "onnxruntime"
    if engine == "openvino" and not has_openvino():
        raise UserError("engine openvino is not installed: pip install openvino")
    kind = f"{engine} {precision}"
    if precision == "bfloat16" and (engine == "onnxruntime" or not has_bfloat16()):
        raise UserError("precision bfloat16 needs --engine openvino and a processor that has it")
    if precision != "float32" and not dice.get(kind, 0) >= MIN_DICE_VS_FLOAT32:
        found = f"{dice[kind]:.4f}" if kind in dice else "not measured"
        raise UserError(
            f"{kind}: the Dice of its masks with those of float32 on {utils.kind_of_cpu()} is {found}; expected at least "
            f"{MIN_DICE_VS_FLOAT32} in manifest.json. Take --precision float32, or, where it is not measured, run python gate.py"
        )
    return engine, precision


def read_verified(path: Path, manifest: dict[str, Any]) -> bytes:
    """Read a file whose checksum is that of its manifest. Raises UserError."""
    content, expected = path.read_bytes(), manifest["sha256"].get(path.name)
    found = hashlib.sha256(content).hexdigest()
    if not hmac.compare_digest(found, str(expected)):
        raise UserError(
            f"{path} has checksum {found}; its manifest says {expected}. One of them was changed: export it anew"
        )
    return content


def load_engine(
    path: Path, engine: str = "auto", precision: str = "auto", threads: int = 0
) -> tuple[Engine, dict[str, Any], str]:
    """Load an ONNX file that `export.py` wrote, if its checksum is that of the manifest beside it.

    threads: of one inference; 0 takes every core. Returns also the metadata of the model file and the SHA-256 of the file
    that is run: int8 has one of its own. Raises UserError.
    """
    if path.suffix != ".onnx" or not path.is_file():
        found = "is no .onnx file" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {found}; run `python export.py --model YOUR.h5`, which writes export/unet.onnx"
        )
    if path.stem.endswith("-int8"):
        raise UserError(
            f"{path} is run by --precision int8 and the name of the file that it was made from"
        )
    try:
        manifest = json.loads(path.with_name("manifest.json").read_text())
        metadata, dice = (
            manifest["facts"],
            manifest.get("precisions", {}).get(utils.kind_of_cpu(), {}),
        )
        content = read_verified(path, manifest)
        engine, precision = choose_engine(engine, precision, dice)
        if precision == "int8":
            path = path.with_name(f"{path.stem}-int8.onnx")
            content = read_verified(path, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} and its manifest.json cannot be read ({error}); run `python export.py --model YOUR.h5`"
        ) from None
    if metadata.get("preparation") != PREPARATION:
        raise UserError(
            f"{path} expects images prepared by {metadata.get('preparation')!r}, not {PREPARATION!r}"
        )
    try:
        opened = {"openvino": open_openvino, "onnxruntime": open_onnxruntime}[engine](
            content, threads, precision
        )
    except ImportError as error:
        raise UserError(f"{engine} is not installed ({error}): pip install {engine}") from None
    except Exception as error:
        raise UserError(f"{path} is no network that {engine} loads ({error})") from None
    return opened, metadata, hashlib.sha256(content).hexdigest()
