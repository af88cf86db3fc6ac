"""Change training images as other patients, machines and hospitals would: geometry, exposure, film edges, noise."""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

STRENGTHS = ("none", "mild", "strong")


def mirrored_ids(names: Sequence[str]) -> np.ndarray | None:
    """Tell what a mirrored image makes of each class id: uint8 (K + 1,), "left lung" and "right lung" changing places.

    None where a side has no partner, so that mirroring would be wrong.
    """
    order = [0]
    for name in names:
        other = re.sub(
            r"(?i)(?<![a-z])(left|right)(?![a-z])", lambda side: "right" if side[0].lower() == "left" else "left", name
        )
        partners = [i for i, candidate in enumerate(names) if candidate.lower() == other.lower()]
        if not partners:
            return None
        order.append(1 + partners[0])
    return np.array(order, np.uint8)


def augmentation(names: Sequence[str], seed: int, strength: str = "mild") -> Any:
    """Build the albumentations pipeline for a uint8 image (H, W, C) and its class ids (H, W), seeded.

    mild: the variation within one hospital. strong: that between hospitals, for images from elsewhere.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the internet for a newer version
    import albumentations as A  # here, because prediction does without its seconds of start-up

    mirror = mirrored_ids(names)

    class Mirror(A.HorizontalFlip):
        def apply_to_mask(self, mask: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
            return mirror[super().apply_to_mask(mask, *args, **params)]

    mild = [
        Mirror(p=0.5 if mirror is not None else 0),
        A.Affine(scale=(0.9, 1.1), translate_percent=(-0.05, 0.05), rotate=(-6, 6), p=0.9),
        A.ElasticTransform(alpha=30, sigma=6, p=0.15),
        A.RandomBrightnessContrast(0.25, 0.25, p=0.5),
        A.RandomGamma((60, 160), p=0.5),
        A.GaussNoise((0.01, 0.05), p=0.3),
        A.GaussianBlur((3, 5), p=0.2),
    ]
    strong = [
        Mirror(p=0.5 if mirror is not None else 0),
        A.Affine(scale=(0.75, 1.2), translate_percent=(-0.08, 0.08), rotate=(-15, 15), shear=(-4, 4), p=0.9),
        A.ElasticTransform(alpha=30, sigma=6, p=0.15),
        A.OneOf(  # film edges and collimators: black or white from one or more sides
            [A.CropAndPad(percent=(-0.12, 0.06), sample_independently=True, fill=fill) for fill in (0, 0, 255)],
            p=0.3,
        ),
        A.RandomToneCurve(scale=0.3, p=0.3),
        A.RandomBrightnessContrast(0.3, 0.4, p=0.5),
        A.RandomGamma((40, 220), p=0.5),
        A.Illumination(intensity_range=(0.05, 0.2), p=0.2),
        A.InvertImg(p=0.1),
        A.Downscale(scale_range=(0.3, 0.7), p=0.15),
        A.GaussNoise((0.01, 0.1), p=0.3),
        A.GaussianBlur((3, 7), p=0.2),
        A.ImageCompression(quality_range=(15, 70), p=0.1),
    ]
    return A.Compose({"none": [], "mild": mild, "strong": strong}[strength], seed=seed)
