"""Record a run: its state, its best model and its log, so that a stopped run goes on where it was.

`config` is `train.Config` throughout.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

import utils
from training import distributed
from utils import UserError, atomic

CHECKPOINT_INTERVAL_S = 5.0  # epochs are written when so much time has passed since the last
RUN_FILES = (
    "state.weights.h5",
    "model.h5",
    "config.json",
    "split.csv",
    "log.csv",
    "curves.png",
    "metrics.csv",
)
NON_TRAINING_FIELDS = (
    "from_report",
    "out_dir",
    "cache_dir",
    "memory_gb",
    "tensorboard",
    "mirror",
    "distributed",
)  # may change in a run


def comparable(config: Any) -> dict[str, Any]:
    """Keep the fields on which the result depends, and the optimizer, which was another once."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in NON_TRAINING_FIELDS
    }
    return fields | {"optimiser": "Muon"}


def read_history(folder: Path, config: Any) -> list[dict[str, float]]:
    """Read the finished epochs of the run in `folder`; none if it is not there or its config was another."""
    path = folder / "state.weights.h5"
    if not path.is_file():
        return []
    try:
        with h5py.File(path) as file:
            progress = json.loads(file.attrs["progress"])
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to start anew") from None
    defaults = {
        field.name: field.default for field in dataclasses.fields(config)
    }  # had by runs older than the field
    defaults |= {"optimiser": "AdamW"}
    now, then = comparable(config), defaults | progress["config"]
    changed = [name for name in (*now, *(set(then) - set(defaults))) if now.get(name) != then[name]]
    if changed:
        print(
            f"{folder}: {', '.join(changed)} changed, so this is a new run; the earlier one will be kept"
        )
    return [] if changed else progress["history"]


def archive_previous_run(folder: Path) -> None:
    """Move an earlier run's files to `folder`/previous1 (2, 3 …), so that starting anew loses no trained model."""
    if not (folder / "model.h5").is_file():
        return
    number = next(i for i in itertools.count(1) if not (folder / f"previous{i}").exists())
    previous = folder / f"previous{number}"
    previous.mkdir()
    print(f"{folder}: the earlier run's files are kept in {previous}")
    for name in RUN_FILES:
        if (folder / name).is_file():
            (folder / name).replace(previous / name)


class Checkpoint(keras.callbacks.Callback):
    """Write state, best model and log after each better epoch, and every few seconds; stop on NaN or no gain.

    A run that is killed makes the epochs since then once more.
    """

    async_safe = True  # on JAX the loss is looked at beside the next steps, so that a GPU does not wait for it

    def __init__(
        self, config: Any, folder: Path, history: list[dict[str, float]], metadata: dict[str, Any]
    ) -> None:
        super().__init__()
        self.config, self.folder, self.history, self.metadata = config, folder, history, metadata
        self.saved = float("-inf")  # when the state was written last

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        steps = self.params["steps"]
        total, done = steps * self.config.epochs, steps * len(self.history)
        self.bar = tqdm(
            total=total,
            initial=done,
            desc="training",
            unit="step",
            disable=None if distributed.is_main_process() else True,
        )

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.start = time.perf_counter()
        for number, layer in enumerate(
            self.model.layers
        ):  # dropout follows from (seed, epoch), also after a resume
            if hasattr(layer, "seed_generator"):
                layer.seed_generator.state.assign([self.config.seed + 10_000 * epoch, number])

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if not np.isfinite(logs["loss"]):
            lower = self.config.learning_rate / 4
            raise UserError(
                f"the loss became {logs['loss']} in epoch {len(self.history) + 1}, step {batch + 1}; try "
                f"--learning-rate {lower:.2g} or --precision float32. Earlier epochs' best model is kept."
            )
        self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)
        self.bar.update()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        seconds = time.perf_counter() - self.start
        logs = {name: float(value) for name, value in logs.items()}
        self.history.append({"epoch": epoch + 1, **logs, "seconds": round(seconds, 2)})
        self.model.stop_training = is_finished(self.history, self.config)
        better = (
            "val_dice" in logs and best_epoch(self.history) == epoch + 1
        )  # else each epoch would be the best yet
        if (
            self.model.stop_training
            or better
            or time.perf_counter() - self.saved >= CHECKPOINT_INTERVAL_S
        ):
            distributed.on_main_process(
                self.save
            )  # so model.h5 is never of a later epoch than the state
            self.saved = time.perf_counter()
        epochs = self.config.epochs
        scores = [
            f"{name} {logs[name]:.4f}" for name in ("loss", "val_loss", "val_dice") if name in logs
        ]
        best = " best" if best_epoch(self.history) == epoch + 1 else ""
        tqdm.write(f"epoch {epoch + 1:3}/{epochs}  {'  '.join(scores)}{best}  {seconds:.1f} s")

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self.bar.close()

    def save(self) -> None:
        """Write the state first: what follows is made from it again, should the run be killed in between."""
        with atomic(self.folder / "state.weights.h5") as temporary:
            self.model.save_weights(temporary)
            with h5py.File(temporary, "r+") as file:
                file.attrs["progress"] = json.dumps(
                    {"config": comparable(self.config), "history": self.history}
                )
        self.save_results()

    def save_results(self) -> None:
        """Write what follows from the state: model.h5 if the last epoch is the best, and log.csv."""
        last = self.history[-1]
        if best_epoch(self.history) == last["epoch"]:
            metadata = self.metadata | {"epoch": last["epoch"], "val_dice": last.get("val_dice")}
            utils.save_model(self.model, self.folder / "model.h5", metadata)
        with atomic(self.folder / "log.csv") as temporary:
            pd.DataFrame(self.history).to_csv(temporary, index=False)


def best_epoch(history: list[dict[str, float]]) -> int:
    """Number of the epoch with the highest validation Dice, from 1; without validation images the last epoch's."""
    return max(history, key=lambda row: row.get("val_dice", row["epoch"]))["epoch"]


def is_finished(history: list[dict[str, float]], config: Any) -> bool:
    """Tell whether all epochs are done, or `early_stop` of them, after the frozen ones, brought nothing better."""
    scores = [row.get("val_dice", 0.0) for row in history[config.frozen_epochs :]]
    waited = len(scores) - 1 - int(np.argmax(scores)) if scores else 0
    return len(history) >= config.epochs or 0 < config.early_stop <= waited
