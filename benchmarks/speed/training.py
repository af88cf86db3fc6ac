"""Measure training steps and predictions in Keras and in PyTorch: images per second."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

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
PRODUCT = "Keras: product of square matrices"
PREDICTION = ", prediction"
MEMORY = ", memory of the GPU"

Seconds = Callable[[int], float]  # number of steps → seconds


def training(
    *,
    filters: str = "8,16",
    size: str = "128",
    depth: int = 4,
    batch_size: int = 8,
    precision: str = "auto",
    rounds: int = 7,
    steps: int = 20,
) -> None:
    """Measure training steps and predictions of the plain U-Net in Keras and PyTorch.

    The paper's network on a GPU: --filters 64 --size 512 --batch-size 16. With JAX set
    XLA_PYTHON_CLIENT_PREALLOCATE=false, so that PyTorch finds memory on the same GPU.

    Args:
        filters: channels of the first level, separated by commas
        size: pixels of the input, such as 128 or 192,256; three numbers are slices, rows, columns
        depth: how often the input is halved
        batch_size: images
        precision: float32, bfloat16, or auto as train.py chooses it
        rounds: how often each is measured
        steps: of each measurement
    """
    precision = utils.set_precision(precision)
    kinds = ["Keras"]
    if is_installed("torch"):
        kinds += ["PyTorch", "PyTorch compiled"]
    for width in map(int, filters.split(",")):
        config = make_config(size, width, depth, batch_size, precision)
        found = measure(config, kinds, rounds, steps)
        shape = "x".join(map(str, input_size(config)))
        what = f"{shape}, {width} filters, batch {batch_size}, {precision}"
        rows = rate_rows(f"training step, {what}", kinds, found)
        rows += rate_rows(f"prediction, {what}", kinds, found, PREDICTION)
        operations = flops(training_model(config))
        rows.append(operation_row(f"training step, {what}", operations, found))
        rows += memory_rows(f"training step, {what}", found)
        write_rows(rows)


def make_config(
    size: str, filters: int, depth: int, batch_size: int, precision: str
) -> train.Config:
    """Make the configuration of images of two sides, or of volumes of three."""
    config = train.Config(filters=filters, depth=depth, batch_size=batch_size, precision=precision)
    if size.count(",") < 2:
        return replace(config, image_size=size)
    return replace(config, patch_size=size, dimensions="3")


def measure(
    config: train.Config, kinds: list[str], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Measure steps and predictions of each kind and the product of matrices, in turn."""
    calls = {}
    for kind in kinds:
        calls[kind] = step_rate, kind, config, steps
        calls[kind + PREDICTION] = step_rate, kind + PREDICTION, config, steps
    on_gpu = bool(utils.gpus())
    calls[PRODUCT] = multiply, PRODUCT_SIZES["gpu" if on_gpu else "cpu"], config.precision, steps
    if on_gpu:
        calls |= {library + MEMORY: (gpu_memory, library) for library in ("Keras", "PyTorch")}
    with isolated_processes(calls, library_of) as isolated:
        return run_interleaved(isolated, rounds)


def library_of(name: str) -> str:
    """Name the library of a call."""
    return "PyTorch" if name.startswith("PyTorch") else "Keras"


def rate_rows(
    what: str, kinds: list[str], found: dict[str, list[float]], suffix: str = ""
) -> list[dict]:
    """Make the rows of images per second: PyTorch's, and Keras's beside each of them."""
    rows, others = [], kinds[1:]
    for other in others:
        rows.append(make_row(f"{what}: {other}", "images/s", found[other + suffix]))
    for other in others or [""]:
        figure = f"{what}: Keras, beside {other}" if other else f"{what}: Keras"
        baseline = found.get(other + suffix, ())
        rows.append(make_row(figure, "images/s", found["Keras" + suffix], other, baseline))
    return rows


def memory_rows(what: str, found: dict[str, list[float]]) -> list[dict]:
    """Make the rows of each library's peak memory of the GPU."""
    rows = []
    for name, values in found.items():
        if name.endswith(MEMORY) and all(values):
            rows.append(make_row(f"{what}: {name}", "GB", values))
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
    """Build a network; return the function that times its steps, or its predictions."""
    utils.keep_freed_memory()  # as train.py does; for PyTorch alike
    shape = config.batch_size, *input_size(config), 1
    x = np.random.default_rng(0).random(shape, np.float32)
    if kind.startswith("PyTorch"):
        return make_pytorch_step(x, kind, config)
    utils.set_precision(config.precision)
    model = make_keras(config)
    if kind.endswith(PREDICTION):
        return partial(seconds_of, partial(model.predict_on_batch, x))
    y = np.float32(x > 0.5)
    return lambda count: fit_seconds(model, Repeated(x, y, count))


make_keras = cache(training_model)  # one network for steps and predictions


def make_pytorch_step(x: np.ndarray, kind: str, config: train.Config) -> Seconds:
    """Return the function that times the same network in PyTorch."""
    import torch

    from benchmarks import pytorch_unet

    torch.set_num_threads(utils.cores())
    model = make_pytorch(config, compiled="compiled" in kind)
    if kind.endswith(PREDICTION):
        predictor = pytorch_unet.Predictor(model, config.precision)
        return partial(seconds_of, partial(predictor.predict_on_batch, x))
    step = pytorch_unet.make_step(model.train(), config.precision)
    return partial(seconds_of, partial(step, x, np.float32(x > 0.5)))


@cache
def make_pytorch(config: train.Config, compiled: bool) -> Any:
    """Build the network in PyTorch, on the GPU if there is one."""
    import torch

    from benchmarks import pytorch_unet

    torch.backends.cudnn.benchmark = True  # as is usual where all batches have one size
    torch.set_float32_matmul_precision("high")  # TF32, as XLA takes it
    levels = plan_levels(input_size(config), config.filters, config.depth)
    model = pytorch_unet.UNet(1, levels).to("cuda" if torch.cuda.is_available() else "cpu")
    return torch.compile(model) if compiled else model


def seconds_of(step: Callable[[], object], count: int) -> float:
    """Time `count` calls of a step."""
    return count / steps_per_second(step, count)


def gpu_memory(library: str) -> float:
    """Return the most memory of the GPU that this process has taken until now, in GB."""
    if library == "PyTorch":
        if not is_installed("torch"):
            return 0.0
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    if keras.backend.backend() != "jax":
        return 0.0
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9


def multiply(size: int, precision: str, count: int) -> float:
    """Multiply two square matrices in the network's precision: operations per second."""
    dtype = utils.set_precision(precision)
    a, b = keras.random.normal((2, size, size), dtype=dtype)
    product = a
    keras.ops.convert_to_numpy(keras.ops.matmul(a, b)[0, 0])
    start = time.perf_counter()
    for _ in range(count):
        product = keras.ops.matmul(a, product) / size  # each waits for the one before
    keras.ops.convert_to_numpy(product[0, 0])
    return 2 * size**3 * count / (time.perf_counter() - start)


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
