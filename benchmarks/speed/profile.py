"""Say where the time of a training step goes: the shares of its operations, on TensorFlow."""

import importlib
import itertools
import tempfile
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

import utils
from benchmarks.speed.training import flops, make_config
from benchmarks.table import processor
from benchmarks.timing import Repeated, fit_seconds, training_model
from utils import UserError, atomic

TABLE = Path("results/profile.csv")
STEPS = 3
# A batch has about so many multiplications, so that a step of a large network ends in seconds.
BATCH_FLOPS = 300e9
# TensorFlow's names of operations → the column of the table. A name goes to the first that fits.
GROUPS = {
    "gradient of weights": ("Conv2DBackpropFilter",),
    "gradient of inputs, up-convolution": ("Conv2DBackpropInput",),
    "convolution": ("Conv2D", "BiasAdd"),
    "normalization": ("FusedBatchNorm",),
    "activation, pooling, concatenation": ("Relu", "MaxPool", "Concat", "Slice", "Sigmoid"),
    "optimizer": ("MatMul", "Einsum"),
}
REST = "other operations"


def profile(
    *,
    filters: str = "8,16,32,64",
    sizes: str = "64,128,256,512",
    precisions: str = "float32,bfloat16",
) -> None:
    """Write results/profile.csv: a row for each network, with the shares of a step's time.

    A share is of the time of all operations. "waiting" is the part of the step in which none ran.
    The batch has 8 images, fewer where a step would take long.

    Args:
        filters: channels of the first level, separated by commas
        sizes: pixels of the input's side
        precisions: float32, bfloat16
    """
    if keras.backend.backend() != "tensorflow":
        raise UserError("the profile is TensorFlow's; run it without KERAS_BACKEND")
    choices = [each.split(",") for each in (precisions, filters, sizes)]
    rows = []
    for precision, width, size in tqdm([*itertools.product(*choices)], unit="network"):
        rows.append(profile_row(precision, int(width), size))
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    table["hardware"] = processor()
    with atomic(TABLE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    print(f"written to {TABLE}")


def profile_row(precision: str, filters: int, size: str) -> dict[str, float | str]:
    """Measure one network: its steps' time, operations a second and shares."""
    utils.set_precision(precision)
    config = make_config(size, filters, 4, 8, precision)
    model = training_model(config)
    batch = int(np.clip(BATCH_FLOPS // flops(model), 1, 8))
    x = np.random.default_rng(0).random((batch, int(size), int(size), 1), np.float32)
    repeated = Repeated(x, np.float32(x > 0.5), STEPS + 1)
    fit_seconds(model, repeated)  # builds the graph
    step_s = fit_seconds(model, repeated) / (STEPS + 1)
    operations = trace(model, repeated)
    total = sum(operations.values())
    row = {
        "precision": precision,
        "filters": filters,
        "size": size,
        "batch": batch,
        "ms a step": 1000 * step_s,
        "GFLOP/s": flops(model) * batch / step_s / 1e9,
    }
    shares = Counter()
    for name, seconds in operations.items():
        shares[group_of(name)] += seconds / total
    row |= {group: shares[group] for group in (*GROUPS, REST)}
    keras.backend.clear_session()
    return row


def group_of(operation: str) -> str:
    """Return the column of an operation's type."""
    for group, names in GROUPS.items():
        if any(name in operation for name in names):
            return group
    return REST


def trace(model: keras.Model, batches: keras.utils.PyDataset) -> Counter:
    """Return the seconds of each type of operation in an epoch."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            fit_seconds(model, batches)
        (written,) = Path(folder).rglob("*.xplane.pb")
        # TensorFlow brings the format of its traces, but no name for it.
        planes = importlib.import_module("tensorflow.tsl.profiler.protobuf.xplane_pb2").XSpace()
        planes.ParseFromString(written.read_bytes())
    seconds = Counter()
    for plane in planes.planes:
        names = {key: entry.name for key, entry in plane.event_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                # An operation's event is named "where/it/stands:Type", others "Class::method".
                place, _, kind = names[event.metadata_id].rpartition(":")
                if place and not place.endswith(":") and kind[:1].isupper():
                    seconds[kind] += event.duration_ps / 1e12
    return seconds
