"""results/benchmark.csv: a row for each measured figure, with its range, date and hardware."""

import datetime
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import keras
import pandas as pd

import utils
from utils import atomic

TABLE = Path("results/benchmark.csv")


def make_row(
    figure: str,
    unit: str,
    values: Sequence[float],
    reference: str = "",
    baseline: Sequence[float] = (),
) -> dict:
    """Make a row: the median and the range of `values`, and the ratio of the medians.

    reference: the name of what `baseline` measured in the same run.
    """
    median = statistics.median(values)
    return {
        "figure": figure,
        "unit": unit,
        "median": median,
        "low": min(values),
        "high": max(values),
        "reference": reference,
        "ratio": median / statistics.median(baseline) if len(baseline) else float("nan"),
        "repeats": len(values),
    }


def write_rows(rows: Sequence[dict], hardware: str = "") -> None:
    """Print rows and write them to TABLE; they replace rows of the same figure and hardware."""
    new = pd.DataFrame(rows)
    print(new.to_string(index=False, float_format="{:.4g}".format))
    new["date"] = datetime.date.today().isoformat()
    new["hardware"] = hardware or processor()
    if TABLE.is_file():
        old = pd.read_csv(TABLE)
        replaced = old.figure.isin(new.figure) & old.hardware.isin(new.hardware)
        new = pd.concat([old[~replaced], new])
    with atomic(TABLE) as temporary:
        new.to_csv(temporary, index=False, float_format="%.4g")
    print(f"written to {TABLE}")


def processor() -> str:
    """Name the GPUs with the Keras backend, the processor, and how many cores are used."""
    name = utils.cpu_info().get("model name", sys.platform)
    instructions = utils.kind_of_cpu().rpartition(" ")[2]  # processors of one name differ in them
    cpu = f"{utils.cores()} cores of {name} ({instructions})"
    gpus = [f"{gpu} by {keras.backend.backend()}" for gpu in gpu_names()] if utils.gpus() else []
    return ", ".join([*gpus, cpu])


def gpu_names() -> list[str]:
    """List NVIDIA's GPUs as its driver calls them, such as "NVIDIA H100 80GB HBM3"."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
