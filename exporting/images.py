"""Choose the images that an export is checked and calibrated on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.phantoms import make_phantoms
from dataset.run_split import find_split
from dataset.split_table import read_split
from imaging.scan import Scan
from inference.inputs import list_inputs, read_one
from inference.precision_check import MAX_WINDOWS
from inference.segment import prepare, take_middle
from utils import UserError

MAX_SLICES = 8  # of a volume
NUM_CALIBRATING = 8  # windows of an image


class Images(NamedTuple):
    """Which images are used for what."""

    agreement: list[Path]  # test images: the formats' masks are compared with the model file's
    precision: list[Path]  # validation images: reduced precision is compared with float32
    calibration: list[Path]  # training images, none of them above: ranges of the integers
    source: str  # where the validation images come from


def choose_images(model: Path, images: str, checked: int, endings: Sequence[str] = ()) -> Images:
    """Choose at most `checked` images of each kind. Raises UserError if there are too few.

    model: the model file, whose run has a split.csv. images: a file or folder, or "". endings: of
    the files of an image's channels.
    """
    sources = Sources(Path(model), images, checked, endings)
    candidates = sources.list("val")
    # Some of the same images may have to calibrate.
    precision = candidates[: min(checked, max(1, len(candidates) // 2))]
    others = [path for path in sources.list("train") if path not in precision]
    if not others:
        raise UserError(
            f"{precision[0]} is the only image; expected another one to calibrate the integers on"
        )
    return Images(sources.list("test")[:checked], precision, others[-checked:], sources.name)


class Sources(NamedTuple):
    """Where images may come from."""

    model: Path
    images: str
    checked: int
    endings: Sequence[str]

    @property
    def split(self) -> Path | None:
        """The split of the model's run, if it is there."""
        return find_split(self.model)

    @property
    def name(self) -> str:
        """What the manifest says of them."""
        if self.images:
            return Path(self.images).name
        return "of the split.csv beside the model" if self.split else "phantoms"

    def list(self, subset: str) -> list[Path]:
        """List the images that the user names, else a subset of the model's run, else phantoms.

        If the run has no image in this subset, all its images are taken.
        """
        if self.images:
            found = list_inputs(Path(self.images), endings=self.endings)
            paths = [item.path for item in found.items]
        elif split := self.split:
            pairs, subsets = read_split(split)
            images = [pair.image for pair in pairs]
            wanted = {
                pair.image for pair, other in zip(pairs, subsets, strict=True) if other == subset
            }
            paths = [image for image in images if image in wanted] or images
        else:
            folder = make_phantoms("", 2 * self.checked, seed=1) / "CXR_png"
            paths = sorted(folder.iterdir())
        if not paths:
            raise UserError("no image to check the formats on; name some with --images")
        return paths


def read_middle(path: Path, metadata: dict[str, Any]) -> Scan:
    """Read an image; of a volume, or of a large image, what is in its middle."""
    return take_middle(read_one(path, metadata), metadata, MAX_WINDOWS, MAX_SLICES)


def read_prepared(path: Path, metadata: dict[str, Any]) -> list[np.ndarray]:
    """Read an image and prepare some of its windows, drawn: each (1, …, C) float32."""
    _, windows = prepare(read_middle(path, metadata), metadata)
    numbers = np.random.default_rng(0).permutation(len(windows))[:NUM_CALIBRATING]
    return [windows[i][None].astype(np.float32) / 255 for i in numbers]
