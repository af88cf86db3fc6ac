"""Batches that are augmented where the network computes: the images lie on the GPU (JAX).

The augmentations are those of `augmentation.py`, with one resampling instead of up to three and
random numbers of their own. "strong" is left to albumentations. Each step is tested beside
albumentations' own; the speed on a GPU is not measured.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import cv2
import keras
import numpy as np

if TYPE_CHECKING:
    from jax import Array
from dataset.augmentation import AMOUNTS, Amounts, mirrored_planes
from dataset.batches import Batches, Shard, to_targets
from dataset.cache import Dataset
from imaging.labels import Classes

MAX_MEMORY_SHARE = 0.25  # of the GPU's memory that the images may take
SIGMA = 6.0  # pixels over which a displacement is smooth


def fits_on_device(dataset: Dataset, strength: str, shard: Shard) -> bool:
    """Say whether one process trains with JAX on a GPU that can hold and augment the images."""
    if keras.backend.backend() != "jax" or shard.world_size > 1:
        return False
    if strength not in ("none", *AMOUNTS) or not isinstance(dataset.rows, np.ndarray):
        return False
    import jax

    memory = jax.devices()[0].memory_stats() or {}  # a CPU has none
    copies = 1 + 2 * dataset.neighbours  # each image is also its neighbours' channel
    return copies * dataset.rows.nbytes <= MAX_MEMORY_SHARE * memory.get("bytes_limit", 0)


class DeviceBatches(Batches):
    """`Batches` of one process as JAX arrays: the same images in the same order."""

    def __init__(
        self,
        dataset: Dataset,
        slices: np.ndarray,
        batch_size: int,
        strength: str = "",
        **options: Any,
    ) -> None:
        import jax

        super().__init__(dataset, np.arange(len(slices)), batch_size, strength, **options)
        self.on_device = jax.device_put(dataset.take(slices))
        finish = partial(make_batch, amounts=AMOUNTS.get(strength), classes=dataset.classes)
        self.finish = jax.jit(finish)

    def __getitem__(self, index: int) -> tuple["Array", "Array"]:
        """Return a batch of this epoch; JAX computes it beside the step before."""
        order = self.order(self.epoch)
        places = order[index * self.batch_size : (index + 1) * self.batch_size]
        seeds = np.array([self.seed, self.epoch, index], np.uint32)
        return self.finish(*self.on_device, places, seeds)


def make_batch(
    images: "Array",
    masks: "Array",
    places: "Array",
    seeds: "Array",
    amounts: Amounts | None,
    classes: Classes,
) -> tuple["Array", "Array"]:
    """Take images (M, H, W, C) and masks (M, H, W, K) at `places` and augment them.

    The data set is uint8 (N, H, W, …), the result float32 in [0, 1].
    """
    import jax
    import jax.numpy as jnp

    batch = [jnp.asarray(array[places], jnp.float32) / 255 for array in (images, masks)]
    if amounts:
        mirrored = mirrored_planes(classes)
        key = jax.random.key(0)
        for seed in seeds:
            key = jax.random.fold_in(key, seed)
        keys = jax.random.split(key, len(places))
        batch = jax.vmap(partial(augment_image, amounts=amounts, mirrored=mirrored))(*batch, keys)
    return batch[0], to_targets(batch[1], classes, jnp)


def augment_image(
    image: "Array", mask: "Array", key: "Array", amounts: Amounts, mirrored: np.ndarray | None
) -> tuple["Array", "Array"]:
    """Augment one image (H, W, C) and its masks (H, W, K), in [0, 1].

    mirrored: as in `mirrored_planes`.
    """
    import jax.numpy as jnp
    from jax import random

    keys = iter(random.split(key, 20))

    def draw(low: float, high: float, shape: tuple[int, ...] = ()) -> "Array":
        return random.uniform(next(keys), shape, minval=low, maxval=high)

    def happens(probability: float) -> "Array":
        return random.bernoulli(next(keys), probability)

    size, channels = image.shape[:2], image.shape[-1]
    flips = happens(0.5) if mirrored is not None else False
    if mirrored is not None:
        mask = jnp.where(flips, mask[..., mirrored], mask)
    moves = happens(0.9)
    scale = jnp.where(moves, draw(*amounts.scale, (2,)), 1.0)
    turn = jnp.where(moves, jnp.deg2rad(draw(-amounts.rotate, amounts.rotate)), 0.0)
    shift = jnp.where(moves, draw(-amounts.shift, amounts.shift, (2,)) * jnp.array(size[::-1]), 0.0)
    alpha = jnp.where(happens(amounts.elastic_p), amounts.elastic, 0.0)
    field = alpha * smooth_noise(draw(-1, 1, (2, *size)))
    both = warp(jnp.concatenate([image, mask], axis=-1), flips, scale, turn, shift, field)
    image, mask = both[..., :channels], both[..., channels:]

    contrast, brightness = (draw(-amounts.light, amounts.light) for _ in range(2))
    lit = jnp.clip((1 + contrast) * image + brightness, 0, 1)
    image = jnp.where(happens(0.5), lit, image)
    image = jnp.where(happens(0.5), image ** draw(*amounts.gamma), image)
    if amounts.downscale:
        image = jnp.where(happens(0.2), downscale(image, draw(*amounts.downscale)), image)
    noise = draw(*amounts.noise) * random.normal(next(keys), (*size, 1))
    image = jnp.where(happens(0.3), jnp.clip(image + noise, 0, 1), image)
    blurred = blur(image, jnp.where(happens(0.5), 1, 2), draw(0.5, 3.0))
    return jnp.where(happens(0.2), blurred, image), mask


def warp(
    image: "Array", flips: "Array", scale: "Array", turn: "Array", shift: "Array", field: "Array"
) -> "Array":
    """Mirror, scale, turn and shift an image (H, W, C) around its centre; displace its pixels.

    scale, shift: (x, y), shift in pixels; turn: radians; field: displacements (2, H, W) in x and
    y, pixels. Zeros come in from outside.
    """
    import jax.numpy as jnp
    from jax.scipy.ndimage import map_coordinates

    height, width = image.shape[:2]
    y, x = jnp.mgrid[:height, :width]
    x, y = x + field[0] - (width - 1) / 2 - shift[0], y + field[1] - (height - 1) / 2 - shift[1]
    x, y = jnp.cos(turn) * x - jnp.sin(turn) * y, jnp.sin(turn) * x + jnp.cos(turn) * y
    x, y = x / scale[0] + (width - 1) / 2, y / scale[1] + (height - 1) / 2
    x = jnp.where(flips, width - 1 - x, x)
    planes = [map_coordinates(image[..., i], [y, x], order=1) for i in range(image.shape[-1])]
    return jnp.stack(planes, axis=-1)


def smooth_noise(noise: "Array") -> "Array":
    """Blur (N, H, W) by a Gaussian of SIGMA pixels, as two matrix products."""
    kernels = []
    for side in noise.shape[1:]:  # blurring the identity gives the blur's matrix
        identity = np.eye(side, dtype=np.float32)
        border = cv2.BORDER_REPLICATE
        kernels.append(cv2.GaussianBlur(identity, (1, 0), 1e-6, sigmaY=SIGMA, borderType=border))
    rows, columns = kernels
    return rows @ noise @ columns.T


def blur(image: "Array", radius: "Array", sigma: "Array") -> "Array":
    """Blur (H, W, C) by a Gaussian that reaches `radius` (1 or 2) pixels far."""
    import jax.numpy as jnp

    taps = np.arange(-2, 3)
    weights = jnp.exp(-0.5 * (taps / sigma) ** 2) * (abs(taps) <= radius)
    weights = weights / weights.sum()
    for axis in (0, 1):
        margins = [(0, 0), (0, 0), (0, 0)]
        margins[axis] = (2, 2)
        padded = jnp.pad(image, margins, mode="reflect")
        parts = [
            jnp.take(padded, np.arange(image.shape[axis]) + 2 + tap, axis=axis) for tap in taps
        ]
        image = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return image


def downscale(image: "Array", scale: "Array") -> "Array":
    """Shrink (H, W, C) to `scale` and enlarge it again, without interpolation."""
    import jax.numpy as jnp

    for axis in (0, 1):
        side = image.shape[axis]
        small = jnp.round(side * scale)
        kept = jnp.floor(jnp.floor(np.arange(side) * small / side) * (1 / scale))
        image = jnp.take(image, jnp.minimum(kept, side - 1).astype(int), axis=axis)
    return image
