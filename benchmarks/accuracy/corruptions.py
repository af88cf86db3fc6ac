"""Corrupt X-rays as other hospitals' images differ: a fixed, seeded set of 19 corruptions.

In the manner of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), at one severity each.
Every function takes a grey image (H, W) float32 in [0, 1], its class ids (H, W) and a random
generator. It returns the corrupted image and its ids; their size may change. The strong
augmentation has most of these kinds too, by other code and at random strengths.
"""

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np

from imaging import preprocess
from imaging.grid import resize

Corrupted = tuple[np.ndarray, np.ndarray]
Rng = np.random.Generator


def change_greys(
    image: np.ndarray, ids: np.ndarray, rng: Rng, change: Callable[[np.ndarray], np.ndarray]
) -> Corrupted:
    """Apply a function to the grey levels."""
    return np.clip(change(image), 0, 1), ids


def add_noise(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Simulate few X-ray quanta: the noise grows with the root of the signal."""
    photons = 60.0
    quanta = rng.poisson(image * photons) / photons
    return np.clip(quanta + rng.normal(0, 0.03, image.shape), 0, 1), ids


def blur(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Blur by a Gaussian of 0.8 % of the longer side."""
    return cv2.GaussianBlur(image, (0, 0), 0.008 * max(image.shape)), ids


def coarsen(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Shrink to a thumbnail of 96 pixels and enlarge it again."""
    scale = 96 / max(image.shape)
    size = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    return resize(resize(image, size), image.shape), ids


def compress(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Save as JPEG of quality 10."""
    data = cv2.imencode(".jpg", np.uint8(255 * image), [cv2.IMWRITE_JPEG_QUALITY, 10])[1]
    return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) / 255, ids


def light_unevenly(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Give one side more light than the other, as a tube off centre does."""
    height, width = image.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    return np.clip(image * (1 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y)), 0, 1), ids


def add_border(image: np.ndarray, ids: np.ndarray, rng: Rng, grey: float) -> Corrupted:
    """Pad each side by 0 to 20 %."""
    widths = []
    for side in image.shape:
        before, after = rng.uniform(0, 0.2, 2)
        widths.append((int(side * before), int(side * after)))
    return np.pad(image, widths, constant_values=grey), np.pad(ids, widths)


def bounding_box(ids: np.ndarray, margin: int = 0) -> tuple[slice, slice] | None:
    """Give the rows and columns of the foreground with a margin; None if there is none."""
    places = np.argwhere(ids > 0)
    if not len(places):
        return None
    top, left = np.maximum(places.min(0) - margin, 0)
    bottom, right = places.max(0) + max(1, margin)
    return slice(top, bottom), slice(left, right)


def collimate(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Blacken all but a field that leaves 3 % around the lungs."""
    field = bounding_box(ids, margin=round(0.03 * max(image.shape)))
    if field is None:
        return image, ids
    covered = np.zeros_like(image)
    covered[field] = image[field]
    return covered, ids


def crop(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Crop to the lungs: nothing around them is left."""
    field = bounding_box(ids)
    return (image, ids) if field is None else (image[field], ids[field])


def rotate(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Lean the patient to one side by 12 degrees."""
    height, width = image.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.choice([-12, 12]), 1.0)
    turned = cv2.warpAffine(ids, matrix, (width, height), flags=cv2.INTER_NEAREST)
    return cv2.warpAffine(image, matrix, (width, height)), turned


def narrow(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Shrink to 80 % of the width: pixels that are not square, or a slim patient."""
    height, width = image.shape[0], round(0.8 * image.shape[1])
    ids = cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST)
    return resize(image, (height, width)), ids


def add_markers(image: np.ndarray, ids: np.ndarray, rng: Rng) -> Corrupted:
    """Write letters into two corners, one in a white box, and lay a cable across the chest."""
    marked = np.uint8(255 * image)  # OpenCV draws letters on 8 bits only
    height, width = image.shape

    def point(x: float, y: float) -> tuple[int, int]:
        return round(x * width), round(y * height)

    cv2.rectangle(marked, point(0.02, 0.02), point(0.16, 0.1), 255, -1)
    font, size = cv2.FONT_HERSHEY_SIMPLEX, height / 400
    cv2.putText(marked, "R", point(0.05, 0.09), font, size, 0, 2)
    cv2.putText(marked, "AP 12:30", point(0.6, 0.95), font, size, 255, 2)
    path = np.cumsum(rng.normal((0.0, 0.09), 0.03, (12, 2)), axis=0) + (rng.uniform(0.3, 0.7), 0.0)
    cable = np.int32(path * (width, height))
    cv2.polylines(marked, [cable], False, 230, max(1, round(0.008 * width)), cv2.LINE_AA)
    return marked / 255, ids


# The random numbers of a corruption depend on its place here.
CORRUPTIONS: dict[str, Callable[..., Corrupted]] = {
    "clean": partial(change_greys, change=lambda image: image),
    "dark (gamma 2.5)": partial(change_greys, change=lambda image: image**2.5),
    "bright (gamma 0.4)": partial(change_greys, change=lambda image: image**0.4),
    "pale (a third of the contrast)": partial(
        change_greys, change=lambda image: 0.35 + 0.33 * image
    ),
    "hard film (sigmoid)": partial(
        change_greys, change=lambda image: 1 / (1 + np.exp(-12 * (image - 0.5)))
    ),
    "overexposed (brightest quarter lost)": partial(
        change_greys, change=lambda image: image / 0.75
    ),
    "inverted": partial(change_greys, change=lambda image: 1 - image),
    "12 grey levels": partial(change_greys, change=lambda image: np.round(11 * image) / 11),
    "uneven field": light_unevenly,
    "quantum noise": add_noise,
    "blur": blur,
    "96 pixels": coarsen,
    "JPEG quality 10": compress,
    "black borders": partial(add_border, grey=0.0),
    "white borders": partial(add_border, grey=1.0),
    "collimated to the lungs": collimate,
    "cropped to the lungs": crop,
    "turned by 12 degrees": rotate,
    "80 % of the width": narrow,
    "markers and a cable": add_markers,
}


def corrupt(name: str, image: np.ndarray, ids: np.ndarray, seed: int) -> Corrupted:
    """Corrupt a decoded image (H, W, C): uint8 (H, W, 1) and its ids.

    The same name, image and seed give the same result.
    """
    grey = preprocess.to_channels(image, 1)[..., 0]
    # 16 bits often hold 12: the brightest pixel is white.
    white = 255 if image.dtype == np.uint8 else max(1.0, float(grey.max()))
    rng = np.random.default_rng((seed, list(CORRUPTIONS).index(name)))
    corrupted, ids = CORRUPTIONS[name]((grey / white).astype(np.float32), ids, rng)
    return np.uint8(np.round(255 * corrupted))[..., None], ids
