"""What each element of the default recipe is worth: one change at a time, cross-validated."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import metrics
import predict
from benchmarks.accuracy import trainings
from benchmarks.accuracy.trainings import read_folds, run_trainings, write_table
from utils import UserError

# Row of the table → flags of its training.
TRAININGS = {
    "default": [],
    "another seed": ["--seed", "1"],  # shows what chance alone does
    "dice loss alone": ["--loss", "dice"],
    "residual blocks": ["--architecture", "residual"],
    "U-Net++": ["--architecture", "unet++"],
    # Made by benchmarks.imagenet_weights.
    "pretrained encoder": [
        *("--architecture", "efficientnetlite0"),
        *("--init-weights", "efficientnet-lite0.weights.h5"),
    ],
    "group normalization": ["--normalization", "group"],
    "instance normalization": ["--normalization", "instance"],
    "no normalization": ["--normalization", "none"],
    "no augmentation": ["--augmentation", "none"],
    "strong augmentation": ["--augmentation", "strong"],
}
# Row of the table → trainings whose models are averaged, and what is changed in their metadata.
PREDICTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "mirrored too": (["default"], {"mirror": True}),
    "not cleaned": (["default"], {"clean": None}),
    "both seeds averaged": (["default", "another seed"], {}),
}


def ablation(
    data_dir: str,
    *,
    rows: str = "",
    flags: str = "",
    jobs: int = 1,
    out_dir: Path = Path("files/ablation"),
) -> None:
    """Train and score every fold of every change: results/ablation.csv.

    Args:
        data_dir: the data set
        rows: only these and the default, separated by commas, into results/ablation-rows.csv
        flags: more flags for every training, as in --flags="--epochs 100 --filters 16"
        jobs: trainings at once, each on its share of the cores; on a Ray cluster, CPUs of each
        out_dir: where the runs go
    """
    wanted = rows.split(",") if rows else [*TRAININGS, *PREDICTIONS]
    needed = needed_trainings(wanted)
    common = ["--data-dir", data_dir, "--folds", str(trainings.FOLDS), *shlex.split(flags)]
    run_trainings(fold_flags(needed, common, out_dir), jobs)
    scores, seconds = {}, {}
    for name in needed:
        scores[name], seconds[name] = read_folds(run_folder(out_dir, name))
    for name, (members, changes) in PREDICTIONS.items():
        if name in wanted:
            runs = [run_folder(out_dir, member) for member in members]
            scores[name] = score_folds(runs, changes)
            seconds[name] = sum(seconds[member] for member in members)
    table = [make_row(name, scores, seconds) for name in scores]
    write_table(pd.DataFrame(table), Path(f"results/ablation{'-rows' if rows else ''}.csv"))


def needed_trainings(wanted: Sequence[str]) -> list[str]:
    """List the trainings for these rows, in the table's order. Raises UserError for another row."""
    known = [*TRAININGS, *PREDICTIONS]
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise UserError(f"rows has {', '.join(unknown)}; expected {', '.join(known)}")
    needed = {"default", *wanted}
    for name in wanted:
        if name in PREDICTIONS:
            needed.update(PREDICTIONS[name][0])
    return [name for name in TRAININGS if name in needed]


def fold_flags(names: Sequence[str], common: list[str], out_dir: Path) -> list[list[str]]:
    """List the flags of every fold of the named trainings."""
    flags = []
    for name in names:
        for fold in range(trainings.FOLDS):
            own = [*TRAININGS[name], "--fold", str(fold)]
            flags.append([*common, *own, "--out-dir", str(run_folder(out_dir, name))])
    return flags


def run_folder(out_dir: Path, name: str) -> Path:
    """Name the run folder of a row."""
    return out_dir / "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def score_folds(runs: Sequence[Path], changes: dict[str, Any]) -> pd.DataFrame:
    """Score every fold's test images again, with the mean of several runs' models."""
    tables = []
    for fold in range(trainings.FOLDS):
        tables.append(score_test_images([run / f"fold{fold}" for run in runs], changes))
    return pd.concat(tables)


def score_test_images(folders: Sequence[Path], changes: dict[str, Any]) -> pd.DataFrame:
    """Score the test images by the mean of the folders' models, with changes of the metadata."""
    config = predict.Config(model=",".join(str(folder / "model.h5") for folder in folders))
    members = [(model, metadata | changes) for model, metadata in predict.load_members(config)]
    pairs, _ = predict.pairs_to_score(config)
    table, problems = predict.score_pairs(members, pairs)
    if problems:
        raise UserError("\n".join(problems))
    return table


def make_row(
    name: str, scores: dict[str, pd.DataFrame], seconds: dict[str, float]
) -> dict[str, Any]:
    """Make a row: mean metrics, the paired gain over the default with its interval, the time."""
    means = scores[name][["dice", "iou", "nsd", "hd95"]].mean().to_dict()
    paired = metrics.compare_tables(scores["default"], scores[name]).loc["dice"]
    return {
        "change": name,
        "flags": " ".join(TRAININGS.get(name, [])),
        **means,
        "gain": paired["B - A"],
        "low": paired["low"],
        "high": paired["high"],
        "p": paired["p"],
        "seconds a fold": seconds[name],
    }
