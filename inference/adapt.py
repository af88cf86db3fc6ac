"""Adapt a model to other images, such as another hospital's, without any masks of them.

It moves the means and variances of batch normalization halfway to those of the new images (Li et
al. 2016, arXiv 1603.04779; mixed as by Schneider et al. 2020, arXiv 2006.16971). All other weights
stay.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import utils
from inference.inputs import Input, list_inputs, read_input
from inference.problems import Problems
from inference.read_ahead import read_chunks
from inference.segment import Member, prepare_inputs, take_middle
from utils import UserError

MIN_IMAGES = 16  # fewer say little about a hospital
SHARE = 0.5  # of the new statistics; chosen in docs/results.md
BATCH_BYTES = 32 * 192**2  # of prepared images; the statistics of a small batch are noisy
MAX_BYTES = 2**28  # of all prepared images; more add nothing
MAX_WINDOWS, MAX_SLICES = 3, 8  # of an image: windows along each side, of slices
MAX_LOSS = 0.002  # of the Dice on validation images, before it is warned of


def check_paths(path: Path, output: Path) -> None:
    """Raise UserError for a model that cannot be adapted, or an output that is none."""
    if path.suffix == ".onnx":
        raise UserError(f"{path} is an export; adapt its .h5 file, and export that")
    utils.load_metadata(path)
    if output.resolve() == path.resolve():
        raise UserError(f"{output} is the model itself; name another --output")
    if output.is_dir() or output.suffix != ".h5":
        raise UserError(f"--output is {output}; expected a file that ends in .h5")


def adapt_model(
    path: Path, folder: Path, output: Path, score: Callable[[Member], float | None]
) -> list[str]:
    """Adapt a model file to the images in a folder, write it, and return the problems.

    score: gives the Dice on images like those of the training, before and after; None if there are
    none. Raises UserError if there are too few images, or nothing that can be adapted.
    """
    model, metadata = utils.load_model(path)
    found = list_inputs(folder, endings=metadata.get("channel_endings", ()))
    problems = Problems(output.parent)
    windows, count = read_windows(found.items, metadata, problems)
    if count < MIN_IMAGES:
        usable = utils.counted(count, "usable image")
        expected = f"expected at least {MIN_IMAGES}, better hundreds, as they come"
        raise UserError("\n".join([f"{folder} has {usable}; {expected}", *problems.lines]))
    before = score((model, metadata))
    layers = set_statistics(model, batches_of(windows))
    if not layers:
        raise UserError(f"{path} has no batch normalization, so nothing in it can be adapted")
    images = {"images": count, "folder": folder.resolve().name}
    utils.save_model(model, output, metadata | {"adapted_to": images}, path.parent)
    print(f"{output}: {utils.counted(layers, 'layer')} adapted to {utils.counted(count, 'image')}")
    print(describe_change(before, score((model, metadata))))
    return found.problems + problems.lines


def describe_change(before: float | None, after: float | None) -> str:
    """Say what adapting did to the Dice on validation images."""
    if before is None or after is None:
        return "note: the validation images of its run are not here, so it is not checked on them"
    found = f"Dice on the validation images of its run: {before:.4f} before, {after:.4f} after"
    if before - after > MAX_LOSS:
        return f"warning: {found}. For images like those of the training keep the old model"
    return found


def read_windows(
    items: Sequence[Input], metadata: dict[str, Any], problems: Problems
) -> tuple[np.ndarray, int]:
    """Prepare the middle of each image: windows (N, …, C) uint8 in a random order.

    They end at MAX_BYTES. Returns also how many images they are of.
    """
    order = np.random.default_rng(0).permutation(len(items))
    chosen = [items[number] for number in order]
    window = metadata.get("window", "")
    paths = [item.path for item in chosen]
    parts, size = [], 0
    for chunk in read_chunks(chosen, paths, lambda item: read_input(item, window), 8, problems):
        for item, scan in chunk:
            try:
                middle = take_middle(scan, metadata, MAX_WINDOWS, MAX_SLICES)
                parts.append(prepare_inputs(middle, metadata))
            except UserError as error:
                problems.add(item.path, UserError(f"{item.path}: {error}"))
                continue
            size += parts[-1].nbytes
        if size > MAX_BYTES:
            break
    windows = np.concatenate(parts) if parts else np.zeros((0, 1), np.uint8)
    return windows[np.random.default_rng(1).permutation(len(windows))], len(parts)


def batches_of(windows: np.ndarray) -> Iterator[np.ndarray]:
    """Split windows into whole batches, float32 in [0, 1]."""
    size = min(len(windows), max(2, BATCH_BYTES // windows[0].nbytes))
    for start in range(0, len(windows) - size + 1, size):
        yield windows[start : start + size].astype(np.float32) / 255


def all_layers(model: Any) -> Iterator[Any]:
    """List the layers of a Keras model, and of the models that are layers of it."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from all_layers(layer)
        else:
            yield layer


def set_statistics(model: Any, batches: Iterator[np.ndarray]) -> int:
    """Move the statistics of batch normalization towards the means over batches (N, …, C).

    model: of Keras. Returns the number of such layers; without any the model stays as it is.
    """
    layers = [
        layer
        for layer in all_layers(model)
        if hasattr(layer, "moving_variance") and layer.trainable
    ]
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    before = [layer.get_weights() for layer in layers]
    for number, batch in enumerate(batches):
        for layer in layers:
            layer.momentum = number / (number + 1)  # so the moving average is the mean
        model(batch, training=True)
    for layer, momentum, old in zip(layers, momenta, before, strict=True):
        layer.momentum = momentum
        both = zip(old, layer.get_weights(), strict=True)
        layer.set_weights([(1 - SHARE) * one + SHARE * other for one, other in both])
    return len(layers)
