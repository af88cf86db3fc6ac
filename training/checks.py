"""Check the hyperparameters before anything is read, and say what the computer could do better."""

import ast
from collections.abc import Collection
from pathlib import Path
from typing import Any

import utils
from dataset.augmentation import STRENGTHS, split_strength
from imaging.labels import Classes, mirrored_channels
from imaging.preprocess import parse_window
from imaging.scan import MAX_CHANNELS
from networks.own import find_code, is_own
from training.sampling import given_spacing, input_size
from utils import ROOT, UserError, nearest, or_expected

SEEDS = range(2**32)
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def check_before_keras(config: Any) -> Any:
    """Raise UserError for what is known to be wrong before Keras, which takes seconds, is loaded.

    The names in model.py and metrics.py are read from their source. Returns the config.
    """
    losses = keys_in_source(ROOT / "metrics.py", "LOSSES")
    backbones = keys_in_source(ROOT / "model.py", "BACKBONES")
    architectures = keys_in_source(ROOT / "model.py", "ARCHITECTURES", {"BACKBONES": backbones})
    check_values(config)
    check_name("loss", config.loss, losses)
    check_architecture(config.architecture, architectures)
    check_image_size(config, backbones)
    for folder in (config.data_dir, config.extra_dir):
        if folder:
            utils.check_folder(folder)
    return config


def check_config(config: Any) -> None:
    """Raise UserError for a value of a `train.Config` that cannot work."""
    import metrics
    import model

    check_values(config)
    check_name("loss", config.loss, metrics.LOSSES)
    check_architecture(config.architecture, model.ARCHITECTURES)
    if not is_own(config.architecture):
        model.check_names(config.architecture, config.normalization)
    check_image_size(config, model.BACKBONES)


def check_name(field: str, name: str, known: Collection[str]) -> None:
    """Raise UserError unless a name is known; without known names everything is fine."""
    if known and name not in known:
        expected = or_expected(nearest(name, known))
        raise UserError(f"{field} is {name!r}{expected} one of {', '.join(known)}")


def check_architecture(architecture: str, known: Collection[str]) -> None:
    """Raise UserError unless an architecture is known, or its code is there; it is not run."""
    if is_own(architecture):
        find_code(architecture)
    else:
        if architecture.endswith(".py"):
            raise UserError(f"architecture is {architecture!r}; expected {architecture}:FUNCTION")
        check_name("architecture", architecture, known)


def check_image_size(config: Any, backbones: Collection[str]) -> None:
    """Raise UserError for an image size that the network cannot halve as often as it does."""
    size = input_size(config)[-2:]
    given_spacing(config)
    if not is_own(config.architecture):
        name = "patch size" if config.patch_size else "image size"
        utils.check_size(size, config.depth, config.architecture in backbones, name)


def keys_in_source(path: Path, name: str, parts: dict[str, list[str]] | None = None) -> list[str]:
    """Read the keys of a dictionary in a source file without running it.

    parts: names of other dictionaries that it takes in, and their keys. Returns nothing if the
    dictionary is written in another way.
    """
    keys = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_assigned = isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not is_assigned or name not in [getattr(target, "id", "") for target in targets]:
            continue
        if keys or not isinstance(node.value, ast.Dict):
            return []
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            used = [one.id for one in ast.walk(value) if isinstance(one, ast.Name)]
            taken = [part for part in parts or {} if part in used]
            if key is None and not taken:
                return []
            keys += parts[taken[0]] if key is None else [ast.literal_eval(key)]
    return keys


def check_values(config: Any) -> None:
    """Raise UserError for a value that cannot work whatever the network is."""
    classes = Classes(config.classes, config.ignore, config.overlap)
    if config.window not in ("", "file"):
        parse_window(config.window)
    can_mirror = mirrored_channels(classes.names) is not None
    one_of_folds = f"-1, or 0 to {config.folds - 1}"
    if not config.folds:
        one_of_folds = "-1; one of several folds needs --folds, such as --folds 5"
    rules = [
        ("channels", 0 <= config.channels <= MAX_CHANNELS, f"0 to {MAX_CHANNELS}"),
        ("test_fraction", 0 <= config.test_fraction <= 0.5, "0 to 0.5"),
        ("val_fraction", 0 <= config.val_fraction <= 0.5, "0 to 0.5"),
        ("folds", config.folds == 0 or config.folds >= 2, "0 or at least 2"),
        ("fold", config.fold in range(-1, max(config.folds, 0)), one_of_folds),
        ("filters", config.filters >= 1, "at least 1"),
        ("depth", config.depth >= 1, "at least 1"),
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
    check_start(config)
    check_name("augmentation", split_strength(config.augmentation)[0], STRENGTHS)


def check_start(config: Any) -> None:
    """Raise UserError for weights to start from that cannot be."""
    start = config.init_weights
    if start == "imagenet":
        from model import BACKBONES  # loads Keras

        if config.architecture not in BACKBONES:
            raise UserError(
                f"init_weights is imagenet, and architecture {config.architecture} has no such "
                f"weights; expected one of {', '.join(BACKBONES)}"
            )
    if start not in ("", "imagenet") and not Path(start).is_file():
        raise UserError(f"init_weights is {start}; there is no such file")


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
