"""Propose hyperparameters: what follows from a data set and from the computer it is trained on.

The rules are nnU-Net's (Isensee et al. 2021, "rule-based parameters"), with a smaller budget: a
step has the pixels that a few processor cores compute in a second, not those that fill a GPU.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dataset.report.fingerprint import SIZES, Fingerprint
from dataset.symmetry import SYMMETRIC
from imaging.grid import SAME
from imaging.labels import mirrored_channels
from utils import cores, counted, free_memory_bytes

if TYPE_CHECKING:
    import pandas as pd

# The ceiling (see fingerprint.py): what a size should reach, and what it must.
GOOD_CEILING, MIN_CEILING = 0.9988, 0.99
MIN_LOW_CEILING = 0.98  # of nine images in ten
USUAL_SIZE, MAX_WHOLE = 128, 256  # pixels: whole images are scaled to fit sizes in between
PATCHES = (128, 256)  # pixels of a patch's sides, the least and the most
PATCH_STEP = 32
OBJECTS_PER_PATCH = 4  # sides of a patch, in objects' diameters
OBJECT_WIDTHS = 8  # an object of a network of lines counts as so many widths long
USUAL_DEPTH, USUAL_EPOCHS, USUAL_EPOCH = 4, 80, 96
VOLUME_EPOCHS = 40  # at most, of a network in three dimensions
FILTERS = 16
MIN_BOTTOM = 4  # pixels of the lowest level
# A step on four cores or fewer.
USUAL_BATCH, MAX_BATCH = 8, 64
STEP_VOXELS = 2**18  # of a batch of volumes
PATCH_VOXELS = 2**17
STEPS_PER_EPOCH = 12
BYTES_PER_PIXEL = 4000  # of a training step with FILTERS
MEMORY_SHARE = 0.25  # of the free memory that a step may take
PIXELS_PER_SECOND = 5e5  # that a core trains a network of FILTERS on, in two and three dimensions
MAX_SECONDS = 3000  # of a training
TRAINED_SHARE, MIN_EPOCHS = 0.68, 10
MIN_SLICES = 16  # of a volume, for a network in three dimensions
ANISOTROPIC = 3.0  # between the distances of slices and of pixels
MIN_COVER = 0.25  # of the volume that a patch covers
DIFFERENT_SIZES = 2.0  # between large and small images
MANY_OBJECTS = 10  # of an image
COLOUR_SHARE = 0.03  # of the images that must be in colour
ALIKE = 0.55  # Dice with the other masks' mean, from which on objects have one place and pose
HOUNSFIELD_BELOW = -200  # only CT has grey levels below: air is -1000
RARE = 0.002  # share of the pixels


class Proposal(NamedTuple):
    """A field of `train.Config`, its value, and why."""

    name: str
    value: Any
    reason: str


class Computer(NamedTuple):
    """What there is to train on. Of a GPU nothing is known before Keras is loaded."""

    memory_bytes: float
    cores: int

    @property
    def max_pixels(self) -> float:
        """How many pixels a step may have to fit into the memory."""
        return MEMORY_SHARE * self.memory_bytes / BYTES_PER_PIXEL

    @property
    def patch_voxels(self) -> float:
        """How many voxels a patch of a volume may have."""
        return min(PATCH_VOXELS * max(1, self.cores / 4), self.max_pixels / 2)


class Geometry(NamedTuple):
    """How large the images of a data set are: medians."""

    shape: tuple[int, int, int]  # slices, rows, columns
    spacing_mm: tuple[float, float, float] | None
    size_ratio: float  # between large and small images: the longer sides of nine and one in ten

    @property
    def side(self) -> int:
        """The longer side of a slice."""
        return max(self.shape[1:])

    @property
    def anisotropy(self) -> float:
        """How much farther apart slices are than pixels; infinite if the files do not say."""
        return self.spacing_mm[0] / min(self.spacing_mm[1:]) if self.spacing_mm else np.inf


def suggest(
    info: "pd.DataFrame", fingerprint: Fingerprint, channels: int, computer: Computer | None = None
) -> list[Proposal]:
    """Propose fields of `train.Config`, each with its reason. Nothing for no images.

    info: of `Dataset`. channels: what most images have, see `detect_channels`.
    """
    if not len(info):
        return []
    computer = computer or Computer(free_memory_bytes(), cores())
    geometry = measure_geometry(info)
    chosen = _input(geometry, fingerprint, computer)
    why = "more features than with 8; a step takes about twice as long"
    chosen.append(Proposal("filters", FILTERS, why))
    chosen += _epochs(info, chosen, computer)
    chosen += [
        _channels(info, channels),
        *_window(info, channels),
        _augmentation(fingerprint, _fields(chosen).get("dimensions", "2")),
        *_mirror(fingerprint),
        *_loss(info, fingerprint.names),
    ]
    return chosen


def measure_geometry(info: "pd.DataFrame") -> Geometry:
    """Summarise the sizes of the images."""
    sizes = np.array([tuple(map(int, size.split("x"))) for size in info["size"]])
    shape = np.median(np.column_stack([info["slices"], sizes]), axis=0)
    known = [spacing for spacing in info["spacing_mm"] if isinstance(spacing, list)]
    spacing = None
    if len(known) > len(info) / 2:
        spacing = tuple(float(one) for one in np.median(known, axis=0))
    small, large = np.quantile(sizes.max(1), (0.1, 0.9))
    return Geometry(tuple(int(one) for one in shape), spacing, float(large / small))


def working_spacing(
    info: "pd.DataFrame", proposals: Sequence[Proposal]
) -> tuple[float, float, float] | None:
    """Give the spacing in mm to which volumes are resampled; None where all keep their own.

    The slices of a 2-D network keep theirs: 0.
    """
    fields = _fields(proposals)
    spacing = measure_geometry(info).spacing_mm
    if not {"dimensions", "patch_size"} <= set(fields) or spacing is None:
        return None
    if "spacing" in fields:
        return tuple(float(one) for one in fields["spacing"].split(","))
    known = [one for one in info["spacing_mm"] if isinstance(one, list)]
    differences = np.abs(np.divide(known, spacing) - 1)
    if fields["dimensions"] != "3":
        differences, spacing = differences[:, 1:], (0.0, *spacing[1:])
    return spacing if differences.max() > SAME else None


def ceiling_sizes(proposals: Sequence[Proposal]) -> list[int]:
    """List the sizes whose ceilings are told: the chosen one and the next smaller one.

    Of patches of slices, which lose nothing, those of whole images, which are not chosen.
    """
    fields = {name: value for name, value, _ in proposals}
    if fields.get("dimensions") == "3":
        return []
    if "image_size" not in fields:
        return [MAX_WHOLE, USUAL_SIZE]
    place = SIZES.index(fields["image_size"])
    return [SIZES[place], SIZES[max(0, place - 1)]]


# -------------------------------------------------------------------------------- what is shown


def _input(geometry: Geometry, fingerprint: Fingerprint, computer: Computer) -> list[Proposal]:
    """Choose dimensions, the size of the network's input, and what follows from it."""
    dimensions, reason = _dimensions(geometry, fingerprint, computer)
    chosen = [Proposal("dimensions", dimensions, reason)] if geometry.shape[0] > 1 else []
    if dimensions == "3":
        return chosen + _volume_patch(geometry, computer)
    whole = choose_whole(geometry, fingerprint, computer)
    if whole:
        return chosen + [whole, *_batch(whole.value, whole.value, computer.max_pixels)]
    return chosen + _patch(geometry, fingerprint, computer)


def choose_whole(
    geometry: Geometry, fingerprint: Fingerprint, computer: Computer
) -> Proposal | None:
    """Choose the size to which whole images are scaled; None where patches are better."""
    if geometry.size_ratio > DIFFERENT_SIZES and fingerprint.objects_per_image() >= MANY_OBJECTS:
        return None
    own = next((size for size in SIZES if size >= geometry.side), SIZES[-1])
    if own <= MAX_WHOLE and 2 * own**2 <= computer.max_pixels:
        return Proposal("image_size", own, "whole images at about their own size lose nothing")
    fits = [size for size in SIZES if min(USUAL_SIZE, own) <= size <= min(MAX_WHOLE, own)]
    fits = [size for size in fits if size == fits[0] or 2 * size**2 <= computer.max_pixels]
    for size in fits:
        if fingerprint.least_ceiling(size) >= GOOD_CEILING:
            break
    ceiling = fingerprint.least_ceiling(size)
    if ceiling < MIN_CEILING or fingerprint.low_ceiling(size) < MIN_LOW_CEILING:
        return None
    reason = f"masks scaled to {size} pixels and back keep a Dice of {floor_dice(ceiling)}"
    return Proposal("image_size", size, reason)


def _patch(geometry: Geometry, fingerprint: Fingerprint, computer: Computer) -> list[Proposal]:
    """Choose the size of patches of slices."""
    scale = max(
        min(_usual_diameter(fingerprint.diameters(k)), OBJECT_WIDTHS * fingerprint.width(k, 0.5))
        for k in range(1, len(fingerprint.names) + 1)
    )
    most = min(PATCHES[1], _round_up(min(geometry.shape[1:]), PATCH_STEP))
    size = int(
        np.clip(_round_up(OBJECTS_PER_PATCH * scale, PATCH_STEP), min(PATCHES[0], most), most)
    )
    while size > 2 * PATCH_STEP and 2 * size**2 > computer.max_pixels:
        size -= PATCH_STEP
    tried = max(one for one in SIZES if one <= MAX_WHOLE)
    why = f"a Dice of {floor_dice(fingerprint.least_ceiling(tried))} at most"
    reason = f"patches, not scaled: whole images scaled to {tried} pixels allow {why}"
    if fingerprint.least_ceiling(tried) >= MIN_CEILING:
        reason = (
            f"patches, not scaled: many small objects "
            f"({fingerprint.objects_per_image():.0f} an image) in images of different sizes"
        )
    return [
        Proposal("patch_size", str(size), reason),
        *_batch(size, size, computer.max_pixels),
    ]


def _batch(height: int, width: int, max_pixels: float) -> list[Proposal]:
    """Choose how many slices a step has; small ones need many, or overhead takes the time."""
    pixels, usual = height * width, USUAL_BATCH * USUAL_SIZE**2
    batch = 4 * (usual // pixels)
    if pixels <= USUAL_SIZE**2:
        batch = USUAL_BATCH * (USUAL_SIZE**2 / pixels) ** 1.5  # 64 images of 64x64
    most = MAX_BATCH if pixels < USUAL_SIZE**2 else USUAL_BATCH
    fits = max(2, int(max_pixels / pixels))
    batch = int(np.clip(batch, 2, min(most, fits)))
    reason = "the default: larger ones would mean fewer steps an epoch"
    if batch > USUAL_BATCH:
        reason = "small images: a step of fewer is bound by overhead"
    elif batch < USUAL_BATCH:
        reason = "what the free memory holds" if batch == fits else "less for large images"
    return [
        Proposal("batch_size", batch, reason),
        *_depth((height, width)),
        *_epoch_images(batch),
    ]


def _depth(sides: Sequence[int]) -> list[Proposal]:
    """Choose how often the input is halved, if not as usual."""
    depth = USUAL_DEPTH
    while depth > 1 and min(sides) // 2**depth < MIN_BOTTOM:
        depth -= 1
    if depth == USUAL_DEPTH:
        return []
    why = f"{min(sides)} pixels, halved more often, would be fewer than {MIN_BOTTOM}"
    return [Proposal("depth", depth, why)]


def _epoch_images(batch: int) -> list[Proposal]:
    """Keep the number of steps of an epoch where batches are large."""
    if batch <= USUAL_BATCH:
        return []
    count = STEPS_PER_EPOCH * batch
    return [Proposal("epoch_images", count, f"at least {STEPS_PER_EPOCH} steps an epoch")]


def _epochs(info: "pd.DataFrame", chosen: Sequence[Proposal], computer: Computer) -> list[Proposal]:
    """Choose fewer epochs than usual for many images, so that the training ends today."""
    shown, pixels = _epoch(info, chosen)
    epochs = int(MAX_SECONDS * PIXELS_PER_SECOND * computer.cores / (shown * pixels))
    if _fields(chosen).get("dimensions") == "3" and epochs >= VOLUME_EPOCHS:
        why = "a volume has the pixels of many images, so that fewer passes are enough"
        return [Proposal("epochs", VOLUME_EPOCHS, why)]
    if epochs >= USUAL_EPOCHS:
        return []
    on = counted(computer.cores, "core")
    why = f"{shown:,.0f} images or patches in each: more takes too long on {on}"
    return [Proposal("epochs", max(MIN_EPOCHS, epochs), why)]


def _fields(proposals: Sequence[Proposal]) -> dict[str, Any]:
    return {name: value for name, value, _ in proposals}


def _epoch(info: "pd.DataFrame", proposals: Sequence[Proposal]) -> tuple[float, float]:
    """Say how many images or patches an epoch shows, and how many pixels each of them has."""
    fields = _fields(proposals)
    size = str(fields.get("patch_size", fields.get("image_size")))
    sides = [int(side) for side in size.split(",")]
    pixels = np.prod(sides if len(sides) > 1 else sides * 2, dtype=float)
    # Every slice, or a patch of every image.
    count = len(info) if "patch_size" in fields else int(info["slices"].sum())
    return max(TRAINED_SHARE * count, fields.get("epoch_images", USUAL_EPOCH)), pixels


def describe_time(
    info: "pd.DataFrame", proposals: Sequence[Proposal], computer: Computer | None = None
) -> str:
    """Estimate how long the training takes that is proposed."""
    computer = computer or Computer(free_memory_bytes(), cores())
    shown, pixels = _epoch(info, proposals)
    epochs = _fields(proposals).get("epochs", USUAL_EPOCHS)
    seconds = epochs * shown * pixels / (PIXELS_PER_SECOND * computer.cores)
    minutes = max(1, round(seconds / 60))
    on = counted(computer.cores, "core")
    return f"about {counted(minutes, 'minute')} of training on {on} without a GPU"


# ------------------------------------------------------------------------------------- volumes


def _dimensions(
    geometry: Geometry, fingerprint: Fingerprint, computer: Computer
) -> tuple[str, str]:
    """Choose between slices, slices with their neighbours, and volumes, and say why."""
    slices, ratio = geometry.shape[0], geometry.anisotropy
    if slices == 1:
        return "2", ""
    if not np.isfinite(ratio):
        return "2.5", "slices with their neighbours: the files do not say how far apart slices are"
    if slices < MIN_SLICES:
        return "2.5", f"slices with their neighbours: {slices} slices are few for three dimensions"
    if ratio >= ANISOTROPIC:
        why = f"slices are {ratio:.1f} times as far apart as pixels"
        return "2.5", f"slices with their neighbours: {why}"
    coarser = _coarsening(geometry, computer)
    if coarser > 1 and _ceiling_at(fingerprint, geometry.side / coarser) < MIN_CEILING:
        why = "what a volume's patch can hold here is too little of it, or too coarse"
        return "2.5", f"slices with their neighbours: {why}"
    return "3", f"slices are {ratio:.1f} times as far apart as pixels: nearly a cube's sides"


def _coarsening(geometry: Geometry, computer: Computer) -> float:
    """By how much voxels must grow until a patch covers MIN_COVER of the volume."""
    voxels = float(np.prod(geometry.shape, dtype=float))
    factor = (MIN_COVER * voxels / computer.patch_voxels) ** (1 / 3)
    return factor if factor > 1 else 1.0


def _ceiling_at(fingerprint: Fingerprint, side: float) -> float:
    """Find the least ceiling at the largest size that was measured and is not above `side`."""
    size = max((one for one in SIZES if one <= side), default=SIZES[0])
    return fingerprint.least_ceiling(size)


def _volume_patch(geometry: Geometry, computer: Computer) -> list[Proposal]:
    """Choose the patch of a volume, and its spacing, depth and batch."""
    coarser = _coarsening(geometry, computer)
    spacing = [coarser * one for one in geometry.spacing_mm]
    shape = [side / coarser for side in geometry.shape]
    depth = USUAL_DEPTH
    while depth > 1 and min(shape[1:]) / 2**depth < MIN_BOTTOM:
        depth -= 1
    patch = shrink_patch([_round_up(side, 2**depth) for side in shape], spacing, depth, computer)
    share = min(1.0, float(np.prod(np.minimum(np.divide(patch, shape), 1))))
    text = ",".join(map(str, patch))
    batch = int(np.clip(min(STEP_VOXELS, computer.max_pixels) // np.prod(patch), 2, 4))
    chosen = [
        Proposal("patch_size", text, f"slices, rows, columns: {share:.0%} of the median volume"),
        Proposal("batch_size", batch, "in the same time, many small steps learn more"),
    ]
    if depth != USUAL_DEPTH:
        why = f"{min(patch[1:])} pixels, halved more often, would be fewer than {MIN_BOTTOM}"
        chosen.append(Proposal("depth", depth, why))
    if coarser > 1:
        why = (
            f"mm, {coarser:.1f} times as coarse as most: a patch shows {MIN_COVER:.0%} of a volume"
        )
        chosen.append(Proposal("spacing", ",".join(f"{one:.3g}" for one in spacing), why))
    return chosen


def shrink_patch(
    patch: list[int], spacing_mm: Sequence[float], depth: int, computer: Computer
) -> list[int]:
    """Shorten the axis that is longest in mm until the patch is small enough."""
    patch, step = list(patch), 2**depth
    while np.prod(patch) > computer.patch_voxels and max(patch) > 2 * step:
        extents = [
            side * mm if side > 2 * step else 0 for side, mm in zip(patch, spacing_mm, strict=True)
        ]
        patch[int(np.argmax(extents))] -= step
    return patch


# ------------------------------------------------------------------ grey levels, augmentation, loss


def _channels(info: "pd.DataFrame", channels: int) -> Proposal:
    """Choose grey, colour, or as many channels as there are."""
    if channels == 1 and set(info.channels) <= {1, 3} and info.in_colour.mean() >= COLOUR_SHARE:
        some = f"{info.in_colour.sum()} of {len(info)} images are in colour"
        return Proposal("channels", 3, f"{some}: as grey ones their stains look alike")
    reason = "most images are grey" if channels == 1 else f"most images have {channels} channels"
    return Proposal("channels", channels, reason)


def _window(info: "pd.DataFrame", channels: int) -> list[Proposal]:
    """Choose the grey levels of CT that hold the objects, with a margin; none for other images."""
    objects = np.concatenate([np.ravel(levels) for levels in info["object"]])
    lowest = np.median([levels[0] for levels in info["quantiles"]])
    # A window counts for all channels, and others than CT's have no Hounsfield units.
    if not len(objects) or lowest >= HOUNSFIELD_BELOW or channels > 1:
        return []
    low, high = np.percentile(objects, (0.5, 99.5))
    margin = max(50.0, 0.25 * (high - low))
    window = f"{(low + high) / 2:.0f},{high - low + 2 * margin:.0f}"
    why = "CT, as grey levels are negative: the objects' range and a margin on both sides"
    return [Proposal("window", window, why)]


def _augmentation(fingerprint: Fingerprint, dimensions: str) -> Proposal:
    """Choose mild changes for objects that lie alike and the same way up, free ones for others.

    Lungs lie alike: turned ones would be no lungs. A heart in short axis or a cell may be turned.
    Volumes are few: with mild changes the validation Dice on the hippocampus fell at the end.
    """
    if dimensions == "3":
        return Proposal("augmentation", "free", "3-D networks overfit where changes are mild")
    agreement = fingerprint.pose_agreement()
    axes = {"rows": 1, "columns": 2}
    sided = [name for name, axis in axes.items() if fingerprint.symmetry(axis) < SYMMETRIC]
    if agreement < ALIKE:
        return Proposal("augmentation", "free", "objects lie anywhere, so images may be turned")
    if not sided:
        why = "objects are the same from all sides, so images may be turned"
        return Proposal("augmentation", "free", why)
    why = f"objects lie alike in all images, and their two sides along {' and '.join(sided)} differ"
    return Proposal("augmentation", "mild", why)


def _mirror(fingerprint: Fingerprint) -> list[Proposal]:
    """Average with the mirrored image where training shows such images; see `kind.find_kind`."""
    order = mirrored_channels(fingerprint.names)
    if order is None or not fingerprint.pairs:
        return []
    partners = [int(channel) - 1 for channel in order[1:]]  # without the background
    if fingerprint.symmetry(2, partners) < SYMMETRIC:
        return []
    why = "left and right look alike: averaged with the mirrored image, twice the time to predict"
    return [Proposal("mirror", True, why)]


def _loss(info: "pd.DataFrame", names: Sequence[str]) -> list[Proposal]:
    """Choose a loss for rare classes; none where the usual one will do."""
    shares = info[[f"share: {name}" for name in names]].to_numpy()
    if not shares.any() or np.median(shares[shares > 0]) >= RARE:
        return []
    why = f"the objects are less than {RARE:.1%} of the pixels: missed pixels count more"
    return [Proposal("loss", "tversky", why)]


# --------------------------------------------------------------------------------------- numbers


def _round_up(value: float, step: int) -> int:
    return int(step * np.ceil(value / step))


def _usual_diameter(diameters: np.ndarray) -> float:
    """Give the diameter of the object that a pixel usually belongs to: specks have no say."""
    if not len(diameters):
        return 0.0
    ordered = np.sort(diameters)
    areas = np.cumsum(ordered**2)
    return float(ordered[np.searchsorted(areas, areas[-1] / 2)])


def floor_dice(value: float) -> str:
    """Write a Dice that is never rounded up to 1."""
    return f"{np.floor(10_000 * value) / 10_000:.4f}"
