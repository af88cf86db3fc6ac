"""Change training images as other patients, machines and hospitals would.

Masks follow the geometry. The pipelines are albumentations'; two steps are our own.
"""

import os
from typing import Any, NamedTuple

import cv2
import numpy as np

from imaging.labels import Classes, mirrored_channels

STRENGTHS = ("none", "mild", "strong", "free")


class Amounts(NamedTuple):
    """Strengths of the basic steps; `augmentation_jax.py` uses them too."""

    scale: tuple[float, float]  # of each axis
    shift: float  # share of the side
    rotate: float  # degrees
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


def draw_opacity(foreground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one to three soft ellipses, centred in the foreground.

    foreground: bool (H, W). Returns float32 (H, W, 2): opacity in [0, 1] and grey level.
    """
    height, width = foreground.shape
    opacity = np.zeros((height, width), np.float32)
    places = np.argwhere(foreground)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(rng.integers(1, 4) if len(places) else 0):
        cy, cx = places[rng.integers(len(places))]
        ry, rx = rng.uniform(0.05, 0.25, 2) * (height, width)
        distance = np.hypot((y - cy) / ry, (x - cx) / rx)
        edge = rng.uniform(0.1, 0.6)  # share of the radius over which it fades
        opacity = np.maximum(opacity, rng.uniform(0.3, 1.0) * np.clip((1 - distance) / edge, 0, 1))
    return np.stack([opacity, np.full_like(opacity, rng.uniform(140, 255))], axis=-1)


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


def own_transforms(classes: Classes) -> tuple[Any, Any]:
    """Make the two transforms that albumentations lacks: Mirror and Opacity."""
    import albumentations as A  # predictions do without its seconds of start-up

    order, count = mirrored_planes(classes), len(classes.names)

    class Mirror(A.HorizontalFlip):
        """Mirror the image; a left lung becomes a right one."""

        def apply_to_mask(self, mask: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
            return super().apply_to_mask(mask, *args, **params)[..., order]

    class Opacity(A.ImageOnlyTransform):
        """Hide some of the foreground as fluid hides lung; the mask stays."""

        def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
            rng = np.random.default_rng(self.random_generator.integers(2**32))
            return {"veil": draw_opacity(data["mask"][..., :count].max(-1) > 127, rng)}

        def apply(self, img: np.ndarray, veil: np.ndarray, **params: Any) -> np.ndarray:
            return np.uint8(img + (veil[..., 1:] - img) * veil[..., :1])

    return Mirror, Opacity


def basic_steps(amounts: Amounts) -> list[Any]:
    """Make the steps for images of any modality."""
    import albumentations as A

    shift, turn = amounts.shift, amounts.rotate
    return [
        A.Affine(
            scale=amounts.scale, translate_percent=(-shift, shift), rotate=(-turn, turn), p=0.9
        ),
        A.ElasticTransform(alpha=amounts.elastic, sigma=6, p=amounts.elastic_p),
        A.RandomBrightnessContrast(amounts.light, amounts.light, p=0.5),
        A.RandomGamma(tuple(round(100 * one) for one in amounts.gamma), p=0.5),
        *([A.Downscale(scale_range=amounts.downscale, p=0.2)] if amounts.downscale else []),
        A.GaussNoise(amounts.noise, p=0.3),
        A.GaussianBlur((3, 5), p=0.2),
    ]


def build_augmentation(classes: Classes, seed: int, strength: str = "mild") -> Any:
    """Build the albumentations pipeline for a uint8 image (H, W, C) and its masks (H, W, K).

    classes: a mirror swaps left and right ones.
    strength:
        none: nothing is changed.
        mild: what varies within one hospital, in any modality.
        strong: what varies between X-rays of different hospitals and diseases.
        free: organs at any angle, size and place, as in MRI and CT (after nnU-Net, Isensee et
            al. 2021).
    """
    # Without this its import asks the internet for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    Mirror, Opacity = own_transforms(classes)
    flip = Mirror(p=0 if mirrored_planes(classes) is None else 0.5)

    def film_edge(fill: int) -> A.CropAndPad:
        return A.CropAndPad(percent=(-0.12, 0.06), sample_independently=True, fill=fill)

    strong = [
        flip,
        A.Affine(
            scale=(0.75, 1.2),
            translate_percent=(-0.08, 0.08),
            rotate=(-15, 15),
            shear=(-4, 4),
            p=0.9,
        ),
        A.ElasticTransform(alpha=30, sigma=6, p=0.15),
        # Film edges and collimators: black or white from one or more sides.
        A.OneOf([film_edge(fill) for fill in (0, 0, 255)], p=0.3),
        A.RandomToneCurve(scale=0.3, p=0.3),
        A.RandomBrightnessContrast(0.3, 0.4, p=0.5),
        A.RandomGamma((40, 220), p=0.5),
        A.Illumination(intensity_range=(0.05, 0.2), p=0.2),
        Opacity(p=0.3),
        A.InvertImg(p=0.1),
        A.Downscale(scale_range=(0.3, 0.7), p=0.15),
        A.GaussNoise((0.01, 0.1), p=0.3),
        A.GaussianBlur((3, 7), p=0.2),
        A.ImageCompression(quality_range=(15, 70), p=0.1),
    ]
    steps = {"none": [], "strong": strong}
    for name, amounts in AMOUNTS.items():
        steps[name] = [flip, *basic_steps(amounts)]
    return A.Compose(steps[strength], seed=seed, mask_interpolation=cv2.INTER_LINEAR)
