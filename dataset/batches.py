"""Decode image/mask pairs, check them, split them, feed them.

python data.py check DIR                  reports on a data set, whose layouts `pairing.py` tells
python data.py download montgomery        fetches one
"""

import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np

from dataset.augmentation import build_augmentation
from dataset.cache import Dataset


class Shard(NamedTuple):
    """Which part of each batch a process computes, and of how many devices in all a batch must be a multiple."""

    rank: int = 0
    world_size: int = 1
    num_devices: int = 1


PREFETCH_PER_THREAD = 2  # batches that each thread makes before they are asked for


# ---------------------------------------------------------------------------------------------------------- batches


class Batches(keras.utils.PyDataset):
    """Batches for `fit`: images (N, H, W, C) and masks (N, H, W, K), float32 in [0, 1].

    strength: of the augmentation, see `augment.augmentation`; "" keeps images and order as they are, for validation.
    at_least: so many images make an epoch, shown again where there are fewer.
    shard: this process's part of each batch, where several train together. For training, images are shown again until
        the last batch, too, can be shared out evenly; for validation that batch is filled up with images that, by the
        third array, weights (N,), do not count.

    Order and augmentation follow from (seed, epoch, batch, place in it) alone: the same in every run and after a
    resume, whichever thread or process makes which batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        names: Sequence[str],
        batch_size: int,
        strength: str = "",
        *,
        seed: int = 0,
        at_least: int = 0,
        shard: Shard = Shard(),  # noqa: B008 (it cannot be changed)
    ) -> None:
        super().__init__(
            workers=1
        )  # Keras's own would wait a tenth of a second at the end of each epoch
        self.dataset, self.rows, self.names, self.batch_size = dataset, rows, names, batch_size
        self.strength, self.seed, self.epoch = strength, seed, 0
        self.shard, self.count = shard, max(len(rows), at_least)
        # To augment an image of 512x512 takes some 8 ms, so that a GPU would wait for two threads.
        self.count_threads = max(2, min(8, (os.cpu_count() or 2) // 2))
        self.threads = ThreadPoolExecutor(self.count_threads)
        self.own = threading.local()  # an augmentation for each thread
        self.ahead: dict[int, Future] = {}
        self.missing = -self.count % shard.num_devices
        if strength:
            self.count, self.missing = self.count + self.missing, 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """Get a batch of this epoch; for training, threads are at the next ones already, beyond its end too."""
        if not self.strength:
            return self.make(self.epoch, index)
        place = self.epoch * len(self) + index
        self.ahead = {number: batch for number, batch in self.ahead.items() if number >= place}
        for number in range(place, place + 1 + PREFETCH_PER_THREAD * self.count_threads):
            if number not in self.ahead:
                self.ahead[number] = self.threads.submit(self.make, *divmod(number, len(self)))
        return self.ahead.pop(place).result()

    def order(self, epoch: int) -> np.ndarray:
        """Put the images of an epoch in order, some of them several times."""
        if not self.strength:
            return self.rows
        rng, repeats = np.random.default_rng((self.seed, epoch)), -(-self.count // len(self.rows))
        return np.concatenate([rng.permutation(self.rows) for _ in range(repeats)])[: self.count]

    def make(self, epoch: int, index: int) -> tuple[np.ndarray, ...]:
        """Make a batch."""
        rows = self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        fill = -len(rows) % self.shard.num_devices
        weights = np.append(
            np.full(len(rows), 1 + self.missing / self.count), np.zeros(fill)
        ).astype(np.float32)
        rows = np.append(rows, np.repeat(rows[-1:], fill))
        length = len(rows) // self.shard.world_size
        part = slice(self.shard.rank * length, (self.shard.rank + 1) * length)
        pictures, masks = self.dataset.take(rows[part])
        if self.strength not in ("", "none"):
            if not hasattr(self.own, "augment"):
                self.own.augment = build_augmentation(self.names, 0, self.strength)
            augment, done = self.own.augment, []
            for place, picture, mask in zip(
                range(part.start, part.stop), pictures, masks, strict=True
            ):
                seed = np.random.SeedSequence((self.seed, epoch, index, place)).generate_state(1)[0]
                # One stream for all steps: by set_random_seed each would have its own, all of the same numbers.
                augment.set_random_state(np.random.default_rng(seed), random.Random(int(seed)))
                done.append(augment(image=picture, mask=mask))
            pictures, masks = (np.stack([one[key] for one in done]) for key in ("image", "mask"))
        masks = with_background(masks.astype(np.float32) / 255)
        batch = pictures.astype(np.float32) / 255, masks
        return (*batch, weights[part]) if self.missing else batch

    def on_epoch_end(self) -> None:
        """Move on to the next epoch's order and augmentation."""
        self.epoch += 1


def with_background(masks: np.ndarray, numpy: Any = np) -> np.ndarray:
    """Put what several classes leave of each pixel before them, as a class of its own; a single one needs none.

    numpy: or JAX's, for its arrays.
    """
    if masks.shape[-1] == 1:
        return masks
    return numpy.concatenate([numpy.maximum(1 - masks.sum(-1, keepdims=True), 0), masks], axis=-1)
