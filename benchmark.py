"""Measure what the README says about speed and memory.

    python benchmark.py training        a training step, beside PyTorch's of the same network
    python benchmark.py pipeline        what reading and augmenting images costs beside the step
    python benchmark.py prediction      every engine, beside OpenVINO's own benchmark; predict.py on a folder
    python benchmark.py start           how long scripts take to answer
    python benchmark.py cold --data-dir DIR    a whole training to a given Dice, beside PyTorch's
    python benchmark.py archive         archive.py on two nodes of a Ray cluster, with one worker, two, and one killed
    python benchmark.py service         how long serve.py takes for a 512x512 PNG, and how many it answers in a second
    python benchmark.py memory          the most memory that a training on 10,000 images of 512x512 takes

What is compared runs in turn, and the median and the range are told. All write results/benchmark.csv, a row for each
figure. PyTorch and OpenVINO are extras: pip install torch openvino.
"""

import contextlib
import datetime
import http.client
import importlib.util
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

import engines
import images
import phantom
import predict
from images import UserError
from serving import engine

SIDE = 512  # pixels
PRODUCT = 2048  # rows of the matrices whose product shows what the processor can do


def make_images(folder: Path, count: int) -> None:
    """Write `count` pairs, a disc on a gradient each and, in a corner, noise."""
    rng = np.random.default_rng(0)
    slope = np.add.outer(np.arange(SIDE), np.arange(SIDE)) // 8
    for i in tqdm(range(count), "writing", unit="pair", disable=None):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        cv2.circle(mask, rng.integers(100, 400, 2).tolist(), int(rng.integers(30, 90)), 255, cv2.FILLED)
        picture = np.uint8(slope + mask // 4)
        picture[:16, :16] = rng.integers(256, size=(16, 16))  # or two could be the same
        images.write(folder / "images" / f"{i}.png", picture)
        images.write(folder / "masks" / f"{i}.png", mask)


def memory(*, count: int = 10_000, memory_gb: float = 1.0) -> None:
    """Train an epoch of all images, with a small network, and measure the process's peak memory.

    Args:
        count: how many images
        memory_gb: as in train.py

    A gigabyte is 2**30 bytes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "set", count)
        flags = f"--image-size {SIDE} --filters 2 --depth 2 --epochs 1 --memory-gb {memory_gb}"
        places = ["--data-dir", folder / "set", "--out-dir", folder / "run", "--cache-dir", folder / "cache"]
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("train.py"), *places, *flags.split()], check=False
        )
        if done.returncode:
            raise UserError("the training failed, see above")
        decoded = sum(path.stat().st_size for path in (folder / "cache").iterdir()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    what = f"train.py on {count} images of {SIDE}x{SIDE}, --memory-gb {memory_gb:g}: peak memory"
    write([row(what, "GB", [peak], "decoded images", [decoded])])


# ------------------------------------------------------------------------------------------------------------- speed
TABLE = Path("results/benchmark.csv")
REST_S = 0.5  # before each measurement, so that the threads of the one before sleep


def row(figure: str, unit: str, values: Sequence[float], reference: str = "", than: Sequence[float] = ()) -> dict:
    """Make a row of the table: median and range of what was measured, and its ratio to a reference in the same run."""
    made = {"figure": figure, "unit": unit, "median": statistics.median(values), "low": min(values)}
    made |= {"high": max(values), "reference": reference, "ratio": float("nan"), "repeats": len(values)}
    if len(than):
        made["ratio"] = made["median"] / statistics.median(than)
    return made


def write(rows: Sequence[dict], hardware: str = "") -> None:
    """Print rows, and put them into results/benchmark.csv in place of older ones of the same figures and hardware."""
    table = pd.DataFrame(rows).assign(date=datetime.date.today().isoformat(), hardware=hardware or processor())
    print(table.drop(columns=["date", "hardware"]).to_string(index=False, float_format="{:.4g}".format))
    if TABLE.is_file():
        old = pd.read_csv(TABLE)
        table = pd.concat([old[~(old.figure.isin(table.figure) & old.hardware.isin(table.hardware))], table])
    with images.atomic(TABLE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    print(f"{TABLE} has these figures now, in place of earlier ones")


def processor() -> str:
    """Name the processor and the cores that are used."""
    import utils

    has, gpus = engines.cpu(), [f"{gpu} by {keras.backend.backend()}, " for gpu in utils.gpus()]
    amx = " with AMX" if "amx_bf16" in has.get("flags", "") else ""
    return f"{''.join(gpus)}{engines.cores()} cores of {has.get('model name', sys.platform)}{amx}"


def in_turn(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Make every call once to warm up, then `rounds` times in turn: what each returned."""
    results: dict[str, list[float]] = {name: [] for name in calls}
    for i in tqdm(range(rounds + 1), "measuring", unit="round", disable=None):
        for name, call in calls.items():
            time.sleep(REST_S)
            value = call()
            if i:
                results[name].append(value)
    return results


def steps_per_second(step: Callable[[], object], count: int) -> float:
    """Call `count` times, after two calls that bring threads and caches back."""
    for _ in range(2):
        step()
    start = time.perf_counter()
    for _ in range(count):
        step()
    return count / (time.perf_counter() - start)


def installed(name: str) -> bool:
    """Tell whether an extra is there; say so if not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed, so nothing is compared with it: pip install {name}")
    return found


@contextlib.contextmanager
def apart(calls: dict[str, tuple]) -> Iterator[dict[str, Callable[[], float]]]:
    """Give each call, a function and its arguments, a process of its own: the threads of one library slow another's."""
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in calls}
        yield {name: lambda name=name, call=call: pools[name].submit(*call).result() for name, call in calls.items()}


def flops(model: keras.Model) -> int:
    """Count the operations of a step's convolutions for an image: those forward, and twice as many backward."""
    count = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Conv2DTranspose):
            places = layer.input if isinstance(layer, keras.layers.Conv2DTranspose) else layer.output
            count += 2 * math.prod(layer.kernel.shape) * math.prod(places.shape[1:3])
    return 3 * count


def multiply(side: int, count: int) -> float:
    """Measure the product of two square matrices in the network's precision: operations per second."""
    import utils

    a, b = (keras.random.normal((side, side), dtype=utils.set_precision("auto")) for _ in range(2))
    return 2 * side**3 * steps_per_second(lambda: float(keras.ops.cast(keras.ops.matmul(a, b)[0, 0], "float32")), count)


@cache
def make_step(kind: str, config: Any) -> Callable[[int], float]:
    """Build the network of a `train.Config`: a function that tells the seconds of so many steps, or predictions."""
    import train
    import utils

    size = config.batch_size, config.image_size, config.image_size, 1
    x = np.random.default_rng(0).random(size, np.float32)
    y = np.float32(x > 0.5)
    if kind.startswith("Keras"):
        utils.set_precision("auto")
        model = train.make_network(config, ["foreground"], Path(), resumed=False)
        train.compile_network(model, config, 10_000)
        if kind == "Keras, prediction":
            return lambda count: count / steps_per_second(lambda: model.predict_on_batch(x), count)
        return lambda count: fit_seconds(model, Repeated(x, y, count))
    import torch

    import rival

    torch.set_num_threads(engines.cores())
    precision = "bfloat16" if utils.has_amx() else "float32"
    model = rival.UNet(1, config.filters).to(memory_format=torch.channels_last)
    step = rival.make_step(torch.compile(model) if kind == "PyTorch compiled" else model, precision)
    return lambda count: count / steps_per_second(lambda: step(x, y), count)


def step_rate(kind: str, config: Any, count: int) -> float:
    """Measure training steps, or predictions: images per second."""
    return config.batch_size * count / make_step(kind, config)(count)


def training(
    *, filters: str = "8,16", image_size: int = 128, batch_size: int = 8, rounds: int = 7, steps: int = 20
) -> None:
    """Measure the training step of the default network and of wider ones, and Keras's prediction: images per second.

    Args:
        filters: of the first level, separated by commas
        image_size: pixels
        batch_size: images
        rounds: how often each is measured
        steps: of each measurement

    The paper's network on a GPU: --filters 64 --image-size 512 --batch-size 16. PyTorch is measured on CPUs only.
    """
    import train
    import utils

    rows = []
    kinds = ["Keras", *(["PyTorch", "PyTorch compiled"] if not utils.gpus() and installed("torch") else [])]
    product, more = f"product of {PRODUCT}x{PRODUCT} matrices", "Keras, prediction"
    for width in map(int, filters.split(",")):
        config = train.Config(filters=width, image_size=image_size, batch_size=batch_size)
        measured = {kind: (step_rate, kind, config, steps) for kind in (*kinds, more)}
        with apart(measured | {product: (multiply, PRODUCT, steps)}) as calls:
            found = in_turn(calls, rounds)
        what = f"training step, {image_size}x{image_size}, {width} filters, batch {batch_size}"
        for reference in kinds[1:]:
            rows.append(row(f"{what}: {reference}", "images/s", found[reference]))
        for reference in kinds[1:] or [""]:
            than = found.get(reference, ())
            rows.append(row(f"{what}: Keras, beside {reference}", "images/s", found["Keras"], reference, than))
        rows.append(row(f"{what}: {more} alone", "images/s", found[more]))
        model = train.make_network(config, ["foreground"], Path(), resumed=False)
        teras = [[rate * each / 1e12 for rate in found[of]] for of, each in (("Keras", flops(model)), (product, 1))]
        rows.append(row(f"{what}: Keras, its convolutions", "TFLOP/s", teras[0], product, teras[1]))
    write(rows)


def fit_seconds(model: Any, batches: Any) -> float:
    """Time the steps of an epoch of `fit`, as train.py runs it, without what comes before its first one ends."""
    times: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: times.append(time.perf_counter()))
    clock.async_safe = True  # as the Recorder is
    model.fit(batches, verbose=0, shuffle=False, callbacks=[clock])
    times.sort()
    return (times[-1] - times[0]) * len(times) / (len(times) - 1)


def epoch_rows(folder: Path, side: int, rounds: int) -> list[dict]:
    """Measure an epoch of a folder's images with augmentation, beside one of a single batch."""
    import data
    import pairing
    import train

    config, names = train.Config(image_size=side), ["foreground"]
    dataset, _ = data.load(pairing.find_pairs(folder)[0], data.Recipe(names, (side, side)))
    model = train.make_network(config, names, Path(), resumed=False)
    train.compile_network(model, config, 10_000)
    batches = data.Batches(dataset, np.arange(len(dataset.index)), names, config.batch_size, config.augmentation)
    calls = {
        "step alone": partial(fit_seconds, model, Repeated(*batches[0], len(batches))),
        "with images": partial(fit_seconds, model, batches),
    }
    found = in_turn(calls, rounds)
    what = f"epoch of {len(dataset.index)} images of {side}x{side}, {config.augmentation} augmentation"
    return [
        row(f"{what}: one batch again and again", "s", found["step alone"]),
        row(f"{what}: read and augmented", "s", found["with images"], "one batch", found["step alone"]),
    ]


def pipeline(*, sizes: str = "128,192", rounds: int = 7, originals: int = 16) -> None:
    """Measure what the images cost: an epoch with augmentation beside one without, and reading files beside the cache.

    Args:
        sizes: of the network's input in pixels, separated by commas
        rounds: how often each is measured
        originals: so many pairs of 4020x4892 pixels, as Montgomery's files are, are written and read
    """
    import data
    import pairing
    import train
    import utils

    utils.set_precision("auto")
    recipe = data.Recipe(["foreground"], (train.Config.image_size, train.Config.image_size))
    with tempfile.TemporaryDirectory() as name:
        folder = phantom.make_phantoms(Path(name) / "phantoms", train.Config.phantoms, seed=0)
        rows = [made for side in sizes.split(",") for made in epoch_rows(folder, int(side), rounds)]
        pairs, _ = pairing.find_pairs(write_large(Path(name) / "large", originals))
        paths = [path for pair in pairs for path in (pair.image, *pair.masks)]

        def decode() -> float:
            start = time.perf_counter()
            with ThreadPoolExecutor(engines.cores()) as pool:
                list(pool.map(lambda path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED), paths))
            return time.perf_counter() - start

        def load(cache_dir: Path | str) -> float:
            start = time.perf_counter()
            data.load(pairs, recipe, cache_dir)
            return time.perf_counter() - start

        calls = {"decode": decode, "read": lambda: load(""), "cached": lambda: load(Path(name) / "cache")}
        found = in_turn(calls, 3)
        what = f"{originals} pairs of 4020x4892 pixels"
        rows.append(row(f"{what}: decoded by OpenCV", "s", found["decode"]))
        rows.append(row(f"{what}: read and prepared", "s", found["read"], "decoded", found["decode"]))
        rows.append(row(f"{what}: from the cache", "s", found["cached"], "decoded", found["decode"]))
    write(rows)


class Repeated(keras.utils.PyDataset):
    """One batch, again and again."""

    def __init__(self, x: np.ndarray, y: np.ndarray, count: int) -> None:
        super().__init__()
        self.batch, self.count = (x, y), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.batch


def write_large(folder: Path, count: int) -> Path:
    """Write phantoms of the size of Montgomery's files."""
    for i in tqdm(range(count), "writing", unit="pair", disable=None):
        picture, masks = phantom.phantom(np.random.default_rng(i))
        images.write(folder / "images" / f"{i}.png", cv2.resize(picture, (4892, 4020), interpolation=cv2.INTER_CUBIC))
        mask = np.uint8(255 * (masks.max(-1) > 0))
        images.write(folder / "masks" / f"{i}.png", cv2.resize(mask, (4892, 4020), interpolation=cv2.INTER_NEAREST))
    return folder


def prediction(*, model: Path = Path(predict.IN_THE_BOX), rounds: int = 5, count: int = 200) -> None:
    """Measure every engine and precision, in images per second, and predict.py on a folder.

    Args:
        model: as export.py wrote it
        rounds: how often each is measured
        count: phantoms of 512x512 pixels in the folder
    """
    height, width = json.loads(model.with_name("manifest.json").read_text())["facts"]["image_size"]
    kinds = [("onnxruntime", "float32"), ("onnxruntime", "int8")]
    if installed("openvino"):
        kinds += [("openvino", precision) for precision in ("float32", "bfloat16", "int8")]
    wanted = {}
    for kind, precision in kinds:
        with contextlib.suppress(UserError):  # not here, or not so well
            engines.load(model, kind, precision)
            wanted[f"{kind} {precision}"] = engine_rate, model, kind, precision
            if kind == "openvino":
                wanted[f"benchmark_app {precision}"] = benchmark_app, model, precision
    with apart(wanted) as calls:
        found = in_turn(calls, rounds)
    rows = []
    for name, values in found.items():
        own = name.replace("openvino", "benchmark_app")
        for reference in ["onnxruntime float32", *([own] if own in found and own != name else [])]:
            figure = f"{model.parent.name}, {height}x{width}: {name}, beside {reference}"
            rows.append(row(figure, "images/s", values, reference, found[reference]))
    rows += folder_rates(model, count, rounds)
    write(rows)


@cache
def opened(model: Path, kind: str, precision: str) -> engines.Engine:
    """Load a model once."""
    return engines.load(model, kind, precision)[0]


def engine_rate(model: Path, kind: str, precision: str) -> float:
    """Measure an engine on batches of 8: images per second."""
    engine = opened(model, kind, precision)
    batch = np.random.default_rng(0).random((8, *engine.input_shape), np.float32)
    return len(batch) * steps_per_second(lambda: engine.run(batch), 12)


def benchmark_app(model: Path, precision: str) -> float:
    """Ask OpenVINO's own tool for its rate, in images per second: the better one of its two hints."""
    path = model.with_name("unet-int8.onnx") if precision == "int8" else model
    shape = json.loads(model.with_name("manifest.json").read_text())["facts"]
    sides = [1, *shape["image_size"], shape["channels"]]
    kind = "bf16" if precision == "bfloat16" else "f32"
    command = [
        Path(sys.executable).with_name("benchmark_app"),
        "-m",
        path,
        "-d",
        "CPU",
        "-t",
        "3",
        "-shape",
        str(sides),
    ]
    rates = []
    for hint in ("latency", "throughput"):
        flags = ["-infer_precision", kind, "-hint", hint]
        said = subprocess.run([*command, *flags], capture_output=True, text=True, check=True).stdout
        rates.append(float(re.search(r"Throughput:\s+([\d.]+) FPS", said)[1]))
    return max(rates)


def folder_rates(model: Path, count: int, rounds: int) -> list[dict]:
    """Measure predict.py on a folder, start and end included, with and without panels."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = phantom.make_phantoms(Path(name) / "phantoms", count, seed=0) / "CXR_png"
        for panels in ("--no-panels", "--panels"):
            flags = ["--model", str(model), "--input", str(folder), "--output", f"{name}/out", panels]
            seconds = [run_script("predict.py", *flags) for _ in range(rounds)]
            figure = f"predict.py on a folder of {count} images, {panels}"
            rows.append(row(figure, "images/s", [count / one for one in seconds]))
    return rows


def run_script(name: str, *flags: str) -> float:
    """Run one of our scripts and return its seconds. Raises UserError if it fails."""
    start = time.perf_counter()
    script = Path(__file__).with_name(name).resolve()
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} {' '.join(flags)} failed:\n{done.stderr[-500:]}")
    return time.perf_counter() - start


def start(*, rounds: int = 7) -> None:
    """Measure how long scripts take from their start to their end.

    Args:
        rounds: how often each is run
    """
    with tempfile.TemporaryDirectory() as name:
        picture = phantom.phantom(np.random.default_rng(0))[0]
        images.write(Path(name) / "one.png", images.resize(picture, (SIDE, SIDE)))
        box = str(Path(__file__).with_name("files") / "lungs" / "unet.onnx")
        one = ["predict.py", "--model", box, "--input", f"{name}/one.png", "--output", f"{name}/out"]
        commands = [["train.py", "--help"], ["predict.py", "--help"], one]
        found = in_turn({command[0] + " " + command[1]: partial(run_script, *command) for command in commands}, rounds)
    names = ("train.py --help", "predict.py --help", "predict.py --input one.png, the model in the box, with its panel")
    write([row(name, "s", values) for name, values in zip(names, found.values(), strict=True)])


def cold(
    data_dir: str, *, flags: str = "", torch_flags: str = "", rounds: int = 3, cache_dir: str = "files/cache"
) -> None:
    """Measure a whole training of fold 0 of 5, from the start of the process until all is written, and its test Dice.

    Args:
        data_dir: the data set
        flags: of train.py, as in --flags="--epochs 40"
        torch_flags: of PyTorch's; those of train.py where none are given
        rounds: how often each is run
        cache_dir: of the decoded images, which the first run fills
    """
    common = ["--data-dir", data_dir, "--folds", "5", "--fold", "0", "--cache-dir", cache_dir]
    ours, theirs, rows = shlex.split(flags), shlex.split(torch_flags or flags), []

    def run(name: str, flags: Sequence[str], saved: str, backend: str) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, Path(__file__).with_name(name).resolve(), *common, *flags, "--out-dir", folder]
            began = time.time()
            environment = os.environ | ({"KERAS_BACKEND": backend} if backend else {})
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise UserError(f"{name} failed:\n{done.stderr[-500:]}")
            dice = float(re.findall(r"test Dice ([\d.]+)", done.stdout)[-1])
            return (Path(folder) / saved).stat().st_mtime - began, dice

    run("train.py", [*ours, "--epochs", "2"], "fold0/curves.png", "")  # fills the cache, and the disk's
    calls = {"train.py": lambda: run("train.py", ours, "fold0/curves.png", "")}
    if installed("torch"):
        calls["PyTorch"] = lambda: run("rival.py", theirs, "model.pt", "torch")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), "training", unit="round", disable=None):
        for name, call in calls.items():
            found[name].append(call())
    than = [seconds for seconds, _ in found.get("PyTorch", ())]
    for name, values in found.items():
        what = f"fold 0 {flags}: {name}"
        told = f"{what}, from start to the end of training"
        rows.append(row(told, "s", [one[0] for one in values], "PyTorch" if than else "", than))
        rows.append(row(f"{what}, test Dice", "", [one[1] for one in values]))
    write(rows)


# ----------------------------------------------------------------------------------------------------------- archive

NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8})
node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
print(cluster.address, *(one.all_processes["raylet"][0].process.pid for one in (cluster.head_node, node)), flush=True)
sys.stdin.readline()
cluster.remove_node(node, allow_graceful=False)
print(flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


class TwoNodes:
    """A Ray cluster of two nodes of one CPU on this machine, in a process of its own."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # as sockets' paths must be short
        local = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        self.settings = os.environ | local | {"RAY_TMPDIR": self.folder}
        errors = Path(self.folder) / "stderr"
        with errors.open("w") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            self.process = subprocess.Popen([sys.executable, "-c", NODES], env=self.settings, text=True, **pipes)
        said = self.process.stdout.readline().split()
        if len(said) != 3:
            raise UserError(f"Ray's nodes did not start:\n{errors.read_text()[-500:]}")
        self.settings["RAY_ADDRESS"], *self.raylets = said

    def start(self, *flags: object) -> subprocess.Popen:
        """Start archive.py on it."""
        command = [sys.executable, Path(__file__).with_name("archive.py"), *map(str, flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=self.settings, text=True, **pipes)

    def workers(self, node: int) -> list[int]:
        """List the processes of a node that hold the network."""
        command = ["ps", "--ppid", self.raylets[node], "-o", "pid=,args="]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return [int(line.split()[0]) for line in said.splitlines() if "MapWorker" in line]

    def lose_a_node(self) -> None:
        """Let the second node die."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def stop(self) -> None:
        """End what is left of it."""
        try:
            self.process.communicate("\n\n", timeout=60)
        finally:
            self.process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something to happen. Raises UserError if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise UserError(f"waited {seconds:g} s in vain")
        time.sleep(0.05)


def count_masks(folder: Path) -> int:
    """Count the masks that are whole."""
    return len(list(folder.rglob("[!.]*.png")))


def kill_at(nodes: TwoNodes, running: subprocess.Popen, out: Path, number: int) -> None:
    """Kill the second node's worker when so many masks are there."""
    wait_until(lambda: running.poll() is not None or (count_masks(out) > number and nodes.workers(1)), 600)
    if running.poll() is None:
        os.kill(nodes.workers(1)[0], signal.SIGKILL)


def archive(*, count: int = 10_000, model: Path = Path(predict.IN_THE_BOX)) -> None:
    """Segment phantoms of 512x512 pixels on a Ray cluster of two nodes on this machine.

    Args:
        count: how many
        model: as export.py wrote it

    A fifth by one worker, then by two; all by two, of which one is killed when a third is done. Raises UserError if a
    mask is missing.
    """
    if not installed("ray"):
        raise UserError("nothing to measure without Ray: pip install -r requirements-archive.txt")
    nodes, rows = TwoNodes(), []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        stack.callback(nodes.stop)
        scans = phantom.make_phantoms(Path(name) / "phantoms", count, seed=0) / "CXR_png"
        fifth = Path(name) / "fifth"
        fifth.mkdir()
        for path in sorted(scans.iterdir())[: count // 5]:
            os.link(path, fifth / path.name)
        rates: dict[str, list[float]] = {}
        runs = ("one worker", 1, fifth), ("two", 2, fifth), ("two, of which one is killed", 2, scans)
        for what, workers, folder in runs:
            number = len(list(folder.iterdir()))
            out, start = Path(name) / what, time.monotonic()
            running = nodes.start("--input", folder, "--output", out, "--model", model, "--workers", workers)
            stack.callback(running.kill)  # of no effect when it has ended
            if "killed" in what:
                kill_at(nodes, running, out, number // 3)
            said = running.communicate()[0]
            seconds, masks = time.monotonic() - start, count_masks(out)
            if running.returncode or masks != number:
                raise UserError(f"{masks} masks of {number}:\n{said[-500:]}")
            rates[what] = [number / seconds]
            figure = f"archive.py, {number} images, start and end included: {what}"
            rows.append(row(figure, "images/s", rates[what], "one worker", rates["one worker"]))
    write(rows)


# ----------------------------------------------------------------------------------------------------------- service


@contextlib.contextmanager
def running(model: str, *flags: str) -> Iterator[int]:
    """Run serve.py on this machine until the block ends; yield its port. Raises UserError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__).with_name("serve.py"), "--model", model, "--port", str(port), *flags]
    process = subprocess.Popen([*command, "--drain-s", "0"], stdout=subprocess.DEVNULL)
    try:
        while not is_ready(port):
            if process.poll() is not None:
                raise UserError("serve.py did not start, see above")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    """Ask /readyz."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False


def ask(connection: http.client.HTTPConnection, content: bytes) -> float:
    """Send an image; return the seconds until its mask is there. Raises UserError."""
    start = time.perf_counter()
    connection.request("POST", "/v1/segment", body=content)
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise UserError(f"the service answered {answer.status}")
    return time.perf_counter() - start


def ask_together(port: int, content: bytes, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Let clients send an image again and again for so long: answers per second, and each answer's seconds."""
    start = time.perf_counter()

    def client(_: int) -> list[float]:
        connection, times = http.client.HTTPConnection("127.0.0.1", port), []
        while time.perf_counter() - start < seconds:
            times.append(ask(connection, content))
        return times

    with ThreadPoolExecutor(clients) as pool:
        times = [one for times in pool.map(client, range(clients)) for one in times]
    return len(times) / (time.perf_counter() - start), times


def service(*, model: str = "export/unet.onnx", repeats: int = 100, seconds: float = 10.0) -> None:
    """Measure serve.py with a phantom of 512x512 pixels.

    Args:
        model: as export.py wrote it
        repeats: how often one client asks, in turn with the bare network, a tenth at a time
        seconds: of each measurement with several clients
    """
    picture = phantom.phantom(np.random.default_rng(0))[0]
    content = cv2.imencode(".png", images.resize(picture, (SIDE, SIDE)))[1].tobytes()
    network, run = engine.load(Path(model))
    zeros = np.zeros((1, *network.input_shape), np.float32)

    def bare() -> float:
        start = time.perf_counter()
        images.decode_scan(content)
        run(zeros)
        return time.perf_counter() - start

    alone, served = [], []
    with running(model) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for i in tqdm(range(11), "in turn", unit="block", disable=None):  # blocks, as each evicts the other's caches
            block = [bare() for _ in range(repeats // 10)], [ask(connection, content) for _ in range(repeats // 10)]
            if i:  # the first warms up
                alone += block[0]
                served += block[1]
    what = f"serve.py, a PNG of {SIDE}x{SIDE}"
    rows = [row(f"{what}, client and service in turn with the bare network", "s", served, "decoded, bare", alone)]
    for clients in (1, 4, 16, 64):
        rates: dict[int, list[float]] = {}
        for most in (1, 8):
            with running(model, "--max-batch", str(most)) as port:
                ask_together(port, content, clients, 1)
                rate, times = ask_together(port, content, clients, seconds)
            rates[most], load = [rate], f"{what}, {clients} clients, --max-batch {most}"
            rows.append(row(load, "images/s", rates[most], "--max-batch 1", rates[1]))
            rows += [row(f"{load}: p{share}", "s", [np.percentile(times, share)]) for share in (50, 99)]
    write(rows)


if __name__ == "__main__":
    from cli import run_cli

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or one process has most of a GPU's memory
    commands = [training, pipeline, prediction, start, cold, archive, service, memory]
    run_cli(
        lambda: tyro.extras.subcommand_cli_from_dict({call.__name__: call for call in commands}, description=__doc__)
    )
