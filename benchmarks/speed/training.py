"""Measure training steps in Keras and in PyTorch, and Keras's prediction: images per second."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import keras
import numpy as np

import train
import utils
from benchmarks.scripts import is_installed
from benchmarks.table import make_row, write_rows
from benchmarks.timing import (
    Repeated,
    fit_seconds,
    isolated_processes,
    run_interleaved,
    steps_per_second,
    training_model,
)
from networks.levels import plan_levels
from training.sampling import input_size

# Rows of the square matrices whose product shows the peak of the processor or the GPU.
PRODUCT_SIZES = {"cpu": 2048, "gpu": 8192}
PRODUCT = "product of square matrices"
PREDICTION = "Keras, prediction"

Seconds = Callable[[int], float]  # number of steps → seconds


def training(
    *,
    filters: str = "8,16",
    size: str = "128",
    depth: int = 4,
    batch_size: int = 8,
    rounds: int = 7,
    steps: int = 20,
) -> None:
    """Measure training steps of the plain U-Net in Keras and PyTorch, in images per second.

    The paper's network on a GPU: --filters 64 --size 512 --batch-size 16. With JAX set
    XLA_PYTHON_CLIENT_PREALLOCATE=false, so that PyTorch finds memory on the same GPU.

    Args:
        filters: channels of the first level, separated by commas
        size: pixels of the input, such as 128 or 192,256; three numbers are slices, rows, columns
        depth: how often the input is halved
        batch_size: images
        rounds: how often each is measured
        steps: of each measurement
    """
    kinds = ["Keras"]
    if is_installed("torch"):
        kinds += ["PyTorch", "PyTorch compiled"]
    rows = []
    for width in map(int, filters.split(",")):
        config = make_config(size, width, depth, batch_size)
        found = measure(config, kinds, rounds, steps)
        shape = "x".join(map(str, input_size(config)))
        what = f"training step, {shape}, {width} filters, batch {batch_size}"
        rows += rate_rows(what, kinds, found)
        rows.append(operation_row(what, flops(training_model(config)), found))
    write_rows(rows)


def make_config(size: str, filters: int, depth: int, batch_size: int) -> train.Config:
    """Make the configuration of images of two sides, or of volumes of three."""
    config = train.Config(filters=filters, depth=depth, batch_size=batch_size)
    if size.count(",") < 2:
        return replace(config, image_size=size)
    return replace(config, patch_size=size, dimensions="3")


def measure(
    config: train.Config, kinds: list[str], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Measure each kind of step, Keras's prediction and the product of matrices, in turn."""
    calls = {kind: (step_rate, kind, config, steps) for kind in (*kinds, PREDICTION)}
    calls[PRODUCT] = multiply, PRODUCT_SIZES["gpu" if utils.gpus() else "cpu"], steps
    with isolated_processes(calls) as isolated:
        return run_interleaved(isolated, rounds)


def rate_rows(what: str, kinds: list[str], found: dict[str, list[float]]) -> list[dict]:
    """Make the rows of images per second: PyTorch's, Keras's beside each of them, prediction."""
    rows, others = [], kinds[1:]
    for other in others:
        rows.append(make_row(f"{what}: {other}", "images/s", found[other]))
    for other in others or [""]:
        figure = f"{what}: Keras, beside {other}" if other else f"{what}: Keras"
        rows.append(make_row(figure, "images/s", found["Keras"], other, found.get(other, ())))
    rows.append(make_row(f"{what}: {PREDICTION} alone", "images/s", found[PREDICTION]))
    return rows


def operation_row(what: str, image_flops: int, found: dict[str, list[float]]) -> dict:
    """Make the row of Keras's operations per second beside the product of matrices."""
    convolutions = [rate * image_flops / 1e12 for rate in found["Keras"]]
    product = [rate / 1e12 for rate in found[PRODUCT]]
    return make_row(f"{what}: Keras, its convolutions", "TFLOP/s", convolutions, PRODUCT, product)


# ----------------------------------------------------------------- run in a process of their own


def step_rate(kind: str, config: train.Config, count: int) -> float:
    """Measure `count` training steps or predictions: images per second."""
    return config.batch_size * count / make_step(kind, config)(count)


@cache
def make_step(kind: str, config: train.Config) -> Seconds:
    """Build a network; return the function that times its steps."""
    shape = config.batch_size, *input_size(config), 1
    x = np.random.default_rng(0).random(shape, np.float32)
    y = np.float32(x > 0.5)
    if kind.startswith("PyTorch"):
        return make_pytorch_step(x, y, config, compiled=kind == "PyTorch compiled")
    utils.set_precision("auto")
    model = training_model(config)
    if kind == PREDICTION:
        return partial(seconds_of, partial(model.predict_on_batch, x))
    return lambda count: fit_seconds(model, Repeated(x, y, count))


def make_pytorch_step(
    x: np.ndarray, y: np.ndarray, config: train.Config, compiled: bool
) -> Seconds:
    """Build the same network in PyTorch; return the function that times its training steps."""
    import torch

    from benchmarks import pytorch_unet

    torch.set_num_threads(utils.cores())
    torch.backends.cudnn.benchmark = True  # as is usual where all batches have one size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bfloat16" if device == "cuda" or utils.has_amx() else "float32"
    levels = plan_levels(x.shape[1:-1], config.filters, config.depth)
    model = pytorch_unet.UNet(x.shape[-1], levels).to(device)
    step = pytorch_unet.make_step(torch.compile(model) if compiled else model, precision)
    return partial(seconds_of, partial(step, x, y))


def seconds_of(step: Callable[[], object], count: int) -> float:
    """Time `count` calls of a step."""
    return count / steps_per_second(step, count)


def multiply(size: int, count: int) -> float:
    """Multiply two square matrices in the network's precision: operations per second."""
    precision = utils.set_precision("auto")
    a, b = keras.random.normal((2, size, size), dtype=precision)

    def step() -> float:
        # Reading a number waits for the product.
        return float(keras.ops.cast(keras.ops.matmul(a, b)[0, 0], "float32"))

    return 2 * size**3 * steps_per_second(step, count)


def flops(model: keras.Model) -> int:
    """Count the operations of one image's convolutions in a training step.

    A multiplication and an addition count as two. Backward takes twice as many as forward.
    """
    count = 0
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)):
            places = layer.input.shape[1:-1]
        elif isinstance(layer, (keras.layers.Conv2D, keras.layers.Conv3D)):
            places = layer.output.shape[1:-1]
        else:
            continue
        count += 2 * math.prod(layer.kernel.shape) * math.prod(places)
    return 3 * count
