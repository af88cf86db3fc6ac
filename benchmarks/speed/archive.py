"""Measure inference.archive on a Ray cluster of two nodes on this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import utils
from benchmarks.scripts import is_installed, python_command, wait_until
from benchmarks.table import make_row, write_rows
from dataset.phantoms import make_phantoms
from inference.models import BUNDLED_MODEL
from utils import UserError

# Prints the cluster's address and the two nodes' process ids. The first line that it reads removes
# the second node, the next one ends it.
NODES = """
import sys
from ray.cluster_utils import Cluster

head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8}
cluster = Cluster(True, head_node_args=head)
node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
ids = [one.all_processes["raylet"][0].process.pid for one in (cluster.head_node, node)]
print(cluster.address, *ids, flush=True)
sys.stdin.readline()
cluster.remove_node(node, allow_graceful=False)
print(flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


def archive(*, count: int = 10_000, model: Path = utils.ROOT / BUNDLED_MODEL) -> None:
    """Segment phantoms by Ray: a fifth by one worker, then by two; all by two, one of them killed.

    Raises UserError if a mask is missing.

    Args:
        count: how many phantoms
        model: what export.py wrote
    """
    if not is_installed("ray"):
        raise UserError("the archive needs Ray: pip install -r requirements-archive.txt")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        nodes = TwoNodes()
        stack.callback(nodes.stop)
        images = make_phantoms(Path(name) / "phantoms", count, seed=0) / "CXR_png"
        fifth = link_some(images, Path(name) / "fifth", count // 5)
        out = Path(name)
        flags = ["--model", model, "--workers"]
        runs = {
            "one worker": segment(nodes, fifth, out / "one", [*flags, 1]),
            "two": segment(nodes, fifth, out / "two", [*flags, 2]),
            "two, of which one is killed": segment(
                nodes, images, out / "killed", [*flags, 2], kill_a_worker=True
            ),
        }
    rows = []
    for what, (number, rate) in runs.items():
        figure = f"inference.archive, {number} images, start and end included: {what}"
        rows.append(make_row(figure, "images/s", [rate], "one worker", [runs["one worker"][1]]))
    write_rows(rows)


def segment(
    nodes: "TwoNodes", images: Path, out: Path, flags: list[object], kill_a_worker: bool = False
) -> tuple[int, float]:
    """Segment a folder on the cluster: how many images, and images per second."""
    number = len(list(images.iterdir()))
    start = time.monotonic()
    running = nodes.start("--input", images, "--output", out, *flags)
    try:
        if kill_a_worker:
            kill_at(nodes, running, out, number // 3)
        printed = running.communicate()[0]
    finally:
        running.kill()  # does nothing when it has ended
    seconds, masks = time.monotonic() - start, count_masks(out)
    if running.returncode or masks != number:
        raise UserError(f"{masks} masks of {number}:\n{printed[-500:]}")
    return number, number / seconds


def link_some(images: Path, folder: Path, count: int) -> Path:
    """Make a folder of the first `count` images."""
    folder.mkdir()
    for path in sorted(images.iterdir())[:count]:
        os.link(path, folder / path.name)
    return folder


def count_masks(folder: Path) -> int:
    """Count the masks that are complete."""
    return len(list(folder.rglob("[!.]*.png")))


def kill_at(nodes: "TwoNodes", running: subprocess.Popen, out: Path, number: int) -> None:
    """Kill the second node's worker when so many masks are written."""

    def is_time() -> bool:
        return bool(running.poll() is not None or (count_masks(out) > number and nodes.workers(1)))

    wait_until(is_time, 600)
    if running.poll() is None:
        os.kill(nodes.workers(1)[0], signal.SIGKILL)


class TwoNodes:
    """A Ray cluster of two nodes of one CPU on this machine, in a process of its own."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets must be short
        self.settings = os.environ | {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": self.folder,
            "PYTHONPATH": str(utils.ROOT),
        }
        errors = Path(self.folder) / "stderr"
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", NODES],
                env=self.settings,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        words = self.process.stdout.readline().split()
        if len(words) != 3:
            raise UserError(f"Ray's nodes did not start:\n{errors.read_text()[-500:]}")
        self.settings["RAY_ADDRESS"], *self.node_ids = words

    def start(self, *flags: object) -> subprocess.Popen:
        """Start inference.archive on it."""
        return subprocess.Popen(
            python_command("-m", "inference.archive", *map(str, flags)),
            env=self.settings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def workers(self, node: int) -> list[int]:
        """List the process ids of a node's workers that hold the network."""
        command = ["ps", "--ppid", self.node_ids[node], "-o", "pid=,args="]
        printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return [int(line.split()[0]) for line in printed.splitlines() if "MapWorker" in line]

    def lose_a_node(self) -> None:
        """Kill the second node."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def stop(self) -> None:
        """End the cluster, or what is left of it."""
        try:
            self.process.communicate("\n\n", timeout=60)
        finally:
            self.process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)
