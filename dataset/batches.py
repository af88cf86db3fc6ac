"""Batches for `fit`: images in order, augmented by threads ahead of the training steps."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import keras
import numpy as np

from dataset.augmentation import Augmentation
from dataset.cache import Dataset
from dataset.kind import find_kind
from imaging.labels import Classes

PREFETCH_PER_THREAD = 2  # batches that each thread makes in advance
MAX_THREADS = 8


class Shard(NamedTuple):
    """Which part of each batch a process computes."""

    rank: int = 0
    world_size: int = 1
    num_devices: int = 1  # of all processes; a batch must be a multiple of it


class Batches(keras.utils.PyDataset):
    """Batches of images (N, [D,] H, W, C) and masks (N, [D,] H, W, K), float32 in [0, 1].

    examples: what is shown, see `Dataset.examples`.
    strength: of the augmentation, see `Augmentation`; "" keeps images and order as they are, for
        validation.
    at_least: an epoch has at least so many images; a smaller data set is repeated.
    shard: this process's part of each batch. Training repeats images until the last batch can be
        shared out evenly. Validation fills that batch with images that do not count: a third
        array, weights (N,), is 0 for them.

    Order and augmentation follow from (seed, epoch, batch, place in it) alone. They are the same
    in every run and after a resume, whichever thread or process makes which batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        examples: np.ndarray,
        batch_size: int,
        strength: str = "",
        *,
        seed: int = 0,
        at_least: int = 0,
        shard: Shard = Shard(),  # noqa: B008 (a NamedTuple cannot be changed)
    ) -> None:
        # Keras's own workers would wait a tenth of a second at the end of each epoch.
        super().__init__(workers=1)
        self.dataset, self.listed = dataset, examples
        self.batch_size, self.strength, self.seed, self.shard = batch_size, strength, seed, shard
        self.epoch = 0
        self.count = max(len(examples), at_least)  # images of an epoch
        self.missing = -self.count % shard.num_devices
        if strength:
            self.count, self.missing = self.count + self.missing, 0
        # Augmenting an image of 512x512 takes 8 ms, so a GPU would wait for two threads.
        self.num_threads = max(2, min(MAX_THREADS, (os.cpu_count() or 2) // 2))
        self.pool = ThreadPoolExecutor(self.num_threads)
        if strength:
            kind = find_kind(dataset, np.unique(np.asarray(examples)[:, 0]))
            self.augment = Augmentation(dataset.classes, strength, kind)
        self.prefetched: dict[int, Future] = {}  # by the batch's number, counted over all epochs

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """Return a batch of this epoch; threads prepare the next ones, also of the next epoch."""
        if not self.strength:
            return self.make(self.epoch, index)
        first = self.epoch * len(self) + index
        for number in [number for number in self.prefetched if number < first]:
            del self.prefetched[number]
        for number in range(first, first + 1 + PREFETCH_PER_THREAD * self.num_threads):
            if number not in self.prefetched:
                epoch, place = divmod(number, len(self))
                self.prefetched[number] = self.pool.submit(self.make, epoch, place)
        return self.prefetched.pop(first).result()

    def order(self, epoch: int) -> np.ndarray:
        """Return the examples of an epoch in order, some of them several times."""
        if not self.strength:
            return self.listed
        rng = np.random.default_rng((self.seed, epoch))
        repeats = -(-self.count // len(self.listed))
        rounds = [rng.permutation(self.listed) for _ in range(repeats)]
        return np.concatenate(rounds)[: self.count]

    def make(self, epoch: int, index: int) -> tuple[np.ndarray, ...]:
        """Make this process's part of a batch."""
        examples = self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        fill = -len(examples) % self.shard.num_devices
        weights = np.full(len(examples) + fill, 1 + self.missing / self.count, np.float32)
        weights[len(examples) :] = 0
        examples = np.concatenate([examples, np.repeat(examples[-1:], fill, axis=0)])
        length = len(examples) // self.shard.world_size
        part = slice(self.shard.rank * length, (self.shard.rank + 1) * length)
        places = range(part.start, part.stop)
        seeds = [np.random.SeedSequence((self.seed, epoch, index, one)) for one in places]
        seeds = [int(one.generate_state(1)[0]) for one in seeds]
        drawn = []
        for example, seed in zip(examples[part], seeds, strict=True):
            # Numbers of its own: those of the augmentation begin with the same seed.
            drawn.append(self.dataset.draw(example, np.random.default_rng((seed, 1))))
        images, masks = self.dataset.take(np.array(drawn))
        if self.strength:
            augmented = map(self.augment, images, masks, seeds)
            images, masks = (np.stack(one) for one in zip(*augmented, strict=True))
        masks = to_targets(masks.astype(np.float32) / 255, self.dataset.classes)
        batch = images.astype(np.float32) / 255, masks
        return (*batch, weights[part]) if self.missing else batch

    def on_epoch_end(self) -> None:
        """Go on to the next epoch's order and augmentation."""
        self.epoch += 1


def to_targets(masks: np.ndarray, classes: Classes) -> np.ndarray:
    """Put the background before several classes, as a class of its own; one class needs none.

    masks: (N, H, W, K) in [0, 1], as `Dataset.take` gives them.
    """
    if classes.num_channels == len(classes.names):
        return masks
    shown = masks[..., : len(classes.names)]
    background = np.maximum(1 - shown.sum(-1, keepdims=True), 0)
    return np.concatenate([background, masks], axis=-1)
