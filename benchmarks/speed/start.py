"""Measure how long scripts take from their start to their end."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

import utils
from benchmarks.scripts import run_script
from benchmarks.table import make_row, write_rows
from benchmarks.timing import run_interleaved
from dataset.phantoms import draw_phantom
from imaging import pictures
from imaging.grid import resize
from inference.models import BUNDLED_MODEL

SIZE = 512  # pixels of the image


def start(*, rounds: int = 7) -> None:
    """Measure how long train.py --help, predict.py --help and the mask of one image take.

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
        found = run_interleaved(calls, rounds)
    write_rows([make_row(figure, "s", seconds) for figure, seconds in found.items()])


def script_seconds(command: list[str]) -> float:
    """Run a script and return its seconds."""
    return run_script(*command)[1]
