"""Train a U-Net: `python train.py` on synthetic chest X-rays, `python train.py --data-dir DIR` on your own images.

Writes a run folder (default files/): model.h5, the best epoch by validation Dice (the last where no image is for
validation); log.csv, a row per epoch; curves.png; split.csv; config.json; state.weights.h5, from which the same command
goes on after a crash or Ctrl-C. With --folds K it runs K folds into fold0 … and writes metrics.csv (a row per image)
and summary.csv over all of them.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import utils


@dataclass(frozen=True)
class Config:
    """The hyperparameters: edit them here, or give them as flags."""

    # Data
    from_report: str = (
        ""  # report.json of `python data.py check DIR`: what it proposes replaces defaults
    )
    data_dir: str = (
        ""  # folder with images/ + masks/ or the Montgomery layout; "" makes synthetic chest X-rays
    )
    phantoms: int = 200  # how many of these
    extra_dir: str = (
        ""  # a further data set, all of which is trained on: phantoms, another hospital's images
    )
    classes: str = "foreground"  # one name merges all masks; several name the ids 1..K, or values: liver=63,tumour=126
    channels: int = 1  # 1 grey, 3 colour
    window: str = ""  # grey levels that are told apart: centre,width (40,400 HU), file (its header's), "" percentiles
    neighbours: int = 0  # 1 also shows the network the slices before and after (2.5-D)
    image_size: int = 128  # pixels, a multiple of 2**depth; images are scaled to fit and padded
    test_fraction: float = (
        0.2  # of the patients, as 1/2, 1/3, 1/4 …, 0 for none; index.csv may name the set instead
    )
    val_fraction: float = (
        0.15  # of the patients that are not test, likewise; 0 keeps the last epoch
    )
    labelled: int = 0  # train on so many images only, as if no more were labelled; 0 is all
    split_seed: int = 0  # which images are train, val and test
    folds: int = 0  # cross-validation in so many folds; 0 is a single split
    fold: int = -1  # this fold alone, 0 .. folds - 1; -1 runs them all
    cache_dir: str = "files/cache"  # decoded images, reused by later runs; "" keeps none
    memory_gb: float = (
        4.0  # more decoded images than that stay on the disk and are read batch by batch
    )

    # Network
    architecture: str = "unet"  # unet, residual, attention, unet++, unet3+, efficientnetv2b0, mobilenetv3, resnet50v2
    encoder_weights: str = (
        "none"  # of the last three: imagenet (downloaded once), a weights file, none
    )
    filters: int = 8  # channels of the first level
    depth: int = 4  # halvings; the last three architectures have 5
    normalization: str = "batch"  # batch, group, instance, none
    init_weights: str = (
        ""  # start from this model file's weights, as far as they fit; "" starts from random ones
    )
    frozen_epochs: int = 0  # epochs at the start in which the encoder's weights stay

    # Training
    augmentation: str = "mild"  # none, mild, strong (X-rays from other hospitals), free (organs at any angle: MRI, CT)
    loss: str = "bce_dice"  # bce_dice, dice, focal or tversky
    epochs: int = 80  # passes over the training images
    epoch_images: int = (
        96  # fewer training images are shown again and again until so many were shown in an epoch
    )
    batch_size: int = 8  # images
    learning_rate: float = 1e-2  # the peak; warmed up linearly, then a cosine down to 0
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 1e-4  # 0 is off
    early_stop: int = 0  # epochs without a better validation Dice; 0 is off
    precision: str = (
        "auto"  # float32, bfloat16, float16; auto is bfloat16 where the hardware has it
    )
    seed: int = 0  # weights, order, augmentation

    # Prediction, noted in the model file
    mirror: bool = False  # average with the prediction of the mirrored image

    # Processes
    distributed: bool = (
        False  # share the work among the processes that Slurm, torchrun … start; see cluster.py
    )

    # Output
    out_dir: str = "files"  # the run folder
    tensorboard: bool = False  # also write OUT_DIR/tensorboard (needs `pip install tensorboard`)


if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    CONFIG = utils.parse_flags(Config)

import keras
import numpy as np
import pandas as pd

import data
import metrics
import predict
from dataset import augmentation_jax
from dataset.augmentation import STRENGTHS
from dataset.cache import Dataset
from dataset.layouts import SUBSETS, Pair
from dataset.loading import Preprocessing
from dataset.phantoms import make_phantoms
from dataset.split_table import read_split, write_split
from imaging import plots, preprocess
from imaging.labels import class_names, mask_values, mirrored_channels, output_channels
from inference import postprocess
from model import build_unet, freeze_encoder
from training import distributed, run_folder
from training.batch_norm import fuse_normalization
from training.optimizer import make_optimizer
from training.run_folder import Checkpoint
from utils import UserError, atomic


def check_config(config: Config) -> None:
    """Raise UserError for a value that cannot work, naming the field, the value and what is expected."""
    names = class_names(config.classes)
    mask_values(config.classes)
    if config.window not in ("", "file"):
        preprocess.parse_window(config.window)
    starts = config.init_weights or config.encoder_weights != "none"
    rules = [
        ("phantoms", config.phantoms >= 10, "at least 10"),
        ("channels", config.channels in (1, 3), "1 or 3"),
        ("neighbours", config.neighbours in (0, 1), "0 or 1"),
        ("neighbours", not config.neighbours or config.channels == 1, "0 for colour images"),
        ("memory_gb", config.memory_gb >= 0, "at least 0"),
        ("test_fraction", 0 <= config.test_fraction <= 0.5, "0 to 0.5"),
        ("val_fraction", 0 <= config.val_fraction <= 0.5, "0 to 0.5"),
        ("labelled", config.labelled >= 0, "at least 0"),
        ("folds", config.folds == 0 or config.folds >= 2, "0 or at least 2"),
        (
            "fold",
            config.fold in range(-1, max(config.folds, 0)),
            f"-1 or a fold of --folds {config.folds}",
        ),
        ("filters", config.filters >= 1, "at least 1"),
        ("depth", config.depth >= 1, "at least 1"),
        ("augmentation", config.augmentation in STRENGTHS, " or ".join(STRENGTHS)),
        ("loss", config.loss in metrics.LOSSES, " or ".join(metrics.LOSSES)),
        ("epochs", config.epochs >= 1, "at least 1"),
        (
            "frozen_epochs",
            0 <= config.frozen_epochs < config.epochs,
            "at least 0, fewer than epochs",
        ),
        (
            "frozen_epochs",
            not config.frozen_epochs or starts,
            "0 without --init-weights or --encoder-weights",
        ),
        ("epoch_images", config.epoch_images >= 0, "at least 0"),
        ("batch_size", config.batch_size >= 1, "at least 1"),
        ("learning_rate", config.learning_rate > 0, "above 0"),
        ("warmup", 0 <= config.warmup < 1, "at least 0, below 1"),
        ("weight_decay", config.weight_decay >= 0, "at least 0"),
        ("early_stop", config.early_stop >= 0, "at least 0"),
        (
            "mirror",
            not config.mirror or mirrored_channels(names) is not None,
            "false, as one of the classes has one side",
        ),
        ("split_seed", 0 <= config.split_seed < 2**32, "0 to 4294967295"),
        ("seed", 0 <= config.seed < 2**32, "0 to 4294967295"),
    ]
    for name, fine, expected in rules:
        if not fine:
            raise UserError(f"{name} is {getattr(config, name)!r}; expected {expected}")


# ---------------------------------------------------------------------------------------------------------- training


def build_network(config: Config, names: list[str], folder: Path, resumed: bool) -> keras.Model:
    """Build the network that `config` describes, with the weights that it names to start from unless it goes on."""
    model = build_unet(
        (config.image_size, config.image_size, config.channels * (1 + 2 * config.neighbours)),
        output_channels(names),
        config.filters,
        config.depth,
        architecture=config.architecture,
        normalization=config.normalization,
        encoder_weights="none" if resumed else config.encoder_weights,
    )
    if config.init_weights and not resumed:
        if Path(config.init_weights).resolve().parent == folder.resolve():
            raise UserError(
                f"init_weights {config.init_weights} would be moved by the new run; name another --out-dir"
            )
        utils.copy_weights(config.init_weights, model)
    fuse_normalization(model)
    return model


def compile_network(model: keras.Model, config: Config, steps: int) -> None:
    """Give the network its optimizer, whose learning rate warms up and falls over `steps` steps, loss and metrics."""
    model.compile(
        make_optimizer(config.learning_rate, config.weight_decay, steps, config.warmup),
        metrics.LOSSES[config.loss],
        weighted_metrics=[metrics.dice, metrics.iou, metrics.precision, metrics.recall],
        jit_compile=utils.jit_compile(),
    )
    model.optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "tensorflow":
        blank = np.zeros((1, *model.output_shape[1:]), np.float32)
        model.compute_metrics(
            None, blank, blank
        )  # makes their variables: in the first step they cost a second trace
        model.reset_metrics()


def assign_subsets(config: Config, folder: Path, pairs: list[Pair], resumed: bool) -> np.ndarray:
    """Split the pairs, or reread the split of the run that goes on: an array of train, val, test ("" for new pairs).

    A new run's earlier files are set aside here, when its data are known to be good, and config.json is written.
    """
    path = folder / "split.csv"
    if not resumed:
        fold = max(config.fold, 0)
        fractions = config.val_fraction, config.test_fraction
        subsets = data.split(
            pairs, *fractions, config.split_seed, config.folds, fold, config.labelled
        )
        if config.early_stop and "val" not in subsets:
            raise UserError(
                f"early_stop is {config.early_stop}; expected 0 where no image is for validation"
            )
        run_folder.archive_previous_run(folder)
        write_split(path, pairs, subsets)
        write_config(config, folder)
        return np.array(subsets)
    known = {pair.image: subset for pair, subset in zip(*read_split(path), strict=True)}
    gone = sorted(set(known) - {pair.image for pair in pairs})
    if gone:
        raise UserError(
            f"{path} names {gone[0]}, which is gone; put it back, or remove {folder} to start anew"
        )
    write_config(config, folder)
    return np.array([known.get(pair.image, "") for pair in pairs])


def train_run(config: Config, folder: Path) -> pd.DataFrame:
    """Train one run in `folder`, or go on with it; return its log."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(config.seed)
    precision = utils.set_precision(
        distributed.broadcast_from_main(lambda: utils.set_precision(config.precision))
    )
    names = class_names(config.classes)
    data_dir = config.data_dir or distributed.main_process_first(
        lambda: make_phantoms("", config.phantoms, seed=0)
    )
    size = (config.image_size, config.image_size)
    history, best = (
        distributed.broadcast_from_main(lambda: run_folder.read_history(folder, config)),
        folder / "model.h5",
    )
    if distributed.broadcast_from_main(lambda: is_done(config, folder, history)):
        return pd.DataFrame(history)
    recipe = Preprocessing(names, size, config.channels, config.window, mask_values(config.classes))
    with distributed.scope():
        # The network comes first: one that cannot be built is told before the data are read.
        model = build_network(config, names, folder, bool(history))
        pairs, dataset = distributed.main_process_first(
            lambda: data.load_dataset(
                data_dir, recipe, config.cache_dir, config.memory_gb, config.extra_dir
            )
        )
        if distributed.broadcast_from_main(lambda: [pair.image.name for pair in pairs]) != [
            pair.image.name for pair in pairs
        ]:
            raise UserError(f"{data_dir} holds other images here than where the first process runs")
        dataset = dataclasses.replace(dataset, neighbours=config.neighbours)
        subsets = np.array(
            distributed.broadcast_from_main(
                lambda: assign_subsets(config, folder, pairs, bool(history)).tolist()
            )
        )
        rows = {subset: dataset.slices_of(np.flatnonzero(subsets == subset)) for subset in SUBSETS}
        counts = ", ".join(f"{len(indices)} {subset}" for subset, indices in rows.items())
        print(
            f"{data_dir}: {counts}; {precision} on {utils.device_name()}; epoch {len(history) + 1} of {config.epochs}"
        )
        recorder = Checkpoint(config, folder, history, make_metadata(config, names))
        fit(model, config, recorder, dataset, rows)
    log = pd.DataFrame(history)
    if distributed.is_main_process():
        utils.update_metadata(
            best, mirror=config.mirror
        )  # a run that went on may have none better than before
        extra = np.array([pair.subset == "extra" for pair in pairs])
        own = rows["train"][~extra[dataset.pair[rows["train"]]]]  # phantoms have no say in it
        choose_cleaning(best, dataset, own, rows["val"])
        plots.draw_curves(log, folder / "curves.png")
    distributed.barrier()
    score = f", validation Dice {log.val_dice.max():.4f}" if "val_dice" in log else ""
    print(
        f"best epoch {run_folder.best_epoch(history)}{score}, trained {log.seconds.sum():.0f} s: {best}"
    )
    return log


def is_done(config: Config, folder: Path, history: list[dict[str, float]]) -> bool:
    """Tell whether the run in `folder` is finished, which is noted; else clear what a crash left. Raises UserError."""
    best = folder / "model.h5"
    if history and not best.is_file() and run_folder.best_epoch(history) < len(history):
        raise UserError(
            f"{best}, the best epoch's model, is gone; put it back, or remove {folder} to start anew"
        )
    if (
        run_folder.is_finished(history, config)
        and best.is_file()
        and (folder / "curves.png").is_file()
    ):  # which is written last
        utils.update_metadata(best, mirror=config.mirror)
        write_config(config, folder)
        print(
            f"{folder} holds this very run, finished; change a setting or remove the folder to train again"
        )
        return True
    for leftover in folder.glob(".[0-9]*.h5"):  # half-written when a run was killed
        leftover.unlink()
    return False


def make_metadata(config: Config, names: list[str]) -> dict[str, Any]:
    """Collect what a user of the model must know."""
    more = {name: getattr(config, name) for name in ("window", "neighbours", "mirror")}
    more["mask_values"] = mask_values(config.classes)
    return utils.make_metadata(
        names, (config.image_size, config.image_size), config.channels, **more
    )


def write_config(config: Config, folder: Path) -> None:
    """Write config.json, which tells people (and `experiments.py`) what the folder holds."""
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2))


def fit(
    model: keras.Model,
    config: Config,
    recorder: Checkpoint,
    dataset: Dataset,
    rows: dict[str, np.ndarray],
) -> None:
    """Train from where the recorder's history ends: first with a frozen encoder, if so configured, then all of it."""
    names, history, state = (
        recorder.metadata["classes"],
        recorder.history,
        recorder.folder / "state.weights.h5",
    )
    shard = distributed.shard()
    if config.batch_size % shard.num_devices:
        raise UserError(
            f"batch_size is {config.batch_size}; expected a multiple of the {shard.num_devices} devices"
        )
    on_device = augmentation_jax.fits_on_device(dataset, config.augmentation, shard)
    kind = augmentation_jax.DeviceBatches if on_device else data.Batches
    batches = kind(
        dataset,
        rows["train"],
        names,
        config.batch_size,
        config.augmentation,
        seed=config.seed,
        at_least=config.epoch_images,
        shard=shard,
    )
    held_out = rows["val"]
    validation = (
        kind(dataset, held_out, names, config.batch_size, shard=shard) if len(held_out) else None
    )
    for start, end in ((0, config.frozen_epochs), (config.frozen_epochs, config.epochs)):
        if start == end or len(history) > end:
            continue
        freeze_encoder(model, frozen=end < config.epochs)
        compile_network(model, config, len(batches) * (end - start))
        recorder.set_model(model)
        if len(history) > start:  # a stopped run goes on
            model.load_weights(state)
            distributed.on_main_process(recorder.save_results)
        batches.epoch = len(history)
        if len(history) < end and not run_folder.is_finished(history, config):
            model.fit(
                batches,
                validation_data=validation,
                initial_epoch=len(history),
                epochs=end,
                callbacks=[
                    recorder,
                    *(
                        [tensorboard(recorder.folder)]
                        if config.tensorboard and distributed.is_main_process()
                        else []
                    ),
                ],
                shuffle=False,  # Batches shuffles, in a way that a resumed run repeats
                verbose=0,
            )


def choose_cleaning(path: Path, dataset: Dataset, train: np.ndarray, val: np.ndarray) -> None:
    """Note in the model file how masks are cleaned, unless that lowers the mean Dice of the validation images.

    What is kept follows from the training masks: as many parts of a class as 95 % of them have, and no holes. Without
    validation images the training images decide.
    """
    model, metadata = utils.load_model(path)
    train, val = (
        rows[:: max(1, len(rows) // 1000)] for rows in (train, val)
    )  # a thousand tell enough
    names = metadata["classes"]

    def truth(i: int) -> np.ndarray:
        return preprocess.shares_to_ids(dataset.take([i])[1][0])

    parts = [
        postprocess.usual_components(truth(i) == k for i in train) for k in range(1, len(names) + 1)
    ]
    scores = {"as they are": [], "cleaned": []}
    for i in val if len(val) else train:
        probs = np.asarray(model.predict_on_batch(dataset.take([i])[0].astype(np.float32) / 255))[0]
        ids = postprocess.to_ids(probs, metadata["threshold"])
        for name, found in zip(scores, (ids, postprocess.clean_mask(ids, parts)), strict=True):
            scores[name].append(metrics.score_classes(truth(i), found, names)["dice"])
    before, after = (float(np.mean(values)) for values in scores.values())
    if after >= before:
        utils.update_metadata(path, clean=parts)


def tensorboard(folder: Path) -> keras.callbacks.Callback:
    """Make the callback that writes TensorBoard's log. Raises UserError if TensorBoard is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard: pip install tensorboard") from None
    return keras.callbacks.TensorBoard(folder / "tensorboard")


def score_fold(folder: Path) -> pd.DataFrame:
    """Score a fold's test images with its best model, write its metrics.csv, return the table."""
    config = predict.Config(model=str(folder / "model.h5"))
    pairs, _ = predict.pairs_to_score(config)
    table, problems = predict.score_pairs(predict.load_members(config), pairs)
    if problems:
        raise UserError("\n".join(problems))
    with atomic(folder / "metrics.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def cross_validate(config: Config) -> pd.DataFrame:
    """Train and score every fold (or the one asked for); print and write the summary over all test images."""
    out_dir = Path(config.out_dir)
    folds = range(config.folds) if config.fold == -1 else [config.fold]
    tables = []
    for fold in folds:
        log = train_run(dataclasses.replace(config, fold=fold), out_dir / f"fold{fold}")
        if not distributed.is_main_process():
            continue
        table = score_fold(out_dir / f"fold{fold}")
        print(
            f"fold {fold}: test Dice {table.dice.mean():.4f}, {len(table)} images, trained {log.seconds.sum():.0f} s"
        )
        tables.append(table.assign(fold=str(fold)))
    if not distributed.is_main_process():
        return pd.DataFrame()
    table = pd.concat(tables)
    summary = metrics.summarize(table)
    print(f"\n{len(table)} test images in {len(tables)} fold(s)\n{predict.format_summary(table)}")
    if config.fold == -1:
        with atomic(out_dir / "metrics.csv") as temporary:
            table.to_csv(temporary, index=False)
        with atomic(out_dir / "summary.csv") as temporary:
            summary.to_csv(temporary, index_label="metric")
    return summary


def apply_report(config: Config) -> Config:
    """Replace defaults by what the report that `config` names proposes. Raises UserError if it is none."""
    if not config.from_report:
        return config
    try:
        proposed = json.loads(Path(config.from_report).read_text())
        new = {
            name: value
            for name, value in proposed.items()
            if getattr(config, name) == getattr(Config, name)
        }
        wrong = [
            name for name, value in new.items() if type(value) is not type(getattr(Config, name))
        ]
        if wrong:
            raise ValueError(f"{wrong[0]} is {new[wrong[0]]!r}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"from_report {config.from_report} cannot be taken ({error}); see data.py check"
        ) from None
    print("from the report: " + ", ".join(f"{name} {value}" for name, value in new.items()))
    return dataclasses.replace(config, **new)


def train(config: Config) -> pd.DataFrame:
    """Train as `config` says: one run (returns its log) or folds (returns the summary). Raises UserError."""
    config = apply_report(config)
    check_config(config)
    if config.distributed:
        distributed.initialize()
    return cross_validate(config) if config.folds else train_run(config, Path(config.out_dir))


if __name__ == "__main__":
    with distributed.abort_on_error():
        utils.run_cli(lambda: train(CONFIG), utils.RESUMES)
