"""Check the hyperparameters before anything is read, and say what the computer could do better."""

from pathlib import Path
from typing import Any

import model
import utils
from dataset.augmentation import STRENGTHS
from imaging.labels import Classes, mirrored_channels
from imaging.preprocess import parse_window
from imaging.scan import MAX_CHANNELS
from metrics import LOSSES
from utils import UserError

SEEDS = range(2**32)
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def check_config(config: Any) -> None:
    """Raise UserError for a value of a `train.Config` that cannot work."""
    classes = Classes(config.classes, config.ignore, config.overlap)
    if config.window not in ("", "file"):
        parse_window(config.window)
    can_mirror = mirrored_channels(classes.names) is not None
    one_of_folds = f"-1 or a fold of --folds {config.folds}"
    rules = [
        ("channels", 0 <= config.channels <= MAX_CHANNELS, f"0 to {MAX_CHANNELS}"),
        ("neighbours", config.neighbours in (0, 1), "0 or 1"),
        (
            "neighbours",
            not config.neighbours or config.channels in (0, 1),
            "0 for several channels",
        ),
        ("test_fraction", 0 <= config.test_fraction <= 0.5, "0 to 0.5"),
        ("val_fraction", 0 <= config.val_fraction <= 0.5, "0 to 0.5"),
        ("folds", config.folds == 0 or config.folds >= 2, "0 or at least 2"),
        ("fold", config.fold in range(-1, max(config.folds, 0)), one_of_folds),
        ("filters", config.filters >= 1, "at least 1"),
        ("depth", config.depth >= 1, "at least 1"),
        ("augmentation", config.augmentation in STRENGTHS, " or ".join(STRENGTHS)),
        ("loss", config.loss in LOSSES, " or ".join(LOSSES)),
        ("epochs", config.epochs >= 1, "at least 1"),
        ("epoch_images", config.epoch_images >= 0, "at least 0"),
        ("batch_size", config.batch_size >= 1, "at least 1"),
        ("learning_rate", config.learning_rate > 0, "above 0"),
        ("mirror", not config.mirror or can_mirror, "false, because a class has one side only"),
        ("seed", config.seed in SEEDS, f"0 to {SEEDS[-1]}"),
    ]
    for name, is_fine, expected in rules:
        if not is_fine:
            raise UserError(f"{name} is {getattr(config, name)!r}; expected {expected}")
    model.check_names(config.architecture, config.normalization)
    size = utils.parse_size(config.image_size)
    model.check_size(size, config.depth, pretrained=config.architecture in model.BACKBONES)


def print_device_hint(config: Any) -> None:
    """Suggest larger settings where a GPU is found, and a package where one is not used."""
    laptop = type(config)()
    sizes = ("image_size", "filters", "batch_size")
    is_laptop = all(getattr(config, name) == getattr(laptop, name) for name in sizes)
    if utils.gpus() and is_laptop:
        print("a GPU is found: try --image-size 512 --filters 64 --batch-size 16")
    if not utils.gpus() and NVIDIA_DRIVER.exists():
        print(
            "an NVIDIA GPU is in this computer and not used: pip install -r requirements-gpu.txt; "
            "--verbose shows what the backend says"
        )
