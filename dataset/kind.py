"""Find out what the images of a data set are like, and so how training may change them."""

from collections.abc import Iterator, Sequence

import numpy as np

from dataset.augmentation import Kind, mirrored_planes
from dataset.cache import Case, Dataset
from dataset.symmetry import SYMMETRIC, small_mask, symmetry

MAX_ASKED = 100  # pairs that are looked at
MAX_SLICES, MAX_SIDE = 64, 512  # of each, in slices and pixels
MAX_ANISOTROPY = 1.5  # up to so many times longer than wide a voxel counts as a cube
CLEAR = 0.5  # standard deviations of the image between objects and the rest
MIXED = 0.02  # share of the images whose objects are dark, where those of others are bright


def find_kind(dataset: Dataset, pairs: Sequence[int]) -> Kind:
    """Look at the pairs with these numbers, the training ones."""
    sampler = dataset.sampler
    spacing = sampler.spacing
    return Kind(
        sampler.dimensions,
        spacing is not None and max(spacing) <= MAX_ANISOTROPY * min(spacing),
        sampler.patches,
        mirrored_axes(dataset, pairs),
        count_mixed(dataset, pairs)[0] != "",
    )


def _some(dataset: Dataset, pairs: Sequence[int]) -> Iterator[Case]:
    """Give some of the cases, thinned out."""
    for number in np.asarray(pairs, int)[:: -(-len(pairs) // MAX_ASKED) or 1]:
        yield dataset.cases[number].thinned(MAX_SLICES, MAX_SIDE)


def mirrored_axes(dataset: Dataset, pairs: Sequence[int]) -> tuple[int, ...]:
    """List the axes (0 slices, 1 rows, 2 columns) on whose two sides the objects lie alike."""
    order = mirrored_planes(dataset.classes)
    count = len(dataset.classes.names)
    masks = [small_mask(case.truth(dataset.classes)[0], count) for case in _some(dataset, pairs)]
    axes = [axis for axis in range(2) if symmetry(masks, axis) >= SYMMETRIC]
    if order is not None and symmetry(masks, 2, order[:count]) >= SYMMETRIC:
        axes.append(2)
    return tuple(axes)


def count_mixed(dataset: Dataset, pairs: Sequence[int]) -> tuple[str, int, int]:
    """Find a class that is clearly brighter than the rest in some images, and darker in others.

    Returns its name, how many are bright and how many dark; "" if no class is like that.
    """
    contrasts = [_contrasts(case, len(dataset.classes.names)) for case in _some(dataset, pairs)]
    for name, found in zip(dataset.classes.names, zip(*contrasts, strict=True), strict=False):
        bright, dark = sum(one > CLEAR for one in found), sum(one < -CLEAR for one in found)
        if min(bright, dark) >= max(2, MIXED * (bright + dark)):
            return name, bright, dark
    return "", 0, 0


def _contrasts(case: Case, count: int) -> list[float]:
    """How much brighter each class is than what is no object, in standard deviations of the image.

    count: how many classes there are.
    """
    grey = case.image.mean(-1, dtype=np.float32)
    objects = case.masks[..., :count] > 127
    rest = ~objects.any(-1)
    contrasts = []
    for inside in np.moveaxis(objects, -1, 0):
        is_known = inside.any() and rest.any()
        difference = grey[inside].mean() - grey[rest].mean() if is_known else 0.0
        contrasts.append(float(difference / (grey.std() + 1e-6)))
    return contrasts
