"""Measure what the README says about speed and memory.

python benchmark.py memory          the most memory that a training on 10,000 images of 512x512 takes
python benchmark.py service         how long serve.py takes for a 512x512 PNG, and how many it answers in a second
"""

import contextlib
import http.client
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import images
import phantom
from images import UserError
from serving import engine

SIDE = 512  # pixels


def make_images(folder: Path, count: int) -> None:
    """Write `count` pairs, a disc on a gradient each and, in a corner, noise."""
    rng = np.random.default_rng(0)
    slope = np.add.outer(np.arange(SIDE), np.arange(SIDE)) // 8
    for i in tqdm(range(count), "writing", unit="pair", disable=None):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        cv2.circle(mask, rng.integers(100, 400, 2).tolist(), int(rng.integers(30, 90)), 255, cv2.FILLED)
        picture = np.uint8(slope + mask // 4)
        picture[:16, :16] = rng.integers(256, size=(16, 16))  # or two could be the same
        images.write(folder / "images" / f"{i}.png", picture)
        images.write(folder / "masks" / f"{i}.png", mask)


def memory(*, count: int = 10_000, memory_gb: float = 1.0) -> float:
    """Train an epoch of all images, with a small network, and measure the process's peak memory.

    Args:
        count: how many images
        memory_gb: as in train.py

    Returns gigabytes (2**30).
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "set", count)
        flags = f"--image-size {SIDE} --filters 2 --depth 2 --epochs 1 --memory-gb {memory_gb}"
        places = ["--data-dir", folder / "set", "--out-dir", folder / "run", "--cache-dir", folder / "cache"]
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("train.py"), *places, *flags.split()], check=False
        )
        if done.returncode:
            raise UserError("the training failed, see above")
        decoded = sum(path.stat().st_size for path in (folder / "cache").iterdir()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{count} images: {decoded:.2f} GB decoded, --memory-gb {memory_gb:g}: peak memory {peak:.2f} GB")
    return peak


# ----------------------------------------------------------------------------------------------------------- service


@contextlib.contextmanager
def running(model: str, *flags: str) -> Iterator[int]:
    """Run serve.py on this machine until the block ends; yield its port. Raises UserError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__).with_name("serve.py"), "--model", model, "--port", str(port), *flags]
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


def ask_together(port: int, content: bytes, clients: int, seconds: float) -> tuple[float, list[float]]:
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
    picture = phantom.phantom(np.random.default_rng(0))[0]
    content = cv2.imencode(".png", images.resize(picture, (SIDE, SIDE)))[1].tobytes()
    network, run = engine.load(Path(model))
    zeros = np.zeros((1, *network.input_shape), np.float32)

    def bare() -> float:
        start = time.perf_counter()
        images.decode_scan(content)
        run(zeros)
        return time.perf_counter() - start

    alone, served = [], []
    with running(model) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for i in tqdm(range(11), "in turn", unit="block", disable=None):  # blocks, as each evicts the other's caches
            block = [bare() for _ in range(repeats // 10)], [ask(connection, content) for _ in range(repeats // 10)]
            if i:  # the first warms up
                alone += block[0]
                served += block[1]
    middle = [1000 * statistics.median(times) for times in (alone, served)]
    told = f"decoding and the bare network {middle[0]:.1f} ms, served {middle[1]:.1f} ms (medians of {len(served)})"
    print(f"{told}, {middle[1] / middle[0]:.2f} times")
    for clients in (1, 4, 16, 64):
        told = []
        for most in (8, 1):
            with running(model, "--max-batch", str(most)) as port:
                ask_together(port, content, clients, 1)
                rate, times = ask_together(port, content, clients, seconds)
            middle, high = (1000 * np.percentile(times, share) for share in (50, 99))
            told.append(f"batches of {most}: {rate:.1f} images/s, p50 {middle:.0f} ms, p99 {high:.0f} ms")
        print(f"{clients:2} clients, " + "; ".join(told), flush=True)


if __name__ == "__main__":
    import tyro

    from cli import run_cli

    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"memory": memory, "service": service}, description=__doc__))
