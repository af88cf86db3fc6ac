"""Does it matter that prepared images have 8 bits? A model sees the same ones with more."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import metrics
import predict
from dataset.pairs import Pair
from dataset.reading import read_pair
from imaging import preprocess
from imaging.labels import Classes
from imaging.scan import Scan
from inference import segment
from inference.sampler import Sampler
from inference.segment import DEFAULT_OPTIONS, Member
from inference.windows import Windows
from utils import atomic


def storage(run: Path, *, subset: str = "val") -> None:
    """Score a model on images stored in 8 and 16 bits, float16 and float32.

    Prints the mean Dice of each and its difference from float32; writes results/storage-RUN.csv, a
    row per image.

    Args:
        run: the folder of a run, which holds model.h5 and split.csv
        subset: which images
    """
    config = predict.Config(model=str(run / "model.h5"), subset=subset)
    members, (pairs, _) = predict.load_members(config), predict.pairs_to_score(config)
    table = pd.DataFrame([score_stored(members[0], pair) for pair in pairs])
    path = Path(f"results/storage-{run.absolute().name}.csv")
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)
    dice = table.drop(columns="image")
    for name, mean in dice.mean().items():
        apart = (dice[name] - dice["float32"]).abs().max()
        print(f"{name:8} Dice {mean:.5f}, at most {apart:.5f} from float32 in an image")


def as_integers(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Round pixels in [0, 1] to as many levels as integers of so many bits have."""
    most = 2**bits - 1
    return np.round(pixels * most) / most


STORED = {
    "float32": lambda pixels: pixels,
    "float16": lambda pixels: pixels.astype(np.float16),
    "16 bits": partial(as_integers, bits=16),
    "8 bits": partial(as_integers, bits=8),
    "6 bits": partial(as_integers, bits=6),
}


def score_stored(member: Member, pair: Pair) -> dict[str, float | str]:
    """Score an image as it would be stored in each way: its Dice."""
    network, metadata = member
    classes, sampler = Classes.from_metadata(metadata), Sampler.from_metadata(metadata)
    scan, truth = read_pair(pair, classes, metadata.get("window", ""))
    grid, pixels = sampler.grid(scan), prepare_exactly(scan, metadata)
    row: dict[str, float | str] = {"image": pair.image.as_posix()}
    for name, store in STORED.items():
        windows = Windows(255 * store(pixels).astype(np.float32), sampler)
        probs = segment.run_windows(network, [windows], DEFAULT_OPTIONS.batch_size)
        bands = ((band,) for band in windows.blend(probs))
        found = segment.decide_scan(bands, 1, grid, metadata)
        scores = metrics.score_classes(truth.mask, found.ids, classes.names, ignored=truth.ignored)
        row[name] = scores["dice"]
    return row


def prepare_exactly(scan: Scan, metadata: dict) -> np.ndarray:
    """Prepare a scan as `preprocess.prepare_scan` does, but float32 in [0, 1] (D, H, W, C)."""
    grid = Sampler.from_metadata(metadata).grid(scan)
    change = partial(preprocess.to_channels, channels=metadata["channels"])
    small = np.stack(list(grid.scale(grid.orient(scan.colours), change)))
    low, high = preprocess.grey_ranges(small, scan, metadata.get("window", ""))
    width = np.where(np.greater(high, low), np.subtract(high, low), np.inf)
    canvas = np.zeros((*grid.canvas, small.shape[-1]), np.float32)
    canvas[:, grid.rows, grid.columns] = np.clip((small - low) / width, 0, 1)
    return canvas
