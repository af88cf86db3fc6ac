"""Measure what images cost: augmentation beside the steps, reading files beside the cache."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import data
import train
import utils
from benchmarks.table import make_row, write_rows
from benchmarks.timing import Repeated, fit_seconds, run_interleaved, training_model
from dataset import loading
from dataset.batches import Batches
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from dataset.phantoms import draw_phantom, make_phantoms
from imaging import pictures
from imaging.labels import Classes
from inference.sampler import Sampler

CLASSES = Classes()
IMAGES = 200  # phantoms of an epoch
LARGE = 4020, 4892  # height and width of Montgomery's original files


def pipeline(*, sizes: str = "128,192", rounds: int = 7, originals: int = 16) -> None:
    """Measure an epoch with augmentation beside the bare steps, and reading files beside the cache.

    Args:
        sizes: of the network's input in pixels, separated by commas
        rounds: how often each epoch is measured
        originals: how many pairs of 4020x4892 pixels, the size of Montgomery's files, are read
    """
    utils.set_precision("auto")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        phantoms = make_phantoms(Path(name) / "phantoms", IMAGES, seed=0)
        for size in sizes.split(","):
            rows += epoch_rows(phantoms, int(size), rounds)
        large = write_large(Path(name) / "large", originals)
        rows += reading_rows(data.find_pairs(large)[0], Path(name) / "cache")
    write_rows(rows)


def epoch_rows(folder: Path, size: int, rounds: int) -> list[dict]:
    """Measure an epoch of a folder's images with augmentation, beside one of a single batch."""
    config = train.Config(image_size=size)
    pairs = data.find_pairs(folder)[0]
    dataset, _ = loading.load_pairs(pairs, Preprocessing(CLASSES, Sampler((size, size))))
    examples = dataset.cover(range(len(pairs)))
    count = len(examples)
    batches = Batches(dataset, examples, config.batch_size, config.augmentation)
    model = training_model(config)
    calls = {
        "bare": partial(fit_seconds, model, Repeated(*batches[0], len(batches))),
        "augmented": partial(fit_seconds, model, batches),
    }
    found = run_interleaved(calls, rounds)
    what = f"epoch of {count} images of {size}x{size}, {config.augmentation} augmentation"
    bare, augmented = found["bare"], found["augmented"]
    return [
        make_row(f"{what}: one batch again and again", "s", bare),
        make_row(f"{what}: read and augmented", "s", augmented, "one batch", bare),
    ]


def reading_rows(pairs: list[Pair], cache_dir: Path) -> list[dict]:
    """Measure decoding alone, reading and preparing, and reading from the cache."""
    calls = {
        "decoded by OpenCV": partial(decode_seconds, pairs),
        "read and prepared": partial(load_seconds, pairs, ""),
        "from the cache": partial(load_seconds, pairs, cache_dir),
    }
    found = run_interleaved(calls, 3)
    what = f"{len(pairs)} pairs of {LARGE[0]}x{LARGE[1]} pixels"
    decoded = found.pop("decoded by OpenCV")
    rows = [make_row(f"{what}: decoded by OpenCV", "s", decoded)]
    for name, seconds in found.items():
        rows.append(make_row(f"{what}: {name}", "s", seconds, "decoded", decoded))
    return rows


def decode_seconds(pairs: list[Pair]) -> float:
    """Time OpenCV's decoding of all files, on all cores."""
    paths = []
    for pair in pairs:
        paths += [pair.image, *pair.masks]
    start = time.perf_counter()
    with ThreadPoolExecutor(utils.cores()) as pool:
        list(pool.map(lambda path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED), paths))
    return time.perf_counter() - start


def load_seconds(pairs: list[Pair], cache_dir: Path | str) -> float:
    """Time the loading of a data set as a training does it."""
    size = utils.parse_size(train.Config.image_size)
    start = time.perf_counter()
    loading.load_pairs(pairs, Preprocessing(CLASSES, Sampler(size)), cache_dir)
    return time.perf_counter() - start


def write_large(folder: Path, count: int) -> Path:
    """Write phantoms of the size of Montgomery's files."""
    size = LARGE[::-1]  # OpenCV's order: width, height
    for i in tqdm(range(count), "writing", unit="pair", disable=None):
        picture, masks = draw_phantom(np.random.default_rng(i))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
        mask = np.uint8(255 * (masks.max(-1) > 0))
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        pictures.write_picture(folder / "images" / f"{i}.png", picture)
        pictures.write_picture(folder / "masks" / f"{i}.png", mask)
    return folder
