"""Spoil X-rays as other hospitals do: a fixed, seeded set, to measure how a model holds up without data from there.

In the manner of ImageNet-C (Hendrycks and Dietterich 2019), at one severity each. Every function takes a grey image
(H, W) float32 in [0, 1], its class ids (H, W) and a random generator, and gives the spoilt image and its ids; sizes may
change. The strong augmentation has most of these kinds too, by other code and at random strengths.
"""

from collections.abc import Callable

import cv2
import numpy as np

from imaging import preprocess

Corrupted = tuple[np.ndarray, np.ndarray]


def _curve(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Corrupted]:
    """Make a corruption of a change of the pixels alone."""
    return lambda image, ids, rng: (np.clip(change(image), 0, 1), ids)


def _noise(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    """Few X-ray quanta: the noise grows with the root of the signal."""
    photons = 60.0
    return np.clip(
        rng.poisson(image * photons) / photons + rng.normal(0, 0.03, image.shape), 0, 1
    ), ids


def _blur(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    return cv2.GaussianBlur(image, (0, 0), 0.008 * max(image.shape)), ids


def _coarse(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    """A thumbnail of 96 pixels, enlarged again."""
    shrink = 96 / max(image.shape)
    small = preprocess.resize(
        image, (round(image.shape[0] * shrink), round(image.shape[1] * shrink))
    )
    return preprocess.resize(small, image.shape), ids


def _jpeg(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    data = cv2.imencode(".jpg", np.uint8(255 * image), [cv2.IMWRITE_JPEG_QUALITY, 10])[1]
    return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) / 255, ids


def _uneven(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    """The tube is off centre: one side gets more light than the other."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in image.shape), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    return np.clip(image * (1 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y)), 0, 1), ids


def _border(value: float) -> Callable[..., Corrupted]:
    """Pad each side by 0 to 20 %."""

    def pad(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
        widths = [
            tuple(int(side * share) for share in rng.uniform(0, 0.2, 2)) for side in image.shape
        ]
        return np.pad(image, widths, constant_values=value), np.pad(ids, widths)

    return pad


def _collimated(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    """Black outside a field that leaves 3 % around the lungs."""
    covered = np.zeros_like(image)
    margin = round(0.03 * max(image.shape))
    places = np.argwhere(ids > 0)
    if not len(places):
        return image, ids
    (y0, x0), (y1, x1) = np.maximum(places.min(0) - margin, 0), places.max(0) + margin
    covered[y0:y1, x0:x1] = image[y0:y1, x0:x1]
    return covered, ids


def _close(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    """A field that ends at the lungs: nothing of the image is left around them."""
    places = np.argwhere(ids > 0)
    if not len(places):
        return image, ids
    (y0, x0), (y1, x1) = places.min(0), places.max(0) + 1
    return image[y0:y1, x0:x1], ids[y0:y1, x0:x1]


def _turned(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    """A patient who leans to one side by 12 degrees."""
    height, width = image.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.choice([-12, 12]), 1.0)
    turned = cv2.warpAffine(ids, matrix, (width, height), flags=cv2.INTER_NEAREST)
    return cv2.warpAffine(image, matrix, (width, height)), turned


def _narrow(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    """Pixels that are not square, or a slim patient: 80 % of the width."""
    size = (image.shape[0], round(0.8 * image.shape[1]))
    return preprocess.resize(image, size), cv2.resize(
        ids, size[::-1], interpolation=cv2.INTER_NEAREST
    )


def _marked(image: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> Corrupted:
    """Letters burnt into two corners, one in a white box, and a cable across the chest."""
    marked, (height, width) = np.uint8(255 * image), image.shape  # letters are drawn on 8 bits only
    corner, opposite = (
        (round(0.02 * width), round(0.02 * height)),
        (round(0.16 * width), round(0.1 * height)),
    )
    cv2.rectangle(marked, corner, opposite, 255, -1)
    for text, x, y, grey in (("R", 0.05, 0.09, 0), ("AP 12:30", 0.6, 0.95, 255)):
        place = (round(x * width), round(y * height))
        cv2.putText(marked, text, place, cv2.FONT_HERSHEY_SIMPLEX, height / 400, grey, 2)
    path = np.cumsum(rng.normal((0.0, 0.09), 0.03, (12, 2)), axis=0) + (rng.uniform(0.3, 0.7), 0.0)
    points = np.int32(path * (width, height))
    cv2.polylines(marked, [points], False, 230, max(1, round(0.008 * width)), cv2.LINE_AA)
    return marked / 255, ids


CORRUPTIONS: dict[str, Callable[..., Corrupted]] = {
    "clean": lambda image, ids, rng: (image, ids),
    "dark (gamma 2.5)": _curve(lambda image: image**2.5),
    "bright (gamma 0.4)": _curve(lambda image: image**0.4),
    "pale (a third of the contrast)": _curve(lambda image: 0.35 + 0.33 * image),
    "hard film (sigmoid)": _curve(lambda image: 1 / (1 + np.exp(-12 * (image - 0.5)))),
    "overexposed (brightest quarter lost)": _curve(lambda image: image / 0.75),
    "inverted": _curve(lambda image: 1 - image),
    "12 grey levels": _curve(lambda image: np.round(11 * image) / 11),
    "uneven field": _uneven,
    "quantum noise": _noise,
    "blur": _blur,
    "96 pixels": _coarse,
    "JPEG quality 10": _jpeg,
    "black borders": _border(0.0),
    "white borders": _border(1.0),
    "collimated to the lungs": _collimated,
    "cropped to the lungs": _close,
    "turned by 12 degrees": _turned,
    "80 % of the width": _narrow,
    "markers and a cable": _marked,
}


def corrupt(name: str, image: np.ndarray, ids: np.ndarray, seed: int) -> Corrupted:
    """Spoil a decoded image (H, W, C): uint8 (H, W, 1) and its ids; the same for the same name, image and seed."""
    grey = preprocess.to_channels(image, 1)[..., 0]
    grey = grey / (
        255 if image.dtype == np.uint8 else max(1.0, float(grey.max()))
    )  # 12 bits come in 16
    rng = np.random.default_rng((seed, list(CORRUPTIONS).index(name)))
    spoilt, ids = CORRUPTIONS[name](grey.astype(np.float32), ids, rng)
    return np.uint8(np.round(255 * spoilt))[..., None], ids
