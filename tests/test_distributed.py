"""Two real processes on this machine train together, over JAX's CPU collectives."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from dataset.batches import Batches, Shard
from dataset.cache import Case, Dataset, find_places
from imaging.labels import Classes
from inference.sampler import Sampler

pytest.importorskip("jax")
FLAGS = [
    "--image-size",
    "32",
    "--filters",
    "2",
    "--depth",
    "2",
    "--precision",
    "float32",
    "--batch-size",
    "4",
    "--epoch-images",
    "8",
]


def by_hand(port, processes, rank):
    return {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(processes),
        "KERAS_DISTRIBUTION_PROCESS_ID": str(rank),
    }


def as_torchrun(port, processes, rank):
    """Give what torchrun sets; it listens itself at MASTER_PORT."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port - 1)}
    return place | {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def start(folder, discs, *more, processes=2, launcher=by_hand):
    """Start `train.py` in so many processes on a free port of the loopback; their output goes to
    files.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-u",
        ROOT / "train.py",
        "--data-dir",
        discs,
        "--out-dir",
        folder,
        *FLAGS,
        *more,
    ]
    command += ["--distributed"] if processes > 1 else []
    started = []
    for rank in range(processes):
        env = os.environ | {"KERAS_BACKEND": "jax"} | launcher(port, processes, rank)
        with folder.with_name(f"{folder.name}-{rank}.txt").open("w") as output:
            started.append(
                subprocess.Popen(
                    list(map(str, command)), env=env, stdout=output, stderr=subprocess.STDOUT
                )
            )
    return started


def finish(processes, seconds=120):
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def log(folder):
    return pd.read_csv(folder / "log.csv").drop(columns="seconds")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(discs, tmp_path):
    """Loss, batch normalization, validation on a number of images that is odd: to the rounding of
    float32.
    """
    for name, processes in (("one", 1), ("two", 2)):
        more = ("--epochs", 3, "--val-fraction", 0.34)
        assert (
            finish(start(tmp_path / name, discs, *more, processes=processes, launcher=as_torchrun))
            == [0] * processes
        )
    assert (pd.read_csv(tmp_path / "two" / "split.csv").subset == "val").sum() % 2 == 1
    pd.testing.assert_frame_equal(
        log(tmp_path / "two"), log(tmp_path / "one"), rtol=1e-4, atol=1e-5
    )
    assert "epoch" not in (tmp_path / "two-1.txt").read_text()
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_and_all_go_on(discs, tmp_path, victim):
    processes = start(tmp_path / "run", discs, "--epochs", 200)
    text = tmp_path / "run-0.txt"
    while "epoch   2/" not in text.read_text():
        assert all(process.poll() is None for process in processes), text.read_text()
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes = finish(processes, 60)
    assert time.monotonic() - began < 60 and codes[1 - victim] not in (0, -9)
    said = (tmp_path / f"run-{1 - victim}.txt").read_text()
    assert "lost another process" in said or "another task died" in said
    done = len(log(tmp_path / "run"))
    processes = start(tmp_path / "run", discs, "--epochs", 200)
    while f"epoch {done + 1:3}/" not in text.read_text():
        assert all(process.poll() is None for process in processes), text.read_text()
        time.sleep(0.1)
    for process in processes:
        process.kill()
    assert f"epoch {done + 1} of 200" in text.read_text()
    assert log(tmp_path / "run").epoch.tolist()[: done + 1] == list(range(1, done + 2))


def test_shares_are_the_batch():
    """Put together, the processes' parts are what one process would see; each image counts once in
    validation.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 2, 1, 32, 32, 1), dtype=np.uint8)
    cases = [Case(*both, find_places(both[1])) for both in pixels]
    dataset = Dataset(cases, Sampler((32, 32)), 1, Classes("x"), pd.DataFrame())
    parts = [Shard(i, 2, 2) for i in range(2)]
    one = Batches(dataset, dataset.cover(np.arange(6)), 4, "mild")
    two = [Batches(dataset, dataset.cover(np.arange(6)), 4, "mild", shard=part) for part in parts]
    for i in range(2):
        for k in range(2):
            np.testing.assert_array_equal(
                one[i][k], np.concatenate([batches[i][k] for batches in two])
            )
    held_out = [Batches(dataset, dataset.cover(np.arange(7)), 4, shard=part) for part in parts]
    weights = np.concatenate([held_out[i][1][2] for i in range(2)])
    np.testing.assert_allclose(weights, [8 / 7, 8 / 7, 8 / 7, 0])
    assert [len(held_out[i][1][0]) for i in range(2)] == [2, 2]
