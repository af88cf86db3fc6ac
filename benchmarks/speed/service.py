"""Measure serve.py: the latency of one client; several clients, beside other services."""

import contextlib
import http.client
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.scripts import python_command
from benchmarks.table import make_row, write_rows
from dataset.phantoms import draw_phantom
from imaging import formats
from imaging.grid import resize
from inference.engines import has_openvino
from inference.exported_model import load_exported
from utils import ROOT, UserError

SIZE = 512  # pixels
WHAT = f"serve.py, a PNG of {SIZE}x{SIZE}"
CLIENTS = 1, 4, 16, 64
BLOCKS = 10  # in which one client alternates with the bare network
STOP_S = 5  # in which a service has to end
MINIMAL = "a minimal FastAPI with ONNX Runtime"
LITSERVE = "the same with LitServe"
# LitServe takes bytes in a form alone.
FORM = (
    b'--image\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n',
    b"\r\n--image--\r\n",
)
FORM_TYPE = "multipart/form-data; boundary=image"


def service(*, model: str = "export/unet.onnx", repeats: int = 100, seconds: float = 10.0) -> None:
    """Measure serve.py with a phantom of 512x512 pixels; client and service share this machine.

    Args:
        model: what export.py wrote
        repeats: requests of the single client, in turn with the bare network, a tenth at a time
        seconds: of each measurement with several clients
    """
    picture = draw_phantom(np.random.default_rng(0))[0]
    content = cv2.imencode(".png", resize(picture, (SIZE, SIZE)))[1].tobytes()
    rows = [latency_row(model, content, repeats)]
    rows += load_rows(model, content, seconds)
    write_rows(rows)


def latency_row(model: str, content: bytes, repeats: int) -> dict:
    """Measure one client beside decoding and the bare network."""
    network, run = load_exported(Path(model))
    zeros = np.zeros((1, *network.input_shape), np.float32)

    def run_bare() -> None:
        formats.decode_scan(content)
        run(zeros)

    bare, served = [], []
    command = python_command("serve.py", "--model", str(Path(model).absolute()), "--drain-s", "0")
    with running(command, os.environ) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        # In blocks, because each evicts the other from the processor's caches.
        for block in tqdm(range(BLOCKS + 1), "one client", unit="block", disable=None):
            bare_block = [seconds_of(run_bare) for _ in range(repeats // BLOCKS)]
            served_block = [request_mask(connection, content) for _ in range(repeats // BLOCKS)]
            if block > 0:  # the first warms up
                bare += bare_block
                served += served_block
    figure = f"{WHAT}, client and service in turn with the bare network"
    return make_row(figure, "s", served, "decoded, bare", bare)


def load_rows(model: str, content: bytes, seconds: float) -> list[dict]:
    """Measure several clients of serve.py with each engine, beside what others would write.

    LitServe is among them if it is installed. The services take turns at each number of clients.
    """
    path = str(Path(model).absolute())
    minimal = (sys.executable, "-m", "uvicorn", "benchmarks.speed.minimal_app:app")
    services = {MINIMAL: [*minimal, "--log-level", "error"]}
    if importlib.util.find_spec("litserve"):
        services[LITSERVE] = [sys.executable, "-m", "benchmarks.speed.litserve_app"]
    for engine in ("onnxruntime", "openvino") if has_openvino() else ("onnxruntime",):
        flags = ["--model", path, "--engine", engine, "--max-concurrent-requests", "256"]
        services[f"serve.py, {engine}"] = python_command("serve.py", *flags, "--drain-s", "0")
    found, environment = {}, os.environ | {"MODEL": path}
    for clients, (name, command) in itertools.product(CLIENTS, services.items()):
        body, kind, more = content, "image/png", {}
        if name == LITSERVE:
            body, kind, more = content.join(FORM), FORM_TYPE, {"THREADS": "1"}
        with running(command, environment | more) as port:
            run_clients(port, body, clients, 1, kind)  # warms up
            found[name, clients] = run_clients(port, body, clients, seconds, kind)
    rows = []
    for name, clients in found:
        rate, times = found[name, clients]
        figure = f"{name}, a PNG of {SIZE}x{SIZE}, {clients} clients"
        rows.append(make_row(figure, "images/s", [rate], MINIMAL, [found[MINIMAL, clients][0]]))
        for percentile in (50, 99):
            value = np.percentile(times, percentile)
            rows.append(make_row(f"{figure}: p{percentile}", "s", [value]))
    return rows


@contextlib.contextmanager
def running(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[int]:
    """Run a service until the block ends; yield its port. Raises UserError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"stdout": subprocess.DEVNULL, "cwd": ROOT, "env": environment}
    process = subprocess.Popen([*command, "--port", str(port)], start_new_session=True, **more)
    try:
        while not is_ready(port):
            if process.poll() is not None:
                raise UserError("a service did not start; its message is above")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves its workers behind
        process.wait()


def is_ready(port: int) -> bool:
    """Ask /readyz."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False


def seconds_of(call: Callable[[], None]) -> float:
    """Time a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def request_mask(
    connection: http.client.HTTPConnection, content: bytes, kind: str = "image/png"
) -> float:
    """Send an image; return the seconds until its mask is there. Raises UserError."""
    start = time.perf_counter()
    connection.request("POST", "/v1/segment", content, {"Content-Type": kind})
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise UserError(f"the service answered {response.status}")
    return time.perf_counter() - start


def run_clients(
    port: int, content: bytes, clients: int, seconds: float, kind: str
) -> tuple[float, list[float]]:
    """Let clients send an image again and again: responses per second, seconds of each response."""
    start = time.perf_counter()

    def run_client(_: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        times = []
        while time.perf_counter() - start < seconds:
            times.append(request_mask(connection, content, kind))
        return times

    times = []
    with ThreadPoolExecutor(clients) as pool:
        for of_client in pool.map(run_client, range(clients)):
            times += of_client
    return len(times) / (time.perf_counter() - start), times
