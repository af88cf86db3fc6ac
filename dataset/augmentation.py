"""Change training images and volumes as other patients, machines and hospitals would.

Masks follow the geometry. The pipelines are albumentations'; four steps are our own. A volume is
changed by the same pipeline: each step does the same to all its slices, only noise is drawn for
each voxel. Where voxels are cubes, "slices" are cut across an axis that is drawn for each volume.

To add a step, name it in `basic_steps`, with its strengths in AMOUNTS. It must know the targets
`images` and `masks` beside `image` and `mask`, which albumentations' own steps do.
"""

import os
import random
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import cv2
import numpy as np

import utils
from imaging.labels import Classes, mirrored_channels
from utils import UserError

STRENGTHS = ("none", "mild", "strong", "free")
STEPS = {
    *("affine", "elastic", "edges", "texture", "tone", "curve", "light", "gamma", "field"),
    *("invert", "marks", "coarse", "noise", "blur", "jpeg"),
}


class Amounts(NamedTuple):
    """Strengths of the basic steps, for images and volumes."""

    scale: tuple[float, float]  # of each axis
    shift: float  # share of the side
    rotate: float  # degrees; TILT at most where objects have an upper and a lower side
    elastic: float  # pixels of displacement, before they are smoothed
    elastic_p: float  # probability
    light: float  # of brightness and contrast
    gamma: tuple[float, float]
    downscale: tuple[float, float] | None  # to this share of the side
    noise: tuple[float, float]  # standard deviation


AMOUNTS = {
    "mild": Amounts((0.9, 1.1), 0.05, 6, 30, 0.15, 0.25, (0.6, 1.6), None, (0.01, 0.05)),
    "free": Amounts((0.7, 1.4), 0.1, 180, 60, 0.3, 0.3, (0.5, 2.0), (0.4, 0.8), (0.01, 0.07)),
}

TILT = 30  # degrees, as nnU-Net turns volumes
MIN_SIDE = 8  # voxels of a volume that is cut across any axis


def split_strength(text: str) -> tuple[str, set[str]]:
    """Split "strong-invert-noise" into the strength and the steps that it leaves out.

    Raises UserError for a step that is not known.
    """
    strength, *without = text.split("-")
    if unknown := set(without) - STEPS:
        raise UserError(
            f"augmentation {text!r} leaves out {', '.join(sorted(unknown))}; expected some of "
            f"{', '.join(sorted(STEPS))}"
        )
    return strength, set(without)


def convolve_randomly(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mix an image with its convolution by a random kernel (Xu et al. 2021, arXiv 2007.13003).

    image: uint8 (H, W, C). Shapes stay, textures and the order of grey levels change.
    """
    size = rng.choice([1, 3, 5, 7])
    changed = cv2.filter2D(np.float32(image), -1, rng.normal(0, 1 / size, (size, size)))
    share = rng.uniform()
    mixed = share * image + (1 - share) * stretch(changed.reshape(image.shape))
    return np.uint8(stretch(mixed))


def stretch(image: np.ndarray) -> np.ndarray:
    """Stretch the grey levels of an image to 0 to 255, but for the outermost 1 %."""
    low, high = np.percentile(image[::3, ::3], (0.5, 99.5))
    return np.clip((image - low) * (255 / (high - low + 1e-3)), 0, 255)


def random_curve(rng: np.random.Generator) -> np.ndarray:
    """Draw new grey levels uint8 (256,) along a curve that may fall (Zhou et al. 2021)."""
    levels, share = np.arange(256.0), rng.uniform()
    bent = np.interp(levels, np.linspace(0, 255, 5), rng.uniform(0, 255, 5))
    mixed = share * levels + (1 - share) * bent
    return np.uint8(255 * (mixed - mixed.min()) / (np.ptp(mixed) + 1e-3))


def mirrored_planes(classes: Classes) -> np.ndarray | None:
    """List which mask takes each one's place in a mirrored image: those of `Dataset.take`.

    None if a class has a side but no partner.
    """
    order = mirrored_channels(classes.names)
    if order is None:
        return None
    planes = np.arange(classes.num_planes)
    planes[: len(classes.names)] = order[1:] - 1
    return planes


def has_sides(classes: Classes) -> bool:
    """Say whether some class is that of one side, such as "left lung"."""
    order = mirrored_planes(classes)
    return order is None or bool((order != np.arange(len(order))).any())


def own_transforms(classes: Classes) -> tuple[Any, Any, Any, Any]:
    """Make the transforms that albumentations lacks: Mirror, Noise, Texture and Curve."""
    import albumentations as A  # predictions do without its seconds of start-up

    order = mirrored_planes(classes)

    class Mirror(A.HorizontalFlip):
        """Mirror the image; a left lung becomes a right one."""

        def apply_to_mask(self, mask: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
            return super().apply_to_mask(mask, *args, **params)[..., order]

    class Noise(A.GaussNoise):
        """Add noise, to a volume as to one tall image; albumentations repeats it in each slice."""

        def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
            image = data["image"] if "image" in data else np.concatenate(data["images"])
            return super().get_params_dependent_on_data(params, {"image": image})

        def apply_to_images(self, images: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
            return self.apply(np.concatenate(images), **params).reshape(images.shape)

    class Random(A.ImageOnlyTransform):
        """A change that draws its own random numbers."""

        def get_params(self) -> dict:
            return {"seed": int(self.random_generator.integers(2**32))}

    class Texture(Random):
        """Change the texture by a random convolution."""

        def apply(self, img: np.ndarray, seed: int, **params: Any) -> np.ndarray:
            return convolve_randomly(img, np.random.default_rng(seed))

    class Curve(Random):
        """Change the grey levels by a random curve."""

        def apply(self, img: np.ndarray, seed: int, **params: Any) -> np.ndarray:
            return random_curve(np.random.default_rng(seed))[img]

    return Mirror, Noise, Texture, Curve


def basic_steps(amounts: Amounts, turn: float, noise: Any, border: int) -> dict[str, Any]:
    """Make the steps for images of any modality.

    turn: degrees; noise: the class; border: OpenCV's mode.
    """
    import albumentations as A

    shift = amounts.shift
    steps = {
        "affine": A.Affine(
            scale=amounts.scale,
            translate_percent=(-shift, shift),
            rotate=(-turn, turn),
            border_mode=border,
            p=0.9,
        ),
        "elastic": A.ElasticTransform(
            alpha=amounts.elastic, sigma=6, border_mode=border, p=amounts.elastic_p
        ),
        "light": A.RandomBrightnessContrast(amounts.light, amounts.light, p=0.5),
        "gamma": A.RandomGamma(tuple(round(100 * one) for one in amounts.gamma), p=0.5),
    }
    if amounts.downscale:
        steps["coarse"] = A.Downscale(scale_range=amounts.downscale, p=0.2)
    steps["noise"] = noise(amounts.noise, p=0.3)
    steps["blur"] = A.GaussianBlur((3, 5), p=0.2)
    return steps


def strong_steps(noise: Any, texture: Any, curve: Any, border: int) -> dict[str, Any]:
    """Make the steps for X-rays of other hospitals."""
    import albumentations as A

    def film_edge(fill: int) -> A.CropAndPad:
        return A.CropAndPad(percent=(-0.12, 0.06), sample_independently=True, fill=fill)

    return {
        "affine": A.Affine(
            scale=(0.65, 1.35),
            translate_percent=(-0.12, 0.12),
            rotate=(-20, 20),
            shear=(-6, 6),
            border_mode=border,
            p=0.9,
        ),
        "elastic": A.ElasticTransform(alpha=60, sigma=6, border_mode=border, p=0.4),
        # Film edges and collimators: black or white from one or more sides.
        "edges": A.OneOf([film_edge(fill) for fill in (0, 0, 255)], p=0.3),
        "texture": texture(p=0.4),
        "tone": A.RandomToneCurve(scale=0.3, p=0.4),
        "curve": curve(p=0.3),
        "light": A.RandomBrightnessContrast(0.35, 0.35, p=0.5),
        "gamma": A.RandomGamma((40, 220), p=0.5),
        "field": A.Illumination(intensity_range=(0.05, 0.2), p=0.4),
        "invert": A.InvertImg(p=0.1),
        # Letters, cables, devices.
        "marks": A.CoarseDropout(
            num_holes_range=(1, 4),
            hole_height_range=(0.01, 0.12),
            hole_width_range=(0.01, 0.3),
            fill="random_uniform",
            p=0.3,
        ),
        "coarse": A.Downscale(scale_range=(0.3, 0.7), p=0.2),
        "noise": noise((0.01, 0.1), p=0.3),
        "blur": A.GaussianBlur((3, 7), p=0.2),
        "jpeg": A.ImageCompression(quality_range=(15, 70), p=0.1),
    }


class Kind(NamedTuple):
    """What the images of a data set are like, and so how they may be changed."""

    dimensions: int = 2  # 2 for images (H, W, C), 3 for volumes (D, H, W, C)
    # A volume's voxels are cubes, or nearly; it is turned about any axis, not only about that
    # across its slices.
    isotropic: bool = False
    patches: bool = False  # pieces of larger images: a reflection comes in from outside, not black
    mirrored_axes: Sequence[int] = (2,)  # 0 slices, 1 rows, 2 columns
    inverted: bool = False  # objects are bright in some images and dark in others


def make_pipeline(classes: Classes, strength: str, kind: Kind) -> Any:
    """Make albumentations' pipeline; a volume is mirrored before."""
    # Without this its import asks the internet for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    with utils.hidden(["torch"]):  # it would take PyTorch along: three seconds more
        import albumentations as A

    strength, without = split_strength(strength)
    mirror, noise, texture, curve = own_transforms(classes)
    border = cv2.BORDER_REFLECT_101 if kind.patches else cv2.BORDER_CONSTANT
    if strength == "strong":
        steps = strong_steps(noise, texture, curve, border)
        without = without | ({"edges"} if kind.patches else set())  # a patch has no film edge
    else:
        amounts = AMOUNTS[strength]
        # Half a turn is two mirrors, so it is right only where both are. It swaps no classes.
        turned = {0, 1, 2} if kind.dimensions == 3 and kind.isotropic else {1, 2}
        may_turn = turned <= set(kind.mirrored_axes) and not has_sides(classes)
        turn = amounts.rotate if may_turn else min(amounts.rotate, TILT)
        steps = basic_steps(amounts, turn, noise, border)
    chosen = [step for name, step in steps.items() if name not in without]
    if kind.inverted and "invert" not in without:
        chosen.append(A.InvertImg(p=0.3))
    if kind.dimensions == 2 and 1 in kind.mirrored_axes:
        chosen.insert(0, A.VerticalFlip(p=0.5))
    if kind.dimensions == 2 and 2 in kind.mirrored_axes:
        chosen.insert(0, mirror(p=0.5))
    return A.Compose(chosen, mask_interpolation=cv2.INTER_LINEAR)


class Augmentation(threading.local):
    """Change an image or a volume and its masks.

    The result follows from image and seed alone. Each thread that uses it has a pipeline of its
    own: a pipeline holds its random numbers.

    classes: a mirror swaps left and right ones. If one has a side but no partner, nothing is
        mirrored left to right.
    strength:
        none: nothing is changed.
        mild: what varies within one hospital, in any modality.
        strong: what varies between X-rays of different hospitals.
        free: organs of any size, anywhere, as in MRI and CT (after nnU-Net, Isensee et al. 2021);
            at any angle if they may be mirrored along all axes and no class is that of one side,
            else tilted by 30 degrees at most.
        A name after a dash leaves that step out: "strong-invert-noise".

    Raises UserError for a strength that is not for volumes.
    """

    def __init__(
        self,
        classes: Classes,
        strength: str = "mild",
        kind: Kind = Kind(),  # noqa: B008 (a NamedTuple cannot be changed)
    ) -> None:
        base, _ = split_strength(strength)
        strength = base if base == "none" else strength  # nothing can be left out of it
        if base == "strong" and kind.dimensions == 3:
            raise UserError(
                "augmentation is strong, which is for X-rays; expected none, mild or free for "
                "volumes with dimensions 3"
            )
        self.order = mirrored_planes(classes)
        never = {2} if self.order is None else set()
        axes = () if strength == "none" else sorted(set(kind.mirrored_axes) - never)
        kind = kind._replace(mirrored_axes=axes)
        self.classes, self.strength, self.kind = classes, strength, kind

    @cached_property
    def pipeline(self) -> Any:
        """This thread's pipeline."""
        return make_pipeline(self.classes, self.strength, self.kind)

    def __call__(
        self, image: np.ndarray, masks: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment uint8 (H, W, C) and (H, W, K), or (D, H, W, C) and (D, H, W, K)."""
        if self.strength == "none":
            return image, masks
        rng = np.random.default_rng(seed)
        # One stream for all steps. With set_random_seed each step would have a stream of its own,
        # all with the same numbers.
        self.pipeline.set_random_state(rng, random.Random(int(seed)))
        if image.ndim == 3:
            changed = self.pipeline(image=image, mask=masks)
            return changed["image"], changed["mask"]
        for axis in self.kind.mirrored_axes:
            if rng.random() < 0.5:
                image, masks = np.flip(image, axis), np.flip(masks, axis)
                masks = masks[..., self.order] if axis == 2 else masks
        is_thin = min(image.shape[:3]) < MIN_SIDE
        across = rng.integers(3) if self.kind.isotropic and not is_thin else 0
        slices = [np.moveaxis(array, across, 0) for array in (image, masks)]
        changed = self.pipeline(images=slices[0], masks=slices[1])
        return tuple(np.moveaxis(changed[name], 0, across) for name in ("images", "masks"))
