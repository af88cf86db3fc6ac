"""Say what the data look like where that has consequences for the training, and which."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dataset.cache import Dataset
from dataset.kind import count_mixed
from dataset.layouts import Pair
from dataset.report.fingerprint import Fingerprint
from dataset.report.plan import DIFFERENT_SIZES, Geometry, floor_dice, measure_geometry

if TYPE_CHECKING:
    import pandas as pd

THIN = 12  # pixels, of half of a class
USUAL_SIZE = 128
THIN_CEILING = 0.97  # Dice at USUAL_SIZE below which thin structures are lost
FEW_PATIENTS, SOME_PATIENTS = 5, 30
RARE_FILES = 0.1  # share of the masks
RARE_PIXELS = 0.002
MOST = 0.5  # share of the pixels of a class that may be the background
ANISOTROPIC = 3.0


def name_consequences(
    pairs: Sequence[Pair], dataset: Dataset, fingerprint: Fingerprint
) -> list[str]:
    """List what stands out in a data set, each with its consequence, a sentence or two each.

    pairs: those of `dataset`.
    """
    info = dataset.info
    if not len(info):
        return []
    geometry = measure_geometry(info)
    return [
        *_thin(fingerprint),
        *_background(info, fingerprint),
        *_rare(info, fingerprint.names),
        *_contrast(dataset),
        *_sizes(geometry),
        *_spacing(geometry),
        *_patients(pairs),
    ]


def _thin(fingerprint: Fingerprint) -> list[str]:
    """Name thin structures, which small images lose."""
    lines = []
    for class_id, name in enumerate(fingerprint.names, 1):
        width = fingerprint.width(class_id, 0.5)
        ceiling = fingerprint.ceiling(USUAL_SIZE)[class_id - 1] if fingerprint.pairs else 1.0
        if width <= THIN and ceiling < THIN_CEILING:
            lines.append(
                f"{name} is thin: half of it is narrower than {width:.0f} pixels. In images scaled "
                f"to {USUAL_SIZE} pixels most of that is gone, and no network gets above a Dice of "
                f"{floor_dice(ceiling)}"
            )
    return lines


def _background(info: "pd.DataFrame", fingerprint: Fingerprint) -> list[str]:
    """Name a class that may be the background, or hold it."""
    lines = []
    names = fingerprint.names
    for name in names:
        share = info[f"share: {name}"].mean()
        if share <= MOST:
            continue
        width = fingerprint.width(0, 0.5)
        if len(names) == 1 and np.isfinite(width) and width <= THIN:
            lines.append(
                f"{name} covers {share:.0%} of the pixels, and half of the rest is lines narrower "
                f"than {width:.0f} pixels. A Dice of {name} is high even if all lines are missed. "
                f'If they are the object: --classes "lines=0,background=1+"'
            )
        elif len(names) > 1:
            lines.append(
                f"class {name} covers {share:.0%} of the pixels. If it is the background, name it "
                "so in --classes: background=VALUE is no class and not scored"
            )
    return lines


def _rare(info: "pd.DataFrame", names: Sequence[str]) -> list[str]:
    """Name classes that few masks or few pixels have."""
    lines = []
    for name in names:
        share = info[f"share: {name}"].to_numpy()
        has, count = int((share > 0).sum()), len(share)
        if has and has < RARE_FILES * count:
            lines.append(
                f"class {name} is in {has} of {count} masks: some subsets may have none. The "
                "column label of an index.csv shares such images out evenly"
            )
        elif has and np.median(share[share > 0]) < RARE_PIXELS:
            usual = np.median(share[share > 0])
            lines.append(
                f"class {name} is rare: {usual:.2%} of the pixels where it is. A network that "
                "finds nothing is right nearly everywhere; look at the masks that it predicts"
            )
    return lines


def _contrast(dataset: Dataset) -> list[str]:
    """Say what objects do that are bright in some images and dark in others."""
    name, bright, dark = count_mixed(dataset, range(len(dataset.cases)))
    if not name:
        return []
    return [
        f"{name} is brighter than the rest in {bright} images and darker in {dark} of those that "
        "were looked at. Training inverts some images, so that it learns both from all of them"
    ]


def _sizes(geometry: Geometry) -> list[str]:
    """Say what different sizes do."""
    if geometry.size_ratio <= DIFFERENT_SIZES:
        return []
    return [
        f"longer sides differ {geometry.size_ratio:.1f}-fold. Scaled to one size, objects of large "
        "images get smaller than those of small ones"
    ]


def _spacing(geometry: Geometry) -> list[str]:
    """Say what slices that are far apart do."""
    if geometry.shape[0] == 1 or not ANISOTROPIC <= geometry.anisotropy < np.inf:
        return []
    return [
        f"slices are {geometry.anisotropy:.1f} times as far apart as pixels: what a slice shows "
        "ends or jumps in the next. Patches of volumes gain little"
    ]


def _patients(pairs: Sequence[Pair]) -> list[str]:
    """Say what few patients do."""
    if not pairs or all(pair.subset for pair in pairs):
        return []
    count = len({pair.group for pair in pairs})
    what = "patients" if any(pair.patient for pair in pairs) else "images"
    if count < FEW_PATIENTS:
        return [
            f"{count} {what} are too few to set some aside for testing: add some, or train with "
            "--test-fraction 0 --val-fraction 0 and look at the results yourself"
        ]
    if count < SOME_PATIENTS:
        tested = max(1, round(0.2 * count))
        return [
            f"{count} {what}, so {tested} are tested and chance decides much of their score: "
            "--folds 5 tests each of them once"
        ]
    return []
