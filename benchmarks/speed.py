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
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np
import tyro
from tqdm import tqdm

import data
import train
import utils
from benchmarks import pytorch_unet
from benchmarks.scale import SIDE, archive, memory
from benchmarks.service import service
from benchmarks.timing import (
    is_installed,
    isolated_processes,
    make_row,
    run_interleaved,
    run_script,
    steps_per_second,
    write_rows,
)
from dataset import loading
from dataset.batches import Batches
from dataset.loading import Preprocessing
from dataset.phantoms import draw_phantom, make_phantoms
from imaging import pictures, preprocess
from inference import engines
from inference.bundled import BUNDLED_MODEL
from utils import UserError

PRODUCT = 2048  # rows of the matrices whose product shows what the processor can do


def flops(model: keras.Model) -> int:
    """Count the operations of a step's convolutions for an image: those forward, and twice as many backward."""
    count = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Conv2DTranspose):
            places = (
                layer.input if isinstance(layer, keras.layers.Conv2DTranspose) else layer.output
            )
            count += 2 * math.prod(layer.kernel.shape) * math.prod(places.shape[1:3])
    return 3 * count


def multiply(side: int, count: int) -> float:
    """Measure the product of two square matrices in the network's precision: operations per second."""

    a, b = (keras.random.normal((side, side), dtype=utils.set_precision("auto")) for _ in range(2))
    return (
        2
        * side**3
        * steps_per_second(
            lambda: float(keras.ops.cast(keras.ops.matmul(a, b)[0, 0], "float32")), count
        )
    )


@cache
def make_step(kind: str, config: Any) -> Callable[[int], float]:
    """Build the network of a `train.Config`: a function that tells the seconds of so many steps, or predictions."""

    size = config.batch_size, config.image_size, config.image_size, 1
    x = np.random.default_rng(0).random(size, np.float32)
    y = np.float32(x > 0.5)
    if kind.startswith("Keras"):
        utils.set_precision("auto")
        model = train.build_network(config, ["foreground"], Path(), resumed=False)
        train.compile_network(model, config, 10_000)
        if kind == "Keras, prediction":
            return lambda count: count / steps_per_second(lambda: model.predict_on_batch(x), count)
        return lambda count: fit_seconds(model, Repeated(x, y, count))
    import torch

    torch.set_num_threads(utils.cores())
    precision = "bfloat16" if utils.has_amx() else "float32"
    model = pytorch_unet.UNet(1, config.filters).to(memory_format=torch.channels_last)
    step = pytorch_unet.make_step(
        torch.compile(model) if kind == "PyTorch compiled" else model, precision
    )
    return lambda count: count / steps_per_second(lambda: step(x, y), count)


def step_rate(kind: str, config: Any, count: int) -> float:
    """Measure training steps, or predictions: images per second."""
    return config.batch_size * count / make_step(kind, config)(count)


def training(
    *,
    filters: str = "8,16",
    image_size: int = 128,
    batch_size: int = 8,
    rounds: int = 7,
    steps: int = 20,
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

    rows = []
    kinds = [
        "Keras",
        *(["PyTorch", "PyTorch compiled"] if not utils.gpus() and is_installed("torch") else []),
    ]
    product, more = f"product of {PRODUCT}x{PRODUCT} matrices", "Keras, prediction"
    for width in map(int, filters.split(",")):
        config = train.Config(filters=width, image_size=image_size, batch_size=batch_size)
        measured = {kind: (step_rate, kind, config, steps) for kind in (*kinds, more)}
        with isolated_processes(measured | {product: (multiply, PRODUCT, steps)}) as calls:
            found = run_interleaved(calls, rounds)
        what = f"training step, {image_size}x{image_size}, {width} filters, batch {batch_size}"
        for reference in kinds[1:]:
            rows.append(make_row(f"{what}: {reference}", "images/s", found[reference]))
        for reference in kinds[1:] or [""]:
            than = found.get(reference, ())
            rows.append(
                make_row(
                    f"{what}: Keras, beside {reference}",
                    "images/s",
                    found["Keras"],
                    reference,
                    than,
                )
            )
        rows.append(make_row(f"{what}: {more} alone", "images/s", found[more]))
        model = train.build_network(config, ["foreground"], Path(), resumed=False)
        teras = [
            [rate * each / 1e12 for rate in found[of]]
            for of, each in (("Keras", flops(model)), (product, 1))
        ]
        rows.append(
            make_row(f"{what}: Keras, its convolutions", "TFLOP/s", teras[0], product, teras[1])
        )
    write_rows(rows)


def fit_seconds(model: Any, batches: Any) -> float:
    """Time the steps of an epoch of `fit`, as train.py runs it, without what comes before its first one ends."""
    times: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(time.perf_counter())
    )
    clock.async_safe = True  # as the Recorder is
    model.fit(batches, verbose=0, shuffle=False, callbacks=[clock])
    times.sort()
    return (times[-1] - times[0]) * len(times) / (len(times) - 1)


def epoch_rows(folder: Path, side: int, rounds: int) -> list[dict]:
    """Measure an epoch of a folder's images with augmentation, beside one of a single batch."""

    config, names = train.Config(image_size=side), ["foreground"]
    dataset, _ = loading.load_pairs(data.find_pairs(folder)[0], Preprocessing(names, (side, side)))
    model = train.build_network(config, names, Path(), resumed=False)
    train.compile_network(model, config, 10_000)
    batches = Batches(
        dataset, np.arange(len(dataset.index)), names, config.batch_size, config.augmentation
    )
    calls = {
        "step alone": partial(fit_seconds, model, Repeated(*batches[0], len(batches))),
        "with images": partial(fit_seconds, model, batches),
    }
    found = run_interleaved(calls, rounds)
    what = (
        f"epoch of {len(dataset.index)} images of {side}x{side}, {config.augmentation} augmentation"
    )
    return [
        make_row(f"{what}: one batch again and again", "s", found["step alone"]),
        make_row(
            f"{what}: read and augmented",
            "s",
            found["with images"],
            "one batch",
            found["step alone"],
        ),
    ]


def pipeline(*, sizes: str = "128,192", rounds: int = 7, originals: int = 16) -> None:
    """Measure what the images cost: an epoch with augmentation beside one without, and reading files beside the cache.

    Args:
        sizes: of the network's input in pixels, separated by commas
        rounds: how often each is measured
        originals: so many pairs of 4020x4892 pixels, as Montgomery's files are, are written and read
    """

    utils.set_precision("auto")
    recipe = Preprocessing(["foreground"], (train.Config.image_size, train.Config.image_size))
    with tempfile.TemporaryDirectory() as name:
        folder = make_phantoms(Path(name) / "phantoms", train.Config.phantoms, seed=0)
        rows = [made for side in sizes.split(",") for made in epoch_rows(folder, int(side), rounds)]
        pairs, _ = data.find_pairs(write_large(Path(name) / "large", originals))
        paths = [path for pair in pairs for path in (pair.image, *pair.masks)]

        def decode() -> float:
            start = time.perf_counter()
            with ThreadPoolExecutor(utils.cores()) as pool:
                list(pool.map(lambda path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED), paths))
            return time.perf_counter() - start

        def load(cache_dir: Path | str) -> float:
            start = time.perf_counter()
            loading.load_pairs(pairs, recipe, cache_dir)
            return time.perf_counter() - start

        calls = {
            "decode": decode,
            "read": lambda: load(""),
            "cached": lambda: load(Path(name) / "cache"),
        }
        found = run_interleaved(calls, 3)
        what = f"{originals} pairs of 4020x4892 pixels"
        rows.append(make_row(f"{what}: decoded by OpenCV", "s", found["decode"]))
        rows.append(
            make_row(f"{what}: read and prepared", "s", found["read"], "decoded", found["decode"])
        )
        rows.append(
            make_row(f"{what}: from the cache", "s", found["cached"], "decoded", found["decode"])
        )
    write_rows(rows)


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
        picture, masks = draw_phantom(np.random.default_rng(i))
        pictures.write_picture(
            folder / "images" / f"{i}.png",
            cv2.resize(picture, (4892, 4020), interpolation=cv2.INTER_CUBIC),
        )
        mask = np.uint8(255 * (masks.max(-1) > 0))
        pictures.write_picture(
            folder / "masks" / f"{i}.png",
            cv2.resize(mask, (4892, 4020), interpolation=cv2.INTER_NEAREST),
        )
    return folder


def prediction(*, model: Path = Path(BUNDLED_MODEL), rounds: int = 5, count: int = 200) -> None:
    """Measure every engine and precision, in images per second, and predict.py on a folder.

    Args:
        model: as export.py wrote it
        rounds: how often each is measured
        count: phantoms of 512x512 pixels in the folder
    """
    height, width = json.loads(model.with_name("manifest.json").read_text())["facts"]["image_size"]
    kinds = [("onnxruntime", "float32"), ("onnxruntime", "int8")]
    if is_installed("openvino"):
        kinds += [("openvino", precision) for precision in ("float32", "bfloat16", "int8")]
    wanted = {}
    for kind, precision in kinds:
        with contextlib.suppress(UserError):  # not here, or not so well
            engines.load_engine(model, kind, precision)
            wanted[f"{kind} {precision}"] = engine_rate, model, kind, precision
            if kind == "openvino":
                wanted[f"benchmark_app {precision}"] = benchmark_app, model, precision
    with isolated_processes(wanted) as calls:
        found = run_interleaved(calls, rounds)
    rows = []
    for name, values in found.items():
        own = name.replace("openvino", "benchmark_app")
        for reference in ["onnxruntime float32", *([own] if own in found and own != name else [])]:
            figure = f"{model.parent.name}, {height}x{width}: {name}, beside {reference}"
            rows.append(make_row(figure, "images/s", values, reference, found[reference]))
    rows += folder_rates(model, count, rounds)
    write_rows(rows)


@cache
def opened(model: Path, kind: str, precision: str) -> engines.Engine:
    """Load a model once."""
    return engines.load_engine(model, kind, precision)[0]


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
        folder = make_phantoms(Path(name) / "phantoms", count, seed=0) / "CXR_png"
        for panels in ("--no-panels", "--panels"):
            flags = [
                "--model",
                str(model),
                "--input",
                str(folder),
                "--output",
                f"{name}/out",
                panels,
            ]
            seconds = [run_script("predict.py", *flags) for _ in range(rounds)]
            figure = f"predict.py on a folder of {count} images, {panels}"
            rows.append(make_row(figure, "images/s", [count / one for one in seconds]))
    return rows


def start(*, rounds: int = 7) -> None:
    """Measure how long scripts take from their start to their end.

    Args:
        rounds: how often each is run
    """
    with tempfile.TemporaryDirectory() as name:
        picture = draw_phantom(np.random.default_rng(0))[0]
        pictures.write_picture(Path(name) / "one.png", preprocess.resize(picture, (SIDE, SIDE)))
        box = str(utils.ROOT / "files" / "lungs" / "unet.onnx")
        one = [
            "predict.py",
            "--model",
            box,
            "--input",
            f"{name}/one.png",
            "--output",
            f"{name}/out",
        ]
        commands = [["train.py", "--help"], ["predict.py", "--help"], one]
        found = run_interleaved(
            {command[0] + " " + command[1]: partial(run_script, *command) for command in commands},
            rounds,
        )
    names = (
        "train.py --help",
        "predict.py --help",
        "predict.py --input one.png, the model in the box, with its panel",
    )
    write_rows(
        [make_row(name, "s", values) for name, values in zip(names, found.values(), strict=True)]
    )


def cold(
    data_dir: str,
    *,
    flags: str = "",
    torch_flags: str = "",
    rounds: int = 3,
    cache_dir: str = "files/cache",
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
            command = [
                sys.executable,
                utils.ROOT / name,
                *common,
                *flags,
                "--out-dir",
                folder,
            ]
            began = time.time()
            environment = os.environ | ({"KERAS_BACKEND": backend} if backend else {})
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
            if done.returncode:
                raise UserError(f"{name} failed:\n{done.stderr[-500:]}")
            dice = float(re.findall(r"test Dice ([\d.]+)", done.stdout)[-1])
            return (Path(folder) / saved).stat().st_mtime - began, dice

    run(
        "train.py", [*ours, "--epochs", "2"], "fold0/curves.png", ""
    )  # fills the cache, and the disk's
    calls = {"train.py": lambda: run("train.py", ours, "fold0/curves.png", "")}
    if is_installed("torch"):
        calls["PyTorch"] = lambda: run("rival.py", theirs, "model.pt", "torch")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), "training", unit="round", disable=None):
        for name, call in calls.items():
            found[name].append(call())
    than = [seconds for seconds, _ in found.get("PyTorch", ())]
    for name, values in found.items():
        what = f"fold 0 {flags}: {name}"
        told = f"{what}, from start to the end of training"
        rows.append(
            make_row(told, "s", [one[0] for one in values], "PyTorch" if than else "", than)
        )
        rows.append(make_row(f"{what}, test Dice", "", [one[1] for one in values]))
    write_rows(rows)


if __name__ == "__main__":
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # or one process has most of a GPU's memory
    commands = [training, pipeline, prediction, start, cold, archive, service, memory]
    utils.run_cli(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {call.__name__: call for call in commands}, description=__doc__
        )
    )
