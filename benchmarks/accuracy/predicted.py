"""Do models know how good their masks are, and which images they do not know?"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

import data
import metrics
import predict
import train
import utils
from benchmarks.accuracy.robustness import check_folds, score_corrupted
from dataset.cache import Dataset
from dataset.pairs import Pair
from dataset.run_split import read_subset
from imaging.plots import new_figure, write_figure
from imaging.scan import Scan
from inference.inputs import list_inputs, read_one
from inference.quality import Kind
from inference.segment import Member, segment_scans
from training.calibration import Sample, fit, learn
from utils import UserError, atomic

MAX_OTHERS = 60  # images of another data set
SIDE = 256  # pixels of an image that is drawn


class Fold(NamedTuple):
    """A fold's model and what it shows on the images that are left out of its training."""

    member: Member
    test: list[Pair]
    kinds: tuple[Kind, Kind]
    samples: list[Sample]


def predicted(run: Path, *, others: str = "") -> None:
    """Compare the predicted Dice with the true one, and flag images of other kinds.

    The judge of each fold is learned from the other folds. Its own test images are judged as they
    are and under 19 corruptions. Writes results/predicted-RUN.csv, a row per image, and a PNG.

    Args:
        run: the folder of a cross-validation, which holds fold0, fold1 …
        others: folders with images of another kind, separated by commas
    """
    folds = list(read_folds(run))
    rows, kinds = [], []
    for number, fold in enumerate(folds):
        samples = [one for other in folds if other is not fold for one in other.samples]
        network, metadata = fold.member
        member = (network, metadata | {"quality": fit(fold.kinds, samples).pack()})
        for seed, pair in enumerate(tqdm(fold.test, f"fold {number}", unit="image", disable=None)):
            rows += score_corrupted([member], pair, seed)
        kinds += judge_others(member, fold.test, [one for one in others.split(",") if one])
    table, name = pd.DataFrame(rows), f"predicted-{run.absolute().name}"
    with atomic(Path(f"results/{name}.csv")) as temporary:
        table.to_csv(temporary, index=False)
    draw_reliability(table, Path(f"results/{name}.png"))
    is_clean = table.corruption == "clean"
    for title, part in (("clean", table[is_clean]), ("all", table)):
        print(f"{title}, {len(part)} images: {metrics.format_predictions(part)}")
    flagged = table.groupby("corruption", sort=False).unusual.mean()
    print("\nflagged as unusual\n" + flagged.to_string(float_format="{:.3f}".format))
    flagged = pd.DataFrame(kinds).groupby("kind", sort=False).unusual.agg(["mean", "size"])
    print("\n" + flagged.to_string(float_format="{:.3f}".format))


def read_folds(run: Path) -> Iterator[Fold]:
    """Load each fold of a cross-validation, and show its model the images it was not trained on."""
    paths = sorted(run.glob("fold*/model.h5"))
    if not paths:
        raise UserError(f"{run} holds no fold0/model.h5; train it with --folds 5 --out-dir {run}")
    check_folds(run, paths)
    for path in paths:
        dataset, numbers = read_numbers(path)
        kinds, samples = learn(path, dataset, numbers["train"], numbers["test"])
        config = predict.Config(model=str(path))
        yield Fold(utils.load_model(path), predict.pairs_to_score(config)[0], kinds, samples)


def read_numbers(path: Path) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Load the data of a run: prepared images, the numbers of its training and test pairs.

    Those of --extra-dir are left out.
    """
    config = train.Config(**json.loads((path.parent / "config.json").read_text()))
    pairs, dataset = train.load_data(train.with_classes(config))
    places = {pair.image.resolve(): number for number, pair in enumerate(pairs)}
    numbers = {}
    for subset in ("train", "test"):
        found = read_subset(path, subset)[0]
        chosen = [places[image.resolve()] for image in found]
        numbers[subset] = np.array([one for one in chosen if pairs[one].subset != "extra"])
    return dataset, numbers


def judge_others(member: Member, test: Sequence[Pair], folders: Sequence[str]) -> list[dict]:
    """Judge images that are no chest X-rays, or none that lies as it should: a row each."""
    rows = []
    for folder in folders:
        images = list_images(Path(folder))
        scans = [read_one(path, member[1]) for path in images[:: -(-len(images) // MAX_OTHERS)]]
        rows += judge(member, Path(folder).name, [scan for scan in scans if len(scan.pixels) == 1])
    grey = np.linspace(0, 255, 5)
    rng = np.random.default_rng(0)
    flat = [np.full((SIDE, SIDE, 1), level, np.uint8) for level in grey]
    noise = [rng.integers(0, 256, (SIDE, SIDE, 1), dtype=np.uint8) for _ in range(5)]
    rows += judge(member, "one grey level", [Scan(one[None]) for one in flat])
    rows += judge(member, "noise", [Scan(one[None]) for one in noise])
    images = [read_one(pair.image, member[1]).pixels for pair in test]
    rows += judge(member, "turned by 90 degrees", [Scan(turn(one)) for one in images])
    rows += judge(member, "upside down", [Scan(one[:, ::-1]) for one in images])
    rows += judge(member, "a quarter of it", [Scan(quarter(one)) for one in images])
    return rows


def list_images(folder: Path) -> list[Path]:
    """List the images of a data set, without its masks, or of a plain folder."""
    try:
        return [pair.image for pair in data.find_pairs(folder)[0]]
    except UserError:
        return [item.path for item in list_inputs(folder).items]


def turn(image: np.ndarray) -> np.ndarray:
    """Turn (1, H, W, C) by 90 degrees."""
    return np.rot90(image, 1, (1, 2))


def quarter(image: np.ndarray) -> np.ndarray:
    """Cut the upper left quarter out of (1, H, W, C)."""
    return image[:, : image.shape[1] // 2, : image.shape[2] // 2]


def judge(member: Member, kind: str, scans: Sequence[Scan]) -> list[dict[str, Any]]:
    """Judge scans of one kind: a row each."""
    found = [segment_scans([member], [scan])[0].quality for scan in scans]
    return [{"kind": kind, "unusual": one.is_unusual, "dice": one.dice} for one in found]


def draw_reliability(table: pd.DataFrame, path: Path) -> None:
    """Draw the true Dice over the predicted one: a point per image, and the mean of ten groups."""
    figure = new_figure(5, 5)
    axes = figure.subplots()
    is_clean = table.corruption == "clean"
    for name, part in (("corrupted", table[~is_clean]), ("clean", table[is_clean])):
        axes.plot(part.predicted_dice, part.dice, ".", markersize=3, alpha=0.5, label=name)
    groups = pd.qcut(table.predicted_dice, 10, duplicates="drop")
    means = table.groupby(groups, observed=True)[["predicted_dice", "dice"]].mean()
    axes.plot(means.predicted_dice, means.dice, "k.-", label="mean of a tenth")
    axes.plot([0, 1], [0, 1], ":", color="grey")
    low = np.floor(20 * table[["predicted_dice", "dice"]].min().min()) / 20
    axes.set(xlabel="predicted Dice", ylabel="Dice", xlim=(low, 1), ylim=(low, 1))
    axes.legend()
    write_figure(figure, path)
