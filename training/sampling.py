"""Read what the hyperparameters say of the network's input: whole slices, patches, volumes.

`config` is a `train.Config` throughout.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

import utils
from dataset.cache import Dataset
from dataset.frame import detect_frame
from dataset.pairs import Pair
from inference.sampler import Sampler
from utils import UserError

MUCH_LARGER = 1.5  # a patch than the largest image: the rest is padding
# Values of --dimensions, and how many slices before and after are channels.
DIMENSIONS = {"2": 0, "2.5": 1, "3": 0}


def input_size(config: Any) -> tuple[int, ...]:
    """Return the size of the network's input, (H, W) or (D, H, W). Raises UserError."""
    if str(config.dimensions) not in DIMENSIONS:
        raise UserError(f"dimensions is {config.dimensions!r}; expected {', '.join(DIMENSIONS)}")
    is_3d = str(config.dimensions) == "3"
    if is_3d and not config.patch_size:
        raise UserError(
            "dimensions is 3 and patch_size is empty; expected --patch-size with slices, rows and "
            "columns, such as 16,64,64. `python data.py check` proposes one"
        )
    if not config.patch_size:
        return utils.parse_size(config.image_size)
    if not is_3d and str(config.patch_size).count(",") == 2:
        raise UserError(
            f"patch_size is {config.patch_size!r}, three sides, and dimensions is "
            f"{config.dimensions}; expected --dimensions 3, a patch of two sides, or "
            '--patch-size "" for whole slices'
        )
    return utils.parse_size(config.patch_size, "patch_size", 3 if is_3d else 2)


def given_spacing(config: Any) -> tuple[float, float, float] | None:
    """Return the spacing of `--spacing` in mm: slices, rows, columns. Raises UserError."""
    text = str(config.spacing).strip()
    if not text:
        return None
    try:
        sides = [float(part) for part in text.split(",")]
    except ValueError:
        sides = []
    counts = (1, 3) if str(config.dimensions) == "3" else (1, 2, 3)
    if len(sides) not in counts or not all(0 < side < float("inf") for side in sides):
        raise UserError(
            f"spacing is {text!r}; expected mm, such as 1, or between slices, rows and columns, "
            "such as 3,1,1"
        )
    if not config.patch_size:
        raise UserError(f"spacing is {text!r}; expected none without --patch-size")
    sides = sides * 3 if len(sides) == 1 else sides
    # Of two numbers: those of rows and columns. A 2-D network leaves the slices as they are.
    return tuple(sides) if len(sides) == 3 else (1.0, *sides)


def make_sampler(config: Any, pairs: Sequence[Pair]) -> Sampler:
    """Make the sampler: volumes are resampled to their median spacing, unless one is given.

    Raises UserError.
    """
    size, neighbours = input_size(config), DIMENSIONS[str(config.dimensions)]
    if not config.patch_size:
        return Sampler(size, neighbours=neighbours)
    frame = detect_frame(pairs)
    spacing = given_spacing(config) or frame.spacing
    # Slices lie as they were taken; a volume is turned to how most volumes lie.
    orientation = frame.orientation if len(size) == 3 else ""
    return Sampler(size, True, neighbours, spacing, orientation)


def describe_patches(config: Any, dataset: Dataset) -> list[str]:
    """Say where a size is not used, or shows more padding than image."""
    notes = []
    if not config.patch_size:
        return notes
    if config.image_size != type(config)().image_size:
        notes.append(
            f"image_size {config.image_size} is not used, because patch_size is "
            f'{config.patch_size}; --patch-size "" takes whole images'
        )
    largest = np.max([case.image.shape[:3] for case in dataset.cases], axis=0)
    if (np.array(dataset.sampler.window) > MUCH_LARGER * largest).any():
        shown = "x".join(map(str, largest))
        notes.append(f"patch_size {config.patch_size} is much larger than all images ({shown})")
    return notes
