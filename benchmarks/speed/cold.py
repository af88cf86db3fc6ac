"""Measure a whole training, from the start of the process until its last file is written."""

import re
import shlex
import tempfile
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.scripts import is_installed, run_script
from benchmarks.table import make_row, write_rows


def cold(
    data_dir: str,
    *,
    flags: str = "",
    torch_flags: str = "",
    rounds: int = 3,
) -> None:
    """Measure a whole training of fold 0 of 5, and its test Dice.

    The first run fills the cache of decoded images, UNET_CACHE.

    Args:
        data_dir: the data set
        flags: of train.py, as in --flags="--epochs 40"
        torch_flags: of benchmarks.pytorch_unet; those of train.py by default
        rounds: how often each is run
    """
    common = ["--data-dir", data_dir, "--folds", "5", "--fold", "0"]
    keras_flags = [*common, *shlex.split(flags)]
    pytorch_flags = [*common, *shlex.split(torch_flags or flags)]
    run_keras([*keras_flags, "--epochs", "2"])  # fills the cache, and the disk's
    calls = {"train.py": partial(run_keras, keras_flags)}
    if is_installed("torch"):
        calls["PyTorch"] = partial(run_pytorch, pytorch_flags)
    seconds, dice = {name: [] for name in calls}, {name: [] for name in calls}
    for _ in tqdm(range(rounds), "training", unit="round", disable=None):
        for name, call in calls.items():
            needed, score = call()
            seconds[name].append(needed)
            dice[name].append(score)
    reference = "PyTorch" if "PyTorch" in calls else ""
    baseline = seconds.get("PyTorch", ())
    rows = []
    for name in calls:
        what = f"fold 0 {flags}: {name}"
        figure = f"{what}, from start to the end of training"
        rows.append(make_row(figure, "s", seconds[name], reference, baseline))
        rows.append(make_row(f"{what}, test Dice", "", dice[name]))
    write_rows(rows)


def run_keras(flags: list[str]) -> tuple[float, float]:
    """Train by train.py until the curves are drawn: seconds, and test Dice."""
    return run_training(["train.py", *flags], "fold0/curves.png", {})


def run_pytorch(flags: list[str]) -> tuple[float, float]:
    """Train by benchmarks.pytorch_unet until its model is written: seconds, and test Dice."""
    command = ["-m", "benchmarks.pytorch_unet", *flags]
    return run_training(command, "model.pt", {"KERAS_BACKEND": "torch"})


def run_training(
    command: list[str], last_file: str, environment: dict[str, str]
) -> tuple[float, float]:
    """Run a training: seconds until `last_file` of the run folder is written, and test Dice."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        printed, _ = run_script(*command, "--out-dir", folder, **environment)
        seconds = (Path(folder) / last_file).stat().st_mtime - start
    return seconds, float(re.findall(r"test Dice ([\d.]+)", printed)[-1])
