"""An archive over a cluster of two nodes on this machine: every image once, whoever dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_serve import exported  # noqa: F401 (a fixture)

import archive
import images
from serving import engine

pytest.importorskip("ray")
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
START = """
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


class Cluster:
    """Two nodes of one CPU, in a process of their own."""

    def __init__(self, folder: Path) -> None:
        self.settings = os.environ | LOCAL | {"RAY_TMPDIR": str(folder)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", START], env=self.settings, text=True, **pipes)
        self.settings["RAY_ADDRESS"], *self.raylets = self.process.stdout.readline().split()

    def workers(self, raylet: str) -> list[int]:
        """List the processes of a node that hold the network."""
        done = subprocess.run(["ps", "--ppid", raylet, "-o", "pid=,args="], capture_output=True, text=True, check=False)
        return [int(line.split()[0]) for line in done.stdout.splitlines() if "MapWorker" in line]

    def next(self) -> None:
        """Let the second node die; the second time, end."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.process.stdout.readline()


@pytest.fixture(scope="module")
def cluster():
    folder = Path("/tmp") / f"ray-{os.getpid()}"  # sockets' paths have 107 characters at most
    running = Cluster(folder)
    yield running
    running.next()
    running.process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def start(cluster: Cluster, *flags: object) -> subprocess.Popen:
    command = [sys.executable, ROOT / "archive.py", *map(str, flags)]
    return subprocess.Popen(command, env=cluster.settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_every_image_has_its_mask_whoever_dies(cluster, exported, phantoms, tmp_path):  # noqa: F811
    scans, out = tmp_path / "scans", tmp_path / "masks"
    files = sorted((phantoms / "CXR_png").iterdir())
    for ward in range(24):
        shutil.copytree(phantoms / "CXR_png", scans / f"ward{ward}")
    (scans / "ward0" / "broken.png").write_bytes(files[0].read_bytes()[:999])
    flags = (
        "--input",
        scans,
        "--output",
        out,
        "--model",
        exported / "unet.onnx",
        "--batch",
        8,
        "--engine",
        "onnxruntime",
    )
    running = start(cluster, *flags)
    wait_until(lambda: all(cluster.workers(raylet) for raylet in cluster.raylets))
    wait_until(lambda: len(list(out.rglob("*.png"))) > 80)
    os.kill(cluster.workers(cluster.raylets[0])[0], signal.SIGKILL)
    done = len(list(out.rglob("*.png")))
    wait_until(lambda: len(list(out.rglob("*.png"))) > done + 80)
    cluster.next()
    said = running.communicate(timeout=90)[0]
    assert running.returncode == 2 and "384 masks" in said and "1 file(s) left out" in said, said
    assert "ward0/broken.png,unreadable" in (out / "problems.csv").read_text()
    assert len([path for path in out.rglob("*.png") if images.is_image(path)]) == 384
    network, run = engine.load(exported / "unet.onnx", 1, "onnxruntime")
    prepared = network.read(files[3].read_bytes())
    expected = 255 * network.decide(run(prepared.batch), prepared).ids
    for ward in (0, 23):
        assert np.array_equal(images.read_mask(out / f"ward{ward}" / files[3].name), expected)

    (scans / "ward0" / "broken.png").unlink()
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    again = start(cluster, *flags)
    assert "384 masks" in again.communicate(timeout=60)[0] and again.returncode == 0
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}


def test_plan_gives_each_mask_one_image():
    wanted, problems = archive.plan(["b/x.nii.gz", "a/x.PNG", "a/x.dcm", "a/.y.png", "notes.txt", "x.png"])
    assert wanted == {"a/x.png": "a/x.PNG", "b/x.png": "b/x.nii.gz", "x.png": "x.png"}
    assert list(problems) == ["a/x.dcm"]


def test_what_cannot_be_is_told(script, exported, phantoms, tmp_path):  # noqa: F811
    model = ("--model", exported / "unet.onnx")
    inside = script(tmp_path, "archive.py", "--input", phantoms, "--output", phantoms / "masks", *model)
    assert inside.returncode == 2 and "name another --output" in inside.stderr
    nothing = script(tmp_path, "archive.py", "--input", tmp_path, "--output", tmp_path.parent / "masks", *model)
    assert nothing.returncode == 2 and "has no image" in nothing.stderr
    strange = script(tmp_path, "archive.py", "--input", "nosuch://x", "--output", "masks", *model)
    assert strange.returncode == 2 and "cannot be opened" in strange.stderr
