"""How a model does on images of a kind that it was not trained on: three shifts."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import data
import metrics
import predict
from benchmarks.accuracy.robustness import score_corrupted
from benchmarks.accuracy.trainings import FOLDS, Flags, run_trainings, write_table
from dataset.layouts import Pair
from dataset.phantoms import make_phantoms
from dataset.reading import read_pair
from imaging.labels import Classes
from imaging.preprocess import to_channels
from inference.adapt import MIN_IMAGES
from utils import UserError

PHANTOMS = 400
STRONG = ("--augmentation", "strong")

# Kind → the steps of the strong augmentation that show it, and the corruptions of that kind.
KINDS: dict[str, tuple[str, list[str]]] = {
    "exposure": (
        "light-gamma-tone-curve",
        [
            "dark (gamma 2.5)",
            "bright (gamma 0.4)",
            "pale (a third of the contrast)",
            "hard film (sigmoid)",
            "overexposed (brightest quarter lost)",
            "12 grey levels",
        ],
    ),
    "inversion": ("invert-curve", ["inverted"]),
    "field": ("field", ["uneven field"]),
    "noise": ("noise", ["quantum noise"]),
    "resolution": ("blur-coarse", ["blur", "96 pixels"]),
    "compression": ("jpeg", ["JPEG quality 10"]),
    "borders": (
        "edges",
        ["black borders", "white borders", "collimated to the lungs", "cropped to the lungs"],
    ),
    "geometry": ("affine-elastic", ["turned by 12 degrees", "80 % of the width"]),
    "markers": ("marks", ["markers and a cable"]),
}


def shift(
    data_dir: str,
    *,
    nuclei: str = "",
    flags: str = "",
    jobs: int = 1,
    out_dir: Path = Path("files/shift"),
) -> None:
    """Train on one kind of image and test on another: results/shift.csv.

    Phantoms → X-rays, X-rays → kinds of corruption that the training left out, and one stain of
    nuclei → the other. Where no masks are needed the model is adapted too.

    Args:
        data_dir: chest X-rays, in the layout of Montgomery
        nuclei: the images of the Data Science Bowl 2018; "" leaves them out
        flags: more flags for every training, as in --flags="--epochs 100 --filters 16"
        jobs: trainings at once, each on its share of the cores; on a Ray cluster, CPUs of each
        out_dir: where the runs go
    """
    more = shlex.split(flags)
    tests = [*list_phantom_tests(data_dir, out_dir, more)]
    if nuclei:
        tests += list_stain_tests(nuclei, out_dir, more)
    left_out = list_left_out(data_dir, out_dir, more)
    run_trainings([*(training for training, *_ in tests), *left_out], jobs)
    rows = []
    for training, name, target in tests:
        rows += score_shift(name, Path(training[-1]), target)
    for training, kind in zip(left_out, KINDS, strict=True):
        rows += score_kind(kind, Path(training[-1]))
    table = pd.DataFrame(rows)
    is_corruption = table["shift"].isin(KINDS)
    mean = table[is_corruption].dice.mean()
    table.loc[len(table)] = {
        "shift": "mean of the corruptions",
        "test": f"{is_corruption.sum()}",
        "dice": mean,
    }
    write_table(table, Path("results/shift.csv"))


Test = tuple[Flags, str, Path]  # the flags of its training, its name, the images to test on


def list_phantom_tests(data_dir: str, out_dir: Path, more: Flags) -> list[Test]:
    """List the training on phantoms alone, to be tested on X-rays."""
    phantoms = str(make_phantoms("", PHANTOMS, seed=0))
    training = ["--data-dir", phantoms, *STRONG, *more, "--out-dir", str(out_dir / "phantoms")]
    return [(training, "phantoms to X-rays", Path(data_dir))]


def list_left_out(data_dir: str, out_dir: Path, more: Flags) -> list[list[str]]:
    """List the trainings on X-rays that leave out a kind of change each."""
    trainings = []
    for kind, (steps, _) in KINDS.items():
        own = ["--augmentation", f"strong-{steps}", "--folds", str(FOLDS), "--fold", "0"]
        folder = str(out_dir / f"without-{kind}")
        trainings.append(["--data-dir", data_dir, *own, *more, "--out-dir", folder])
    return trainings


def list_stain_tests(nuclei: str, out_dir: Path, more: Flags) -> list[Test]:
    """List trainings on bright nuclei, tested on dark ones, and the other way round."""
    pairs, problems = data.find_pairs(nuclei)
    if problems:
        raise UserError("\n".join(problems))
    is_bright = np.array([has_bright_objects(pair) for pair in pairs])
    tests = []
    folders = {}
    for name, chosen in (("bright", is_bright), ("dark", ~is_bright)):
        folders[name] = out_dir / f"nuclei-{name}"
        link_images(
            [pair for pair, is_own in zip(pairs, chosen, strict=True) if is_own], folders[name]
        )
    for name, other in (("bright", "dark"), ("dark", "bright")):
        for strength in ("mild", "strong"):
            own = ["--augmentation", strength, "--test-fraction", "0", *more]
            run = str(out_dir / f"from-{name}-{strength}")
            training = ["--data-dir", str(folders[name]), *own, "--out-dir", run]
            tests.append((training, f"{name} nuclei to {other} ones, {strength}", folders[other]))
    return tests


def has_bright_objects(pair: Pair) -> bool:
    """Say whether the objects of an image are brighter than what is around them."""
    scan, truth = read_pair(pair, Classes("nucleus=1+"))
    grey = to_channels(scan.colours[0], 1)[..., 0]
    inside = truth.mask[0] > 0
    return bool(grey[inside].mean() > grey[~inside].mean())


def link_images(pairs: Sequence[Pair], folder: Path) -> None:
    """Make a data set of links to these images and their masks."""
    root = os.path.commonpath([path for pair in pairs for path in (pair.image, *pair.masks)])
    for pair in pairs:
        for path in (pair.image, *pair.masks):
            link = folder / path.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path.resolve())


def score_shift(name: str, run: Path, target: Path) -> list[dict[str, Any]]:
    """Score a run's model on other images: as it is, and adapted to them without their masks."""
    pairs, models = data.find_pairs(target)[0], {name: run / "model.h5"}
    if len(pairs) >= MIN_IMAGES:
        models[f"{name}, adapted"] = adapt(run, pairs)
    rows = []
    for title, path in models.items():
        members = predict.load_members(predict.Config(model=str(path)))
        table, problems = predict.score_pairs(members, pairs)
        if problems:
            raise UserError("\n".join(problems))
        rows.append(make_row(title, f"{len(table)} images", table))
    return rows


def adapt(run: Path, pairs: Sequence[Pair]) -> Path:
    """Adapt a run's model to images, without their masks; return its file."""
    images, adapted = run / "images", run / "adapted.h5"
    link_images([replace(pair, masks=()) for pair in pairs], images)
    predict.main(predict.Config(str(run / "model.h5"), adapt=str(images), output=str(adapted)))
    return adapted


def score_kind(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Score the model that has not seen a kind of change on corruptions of it."""
    config = predict.Config(model=str(folder / "fold0" / "model.h5"))
    members, (pairs, _) = predict.load_members(config), predict.pairs_to_score(config)
    rows = []
    for seed, pair in enumerate(pairs):
        rows += score_corrupted(members, pair, seed, KINDS[kind][1])
    scores = pd.DataFrame(rows).groupby("corruption", sort=False)
    return [make_row(kind, str(name), table) for name, table in scores]


def make_row(name: str, test: str, table: pd.DataFrame) -> dict[str, Any]:
    """Make a row: the mean Dice over images, and its interval."""
    dice = metrics.summarize(table).loc["dice"]
    return {"shift": name, "test": test, "dice": dice["mean"], "low": dice.low, "high": dice.high}
