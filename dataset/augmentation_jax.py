"""Batches made where the network computes: the images lie on the GPU, and JAX augments each batch there.

The recipes are those of `augment.py`, one resampling instead of up to three, with random numbers of their own. "strong"
is albumentations' alone. GPU speed is not measured; what each step does is tested beside albumentations'.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import cv2
import keras
import numpy as np

if TYPE_CHECKING:
    from jax import Array
from dataset.augmentation import AMOUNTS, Amounts
from dataset.batches import Batches, Shard, with_background
from dataset.cache import Dataset
from imaging.labels import mirrored_channels

MAX_MEMORY_SHARE = 0.25  # of the GPU's memory that the images may take
SIGMA = 6.0  # pixels over which a displacement is smooth


def fits_on_device(dataset: Dataset, strength: str, shard: Shard) -> bool:
    """Tell whether this process alone trains on a GPU, by JAX, that holds the data set and knows the augmentation."""
    if (
        keras.backend.backend() != "jax"
        or shard.world_size > 1
        or strength not in ("none", *AMOUNTS)
    ):
        return False
    import jax

    memory = jax.devices()[0].memory_stats() or {}  # a CPU tells nothing
    most = (
        MAX_MEMORY_SHARE * memory.get("bytes_limit", 0) / (1 + 2 * dataset.neighbours)
    )  # each image is there so many times
    return isinstance(dataset.rows, np.ndarray) and dataset.rows.nbytes <= most


class DeviceBatches(Batches):
    """As `data.Batches`, for one process: the same order of the images, and as JAX arrays."""

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        names: Sequence[str],
        batch_size: int,
        strength: str = "",
        **more: Any,
    ) -> None:
        import jax

        super().__init__(dataset, np.arange(len(rows)), names, batch_size, strength, **more)
        self.held = jax.device_put(dataset.take(rows))
        order = mirrored_channels(names)
        self.finish = jax.jit(
            partial(
                make_batch,
                amounts=AMOUNTS.get(strength),
                order=None if order is None else tuple(order),
            )
        )

    def __getitem__(self, index: int) -> tuple["Array", "Array"]:
        """Get a batch of this epoch; JAX computes it while the network is still at the one before."""
        places = self.order(self.epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return self.finish(*self.held, places, np.array([self.seed, self.epoch, index], np.uint32))


def make_batch(
    pictures: "Array",
    masks: "Array",
    places: "Array",
    seeds: "Array",
    amounts: Amounts | None,
    order: tuple | None,
) -> tuple["Array", "Array"]:
    """Take images (N, H, W, C) and masks (N, H, W, K) uint8 out of a data set, augment them: float32 in [0, 1]."""
    import jax
    import jax.numpy as jnp

    batch = [jnp.asarray(one[places], jnp.float32) / 255 for one in (pictures, masks)]
    if amounts:
        key = jax.random.key(0)
        for seed in seeds:
            key = jax.random.fold_in(key, seed)
        keys = jax.random.split(key, len(places))
        batch = jax.vmap(partial(augment_image, amounts=amounts, order=order))(*batch, keys)
    return batch[0], with_background(batch[1], jnp)


def augment_image(
    picture: "Array", mask: "Array", key: "Array", amounts: Amounts, order: tuple | None
) -> tuple["Array", "Array"]:
    """Augment one image (H, W, C) and its masks (H, W, K), in [0, 1]; order as in `mirrored_ids`."""
    import jax.numpy as jnp
    from jax import random

    keys = iter(random.split(key, 20))

    def draw(low: float, high: float, shape: tuple[int, ...] = ()) -> "Array":
        return random.uniform(next(keys), shape, minval=low, maxval=high)

    def happens(probability: float) -> "Array":
        return random.bernoulli(next(keys), probability)

    size = picture.shape[:2]
    flips = happens(0.5) if order else False
    if order:
        mask = jnp.where(flips, mask[..., np.array(order[1:]) - 1], mask)
    moves = happens(0.9)
    scale = jnp.where(moves, draw(*amounts.scale, (2,)), 1.0)
    turn = jnp.where(moves, jnp.deg2rad(draw(-amounts.rotate, amounts.rotate)), 0.0)
    shift = jnp.where(moves, draw(-amounts.shift, amounts.shift, (2,)) * jnp.array(size[::-1]), 0.0)
    alpha = jnp.where(happens(amounts.elastic_p), amounts.elastic, 0.0)
    field = alpha * smooth_noise(draw(-1, 1, (2, *size)))
    both = warp(jnp.concatenate([picture, mask], axis=-1), flips, scale, turn, shift, field)
    picture, mask = both[..., : picture.shape[-1]], both[..., picture.shape[-1] :]

    lit = (1 + draw(-amounts.light, amounts.light)) * picture + draw(-amounts.light, amounts.light)
    picture = jnp.where(happens(0.5), jnp.clip(lit, 0, 1), picture)
    picture = jnp.where(happens(0.5), picture ** draw(*amounts.gamma), picture)
    if amounts.downscale:
        picture = jnp.where(happens(0.2), downscale(picture, draw(*amounts.downscale)), picture)
    noisy = picture + draw(*amounts.noise) * random.normal(next(keys), (*size, 1))
    picture = jnp.where(happens(0.3), jnp.clip(noisy, 0, 1), picture)
    blurred = blur(picture, jnp.where(happens(0.5), 1, 2), draw(0.5, 3.0))
    return jnp.where(happens(0.2), blurred, picture), mask


def warp(
    image: "Array", flips: "Array", scale: "Array", turn: "Array", shift: "Array", field: "Array"
) -> "Array":
    """Mirror an image (H, W, C), scale, turn and shift it around its centre, displace its pixels; zeros come in.

    scale, shift: (x, y), shift in pixels; turn: radians; field: displacements (x or y, H, W) in pixels.
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
    """Blur (N, H, W) by a Gaussian of SIGMA pixels, as two products of matrices."""
    rows, columns = (
        cv2.GaussianBlur(
            np.eye(side, dtype=np.float32),
            (1, 0),
            1e-6,
            sigmaY=SIGMA,
            borderType=cv2.BORDER_REPLICATE,
        )
        for side in noise.shape[1:]
    )
    return rows @ noise @ columns.T


def blur(image: "Array", radius: "Array", sigma: "Array") -> "Array":
    """Blur (H, W, C) by a Gaussian that reaches `radius` (1 or 2) pixels far."""
    import jax.numpy as jnp

    taps = np.arange(-2, 3)
    weights = jnp.exp(-0.5 * (taps / sigma) ** 2) * (abs(taps) <= radius)
    weights = weights / weights.sum()
    for axis in (0, 1):
        padded = jnp.pad(image, [(2, 2) if i == axis else (0, 0) for i in range(3)], mode="reflect")
        parts = [
            jnp.take(padded, np.arange(image.shape[axis]) + 2 + tap, axis=axis) for tap in taps
        ]
        image = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return image


def downscale(image: "Array", scale: "Array") -> "Array":
    """Repeat every (1 / scale)th pixel of (H, W, C): shrunk and enlarged without interpolation."""
    import jax.numpy as jnp

    for axis in (0, 1):
        side = image.shape[axis]
        small = jnp.round(side * scale)
        kept = jnp.floor(jnp.floor(np.arange(side) * small / side) * (1 / scale))
        image = jnp.take(image, jnp.minimum(kept, side - 1).astype(int), axis=axis)
    return image
