"""What a start from phantoms or from ImageNet is worth when few images are labelled."""

import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

import data
import metrics
import predict
from benchmarks.accuracy.trainings import run_trainings, write_table
from dataset.layouts import Pair
from dataset.phantoms import make_phantoms
from utils import UserError

LABELLED = (5, 10, 20, 40, 0)  # 0: all that are not for testing
TEST_PARTS = 2  # half of the images are the test set
PHANTOMS = 200
ENCODER = ("--architecture", "efficientnetlite0")
STARTS = ("scratch", "phantoms", "encoder", "imagenet")


def few(
    data_dir: str,
    *,
    starts: str = ",".join(STARTS),
    weights: str = "efficientnet-lite0.weights.h5",
    seeds: int = 3,
    flags: str = "",
    jobs: int = 1,
    out_dir: Path = Path("files/few"),
) -> None:
    """Train on 5, 10, 20, 40 and all images, from several starts: results/few.csv.

    Args:
        data_dir: the data set
        starts: scratch, phantoms (the default network, trained on them first), encoder
            (EfficientNet-Lite0 from random weights), imagenet (the same, pretrained); the others
            are compared with the first
        weights: ImageNet's, as `python -m benchmarks.imagenet_weights` writes them
        seeds: how often images are drawn and networks trained
        flags: more flags for every training, as in --flags="--epochs 100 --filters 16"
        jobs: trainings at once, each on its share of the cores; on a Ray cluster, CPUs of each
        out_dir: where the runs go
    """
    more = shlex.split(flags)
    chosen = choose_starts(starts, weights, out_dir)
    if "phantoms" in chosen:
        own = ["--data-dir", str(make_phantoms("", PHANTOMS, seed=0)), "--augmentation", "strong"]
        run_trainings([[*own, "--out-dir", str(out_dir / "phantoms"), *more]], 1)
    trainings = []
    for seed, count in product(range(seeds), LABELLED):
        folder = out_dir / f"data-{count}-seed{seed}"
        link_labelled(data_dir, folder, count, seed)
        common = ["--data-dir", str(folder), "--val-fraction", "0", "--seed", str(seed), *more]
        for start, start_flags in chosen.items():
            run = run_folder(out_dir, start, count, seed)
            trainings.append([*common, *start_flags, "--out-dir", str(run)])
    run_trainings(trainings, jobs)
    table = [row for count in LABELLED for row in make_rows(out_dir, count, list(chosen), seeds)]
    write_table(pd.DataFrame(table), Path("results/few.csv"))


def choose_starts(starts: str, weights: str, out_dir: Path) -> dict[str, list[str]]:
    """Give the flags of each start that is named. Raises UserError for an unknown one."""
    flags = {
        "scratch": [],
        "phantoms": ["--init-weights", str(out_dir / "phantoms/model.h5")],
        "encoder": [*ENCODER],
        "imagenet": [*ENCODER, "--init-weights", weights],
    }
    unknown = sorted(set(starts.split(",")) - set(flags))
    if unknown:
        raise UserError(f"starts has {', '.join(unknown)}; expected {', '.join(flags)}")
    if "imagenet" in starts and not Path(weights).is_file():
        made = "`python -m benchmarks.imagenet_weights` writes it"
        raise UserError(f"{weights} does not exist; {made}, or leave out imagenet")
    return {start: flags[start] for start in starts.split(",")}


def run_folder(out_dir: Path, start: str, count: int, seed: int) -> Path:
    """Name the run folder of one training."""
    return out_dir / f"{start}-{count}-seed{seed}"


def link_labelled(data_dir: str, folder: Path, count: int, seed: int) -> None:
    """Make a data set of links: half of the images for testing, `count` others for training."""
    pairs, problems = data.find_pairs(data_dir)
    if problems:
        raise UserError("\n".join(problems))
    subsets = choose_labelled(pairs, count, seed)
    shutil.rmtree(folder, ignore_errors=True)  # links of an earlier run
    rows = []
    for pair, subset in zip(pairs, subsets, strict=True):
        if not subset:
            continue
        for path in (pair.image, *pair.masks):
            link = folder / path.relative_to(data_dir)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        rows.append((pair.stem, pair.patient, pair.label, subset))
    index = pd.DataFrame(rows, columns=["stem", "patient", "label", "split"])
    index.to_csv(folder / "index.csv", index=False)


def choose_labelled(pairs: Sequence[Pair], count: int, seed: int) -> list[str]:
    """Choose the test images, and `count` training images with equal shares of each label; 0: all.

    Returns test, train or "" for each pair. Raises UserError if there are fewer than `count`.
    """
    subsets = np.array(data.split(pairs, 0, 0, seed, folds=TEST_PARTS, fold=0), dtype=object)
    train = np.flatnonzero(subsets == "train")
    if count > len(train):
        raise UserError(f"{count} labelled images are needed; {len(train)} are not for testing")
    if 0 < count < len(train):
        labels = [pairs[i].label for i in train]
        counts = Counter(labels)
        enough_places = len(counts) <= min(count, len(train) - count)
        stratify = labels if min(counts.values()) > 1 and enough_places else None
        parts = train_test_split(train, train_size=count, random_state=seed, stratify=stratify)
        subsets[parts[1]] = ""
    return subsets.tolist()


def make_rows(out_dir: Path, count: int, starts: list[str], seeds: int) -> list[dict[str, object]]:
    """Make a row for each start: mean Dice, paired gain over the first start, Dice of each seed.

    An image that several seeds test counts once, with its mean.
    """
    rows, first = [], None
    for start in starts:
        tables = [score_run(run_folder(out_dir, start, count, seed)) for seed in range(seeds)]
        means = pd.concat(tables).groupby("image", as_index=False).dice.mean()
        first = means if first is None else first
        paired = metrics.compare_tables(first, means).loc["dice"]
        row = {"labelled": count or "all", "start": start, "dice": paired["B"]}
        row |= {"gain": paired["B - A"], "low": paired["low"], "high": paired["high"]}
        row |= {"p": paired["p"], "seeds": " ".join(f"{one.dice.mean():.4f}" for one in tables)}
        rows.append(row)
    return rows


def score_run(run: Path) -> pd.DataFrame:
    """Score a run's test images; images are named by their file, as their folders differ."""
    table = predict.score_run(run)
    return table.assign(image=[Path(image).name for image in table.image])
