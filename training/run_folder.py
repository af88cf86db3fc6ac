"""The run folder: what a run writes, and how a stopped run goes on.

`config` is a `train.Config` throughout. `state.weights.h5` holds weights, optimizer and the
finished epochs; everything else follows from it. It is written first, so a run that is killed at
any moment goes on from it.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pandas as pd
from keras import ops
from tqdm import tqdm

import utils
from dataset.layouts import Pair
from dataset.split_table import make_rows, read_rows, write_split
from training import distributed, run_identity
from utils import UserError, atomic, first_line

CHECKPOINT_INTERVAL_S = 5.0  # minimum time between two checkpoints, except for a better epoch
STATE = "state.weights.h5"
RUN_FILES = (STATE, "model.h5", "config.json", "split.csv", "log.csv", "curves.png", "metrics.csv")
Epoch = dict[str, float]  # a row of log.csv


def read_history(
    folder: Path, config: Any, find_pairs: Callable[[], Sequence[Pair]]
) -> list[Epoch]:
    """Read the finished epochs of the run in `folder`.

    find_pairs: lists the data, and is called if settings and source are those of the run. Returns
    no epochs if there is no run, or if its settings, source or data were others. Raises UserError
    if the state is damaged, or the best epoch's model or an image is gone.
    """
    path, model = folder / STATE, folder / "model.h5"
    if not path.is_file():
        return []
    try:
        with h5py.File(path) as file:
            progress = json.loads(file.attrs["progress"])
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to start anew") from None
    history = progress["history"]
    is_finished = len(history) >= config.epochs
    changed = run_identity.changed_fields(config, progress["config"])
    if set(changed) <= run_identity.DATA_FIELDS:
        changed += run_identity.changed_source(progress.get("source", {}))
    if set(changed) <= run_identity.DATA_FIELDS:
        changed = _changed_data(folder, find_pairs, changed, is_finished)
    if changed:
        names = run_identity.shorten(changed)
        print(f"{folder}: {names} changed; a new run starts, the old one is kept")
        return []
    if not model.is_file() and best_epoch(history) < len(history):
        raise UserError(
            f"{model}, the model of the best epoch, is gone; put it back, or remove {folder} to "
            "start anew"
        )
    return history


def _changed_data(
    folder: Path, find_pairs: Callable[[], Sequence[Pair]], renamed: list[str], is_finished: bool
) -> list[str]:
    """Name the data that changed since the run; `renamed` fields name another folder for them.

    Images that are added to a run that is not finished take no part in it.
    """
    if not (folder / "split.csv").is_file():
        return renamed
    rows, pairs = read_rows(folder / "split.csv"), find_pairs()
    if renamed:
        return [] if run_identity.is_same_data(rows, pairs) else renamed
    changed, added = run_identity.changed_data(rows, pairs)
    if is_finished:
        changed += [f"{name} (new)" for name in added]
    elif added and not changed:
        print(f"{folder}: {run_identity.shorten(added)} came later and take no part in this run")
    return changed


def is_complete(folder: Path, config: Any, history: list[Epoch]) -> bool:
    """Say whether nothing is left to do in `folder`; else remove what a crash left half-written."""
    for leftover in folder.glob(".[0-9]*.h5"):
        leftover.unlink()
    written = all((folder / name).is_file() for name in ("model.h5", "curves.png"))
    if len(history) < config.epochs or not written:
        return False
    utils.update_metadata(folder / "model.h5", mirror=config.mirror)
    write_config(folder, config)
    print(
        f"{folder} holds this run, finished; another run starts after a change of settings, "
        "code or data, or with another --out-dir"
    )
    return True


def start(folder: Path, config: Any, pairs: Sequence[Pair], subsets: Sequence[str]) -> None:
    """Start a run: put an earlier one aside, write its split and config."""
    archive_previous_run(folder)
    write_split(folder / "split.csv", pairs, subsets)
    write_config(folder, config)


def resume(folder: Path, config: Any, pairs: Sequence[Pair]) -> list[str]:
    """Go on with a run: return the subset of each pair, "" for pairs that are new.

    Raises UserError if an image of the run is gone.
    """
    rows = read_rows(folder / "split.csv")
    keys = [row.key for row in make_rows(pairs, ["train"] * len(pairs))]
    subset_of: dict[Any, str] = {}
    for row in rows:
        subset_of[row.key if row.fingerprints else row.pair.image.absolute()] = row.subset
    subsets = []
    for pair, key in zip(pairs, keys, strict=True):
        subsets.append(subset_of.get(key, subset_of.get(pair.image.absolute(), "")))
    gone = set(subset_of) - set(keys) - {pair.image.absolute() for pair in pairs}
    for row in rows:
        if row.key in gone or row.pair.image.absolute() in gone:
            raise UserError(run_identity.gone(row.pair.image))
    if any(row.fingerprints for row in rows):
        # The data may have been moved.
        write_split(folder / "split.csv", pairs, subsets)
    write_config(folder, config)
    return subsets


def write_config(folder: Path, config: Any) -> None:
    """Write config.json, which says what the folder holds."""
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2))


def archive_previous_run(folder: Path) -> None:
    """Move an earlier run's files to `folder`/previous1 (2, 3 …): no trained model is lost."""
    if not (folder / "model.h5").is_file():
        return
    number = next(i for i in itertools.count(1) if not (folder / f"previous{i}").exists())
    previous = folder / f"previous{number}"
    previous.mkdir()
    print(f"{folder}: the files of the earlier run are now in {previous}")
    for name in RUN_FILES:
        if (folder / name).is_file():
            (folder / name).replace(previous / name)


def best_epoch(history: list[Epoch]) -> int:
    """Number of the epoch with the highest validation Dice, from 1; the last one if none has it."""
    return max(history, key=lambda row: row.get("val_dice", row["epoch"]))["epoch"]


class Checkpoint(keras.callbacks.Callback):
    """Write state, best model and log after a better epoch, and every few seconds.

    model: the plain Keras model that is saved; it shares its weights with the one that is fitted.
    history: finished epochs; this callback appends to it.

    A run that is killed repeats the epochs since the last checkpoint, one that is interrupted
    (`saved_on_interrupt`) repeats only the epoch it was in.
    """

    # JAX: the loss is read beside the next steps, so that a GPU does not wait for Python.
    async_safe = True

    def __init__(
        self,
        config: Any,
        folder: Path,
        history: list[Epoch],
        model: keras.Model,
        metadata: dict[str, Any],
    ) -> None:
        super().__init__()
        self.config, self.folder, self.history = config, folder, history
        self.network, self.metadata = model, metadata
        # Taken now: a file that is edited while the training runs has no part in it.
        self.source = run_identity.source_hashes()
        self.bar: tqdm | None = None
        self.last_save, self.saved_epoch = float("-inf"), len(history)
        # A finished epoch that is not written yet: its number and its variables.
        self.snapshot: tuple[int, list[np.ndarray]] = 0, []

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    def restore(self, model: keras.Model) -> None:
        """Load the state of a stopped run into the compiled model that will be fitted."""
        self.set_model(model)
        if self.history:
            try:
                model.load_weights(self.folder / STATE)
            except ValueError as error:
                raise UserError(
                    f"{self.folder} holds a run of another network ({first_line(error)}); name "
                    "another --out-dir, or remove it to start anew"
                ) from None
            distributed.on_main_process(self.save_results)

    @contextmanager
    def saved_on_interrupt(self) -> Iterator[None]:
        """Write the last finished epoch when Ctrl-C ends the block."""
        try:
            yield
        except KeyboardInterrupt:
            if self.saved_epoch < self.epoch:
                # If Ctrl-C came while the epoch was written, there is no snapshot of it, and the
                # variables still are as it left them.
                number, values = self.snapshot
                if number == self.epoch:
                    for variable, value in zip(self._variables(), values, strict=True):
                        variable.assign(value)
                distributed.on_main_process(self.save)
            if self.bar is not None:
                self.bar.close()
            print(f"{self.epoch} of {self.config.epochs} epochs are saved in {self.folder}")
            raise

    def on_train_begin(self, logs: Epoch | None = None) -> None:
        steps = self.params["steps"]
        self.bar = tqdm(
            total=steps * self.config.epochs,
            initial=steps * self.epoch,
            desc="training",
            unit="step",
            disable=None if distributed.is_main_process() else True,
        )

    def on_epoch_begin(self, epoch: int, logs: Epoch | None = None) -> None:
        self.epoch_start = time.perf_counter()
        # Dropout follows from (seed, epoch), so a run that goes on draws the same.
        for number, layer in enumerate(self.network.layers):
            if hasattr(layer, "seed_generator"):
                layer.seed_generator.state.assign([self.config.seed + 10_000 * epoch, number])

    def on_train_batch_end(self, batch: int, logs: Epoch | None = None) -> None:
        if not np.isfinite(logs["loss"]):
            raise UserError(
                f"the loss became {logs['loss']} in epoch {self.epoch + 1}, step {batch + 1}; try "
                f"--learning-rate {self.config.learning_rate / 4:.2g} or --precision float32. "
                "The best model of earlier epochs is kept."
            )
        self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)
        self.bar.update()

    def on_epoch_end(self, epoch: int, logs: Epoch | None = None) -> None:
        seconds = time.perf_counter() - self.epoch_start
        row = {"epoch": epoch + 1}
        for name, value in logs.items():
            row[name] = float(value)
        rate = float(self.model.optimizer.learning_rate)
        self.history.append({**row, "learning_rate": rate, "seconds": round(seconds, 2)})
        self._write_or_remember()
        scores = [
            f"{name} {row[name]:.4f}" for name in ("loss", "val_loss", "val_dice") if name in row
        ]
        best = "  best" if best_epoch(self.history) == self.epoch else ""
        tqdm.write(
            f"epoch {self.epoch:3}/{self.config.epochs}  {'  '.join(scores)}  {seconds:.1f} s{best}"
        )

    def on_train_end(self, logs: Epoch | None = None) -> None:
        self.bar.close()

    def _write_or_remember(self) -> None:
        """Write a checkpoint if it is due; else copy the state in memory, for Ctrl-C."""
        # Without validation images every epoch would count as better.
        better = "val_dice" in self.history[-1] and best_epoch(self.history) == self.epoch
        due = time.perf_counter() - self.last_save >= CHECKPOINT_INTERVAL_S
        if better or due or self.epoch == self.config.epochs:
            distributed.on_main_process(self.save)
            self.last_save, self.saved_epoch = time.perf_counter(), self.epoch
            self.snapshot = 0, []
        else:
            values = [ops.convert_to_numpy(variable) for variable in self._variables()]
            self.snapshot = self.epoch, values

    def _variables(self) -> list[keras.Variable]:
        return [*self.model.variables, *self.model.optimizer.variables]

    def save(self) -> None:
        """Write the state, then what follows from it."""
        with atomic(self.folder / STATE) as temporary:
            self.model.save_weights(temporary)
            progress = {
                "config": run_identity.training_fields(self.config),
                "source": self.source,
                "history": self.history,
            }
            with h5py.File(temporary, "r+") as file:
                file.attrs["progress"] = json.dumps(progress)
        self.save_results()

    def save_results(self) -> None:
        """Write model.h5 if the last epoch is the best, and log.csv."""
        last = self.history[-1]
        if best_epoch(self.history) == last["epoch"]:
            metadata = self.metadata | {"epoch": last["epoch"], "val_dice": last.get("val_dice")}
            utils.save_model(self.network, self.folder / "model.h5", metadata)
        with atomic(self.folder / "log.csv") as temporary:
            pd.DataFrame(self.history).to_csv(temporary, index=False)
