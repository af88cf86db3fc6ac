"""Train a U-Net.

    python train.py                        on synthetic chest X-rays
    python train.py --data-dir DIR         on your own images and masks, see docs/your-data.md
    python train.py --from-report results/check/report.json    as data.py check proposes
    python train.py --folds 5              cross-validation

The run folder (default files/) gets model.h5 (the best epoch by smoothed validation Dice), log.csv,
curves.png, split.csv and config.json. The same command goes on after Ctrl-C or a crash.
--distributed shares each batch among several processes, see docs/scaling.md.
--verbose also shows what TensorFlow or JAX says.
The environment variable UNET_CACHE names the folder of decoded images, for later runs (default
files/cache; empty keeps none).
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import utils


@dataclass(frozen=True)
class Config:
    """The hyperparameters: edit them here, or give them as flags.

    On a GPU change three of them: image_size = 512, filters = 64, batch_size = 16.
    """

    # Data and output
    data_dir: str = ""  # your images and masks; "" makes synthetic chest X-rays
    out_dir: str = "files"  # the run folder
    classes: str = ""  # those of the data set, or foreground; "liver,tumour" names the ids 1 and 2
    ignore: str = ""  # value or colour of mask pixels that do not count, such as "255"
    overlap: bool = False  # a pixel may be of several classes: a sigmoid for each
    # Pixels, multiples of 2**depth, or height and width: "192,256". Images are scaled to fit.
    image_size: int | str = 128
    # Or pieces of the images at their own resolution: "192", "192,256", in 3-D "16,64,64".
    patch_size: str = ""
    dimensions: str = "2"  # 2; 2.5 adds the slices before and after as channels; 3 needs patches
    spacing: str = ""  # mm of the volumes that patches are taken from: "1", "3,1,1"; "" the median
    channels: int = 0  # 1 grey, 3 colour, or as many as the images have; 0 looks at them
    window: str = ""  # grey levels shown: "" percentiles, "40,400" centre and width, or "file"
    extra_dir: str = ""  # a second data set, for training only
    # Of the patients, rounded to 1/2, 1/3, 1/4 …; index.csv may name the test set instead.
    test_fraction: float = 0.2
    val_fraction: float = 0.15  # of the other patients; 0 keeps the last epoch instead of the best
    folds: int = 0  # cross-validation in so many folds; 0 is a single split
    fold: int = -1  # trains this fold alone; -1 trains them all

    # Model
    architecture: str = "unet"  # or residual, unet++, resnet50v2, my_net.py:build …
    filters: int = 8  # channels of the first level; they double at each level below
    depth: int = 4  # how often the image is halved
    normalization: str = "batch"  # or group, instance, none
    init_weights: str = ""  # start from this model file; "imagenet" for a pretrained encoder

    # Training
    augmentation: str = "mild"  # or none, strong (other X-ray machines), free (angles: MRI, CT)
    loss: str = "bce_dice"  # or dice, focal, tversky
    epochs: int = 80  # passes over the training images
    epoch_images: int = 96  # a smaller data set is repeated until an epoch has so many images
    batch_size: int = 8  # images per step
    learning_rate: float = 1e-2  # the peak: a short linear warmup, then a cosine down to 0
    mirror: bool = False  # predictions are averaged with those of the mirrored image
    seed: int = 0  # of weights, order and augmentation

    # Computer
    precision: str = "auto"  # float32, bfloat16 or float16; auto is bfloat16 where that is fast


if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    from training.checks import check_before_keras

    IS_DISTRIBUTED = utils.take_word("--distributed")
    CONFIG = utils.run_cli(lambda: check_before_keras(utils.parse_flags(Config, from_report=True)))
    print("loading Keras …", flush=True)
    utils.load_keras()

import keras
import numpy as np
import pandas as pd

import data
import metrics
import predict
from dataset.batches import Batches
from dataset.cache import Dataset
from dataset.channels import detect_channels
from dataset.layouts import SUBSETS, Pair
from dataset.loading import Preprocessing
from dataset.notes import describe_subsets
from dataset.phantoms import make_phantoms
from imaging.channel_files import channel_endings
from imaging.labels import Classes
from imaging.plots import draw_curves
from model import BACKBONES, build_unet
from networks.own import is_own
from training import distributed, run_folder
from training.calibration import calibrate
from training.checkpoint import Checkpoint
from training.checks import check_config, print_device_hint
from training.cleanup import choose_cleanup
from training.cross_validation import cross_validate
from training.optimizer import make_optimizer
from training.prior import class_shares, start_at_shares
from training.sampling import describe_patches, make_sampler
from training.twin import make_twin
from utils import UserError

PHANTOMS = 200  # synthetic X-rays that are drawn where there is no data_dir
MIN_VAL_WINDOWS = 64  # of patches, if the validation images have so many


def train(config: Config, is_distributed: bool = False) -> pd.DataFrame:
    """Train as `config` says: one run (returns its log) or folds (returns their summary).

    is_distributed: several processes share each batch.
    """
    config = with_classes(config)
    check_config(config)
    if is_distributed:
        distributed.initialize()
    print_device_hint(config)
    if config.folds:
        return cross_validate(config, train_run, predict.score_run)
    log = train_run(config, Path(config.out_dir))
    name = Path(config.out_dir).name
    own = f" --model {config.out_dir}/model.h5 --output results/{name}"
    own = "" if config.out_dir == Config.out_dir else own
    print(f"next: python predict.py{own}    scores the test images and draws panels")
    return log


def with_classes(config: Config) -> Config:
    """Fill in the classes, and what does not count: as the data set says, else foreground."""
    layout = data.find_data(config.data_dir) if config.data_dir and not config.classes else None
    ignore = config.ignore or (layout.ignore if layout else "")
    return replace(config, classes=data.choose_classes(config.classes, layout), ignore=ignore)


def train_run(config: Config, folder: Path) -> pd.DataFrame:
    """Train one network in `folder`, or go on with a stopped run; return its log."""
    with run_folder.locked(folder) if distributed.is_main_process() else nullcontext():
        return fit_run(config, folder)


def fit_run(config: Config, folder: Path) -> pd.DataFrame:
    """Do what `train_run` says, in a folder that nobody else writes to."""
    keras.utils.clear_session()
    utils.set_seed(config.seed)
    precision = distributed.broadcast_from_main(utils.set_precision, config.precision)
    utils.set_precision(precision)
    history = distributed.broadcast_from_main(
        run_folder.read_history, folder, config, lambda: find_pairs(config)
    )
    if distributed.broadcast_from_main(run_folder.is_complete, folder, config, history):
        return pd.DataFrame(history)

    # Data: pairs of image and mask, decoded once.
    pairs, dataset = load_data(config, folder if history else None)

    with distributed.scope():
        # Model: plain Keras is saved; a twin that shares its weights trains faster on a CPU.
        model = build_network(config, dataset, folder, bool(history))
        twin = make_twin(model)

        # Split: only now, because it puts an earlier run aside.
        subsets = distributed.broadcast_from_main(assign_subsets, config, folder, pairs, history)
        numbers = {name: np.flatnonzero(np.array(subsets) == name) for name in SUBSETS}
        print(", ".join(f"{len(dataset.examples(numbers[name]))} {name}" for name in SUBSETS))
        for note in [
            *describe_subsets(dataset, numbers["val"]),
            *describe_patches(config, dataset),
        ]:
            print(f"note: {note}")

        if not history and not utils.is_model_file(config.init_weights):
            shares = class_shares(dataset.info.iloc[numbers["train"]], dataset.classes.names)
            start_at_shares(model, shares)

        # Compile: loss and metrics are computed per image and averaged over images.
        train_batches, val_batches = make_batches(config, dataset, numbers)
        if config.mirror and 2 not in train_batches.augment.kind.mirrored_axes:
            print("note: mirror is on, but training shows no mirrored images; it may do harm")
        compile_model(twin, config, steps=len(train_batches) * config.epochs)

        # Fit.
        metadata = make_metadata(config, dataset, pairs)
        if distributed.is_main_process():  # which writes the model file
            metadata["split"] = run_folder.go_on(folder)
        checkpoint = Checkpoint(config, folder, history, model, metadata)
        checkpoint.restore(twin)
        train_batches.epoch = checkpoint.epoch
        print(f"{model.count_params():,} parameters, {precision}, {utils.device_name()}")
        if checkpoint.epoch < config.epochs:
            print(f"epoch {checkpoint.epoch + 1} of {config.epochs}", flush=True)
        with checkpoint.saved_on_interrupt():
            twin.fit(
                train_batches,
                validation_data=val_batches,
                initial_epoch=checkpoint.epoch,
                epochs=config.epochs,
                callbacks=[checkpoint],
                shuffle=False,  # Batches shuffles, in an order that a resumed run repeats
                verbose=0,
            )

    # Result.
    log = pd.DataFrame(history)
    if distributed.is_main_process():
        finish_run(config, folder, pairs, dataset, numbers, log)
    distributed.barrier()
    return log


def find_pairs(config: Config) -> list[Pair]:
    """List the pairs of the data set, and of the one for training only."""
    pairs = []
    for folder in (data_folder(config), config.extra_dir):
        pairs += data.find_pairs(folder)[0] if folder else []
    return pairs


def data_folder(config: Config) -> str:
    """Return the folder of the data set; without one, phantoms are drawn."""
    return config.data_dir or str(make_phantoms("", PHANTOMS, seed=0))


def load_data(config: Config, stopped: Path | None = None) -> tuple[list[Pair], Dataset]:
    """Find and decode the images and masks. Raises UserError that lists every unusable file.

    stopped: the folder of a run that goes on as it began, also if there are more images now.
    """

    def load() -> tuple[list[Pair], Dataset]:
        data_dir = data_folder(config)
        print(f"data: {data_dir}", flush=True)
        layout = data.find_data(data_dir)
        sampler, channels = run_folder.read_input(stopped)
        preprocessing = Preprocessing(
            Classes(config.classes, config.ignore, config.overlap),
            sampler or make_sampler(config, layout.pairs),
            channels or config.channels or detect_channels(layout.pairs),
            config.window,
        )
        return data.load_dataset(layout, preprocessing, utils.cache_folder(), config.extra_dir)

    pairs, dataset = distributed.main_process_first(load)
    if str(config.dimensions) != "2" and all(len(case.image) == 1 for case in dataset.cases):
        raise UserError(
            f"dimensions is {config.dimensions}; expected 2: the images have one slice each"
        )
    images = [pair.image.name for pair in pairs]
    if distributed.broadcast_from_main(lambda: images) != images:
        raise UserError("the data set holds other images here than where the main process runs")
    return pairs, dataset


def assign_subsets(
    config: Config, folder: Path, pairs: list[Pair], history: list[run_folder.Epoch]
) -> list[str]:
    """Return each pair's subset: those of the stopped run, or a new split for a new run."""
    if history:
        return run_folder.resume(folder, config, pairs)
    subsets = data.split(
        pairs,
        config.val_fraction,
        config.test_fraction,
        folds=config.folds,
        fold=max(config.fold, 0),
    )
    run_folder.start(folder, config, pairs, subsets)
    return subsets


def build_network(
    config: Config, dataset: Dataset, folder: Path = Path(), resumed: bool = False
) -> keras.Model:
    """Build the network, with the weights that it starts from unless a run is resumed."""
    start = "" if resumed else config.init_weights
    from_encoder = config.architecture in BACKBONES and not utils.is_model_file(start)
    model = build_unet(
        dataset.sampler.input_shape(dataset.channels),
        dataset.classes.num_channels,
        config.filters,
        config.depth,
        architecture=config.architecture,
        normalization=config.normalization,
        encoder_weights=start if start and from_encoder else "none",
        overlap=dataset.classes.overlap,
        spacing=dataset.sampler.spacing if dataset.sampler.dimensions == 3 else None,
    )
    if start and not from_encoder:
        if Path(start).resolve().parent == folder.resolve():
            raise UserError(f"init_weights {start} is in the run folder; name another --out-dir")
        utils.copy_weights(start, model)
    return model


def make_batches(
    config: Config, dataset: Dataset, numbers: dict[str, np.ndarray]
) -> tuple[Batches, Batches | None]:
    """Make the batches of training images, augmented, and those of validation images, if any.

    numbers: the pairs of each subset.
    """
    shard = distributed.shard()
    if config.batch_size % shard.num_devices:
        raise UserError(
            f"batch_size is {config.batch_size}; expected a multiple of the {shard.num_devices} "
            "devices"
        )
    training = Batches(
        dataset,
        dataset.examples(numbers["train"]),
        config.batch_size,
        config.augmentation,
        seed=config.seed,
        at_least=config.epoch_images,
        shard=shard,
    )
    windows = dataset.cover(numbers["val"])
    if not len(windows):
        return training, None
    most = max(training.count, MIN_VAL_WINDOWS)
    if dataset.sampler.patches and len(windows) > most:
        # Of large images as many windows as an epoch has patches. A fixed step would fall on the
        # same column of each image.
        drawn = np.random.default_rng(0).choice(len(windows), most, replace=False)
        windows = windows[np.sort(drawn)]
    return training, Batches(dataset, windows, config.batch_size, shard=shard)


def compile_model(model: keras.Model, config: Config, steps: int) -> None:
    """Give the network its optimizer, loss and metrics; `steps` is the length of the training."""
    loss, *scores = (
        metrics.per_class(function) if config.overlap else function
        for function in (metrics.LOSSES[config.loss], *metrics.TRAINING_METRICS)
    )
    if config.patch_size:  # a patch without an object says little by itself
        scores = metrics.pooled_metrics(config.overlap)
    utils.keep_freed_memory()
    model.compile(
        make_optimizer(config.learning_rate, steps),
        loss,
        weighted_metrics=scores,
        jit_compile=utils.jit_compile(),
    )
    model.optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "tensorflow":
        # Make the metrics' variables now: in the first step they would cost a second trace.
        blank = np.zeros((1, *model.output_shape[1:]), np.float32)
        truth = np.concatenate([blank, blank[..., :1]], axis=-1) if config.ignore else blank
        model.compute_metrics(None, truth, blank)
        model.reset_metrics()


def make_metadata(config: Config, dataset: Dataset, pairs: list[Pair]) -> dict:
    """Collect what a user of the model file must know."""
    folders = [Path(name) for name in (config.data_dir, config.extra_dir) if name]
    return utils.make_metadata(
        dataset.classes.names,
        dataset.sampler.size[-2:],
        dataset.channels,
        **dataset.classes.metadata,
        **dataset.sampler.metadata,
        window=config.window,
        # How the files of an image's channels are named, where they are several.
        channel_endings=channel_endings((pairs[0].image, *pairs[0].more_channels)),
        mirror=config.mirror,
        **({"architecture": config.architecture} if is_own(config.architecture) else {}),
        phantoms=all((folder / "phantoms.json").is_file() for folder in folders),
    )


def finish_run(
    config: Config,
    folder: Path,
    pairs: list[Pair],
    dataset: Dataset,
    numbers: dict[str, np.ndarray],
    log: pd.DataFrame,
) -> None:
    """Choose how masks are cleaned and judged, draw the curves, print the result."""
    path = folder / "model.h5"
    # A resumed run may have found no better epoch, so its model file is from before.
    utils.update_metadata(path, mirror=config.mirror)
    is_extra = np.array([pair.subset == "extra" for pair in pairs])
    own = numbers["train"][~is_extra[numbers["train"]]]
    choose_cleanup(path, dataset, own, numbers["val"])
    calibrate(path, dataset, own, numbers["val"])
    best = run_folder.best_epoch(log.to_dict("records"))
    draw_curves(log, best, folder / "curves.png")
    score = f", validation Dice {log.val_dice[best - 1]:.4f}" if "val_dice" in log else ""
    print(f"best epoch {best}{score}, trained {log.seconds.sum():.0f} s: {path}")


if __name__ == "__main__":
    with distributed.abort_on_error():
        utils.run_cli(lambda: train(CONFIG, IS_DISTRIBUTED), utils.RESUMES)
