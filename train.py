"""Train a U-Net: `python train.py` on synthetic chest X-rays, `python train.py --data-dir DIR` on your own images.

Writes a run folder (default files/): model.h5, the best epoch by validation Dice; log.csv, a row per epoch; curves.png;
split.csv; config.json; state.weights.h5, from which the same command goes on after a crash or Ctrl-C. With --folds K it
runs K folds into fold0 … and writes metrics.csv (a row per image) and summary.csv over all of them.
"""

import dataclasses
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

import data
import images
import metrics
import phantom
import predict
import utils
from images import UserError
from model import build_unet


@dataclass(frozen=True)
class Config:
    """The hyperparameters: edit them here, or give them as flags."""

    # Data
    data_dir: str = ""  # folder with images/ + masks/ or the Montgomery layout; "" makes synthetic chest X-rays
    phantoms: int = 200  # how many of these
    classes: str = "foreground"  # one name merges all masks; "left lung,right lung" keeps both; names of the ids 1..K
    channels: int = 1  # 1 grey, 3 colour
    image_size: int = 128  # pixels, a multiple of 2**depth; images are scaled to fit and padded
    test_fraction: float = 0.2  # of the patients, as 1/2, 1/3, 1/4 …; index.csv may name the test set instead
    val_fraction: float = 0.15  # of the patients that are not test, likewise
    folds: int = 0  # cross-validation in so many folds; 0 is a single split
    fold: int = -1  # this fold alone, 0 .. folds - 1; -1 runs them all
    cache_dir: str = "files/cache"  # decoded images, reused by later runs; "" keeps none

    # Network
    filters: int = 8  # channels of the first level
    depth: int = 4  # poolings

    # Training
    loss: str = "bce_dice"  # bce_dice, dice, focal or tversky
    epochs: int = 50
    batch_size: int = 8  # images
    learning_rate: float = 4e-3  # the peak; warmed up linearly, then a cosine down to 0
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 1e-4  # AdamW's; 0 is off
    early_stop: int = 0  # epochs without a better validation Dice; 0 is off
    precision: str = "auto"  # float32, bfloat16, float16; auto is bfloat16 where the hardware has it
    seed: int = 0  # split, weights, order, augmentation

    # Output
    out_dir: str = "files"  # the run folder
    tensorboard: bool = False  # also write OUT_DIR/tensorboard (needs `pip install tensorboard`)


RUN_FILES = ("state.weights.h5", "model.h5", "config.json", "split.csv", "log.csv", "curves.png", "metrics.csv")
NO_EFFECT = ("out_dir", "cache_dir", "tensorboard")  # a run goes on although these changed


def check_config(config: Config) -> None:
    """Raise UserError for a value that cannot work, naming the field, the value and what is expected."""
    rules = [
        ("phantoms", config.phantoms >= 10, "at least 10"),
        ("channels", config.channels in (1, 3), "1 or 3"),
        ("test_fraction", 0 < config.test_fraction <= 0.5, "above 0, at most 0.5"),
        ("val_fraction", 0 < config.val_fraction <= 0.5, "above 0, at most 0.5"),
        ("folds", config.folds == 0 or config.folds >= 2, "0 or at least 2"),
        ("fold", config.fold in range(-1, max(config.folds, 0)), f"-1 or a fold of --folds {config.folds}"),
        ("filters", config.filters >= 1, "at least 1"),
        ("depth", config.depth >= 1, "at least 1"),
        ("loss", config.loss in metrics.LOSSES, " or ".join(metrics.LOSSES)),
        ("epochs", config.epochs >= 1, "at least 1"),
        ("batch_size", config.batch_size >= 1, "at least 1"),
        ("learning_rate", config.learning_rate > 0, "above 0"),
        ("warmup", 0 <= config.warmup < 1, "at least 0, below 1"),
        ("weight_decay", config.weight_decay >= 0, "at least 0"),
        ("early_stop", config.early_stop >= 0, "at least 0"),
        ("seed", 0 <= config.seed < 2**32, "0 to 4294967295"),
    ]
    for name, fine, expected in rules:
        if not fine:
            raise UserError(f"{name} is {getattr(config, name)!r}; expected {expected}")


# ------------------------------------------------------------------------------------------------- state of the run


def comparable(config: Config) -> dict[str, Any]:
    """Keep the fields on which the result depends."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_EFFECT}


def read_history(folder: Path, config: Config) -> list[dict[str, float]]:
    """Read the finished epochs of the run in `folder`; none if it is not there or its config was another."""
    path = folder / "state.weights.h5"
    if not path.is_file():
        return []
    try:
        with h5py.File(path) as file:
            progress = json.loads(file.attrs["progress"])
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to start anew") from None
    changed = [name for name, value in comparable(config).items() if progress["config"].get(name) != value]
    if changed:
        print(f"{folder}: {', '.join(changed)} changed, so training starts anew")
    return [] if changed else progress["history"]


def set_aside(folder: Path) -> None:
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


class Recorder(keras.callbacks.Callback):
    """After each epoch write the state, the best model and the log; show progress; stop on NaN or no gain."""

    def __init__(self, config: Config, folder: Path, history: list[dict[str, float]], facts: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.folder, self.history, self.facts = config, folder, history, facts

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        steps = self.params["steps"]
        total, done = steps * self.config.epochs, steps * len(self.history)
        self.bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=None)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.start = time.perf_counter()

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
        self.save()
        epochs = self.config.epochs
        tqdm.write(
            f"epoch {epoch + 1:3}/{epochs}  loss {logs['loss']:.4f}  val_loss {logs['val_loss']:.4f}  "
            f"val_dice {logs['val_dice']:.4f}{' best' if self.best_epoch() == epoch + 1 else ''}  {seconds:.1f} s"
        )
        self.model.stop_training = finished(self.history, self.config)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self.bar.close()

    def best_epoch(self) -> int:
        """Number of the epoch with the highest validation Dice, from 1."""
        return max(self.history, key=lambda row: row["val_dice"])["epoch"]

    def save(self) -> None:
        """Write the state first: what follows is made from it again, should the run be killed in between."""
        with images.atomic(self.folder / "state.weights.h5") as temporary:
            self.model.save_weights(temporary)
            with h5py.File(temporary, "r+") as file:
                file.attrs["progress"] = json.dumps({"config": comparable(self.config), "history": self.history})
        self.save_results()

    def save_results(self) -> None:
        """Write what follows from the state: model.h5 if the last epoch is the best, and log.csv."""
        last = self.history[-1]
        if self.best_epoch() == last["epoch"]:
            facts = self.facts | {"epoch": last["epoch"], "val_dice": last["val_dice"]}
            utils.save_model(self.model, self.folder / "model.h5", facts)
        with images.atomic(self.folder / "log.csv") as temporary:
            pd.DataFrame(self.history).to_csv(temporary, index=False)


def finished(history: list[dict[str, float]], config: Config) -> bool:
    """Tell whether all epochs are done, or `early_stop` of them brought nothing better."""
    scores = [row["val_dice"] for row in history]
    waited = len(scores) - 1 - int(np.argmax(scores)) if scores else 0
    return len(scores) >= config.epochs or 0 < config.early_stop <= waited


def draw_curves(log: pd.DataFrame, path: Path) -> None:
    """Draw loss and Dice over the epochs, training and validation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "dice"), strict=True):
        axes.plot(log.epoch, log[name], label="training (augmented)")
        axes.plot(log.epoch, log[f"val_{name}"], label="validation")
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with images.atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


# ---------------------------------------------------------------------------------------------------------- training


def compiled_unet(config: Config, names: list[str], steps: int) -> keras.Model:
    """Build the network and its optimiser, whose learning rate warms up and falls over `steps` steps."""
    shape = (config.image_size, config.image_size, config.channels)
    model = build_unet(shape, data.channels_of(names), config.filters, config.depth)
    warmup = int(config.warmup * steps)
    rate = keras.optimizers.schedules.CosineDecay(
        config.learning_rate if warmup == 0 else 0.0,
        decay_steps=max(1, steps - warmup),
        warmup_target=config.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=config.weight_decay),
        metrics.LOSSES[config.loss],
        metrics=[metrics.dice, metrics.iou, metrics.precision, metrics.recall],
        jit_compile=utils.jit_compile(),
    )
    return model


def assign_subsets(config: Config, folder: Path, pairs: list[data.Pair], resumed: bool) -> np.ndarray:
    """Split the pairs, or reread the split of the run that goes on: an array of train, val, test ("" for new pairs).

    A new run's earlier files are set aside here, when its data are known to be good.
    """
    path = folder / "split.csv"
    if not resumed:
        fold = max(config.fold, 0)
        subsets = data.split(pairs, config.val_fraction, config.test_fraction, config.seed, config.folds, fold)
        set_aside(folder)
        data.write_split(path, pairs, subsets)
        return np.array(subsets)
    known = {pair.image: subset for pair, subset in zip(*data.read_split(path), strict=True)}
    gone = sorted(set(known) - {pair.image for pair in pairs})
    if gone:
        raise UserError(f"{path} names {gone[0]}, which is gone; put it back, or remove {folder} to start anew")
    return np.array([known.get(pair.image, "") for pair in pairs])


def train_run(config: Config, folder: Path) -> pd.DataFrame:
    """Train one run in `folder`, or go on with it; return its log."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(config.seed)
    precision = utils.set_precision(config.precision)
    names = data.class_names(config.classes)
    data_dir = config.data_dir or phantom.make_phantoms("", config.phantoms, seed=0)
    size = (config.image_size, config.image_size)
    history = read_history(folder, config)
    if finished(history, config) and (folder / "curves.png").is_file():  # which is written last
        print(f"{folder} holds this very run, finished; change a setting or remove the folder to train again")
        return pd.DataFrame(history)
    for leftover in folder.glob(".[0-9]*.h5"):  # half-written when a run was killed
        leftover.unlink()
    compiled_unet(config, names, 1)  # a network that cannot be built is told before the data are read
    pairs, dataset = data.load_checked(data_dir, names, size, config.channels, config.cache_dir)
    subsets = assign_subsets(config, folder, pairs, bool(history))
    with images.atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2))

    rows = {subset: np.flatnonzero(subsets == subset) for subset in data.SUBSETS}
    batches = data.Batches(dataset, rows["train"], names, config.batch_size, train=True, seed=config.seed)
    validation = data.Batches(dataset, rows["val"], names, config.batch_size, train=False)
    counts = ", ".join(f"{len(indices)} {subset}" for subset, indices in rows.items())
    print(f"{data_dir}: {counts}; {precision} on {utils.device_name()}; epoch {len(history) + 1} of {config.epochs}")
    model = compiled_unet(config, names, len(batches) * config.epochs)
    recorder = Recorder(config, folder, history, utils.make_facts(names, size, config.channels))
    recorder.set_model(model)
    if history:
        batches.epoch = len(history)
        model.optimizer.build(model.trainable_variables)
        model.load_weights(folder / "state.weights.h5")
        recorder.save_results()
    callbacks = [recorder, *([tensorboard(folder)] if config.tensorboard else [])]
    if not finished(history, config):
        model.fit(
            batches,
            validation_data=validation,
            initial_epoch=len(history),
            epochs=config.epochs,
            callbacks=callbacks,
            shuffle=False,  # Batches shuffles, in a way that a resumed run repeats
            verbose=0,
        )
    log = pd.DataFrame(history)
    draw_curves(log, folder / "curves.png")
    best = recorder.best_epoch()
    trained = f"{log.seconds.sum():.0f} s"
    print(f"best epoch {best}, validation Dice {log.val_dice.max():.4f}, trained {trained}: {folder / 'model.h5'}")
    return log


def tensorboard(folder: Path) -> keras.callbacks.Callback:
    """Make the callback that writes TensorBoard's log. Raises UserError if TensorBoard is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard: pip install tensorboard") from None
    return keras.callbacks.TensorBoard(folder / "tensorboard")


def score_fold(folder: Path) -> pd.DataFrame:
    """Score a fold's test images with its best model, write its metrics.csv, return the table."""
    model, facts = utils.load_model(folder / "model.h5")
    pairs, _ = predict.pairs_to_score(predict.Config(model=str(folder / "model.h5")))
    table, problems = predict.score_pairs(model, facts, pairs)
    if problems:
        raise UserError("\n".join(problems))
    with images.atomic(folder / "metrics.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def cross_validate(config: Config) -> pd.DataFrame:
    """Train and score every fold (or the one asked for); print and write the summary over all test images."""
    out_dir = Path(config.out_dir)
    folds = range(config.folds) if config.fold == -1 else [config.fold]
    tables = []
    for fold in folds:
        log = train_run(dataclasses.replace(config, fold=fold), out_dir / f"fold{fold}")
        table = score_fold(out_dir / f"fold{fold}")
        print(f"fold {fold}: test Dice {table.dice.mean():.4f}, {len(table)} images, trained {log.seconds.sum():.0f} s")
        tables.append(table.assign(fold=str(fold)))
    summary = metrics.summarise(pd.concat(tables))
    print(f"\n{sum(map(len, tables))} test images in {len(tables)} fold(s)\n{predict.format_summary(summary)}")
    if config.fold == -1:
        with images.atomic(out_dir / "metrics.csv") as temporary:
            pd.concat(tables).to_csv(temporary, index=False)
        with images.atomic(out_dir / "summary.csv") as temporary:
            summary.to_csv(temporary, index_label="metric")
    return summary


def train(config: Config) -> pd.DataFrame:
    """Train as `config` says: one run (returns its log) or folds (returns the summary). Raises UserError."""
    check_config(config)
    return cross_validate(config) if config.folds else train_run(config, Path(config.out_dir))


if __name__ == "__main__":
    utils.run(train, Config)
