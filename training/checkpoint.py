"""Save a training as it goes: the state after an epoch, the best model, the log."""

import json
import time
from collections.abc import Iterator
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
from training import distributed, run_identity
from training.run_folder import STATE, Epoch, best_epoch
from utils import UserError, atomic, first_line

CHECKPOINT_INTERVAL_S = 5.0  # minimum time between two checkpoints, except for a better epoch


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
        self.source = run_identity.source_hashes(architecture=config.architecture)
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
