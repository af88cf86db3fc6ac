"""Run a network that `export.py` wrote, without Keras: by ONNX Runtime or OpenVINO.

A network runs in float32. bfloat16 and int8 are allowed where masks stay the same: manifest.json,
beside the network, holds for each kind of processor the mean Dice between the masks of both
(`python -m inference.precision_check` measures it).
"""

import hashlib
import hmac
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import utils
from utils import UserError

# ONNX Runtime's own switch, read at its first import: it sends nothing and writes no file.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

MIN_DICE_VS_FLOAT32 = 0.999
ENGINES = ("auto", "onnxruntime", "openvino", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Engine:
    """A network that is ready to run."""

    engine: str
    precision: str
    # Images (N, …, C) float32 in [0, 1] → probabilities (N, …, K). Of a network that also looks at
    # the mirrored image, a channel more: how much both differ.
    run: Callable[[np.ndarray], np.ndarray]
    input_name: str
    input_shape: tuple[int, ...]  # (h, w, C), or (d, h, w, C) of a 3-D network
    output_name: str
    output_channels: int

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Run the network, under the name that a Keras model has for it."""
        return self.run(images)


CUDA = "CUDAExecutionProvider"  # ONNX Runtime's part for NVIDIA GPUs

# ------------------------------------------------------------------------------ opening a network


def join_outputs(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Join a network's outputs: probabilities (N, …, K) and, if there is one, their spread."""
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=-1)


Run = Callable[[np.ndarray], np.ndarray]  # images (1, …, C) → probabilities (1, …, K)


class Lanes:
    """Compute images side by side: one that comes alone by all threads, others by a thread each.

    wide: computes an image by all threads. open_narrow: opens what computes one by one thread, when
    it is needed first. Both may be called by several threads at a time.
    """

    def __init__(self, threads: int, wide: Run, open_narrow: Callable[[], Run]) -> None:
        self.wide, self.threads = wide, threads
        self.open_narrow = cache(open_narrow)
        self.lock, self.running = threading.Lock(), 0
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="lane")

    def run(self, images: np.ndarray) -> np.ndarray:
        """Compute images (N, …, C); may be called by several threads at a time."""
        with self.lock:
            self.running += 1
            is_alone = self.running == 1
        try:
            if is_alone and len(images) == 1:
                return self.wide(images)
            with self.lock:
                narrow = self.open_narrow()
            if len(images) == 1:
                return narrow(images)
            return np.concatenate(list(self.pool.map(narrow, np.split(images, len(images)))))
        finally:
            with self.lock:
                self.running -= 1


def open_onnxruntime(content: bytes, threads: int = 0, precision: str = "float32") -> Engine:
    """Open an ONNX file with ONNX Runtime on the CPU; threads 0 takes every core."""
    import onnxruntime

    def open_session(num_threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        # Threads wait by spinning, but only while an image is computed: after it they would take
        # the cores from those that decode the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(content, options, providers=providers)

    # ONNX Runtime's own 0 would pin its threads to cores that other processes use too.
    threads = threads or utils.cores()
    wide = open_session(threads)
    name = wide.get_inputs()[0].name

    def run_with(session: Any) -> Run:
        return lambda images: join_outputs(session.run(None, {name: images}))

    lanes = Lanes(threads, run_with(wide), lambda: run_with(open_session(1)))
    return describe_session("onnxruntime", wide, precision, lanes.run)


def describe_session(engine: str, session: Any, precision: str, run: Run) -> Engine:
    """Say what a session of ONNX Runtime takes and gives."""
    entry, output = session.get_inputs()[0], session.get_outputs()[0]
    shape = tuple(entry.shape[1:])
    return Engine(engine, precision, run, entry.name, shape, output.name, output.shape[-1])


def open_cuda(content: bytes, threads: int = 0, precision: str = "float32") -> Engine:
    """Open an ONNX file with ONNX Runtime on an NVIDIA GPU; `threads` says nothing there.

    Raises UserError if the GPU cannot be used. ONNX Runtime alone would go on without it.
    """
    import onnxruntime

    onnxruntime.preload_dlls()  # of NVIDIA's Python packages
    # TF32 rounds to 10 bits. The masks are to be those of float32.
    providers = [(CUDA, {"use_tf32": "0"})]
    session = onnxruntime.InferenceSession(content, providers=providers)
    if CUDA not in session.get_providers():
        raise UserError(
            "engine cuda finds no NVIDIA GPU, or not its libraries (see above); "
            "use --engine onnxruntime"
        )
    name = session.get_inputs()[0].name
    return describe_session(
        "cuda", session, precision, lambda images: join_outputs(session.run(None, {name: images}))
    )


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    At its import it would report to Google Analytics and write a file to $HOME. Its only switches
    are a file in $HOME and the variables that CI systems set. It does without the package
    openvino_telemetry if that cannot be imported, and None here means just that to Python.
    """
    sys.modules["openvino_telemetry"] = None
    import openvino

    return openvino


def open_openvino(content: bytes, threads: int = 0, precision: str = "float32") -> Engine:
    """Open an ONNX file with OpenVINO on the CPU, with fixed sizes: twice as fast as open ones."""
    openvino = import_openvino()
    core = openvino.Core()
    model = core.read_model(content)
    sides = list(model.inputs[0].partial_shape)[1:]
    shape = tuple(side.get_length() for side in sides)
    model.reshape([1, *shape])
    threads = threads or utils.cores()
    config = {
        # Pinned threads of several processes would share the same core.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
    }

    def compile_for(hint: str, **more: Any) -> Run:
        compiled = core.compile_model(model, "CPU", config | {"PERFORMANCE_HINT": hint, **more})
        own = threading.local()  # a request serves one thread at a time

        def run(images: np.ndarray) -> np.ndarray:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            own.request.infer([images])
            # The request's next run overwrites its outputs.
            return join_outputs([output.data for output in own.request.output_tensors]).copy()

        return run

    lanes = Lanes(
        threads,
        compile_for("LATENCY"),
        lambda: compile_for("THROUGHPUT", NUM_STREAMS=threads),
    )
    return Engine(
        "openvino",
        precision,
        lanes.run,
        model.inputs[0].any_name,
        shape,
        model.outputs[0].any_name,
        model.outputs[0].partial_shape[-1].get_length(),
    )


# --------------------------------------------------------------- choosing an engine and precision


def has_openvino() -> bool:
    """Return whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def has_cuda() -> bool:
    """Return whether the ONNX Runtime that is installed is the one for NVIDIA GPUs."""
    import onnxruntime

    return CUDA in onnxruntime.get_available_providers()


def has_bfloat16() -> bool:
    """Return whether OpenVINO is installed and computes in bfloat16 on this processor."""
    if not has_openvino():
        return False
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def choose_engine(engine: str, precision: str, dice: dict[str, float]) -> tuple[str, str]:
    """Choose engine and precision.

    auto is OpenVINO in bfloat16 if that is allowed here, else ONNX Runtime in float32. dice:
    between masks of reduced precision and of float32 on this kind of processor, with the keys
    "openvino bfloat16", "openvino int8" and "onnxruntime int8". Raises UserError for what is not
    allowed or cannot run.
    """
    for name, value, known in (("engine", engine, ENGINES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UserError(f"{name} is {value!r}; expected {', '.join(known)}")
    if precision == "auto":
        allowed = is_allowed("openvino", "bfloat16", dice)
        may_choose = engine in ("auto", "openvino")
        precision = "bfloat16" if allowed and may_choose and has_bfloat16() else "float32"
    if engine == "auto":
        fast_int8 = precision == "int8" and has_openvino() and is_allowed("openvino", "int8", dice)
        engine = "openvino" if precision == "bfloat16" or fast_int8 else "onnxruntime"
    check_choice(engine, precision, dice)
    return engine, precision


def is_allowed(engine: str, precision: str, dice: dict[str, float]) -> bool:
    """Return whether the masks of this precision are close enough to those of float32."""
    return precision == "float32" or dice.get(f"{engine} {precision}", 0) >= MIN_DICE_VS_FLOAT32


def check_choice(engine: str, precision: str, dice: dict[str, float]) -> None:
    """Raise UserError if an engine cannot run here, or a precision is not allowed."""
    if engine == "openvino" and not has_openvino():
        raise UserError("engine openvino is not installed: pip install openvino")
    if engine == "cuda" and not has_cuda():
        raise UserError(
            "engine cuda is not installed: pip uninstall onnxruntime, "
            'then pip install "onnxruntime-gpu[cuda,cudnn]"'
        )
    if engine == "cuda" and precision != "float32":
        raise UserError(f"engine cuda computes in float32, not in {precision}")
    if precision == "bfloat16" and (engine != "openvino" or not has_bfloat16()):
        raise UserError("precision bfloat16 needs --engine openvino and a processor that has it")
    if not is_allowed(engine, precision, dice):
        name = f"{engine} {precision}"
        found = f"{dice[name]:.4f}" if name in dice else "not measured"
        raise UserError(
            f"{name}: the Dice of its masks with those of float32 on {utils.kind_of_cpu()} is "
            f"{found}; expected at least {MIN_DICE_VS_FLOAT32} in manifest.json. Use --precision "
            "float32. If it is not measured, run python -m inference.precision_check"
        )


# --------------------------------------------------------------------- loading an exported folder


def load_engine(
    path: Path, engine: str = "auto", precision: str = "auto", threads: int = 0
) -> tuple[Engine, dict[str, Any], str]:
    """Load an ONNX file that `export.py` wrote, if its checksum is that of manifest.json.

    threads: of one inference; 0 takes every core. Returns also the metadata of the model file and
    the SHA-256 of the file that runs: int8 has a file of its own. Raises UserError.
    """
    path = Path(utils.find_default(str(path)))
    if path.suffix != ".onnx" or not path.is_file():
        found = "is no .onnx file" if path.exists() else "does not exist"
        near = utils.nearest_path(path)
        hint = f"did you mean {near}? Else " if near else ""
        raise UserError(
            f"{path} {found}; {hint}run `python export.py --model YOUR.h5`, which writes "
            "export/unet.onnx"
        )
    if path.stem.endswith("-int8"):
        raise UserError(f"{path} cannot be named; name its float32 file with --precision int8")
    try:
        manifest = json.loads(path.with_name("manifest.json").read_text())
        metadata = manifest["facts"]
        dice = manifest.get("precisions", {}).get(utils.kind_of_cpu(), {})
        content = read_verified(path, manifest)
        engine, precision = choose_engine(engine, precision, dice)
        if precision == "int8":
            content = read_verified(int8_path(path), manifest)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} and its manifest.json cannot be read ({error}); "
            "run `python export.py --model YOUR.h5`"
        ) from None
    utils.check_preparation(path, metadata)
    opened = open_network(path, content, engine, precision, threads)
    return opened, metadata, hashlib.sha256(content).hexdigest()


def int8_path(path: Path) -> Path:
    """Return where the int8 version of an ONNX file is."""
    return path.with_name(f"{path.stem}-int8.onnx")


def read_verified(path: Path, manifest: dict[str, Any]) -> bytes:
    """Read a file if its checksum is that of the manifest. Raises UserError."""
    content, expected = path.read_bytes(), manifest["sha256"].get(path.name)
    found = hashlib.sha256(content).hexdigest()
    if not hmac.compare_digest(found, str(expected)):
        raise UserError(
            f"{path} has checksum {found}; its manifest expects {expected}. One of them was "
            "changed: export it again"
        )
    return content


def open_network(path: Path, content: bytes, engine: str, precision: str, threads: int) -> Engine:
    """Open the content of an ONNX file with an engine. Raises UserError."""
    open_with = {"onnxruntime": open_onnxruntime, "openvino": open_openvino, "cuda": open_cuda}
    try:
        return open_with[engine](content, threads, precision)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{engine} is not installed ({error}): pip install {engine}") from None
    except Exception as error:  # each engine has errors of its own
        raise UserError(f"{path} is no network that {engine} loads ({error})") from None
