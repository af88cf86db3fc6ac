"""Measure what the README says about speed and memory.

python benchmark.py memory          the most memory that a training on 10,000 images of 512x512 takes
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import images
from images import UserError

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


if __name__ == "__main__":
    import tyro

    from cli import run_cli

    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"memory": memory}, description=__doc__))
