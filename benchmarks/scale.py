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
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import utils
from benchmarks.timing import is_installed, make_row, wait_until, write_rows
from dataset.phantoms import make_phantoms
from imaging import pictures
from inference.bundled import BUNDLED_MODEL
from utils import UserError

SIDE = 512  # pixels


def make_images(folder: Path, count: int) -> None:
    """Write `count` pairs, a disc on a gradient each and, in a corner, noise."""
    rng = np.random.default_rng(0)
    slope = np.add.outer(np.arange(SIDE), np.arange(SIDE)) // 8
    for i in tqdm(range(count), "writing", unit="pair", disable=None):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        cv2.circle(
            mask, rng.integers(100, 400, 2).tolist(), int(rng.integers(30, 90)), 255, cv2.FILLED
        )
        picture = np.uint8(slope + mask // 4)
        picture[:16, :16] = rng.integers(256, size=(16, 16))  # or two could be the same
        pictures.write_picture(folder / "images" / f"{i}.png", picture)
        pictures.write_picture(folder / "masks" / f"{i}.png", mask)


def memory(*, count: int = 10_000, memory_gb: float = 1.0) -> None:
    """Train an epoch of all images, with a small network, and measure the process's peak memory.

    Args:
        count: how many images
        memory_gb: as in train.py

    A gigabyte is 2**30 bytes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "set", count)
        flags = f"--image-size {SIDE} --filters 2 --depth 2 --epochs 1 --memory-gb {memory_gb}"
        places = [
            "--data-dir",
            folder / "set",
            "--out-dir",
            folder / "run",
            "--cache-dir",
            folder / "cache",
        ]
        done = subprocess.run(
            [sys.executable, utils.ROOT / "train.py", *places, *flags.split()],
            check=False,
        )
        if done.returncode:
            raise UserError("the training failed, see above")
        decoded = sum(path.stat().st_size for path in (folder / "cache").iterdir()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    what = f"train.py on {count} images of {SIDE}x{SIDE}, --memory-gb {memory_gb:g}: peak memory"
    write_rows([make_row(what, "GB", [peak], "decoded images", [decoded])])


# ----------------------------------------------------------------------------------------------------------- archive

NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8})
node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
print(cluster.address, *(one.all_processes["raylet"][0].process.pid for one in (cluster.head_node, node)), flush=True)
sys.stdin.readline()
cluster.remove_node(node, allow_graceful=False)
print(flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


class TwoNodes:
    """A Ray cluster of two nodes of one CPU on this machine, in a process of its own."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # as sockets' paths must be short
        local = {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(utils.ROOT),
        }
        self.settings = os.environ | local | {"RAY_TMPDIR": self.folder}
        errors = Path(self.folder) / "stderr"
        with errors.open("w") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            self.process = subprocess.Popen(
                [sys.executable, "-c", NODES], env=self.settings, text=True, **pipes
            )
        said = self.process.stdout.readline().split()
        if len(said) != 3:
            raise UserError(f"Ray's nodes did not start:\n{errors.read_text()[-500:]}")
        self.settings["RAY_ADDRESS"], *self.raylets = said

    def start(self, *flags: object) -> subprocess.Popen:
        """Start archive.py on it."""
        command = [sys.executable, "-m", "inference.archive", *map(str, flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=self.settings, text=True, **pipes)

    def workers(self, node: int) -> list[int]:
        """List the processes of a node that hold the network."""
        command = ["ps", "--ppid", self.raylets[node], "-o", "pid=,args="]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return [int(line.split()[0]) for line in said.splitlines() if "MapWorker" in line]

    def lose_a_node(self) -> None:
        """Let the second node die."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def stop(self) -> None:
        """End what is left of it."""
        try:
            self.process.communicate("\n\n", timeout=60)
        finally:
            self.process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)


def count_masks(folder: Path) -> int:
    """Count the masks that are whole."""
    return len(list(folder.rglob("[!.]*.png")))


def kill_at(nodes: TwoNodes, running: subprocess.Popen, out: Path, number: int) -> None:
    """Kill the second node's worker when so many masks are there."""
    wait_until(
        lambda: running.poll() is not None or (count_masks(out) > number and nodes.workers(1)), 600
    )
    if running.poll() is None:
        os.kill(nodes.workers(1)[0], signal.SIGKILL)


def archive(*, count: int = 10_000, model: Path = Path(BUNDLED_MODEL)) -> None:
    """Segment phantoms of 512x512 pixels on a Ray cluster of two nodes on this machine.

    Args:
        count: how many
        model: as export.py wrote it

    A fifth by one worker, then by two; all by two, of which one is killed when a third is done. Raises UserError if a
    mask is missing.
    """
    if not is_installed("ray"):
        raise UserError("nothing to measure without Ray: pip install -r requirements-archive.txt")
    nodes, rows = TwoNodes(), []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        stack.callback(nodes.stop)
        scans = make_phantoms(Path(name) / "phantoms", count, seed=0) / "CXR_png"
        fifth = Path(name) / "fifth"
        fifth.mkdir()
        for path in sorted(scans.iterdir())[: count // 5]:
            os.link(path, fifth / path.name)
        rates: dict[str, list[float]] = {}
        runs = (
            ("one worker", 1, fifth),
            ("two", 2, fifth),
            ("two, of which one is killed", 2, scans),
        )
        for what, workers, folder in runs:
            number = len(list(folder.iterdir()))
            out, start = Path(name) / what, time.monotonic()
            running = nodes.start(
                "--input", folder, "--output", out, "--model", model, "--workers", workers
            )
            stack.callback(running.kill)  # of no effect when it has ended
            if "killed" in what:
                kill_at(nodes, running, out, number // 3)
            said = running.communicate()[0]
            seconds, masks = time.monotonic() - start, count_masks(out)
            if running.returncode or masks != number:
                raise UserError(f"{masks} masks of {number}:\n{said[-500:]}")
            rates[what] = [number / seconds]
            figure = f"archive.py, {number} images, start and end included: {what}"
            rows.append(
                make_row(figure, "images/s", rates[what], "one worker", rates["one worker"])
            )
    write_rows(rows)
