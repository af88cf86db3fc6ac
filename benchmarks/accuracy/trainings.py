"""Run many trainings by train.py, several at once, and read what they wrote."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from benchmarks.scripts import python_command
from inference import archive
from utils import UserError, atomic

FOLDS = 5

Flags = Sequence[str]  # of one training


def folds(
    data_dir: str,
    *,
    folds: int = FOLDS,
    flags: str = "",
    jobs: int = 1,
    out_dir: Path = Path("files/folds"),
) -> None:
    """Cross-validate like train.py --folds, several folds at once.

    Args:
        data_dir: the data set
        folds: how many
        flags: more flags for every training, as in --flags="--epochs 100 --filters 16"
        jobs: trainings at once, each on its share of the cores; on a Ray cluster, CPUs of each
        out_dir: where the runs go
    """
    common = ["--data-dir", data_dir, "--folds", str(folds), "--out-dir", str(out_dir)]
    common += shlex.split(flags)
    run_trainings([[*common, "--fold", str(fold)] for fold in range(folds)], jobs)
    # All folds are trained: this prints and writes the summary.
    subprocess.run(python_command("train.py", *common), check=True)


def run_trainings(trainings: Sequence[Flags], jobs: int) -> None:
    """Run train.py with each list of flags, `jobs` at once.

    Where RAY_ADDRESS names a Ray cluster they run there, with `jobs` CPUs each. Raises UserError
    with the message of the one that failed.
    """
    if jobs < 1:
        raise UserError(f"jobs is {jobs}; expected at least 1")
    if os.environ.get("RAY_ADDRESS"):
        run_on_cluster(trainings, cpus=jobs)
    else:
        run_on_this_machine(trainings, jobs)


def run_on_this_machine(trainings: Sequence[Flags], jobs: int) -> None:
    """Run trainings in parallel, each on its share of the cores (on Linux)."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    free_shares = [cores[i::jobs] for i in range(jobs)]

    def run(flags: Flags) -> None:
        share = free_shares.pop()
        process = subprocess.Popen(
            python_command("train.py", *flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if share:
            os.sched_setaffinity(process.pid, share)  # before it starts threads of its own
        printed = process.communicate()[0]
        free_shares.append(share)
        check_training(flags, process.returncode, printed)

    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(run, trainings)
        list(tqdm(done, "training", len(trainings), unit="run", disable=None))


def run_on_cluster(trainings: Sequence[Flags], cpus: int) -> None:
    """Run trainings as tasks of the Ray cluster, with `cpus` CPUs each.

    If a machine dies, its training goes on elsewhere. Every machine needs this repository, the data
    and the run folders at the same paths.
    """
    archive.connect()
    import ray

    folder = str(Path.cwd())
    environment = os.environ | {"TF_NUM_INTRAOP_THREADS": str(cpus)}

    @ray.remote(num_cpus=cpus, max_retries=3)
    def run(flags: Flags) -> tuple[int, str]:
        done = subprocess.run(
            python_command("train.py", *flags),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    waiting = {run.remote(list(flags)): flags for flags in trainings}
    with tqdm(total=len(trainings), desc="training", unit="run", disable=None) as bar:
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            check_training(waiting.pop(done), *ray.get(done))
            bar.update()


def check_training(flags: Flags, exit_code: int, printed: str) -> None:
    """Raise UserError with a training's error message, or its whole output, if it failed."""
    if exit_code:
        message = printed[max(0, printed.rfind("\nerror: ")) :].strip()
        raise UserError(f"python train.py {' '.join(flags)} failed:\n{message}")


def read_folds(run: Path) -> tuple[pd.DataFrame, float]:
    """Read a cross-validation: a row per test image, and the mean seconds of a fold's training."""
    tables, seconds = [], 0.0
    for fold in range(FOLDS):
        tables.append(pd.read_csv(run / f"fold{fold}" / "metrics.csv"))
        seconds += pd.read_csv(run / f"fold{fold}" / "log.csv").seconds.sum()
    return pd.concat(tables), seconds / FOLDS


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a study's table and print it."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)
    print(f"{table.to_string(index=False, float_format='{:.4f}'.format)}\n{path}")
