"""How a cross-validation's models do on corrupted images."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

import metrics
import predict
from benchmarks.accuracy.corruptions import CORRUPTIONS, corrupt
from benchmarks.accuracy.trainings import write_table
from dataset.layouts import Pair
from dataset.reading import read_pair
from imaging.labels import Classes
from imaging.scan import Scan
from inference.segment import Member, segment_scans
from training.run_identity import NON_TRAINING_FIELDS
from utils import UserError

METRICS = ["dice", "iou", "nsd", "hd95"]


def corruptions(run: Path) -> None:
    """Score every fold's model on its test images, corrupted: results/corruptions-RUN.csv.

    Args:
        run: the folder of a cross-validation, which holds fold0, fold1 …
    """
    rows = []
    for config, members, pairs in load_folds(run):
        for seed, pair in enumerate(tqdm(pairs, config.model, unit="image", disable=None)):
            rows += score_corrupted(members, pair, seed)
    table = pd.DataFrame(rows).groupby("corruption", sort=False)[METRICS].mean().reset_index()
    table["loss"] = table.dice[0] - table.dice
    mean = {"corruption": "mean, without clean", **table.iloc[1:].mean(numeric_only=True)}
    table = pd.concat([table, pd.DataFrame([mean])])
    write_table(table, Path(f"results/corruptions-{run.absolute().name}.csv"))


def score_corrupted(
    members: list[Member], pair: Pair, seed: int, chosen: Sequence[str] = tuple(CORRUPTIONS)
) -> list[dict[str, Any]]:
    """Score one image under each of the chosen corruptions; a row each."""
    metadata = members[0][1]
    names = metadata["classes"]
    scan, read = read_pair(pair, Classes.from_metadata(metadata))
    scans, truths = [], []
    for name in chosen:
        image, truth = corrupt(name, scan.pixels[0], read.mask[0], seed)
        scans.append(Scan(image[None]))
        truths.append(truth)
    rows = []
    predictions = segment_scans(members, scans)
    for name, truth, predicted in zip(chosen, truths, predictions, strict=True):
        scores = metrics.score_classes(truth, predicted.ids[0], names)
        row = {"corruption": name, "image": pair.image.as_posix(), **scores}
        rows.append(row | (predicted.quality.describe() if predicted.quality else {}))
    return rows


def load_folds(run: Path) -> Iterator[tuple[predict.Config, list[Member], list[Pair]]]:
    """Yield each fold of a cross-validation: how to predict, its model, its test images."""
    models = sorted(run.glob("fold*/model.h5"))
    if not models:
        command = f"python train.py --folds 5 --out-dir {run}"
        raise UserError(f"{run} holds no fold0/model.h5; train it with `{command}`")
    check_folds(run, models)
    for path in models:
        config = predict.Config(model=str(path))
        yield config, predict.load_members(config), predict.pairs_to_score(config)[0]


def check_folds(run: Path, models: list[Path]) -> None:
    """Raise UserError unless these are all folds of one cross-validation."""
    recipes = []
    for path in models:
        config = json.loads((path.parent / "config.json").read_text())
        for name in (*NON_TRAINING_FIELDS, "fold"):
            config.pop(name, None)
        recipes.append(config)
    if any(recipe != recipes[0] for recipe in recipes) or len(models) != recipes[0]["folds"]:
        raise UserError(
            f"{run} does not hold all folds of one cross-validation; train it into a folder of its "
            "own"
        )
