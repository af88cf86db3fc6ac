"""Measure how long scripts take from their start to their end, and train.py to its first step."""

import importlib.util
import os
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

import utils
from benchmarks.scripts import python_command, run_script
from benchmarks.table import make_row, write_rows
from benchmarks.timing import run_interleaved
from dataset.phantoms import draw_phantom, make_phantoms
from imaging import pictures
from imaging.grid import resize
from inference.models import BUNDLED_MODEL

SIZE = 512  # pixels of the image
JAX = {"KERAS_BACKEND": "jax"}


def start(*, rounds: int = 7) -> None:
    """Measure train.py --help, predict.py --help, the mask of one image, and train.py's start.

    JAX is among the backends if it is installed.

    Args:
        rounds: how often each is run
    """
    with tempfile.TemporaryDirectory() as name:
        image = Path(name) / "one.png"
        picture = draw_phantom(np.random.default_rng(0))[0]
        pictures.write_picture(image, resize(picture, (SIZE, SIZE)))
        one_image = ["--model", str(utils.ROOT / BUNDLED_MODEL), "--input", str(image)]
        one_image += ["--output", f"{name}/out"]
        commands = {
            "train.py --help": ["train.py", "--help"],
            "predict.py --help": ["predict.py", "--help"],
            "predict.py --input one.png, the pretrained model, with its panel": [
                "predict.py",
                *one_image,
            ],
        }
        calls = {figure: partial(script_seconds, command) for figure, command in commands.items()}
        phantoms = make_phantoms(Path(name) / "phantoms", 100, seed=0)
        first_step = "train.py until its first step, decoded images in the cache"
        calls[first_step] = partial(seconds_to_first_step, phantoms)
        if importlib.util.find_spec("jax"):
            calls[f"{first_step}, JAX"] = partial(seconds_to_first_step, phantoms, **JAX)
            calls[f"{first_step}, JAX, nothing kept that it compiled"] = partial(
                seconds_to_first_step, phantoms, **JAX, JAX_COMPILATION_CACHE_DIR=""
            )
        calls["of which: importing Keras and its backend"] = partial(
            script_seconds, ["-c", "import utils; utils.load_keras()"]
        )
        found = run_interleaved(calls, rounds)
    write_rows([make_row(figure, "s", seconds) for figure, seconds in found.items()])


def script_seconds(command: list[str]) -> float:
    """Run a script and return its seconds."""
    return run_script(*command)[1]


def seconds_to_first_step(data_dir: Path, **more: str) -> float:
    """Start a training; return the seconds until its first step begins. The training is ended.

    more: environment variables.
    """
    environment = os.environ | {"UNET_CACHE": f"{data_dir}/cache"} | more
    with tempfile.TemporaryDirectory() as out_dir:
        command = python_command("train.py", "--data-dir", str(data_dir), "--out-dir", out_dir)
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        with process:
            for line in process.stdout:
                if line.startswith("epoch 1 of"):
                    break
            seconds = time.perf_counter() - start
            process.kill()
    return seconds
