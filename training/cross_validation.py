"""Cross-validation: train and score every fold, and summarize all test images together."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

import metrics
from training import distributed, run_folder
from utils import atomic


def _put_aside(out_dir: Path, count: int) -> None:
    """Put the folds aside that an earlier run of more folds left: no fold*/model.h5 is old."""
    for folder in out_dir.glob("fold*"):
        number = folder.name.removeprefix("fold")
        if number.isdecimal() and int(number) >= count:
            run_folder.archive_previous_run(folder)


def cross_validate(
    config: Any,
    train_run: Callable[[Any, Path], pd.DataFrame],
    score_run: Callable[[Path], pd.DataFrame],
) -> pd.DataFrame:
    """Run the folds that a `train.Config` asks for; print and return the summary of their scores.

    train_run: trains a config in a folder and returns its log. score_run: scores a run folder's
    test images and returns a row per image. All folds write metrics.csv and summary.csv.
    """
    out_dir = Path(config.out_dir)
    folds = range(config.folds) if config.fold == -1 else [config.fold]
    tables = []
    if config.fold == -1 and distributed.is_main_process():
        _put_aside(out_dir, config.folds)
    for fold in folds:
        folder = out_dir / f"fold{fold}"
        log = train_run(dataclasses.replace(config, fold=fold), folder)
        if distributed.is_main_process():
            table = score_run(folder)
            dice, seconds = table.dice.mean(), log.seconds.sum()
            print(
                f"fold {fold}: test Dice {dice:.4f}, {len(table)} images, trained {seconds:.0f} s"
            )
            tables.append(table.assign(fold=str(fold)))
    if not distributed.is_main_process():
        return pd.DataFrame()
    table = pd.concat(tables)
    summary = metrics.summarize(table)
    print(f"\n{len(table)} test images in {len(tables)} fold(s)\n{metrics.format_summary(table)}")
    if config.fold == -1:
        with atomic(out_dir / "metrics.csv") as temporary:
            table.to_csv(temporary, index=False)
        with atomic(out_dir / "summary.csv") as temporary:
            summary.to_csv(temporary, index_label="metric")
    return summary
