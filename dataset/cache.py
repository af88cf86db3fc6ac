"""Keep decoded slices in one file, so that they are decoded once.

They are held in memory if they fit, otherwise read batch by batch.
"""

import json
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from imaging.labels import Classes
from imaging.preprocess import shares_to_ids
from utils import atomic

if TYPE_CHECKING:
    import pandas as pd

FOOTER = struct.Struct("<Q")  # the file's last bytes: the length of the table before them


def cache_folder() -> str:
    """Return where decoded images are kept: UNET_CACHE, else files/cache; "" keeps none."""
    return os.environ.get("UNET_CACHE", "files/cache")


class Entry(NamedTuple):
    """Where a pair's slices are in the file, and information on its source files."""

    first: int
    count: int
    info: dict[str, Any]


class Store:
    """A file of rows of `width` bytes: a slice's image and masks. A table in JSON follows them."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        self.file, self.width, self.lock = file, width, Lock()
        self.entries: dict[str, Entry] = {}  # a pair each, by the fingerprint of its files
        self.rows = 0

    def add(self, key: str, rows: np.ndarray, info: dict[str, Any]) -> None:
        """Append a pair's slices: uint8 (S, width)."""
        self.file.write(rows.tobytes())
        self.entries[key] = Entry(self.rows, len(rows), info)
        self.rows += len(rows)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Read rows: (n,) → uint8 (n, width).

        The file stays open, so another process may replace it in the meantime.
        """
        found = np.empty((len(rows), self.width), np.uint8)
        with self.lock:
            for row, target in zip(rows, found, strict=True):
                self.file.seek(int(row) * self.width)
                self.file.readinto(target)
        return found


def open_store(path: Path, width: int) -> Store | None:
    """Open a file that `new_store` wrote; None if there is none or it is damaged."""
    try:
        store = Store(path.open("rb"), width)
        end = store.file.seek(-FOOTER.size, 2)
        (length,) = FOOTER.unpack(store.file.read(FOOTER.size))
        store.file.seek(end - length)
        store.entries = {key: Entry(*entry) for key, *entry in json.loads(store.file.read(length))}
        store.rows = sum(entry.count for entry in store.entries.values())
        return store if store.rows * width == end - length else None
    except (OSError, ValueError, TypeError, struct.error):
        return None


@contextmanager
def new_store(path: Path | None, width: int) -> Iterator[Store]:
    """Make a store at `path`, whole or not at all. Without a path it ends with the process."""
    if path is None:
        yield Store(tempfile.TemporaryFile(), width)  # noqa: SIM115 (open as long as the data set)
        return
    with atomic(path) as temporary, temporary.open("wb+") as file:
        store = Store(file, width)
        yield store
        table = json.dumps([[key, *entry] for key, entry in store.entries.items()]).encode()
        file.write(table + FOOTER.pack(len(table)))


@dataclass(frozen=True)
class Dataset:
    """The slices of all pairs, at the network's size."""

    rows: np.ndarray | Store  # (R, bytes): each slice's image and masks
    index: np.ndarray  # (N,) the row of each slice
    pair: np.ndarray  # (N,) the pair of each slice; a plain image is a pair of one slice
    size: tuple[int, int]  # (H, W)
    channels: int
    classes: Classes
    info: "pd.DataFrame"  # a row per pair: size, bits, channels, each class's share of the pixels …
    neighbours: int = 0  # slices before and after each that are further channels of its image

    @property
    def image_bytes(self) -> int:
        """Bytes of a slice's image; those of its masks follow."""
        return self.size[0] * self.size[1] * self.channels

    def slices_of(self, pairs: np.ndarray) -> np.ndarray:
        """Number the slices of pairs."""
        return np.flatnonzero(np.isin(self.pair, pairs))

    def take(self, slices: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Get slices (n,): images (n, H, W, C) and masks (n, H, W, K), uint8.

        A mask's value is the share of the pixel that is of the class: 255 is all of it. With
        `--ignore` a further mask is the share that does not count.
        """
        slices = np.arange(len(self.index))[slices]
        rows = self.rows[self.index[slices]]
        images = rows[:, : self.image_bytes].reshape(-1, *self.size, self.channels)
        masks = rows[:, self.image_bytes :].reshape(len(rows), *self.size, -1)
        if self.neighbours:
            images = self._with_neighbours(slices, images)
        return images, masks

    def _with_neighbours(self, slices: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Put the slices before and after into the channels; at a border its slice is repeated."""
        first = np.searchsorted(self.pair, self.pair[slices], "left")
        last = np.searchsorted(self.pair, self.pair[slices], "right") - 1
        channels = []
        for step in range(-self.neighbours, self.neighbours + 1):
            if step == 0:
                channels.append(images)
                continue
            near = self.rows[self.index[np.clip(slices + step, first, last)]]
            channels.append(near[:, : self.image_bytes].reshape(images.shape))
        return np.concatenate(channels, axis=-1)

    def truth(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Get a slice's mask (H, W), ids or BITS, and which pixels do not count, if any may."""
        shares = self.take([number])[1][0]
        ignored = shares[..., -1] > 127 if self.classes.ignored else None
        return shares_to_ids(shares[..., : len(self.classes.names)], self.classes.dtype), ignored

    @property
    def images(self) -> np.ndarray:
        """All images (N, H, W, C)."""
        return self.take(slice(None))[0]

    @property
    def masks(self) -> np.ndarray:
        """All masks (N, H, W, K)."""
        return self.take(slice(None))[1]


def select(
    store: Store,
    keys: Sequence[str],
    size: tuple[int, int],
    channels: int,
    classes: Classes,
    max_bytes: float,
) -> Dataset:
    """Make a data set of the pairs named by `keys`, in memory if it takes at most `max_bytes`."""
    import pandas as pd  # a wrong path is answered without its half second

    entries = [store.entries[key] for key in keys]
    counts = [entry.count for entry in entries]
    ranges = [np.arange(entry.first, entry.first + entry.count) for entry in entries]
    index = np.concatenate([np.zeros(0, int), *ranges])
    pair = np.repeat(np.arange(len(entries)), counts)
    rows: np.ndarray | Store = store
    if len(index) * store.width <= max_bytes:
        rows, index = store[index], np.arange(len(index))
    info = pd.DataFrame([entry.info for entry in entries])
    return Dataset(rows, index, pair, size, channels, classes, info)
