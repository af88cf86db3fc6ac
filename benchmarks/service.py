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
import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import utils
from benchmarks.scale import SIDE
from benchmarks.timing import make_row, write_rows
from dataset.phantoms import draw_phantom
from imaging import formats, preprocess
from inference.exported_model import load_exported
from utils import UserError

# ----------------------------------------------------------------------------------------------------------- service


@contextlib.contextmanager
def running(model: str, *flags: str) -> Iterator[int]:
    """Run serve.py on this machine until the block ends; yield its port. Raises UserError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        utils.ROOT / "serve.py",
        "--model",
        model,
        "--port",
        str(port),
        *flags,
    ]
    process = subprocess.Popen([*command, "--drain-s", "0"], stdout=subprocess.DEVNULL)
    try:
        while not is_ready(port):
            if process.poll() is not None:
                raise UserError("serve.py did not start, see above")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    """Ask /readyz."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False


def ask(connection: http.client.HTTPConnection, content: bytes) -> float:
    """Send an image; return the seconds until its mask is there. Raises UserError."""
    start = time.perf_counter()
    connection.request("POST", "/v1/segment", body=content)
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise UserError(f"the service answered {answer.status}")
    return time.perf_counter() - start


def ask_together(
    port: int, content: bytes, clients: int, seconds: float
) -> tuple[float, list[float]]:
    """Let clients send an image again and again for so long: answers per second, and each answer's seconds."""
    start = time.perf_counter()

    def client(_: int) -> list[float]:
        connection, times = http.client.HTTPConnection("127.0.0.1", port), []
        while time.perf_counter() - start < seconds:
            times.append(ask(connection, content))
        return times

    with ThreadPoolExecutor(clients) as pool:
        times = [one for times in pool.map(client, range(clients)) for one in times]
    return len(times) / (time.perf_counter() - start), times


def service(*, model: str = "export/unet.onnx", repeats: int = 100, seconds: float = 10.0) -> None:
    """Measure serve.py with a phantom of 512x512 pixels.

    Args:
        model: as export.py wrote it
        repeats: how often one client asks, in turn with the bare network, a tenth at a time
        seconds: of each measurement with several clients
    """
    picture = draw_phantom(np.random.default_rng(0))[0]
    content = cv2.imencode(".png", preprocess.resize(picture, (SIDE, SIDE)))[1].tobytes()
    network, run = load_exported(Path(model))
    zeros = np.zeros((1, *network.input_shape), np.float32)

    def bare() -> float:
        start = time.perf_counter()
        formats.decode_scan(content)
        run(zeros)
        return time.perf_counter() - start

    alone, served = [], []
    with running(model) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for i in tqdm(
            range(11), "in turn", unit="block", disable=None
        ):  # blocks, as each evicts the other's caches
            block = (
                [bare() for _ in range(repeats // 10)],
                [ask(connection, content) for _ in range(repeats // 10)],
            )
            if i:  # the first warms up
                alone += block[0]
                served += block[1]
    what = f"serve.py, a PNG of {SIDE}x{SIDE}"
    rows = [
        make_row(
            f"{what}, client and service in turn with the bare network",
            "s",
            served,
            "decoded, bare",
            alone,
        )
    ]
    for clients in (1, 4, 16, 64):
        rates: dict[int, list[float]] = {}
        for most in (1, 8):
            with running(model, "--max-batch", str(most)) as port:
                ask_together(port, content, clients, 1)
                rate, times = ask_together(port, content, clients, seconds)
            rates[most], load = [rate], f"{what}, {clients} clients, --max-batch {most}"
            rows.append(make_row(load, "images/s", rates[most], "--max-batch 1", rates[1]))
            rows += [
                make_row(f"{load}: p{share}", "s", [np.percentile(times, share)])
                for share in (50, 99)
            ]
    write_rows(rows)
