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
import importlib.util
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import keras
import pandas as pd
from tqdm import tqdm

import utils
from utils import UserError, atomic

# ------------------------------------------------------------------------------------------------------------- speed
TABLE = Path("results/benchmark.csv")
REST_S = 0.5  # before each measurement, so that the threads of the one before sleep


def make_row(
    figure: str, unit: str, values: Sequence[float], reference: str = "", than: Sequence[float] = ()
) -> dict:
    """Make a row of the table: median and range of what was measured, and its ratio to a reference in the same run."""
    made = {"figure": figure, "unit": unit, "median": statistics.median(values), "low": min(values)}
    made |= {
        "high": max(values),
        "reference": reference,
        "ratio": float("nan"),
        "repeats": len(values),
    }
    if len(than):
        made["ratio"] = made["median"] / statistics.median(than)
    return made


def write_rows(rows: Sequence[dict], hardware: str = "") -> None:
    """Print rows, and put them into results/benchmark.csv in place of older ones of the same figures and hardware."""
    table = pd.DataFrame(rows).assign(
        date=datetime.date.today().isoformat(), hardware=hardware or processor()
    )
    print(
        table.drop(columns=["date", "hardware"]).to_string(
            index=False, float_format="{:.4g}".format
        )
    )
    if TABLE.is_file():
        old = pd.read_csv(TABLE)
        table = pd.concat(
            [old[~(old.figure.isin(table.figure) & old.hardware.isin(table.hardware))], table]
        )
    with atomic(TABLE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    print(f"{TABLE} has these figures now, in place of earlier ones")


def processor() -> str:
    """Name the processor and the cores that are used."""

    has, gpus = utils.cpu_info(), [f"{gpu} by {keras.backend.backend()}, " for gpu in utils.gpus()]
    amx = " with AMX" if "amx_bf16" in has.get("flags", "") else ""
    return f"{''.join(gpus)}{utils.cores()} cores of {has.get('model name', sys.platform)}{amx}"


def run_interleaved(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
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


def is_installed(name: str) -> bool:
    """Tell whether an extra is there; say so if not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed, so nothing is compared with it: pip install {name}")
    return found


@contextlib.contextmanager
def isolated_processes(calls: dict[str, tuple]) -> Iterator[dict[str, Callable[[], float]]]:
    """Give each call, a function and its arguments, a process of its own: the threads of one library slow another's."""
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in calls}
        yield {
            name: lambda name=name, call=call: pools[name].submit(*call).result()
            for name, call in calls.items()
        }


def run_script(name: str, *flags: str) -> float:
    """Run one of our scripts and return its seconds. Raises UserError if it fails."""
    start = time.perf_counter()
    script = utils.ROOT / name
    done = subprocess.run(
        [sys.executable, script, *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{name} {' '.join(flags)} failed:\n{done.stderr[-500:]}")
    return time.perf_counter() - start


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something to happen. Raises UserError if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise UserError(f"waited {seconds:g} s in vain")
        time.sleep(0.05)
