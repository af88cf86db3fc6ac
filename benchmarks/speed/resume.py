"""Measure going on with a large archive: what the images cost that have a mask already."""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import utils
from benchmarks.scripts import is_installed, python_command
from benchmarks.table import make_row, write_rows
from dataset.phantoms import make_phantoms
from imaging import formats, pictures
from inference.models import BUNDLED_MODEL
from utils import UserError

IN_FOLDER = 100
LEFT = 200  # images without a mask


def resume(*, counts: str = "1000,100000", model: Path = utils.ROOT / BUNDLED_MODEL) -> None:
    """Segment the last 200 images of archives of small images, the largest last.

    Args:
        counts: how many images each archive has
        model: what export.py wrote
    """
    if not is_installed("ray"):
        raise UserError("the archive needs Ray: pip install -r requirements-archive.txt")
    rows = []
    for count in map(int, counts.split(",")):
        seconds, gigabytes = run_rest(count, model)
        figure = f"inference.archive, {LEFT} of {count} images are left"
        rows.append(make_row(figure, "s", [seconds]))
        # The peak of all children so far, so the archives grow from one to the next.
        rows.append(make_row(f"{figure}: peak of a process", "GB", [gigabytes]))
    write_rows(rows)


def run_rest(count: int, model: Path) -> tuple[float, float]:
    """Make an archive and go on with it: seconds, and the peak memory of a process in GB."""
    with tempfile.TemporaryDirectory() as name:
        images, masks = Path(name) / "images", Path(name) / "masks"
        picture = next((make_phantoms(f"{name}/phantom", 1, seed=0) / "CXR_png").iterdir())
        small = Path(name) / "small.png"
        pictures.write_picture(small, formats.read_image(picture)[::4, ::4, 0])  # 64x64
        flags = ["--model", str(model), "--input", str(images), "--output", str(masks)]
        flags += ["--engine", "onnxruntime"]
        link(small, images, range(count - LEFT, count))
        segment(flags)  # writes what says whose masks these are
        kept = Path(name) / "mask.png"
        for path in list(masks.rglob("*.png")):
            path.replace(kept)
        link(small, images, range(count - LEFT))
        link(kept, masks, range(count - LEFT))
        start = time.monotonic()
        segment(flags)
        seconds = time.monotonic() - start
        found = sum(1 for _ in masks.rglob("*.png"))
    if found != count:
        raise UserError(f"{found} masks of {count}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def link(file: Path, folder: Path, numbers: range) -> None:
    """Give a file many names."""
    for number in numbers:
        place = folder / f"ward{number // IN_FOLDER}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)  # a file has at most 65,000 hard links


def segment(flags: list[str]) -> None:
    """Run inference.archive. Raises UserError if it fails."""
    command = python_command("-m", "inference.archive", *flags)
    done = subprocess.run(command, cwd=utils.ROOT, check=False, stdout=sys.stderr)
    if done.returncode:
        raise UserError("the archive failed; its message is above")
