"""Measure training and prediction on one GPU, in at most nine minutes. Nothing is installed.

    KERAS_BACKEND=jax python -m benchmarks.gpu [--data-dir XRAYS] [--volumes HIPPOCAMPUS]
    python -m benchmarks.gpu --wheels      list the packages that it needs

The paper's network of 64 filters, for images of 512x512 pixels, by Keras and by PyTorch in turn.
Then one fold of a training on X-rays at that size, and one of volumes. A part for which no time is
left is named at the end. For a machine without internet:

    pip download --no-deps -d wheels $(python -m benchmarks.gpu --wheels)
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import utils

if __name__ == "__main__":
    # JAX would reserve most of the GPU's memory for one process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    utils.load_keras()

import pandas as pd
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.scripts import python_command
from benchmarks.table import make_row, write_rows
from utils import UserError

PACKAGES = (
    *("keras", "albumentations", "tyro", "nibabel", "pandas", "scikit-learn", "tqdm"),
    *("matplotlib", "pillow", "tifffile"),
)
PAPER = ("--filters", "64", "--batch-size", "16")
IMAGES = ("--image-size", "512", *PAPER, "--epochs", "60")
VOLUMES = (
    *("--dimensions", "3", "--patch-size", "40,56,40", "--depth", "3", "--filters", "16"),
    *("--batch-size", "2", "--augmentation", "free", "--epochs", "40"),
)


@dataclass(frozen=True)
class Config:
    """What is measured."""

    data_dir: str = ""  # chest X-rays with masks, such as Montgomery's; "" leaves them out
    volumes: str = ""  # volumes with masks, such as the hippocampus's; "" leaves them out
    minutes: float = 9  # a part that is not done by then is left out
    wheels: bool = False  # only list the packages that this script needs beside JAX and PyTorch


def main(config: Config) -> None:
    """Measure the parts one after the other; name those that were left out."""
    if config.wheels:
        print("\n".join(sorted(list_packages(PACKAGES))))
        return
    if not utils.gpus():
        raise UserError("Keras finds no GPU; see requirements-gpu.txt")
    end, left_out = time.monotonic() + 60 * config.minutes, []
    with tempfile.TemporaryDirectory() as cache:
        # What XLA has tried for a layer is not tried again by the next process.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        for name, command in list_parts(config):
            print(f"\n{name}: python {' '.join(command)}", flush=True)
            try:
                run_part(name, command, end - time.monotonic())
            except (subprocess.SubprocessError, UserError) as error:
                left_out.append(f"{name}: {error}")
    if left_out:
        raise UserError("left out: " + "\n".join(left_out))


def list_parts(config: Config) -> Iterator[tuple[str, list[str]]]:
    """List the parts: a name, and the command."""
    steps = ["-m", "benchmarks.speed", "training", "--size", "512", *PAPER, "--rounds", "3"]
    fold = ["--folds", "5", "--fold", "0", "--val-fraction", "0"]
    yield "steps in bfloat16", [*steps, "--precision", "bfloat16"]
    if config.data_dir:
        yield "fold of images", ["train.py", "--data-dir", config.data_dir, *fold, *IMAGES]
    if config.volumes:
        yield "fold of volumes", ["train.py", "--data-dir", config.volumes, *fold, *VOLUMES]
    yield "steps in float32", [*steps, "--precision", "float32"]


def run_part(name: str, command: Sequence[str], seconds: float) -> None:
    """Run a part in the seconds that are left; write what a training needed and reached."""
    if command[0] != "train.py":
        subprocess.run(python_command(*command), check=True, timeout=max(1, seconds))
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = python_command(*command, "--out-dir", folder)
        subprocess.run(command, check=True, timeout=max(1, seconds))
        whole = time.perf_counter() - start
        log = pd.read_csv(Path(folder) / "fold0" / "log.csv")
        scores = pd.read_csv(Path(folder) / "fold0" / "metrics.csv")
    epochs = log.seconds[1:]  # the first one compiles
    write_rows(
        [
            make_row(f"{name}: test Dice of {len(scores)}", "", [scores.dice.mean()]),
            make_row(f"{name}: an epoch", "s", list(epochs)),
            make_row(f"{name}: until the first epoch's end", "s", [log.seconds[0]]),
            make_row(f"{name}: start, training and scoring", "s", [whole]),
        ]
    )


def list_packages(names: Sequence[str]) -> Iterator[str]:
    """List packages and all that they need, as "name==version"."""
    waiting, seen = list(names), set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        yield f"{name}=={metadata.version(name)}"
        for need in map(Requirement, metadata.requires(name) or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)


if __name__ == "__main__":
    utils.run_script(main, Config)
