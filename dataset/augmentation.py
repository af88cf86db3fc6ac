"""Change training images as other patients, machines and hospitals would: geometry, exposure, film edges, noise."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from imaging.labels import mirrored_channels

STRENGTHS = ("none", "mild", "strong", "free")


class Amounts(NamedTuple):
    """How much of each plain step there is, low and high; `on_device.py` takes them too."""

    scale: tuple[float, float]  # of each axis
    shift: float  # share of the side
    rotate: float  # degrees
    elastic: float  # pixels, before they are made smooth
    elastic_p: float  # how often
    light: float  # brightness and contrast
    gamma: tuple[float, float]
    downscale: tuple[float, float] | None  # to this share of the side
    noise: tuple[float, float]  # standard deviation


AMOUNTS = {
    "mild": Amounts((0.9, 1.1), 0.05, 6, 30, 0.15, 0.25, (0.6, 1.6), None, (0.01, 0.05)),
    "free": Amounts((0.7, 1.4), 0.1, 180, 60, 0.3, 0.3, (0.5, 2.0), (0.4, 0.8), (0.01, 0.07)),
}


def draw_opacity(foreground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make one to three soft ellipses centred in the foreground (H, W, bool): opacity in [0, 1] and grey level.

    Returns float32 (H, W, 2).
    """
    height, width = foreground.shape
    opacity, places = np.zeros((height, width), np.float32), np.argwhere(foreground)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(rng.integers(1, 4) if len(places) else 0):
        cy, cx = places[rng.integers(len(places))]
        ry, rx = rng.uniform(0.05, 0.25, 2) * (height, width)
        distance = np.hypot((y - cy) / ry, (x - cx) / rx)
        edge = rng.uniform(0.1, 0.6)  # share of the radius over which it fades
        opacity = np.maximum(opacity, rng.uniform(0.3, 1.0) * np.clip((1 - distance) / edge, 0, 1))
    return np.stack([opacity, np.full_like(opacity, rng.uniform(140, 255))], axis=-1)


def own_transforms(order: np.ndarray) -> tuple[Any, Any]:
    """Make the two transforms that albumentations lacks: Mirror, which swaps the sides' masks by `order`; Opacity."""
    import albumentations as A  # here, because prediction does without its seconds of start-up

    class Mirror(A.HorizontalFlip):
        def apply_to_mask(self, mask: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
            return super().apply_to_mask(mask, *args, **params)[..., order[1:] - 1]

    class Opacity(A.ImageOnlyTransform):
        """Hide some of the foreground as fluid or consolidation hides lung: it is still to be found."""

        def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
            rng = np.random.default_rng(self.random_generator.integers(2**32))
            return {"veil": draw_opacity(data["mask"].max(-1) > 127, rng)}

        def apply(self, img: np.ndarray, veil: np.ndarray, **params: Any) -> np.ndarray:
            return np.uint8(img + (veil[..., 1:] - img) * veil[..., :1])

    return Mirror, Opacity


def basic_steps(amounts: Amounts) -> list[Any]:
    """Make the steps that suit any modality."""
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


def build_augmentation(names: Sequence[str], seed: int, strength: str = "mild") -> Any:
    """Build the albumentations pipeline for a uint8 image (H, W, C) and its masks (H, W, K), see `Dataset`, seeded.

    mild: the variation within one hospital, of any modality. strong: that of X-rays between hospitals and diseases.
    free: organs at any angle, size and place, as MRI and CT show them (after nnU-Net, Isensee et al. 2021).
    """
    os.environ.setdefault(
        "NO_ALBUMENTATIONS_UPDATE", "1"
    )  # its import asks the internet for a newer version
    import albumentations as A

    order = mirrored_channels(names)
    Mirror, Opacity = own_transforms(np.arange(len(names) + 1) if order is None else order)
    flip = Mirror(p=0 if order is None else 0.5)
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
        A.OneOf(  # film edges and collimators: black or white from one or more sides
            [
                A.CropAndPad(percent=(-0.12, 0.06), sample_independently=True, fill=fill)
                for fill in (0, 0, 255)
            ],
            p=0.3,
        ),
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
    steps = {"none": [], "strong": strong} | {
        name: [flip, *basic_steps(amounts)] for name, amounts in AMOUNTS.items()
    }
    return A.Compose(steps[strength], seed=seed, mask_interpolation=cv2.INTER_LINEAR)
