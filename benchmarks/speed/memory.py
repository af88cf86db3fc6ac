"""Measure the peak memory of a training on a large data set."""

import os
import resource
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import utils
from benchmarks.scripts import python_command
from benchmarks.table import make_row, write_rows
from imaging import pictures
from utils import UserError

SIZE = 512  # pixels


def memory(*, count: int = 10_000) -> None:
    """Train a small network for an epoch on many images of 512x512; measure the peak memory.

    Decoded images are mapped into memory: of their pages those count that are there at the time.
    A gigabyte is 2**30 bytes.

    Args:
        count: how many images
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "data", count)
        flags = ["--data-dir", f"{name}/data", "--out-dir", f"{name}/run"]
        flags += f"--image-size {SIZE} --filters 2 --depth 2 --epochs 1".split()
        # Not run_script: the user wants to see what takes so long.
        command = python_command("train.py", *flags)
        environment = os.environ | {"UNET_CACHE": f"{name}/cache"}
        done = subprocess.run(command, cwd=utils.ROOT, check=False, env=environment)
        if done.returncode:
            raise UserError("the training failed; its message is above")
        decoded = sum(path.stat().st_size for path in (folder / "cache").iterdir()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    what = f"train.py on {count} images of {SIZE}x{SIZE}: peak"
    write_rows([make_row(what, "GB", [peak], "decoded images", [decoded])])


def make_images(folder: Path, count: int) -> None:
    """Write `count` pairs: a disc on a gradient, and noise in a corner."""
    rng = np.random.default_rng(0)
    gradient = np.add.outer(np.arange(SIZE), np.arange(SIZE)) // 8
    for i in tqdm(range(count), "writing", unit="pair", disable=None):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        centre, radius = rng.integers(100, 400, 2).tolist(), int(rng.integers(30, 90))
        cv2.circle(mask, centre, radius, 255, cv2.FILLED)
        picture = np.uint8(gradient + mask // 4)
        # Noise, because two equal images would be refused.
        picture[:16, :16] = rng.integers(256, size=(16, 16))
        pictures.write_picture(folder / "images" / f"{i}.png", picture)
        pictures.write_picture(folder / "masks" / f"{i}.png", mask)
