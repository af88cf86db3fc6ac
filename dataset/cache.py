"""Decoded slices at the network's size, kept in one file: decoded once, then held in memory or read batch by batch."""

import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd

from utils import atomic

FOOTER = struct.Struct("<Q")  # the file's last bytes: how long the notes before them are


class Entry(NamedTuple):
    """Where a pair's slices are in the file, and the info about its files."""

    first: int
    count: int
    info: dict[str, Any]


class Store:
    """A file of rows of `width` bytes (a slice's image and masks), then notes in JSON that tell which pair is where."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        self.file, self.width, self.lock = file, width, Lock()
        self.entries: dict[str, Entry] = {}  # of each pair, by the fingerprint of its files
        self.rows = 0

    def add(self, key: str, rows: np.ndarray, info: dict[str, Any]) -> None:
        """Append a pair's slices: uint8 (S, width)."""
        self.file.write(rows.tobytes())
        self.entries[key] = Entry(self.rows, len(rows), info)
        self.rows += len(rows)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Read rows: (n,) → uint8 (n, width). The file stays open, so it may be replaced meanwhile."""
        found = np.empty((len(rows), self.width), np.uint8)
        with self.lock:
            for row, place in zip(rows, found, strict=True):
                self.file.seek(int(row) * self.width)
                self.file.readinto(place)
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
    """Make a store at `path`, whole or not at all, or, without a path, one that vanishes with the process."""
    if path is None:
        yield Store(tempfile.TemporaryFile(), width)  # noqa: SIM115 (it lives as long as the data set)
        return
    with atomic(path) as temporary, temporary.open("wb+") as file:
        store = Store(file, width)
        yield store
        notes = json.dumps([[key, *entry] for key, entry in store.entries.items()]).encode()
        file.write(notes + FOOTER.pack(len(notes)))


@dataclass(frozen=True)
class Dataset:
    """The slices of all pairs, at the network's size."""

    rows: np.ndarray | Store  # (R, bytes): each slice's image and masks
    index: np.ndarray  # (N,) which row each slice is
    pair: np.ndarray  # (N,) which pair each slice is of; a plain image is a pair of one slice
    size: tuple[int, int]  # (H, W)
    channels: int
    info: (
        pd.DataFrame
    )  # a row per pair: image, size, bits, channels, constant, each class's share of the pixels …
    neighbours: int = 0  # so many slices before and after each are further channels of its image, the border's repeated

    def slices_of(self, pairs: np.ndarray) -> np.ndarray:
        """Number the slices of pairs."""
        return np.flatnonzero(np.isin(self.pair, pairs))

    def take(self, slices: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Get slices (n,): images (n, H, W, C) and masks (n, H, W, K), uint8.

        A mask's value is the share of the pixel that is of the class: 255 is all of it.
        """
        slices, split = (
            np.arange(len(self.index))[slices],
            self.size[0] * self.size[1] * self.channels,
        )
        rows = self.rows[self.index[slices]]
        pictures = rows[:, :split].reshape(-1, *self.size, self.channels)
        masks = rows[:, split:].reshape(len(rows), *self.size, -1)
        if self.neighbours:
            first, last = (
                np.searchsorted(self.pair, self.pair[slices], side) for side in ("left", "right")
            )
            steps = [step for step in range(-self.neighbours, self.neighbours + 1) if step]
            near = [
                self.rows[self.index[np.clip(slices + step, first, last - 1)]][:, :split]
                for step in steps
            ]
            near = [other.reshape(pictures.shape) for other in near]
            pictures = np.concatenate(
                [*near[: self.neighbours], pictures, *near[self.neighbours :]], axis=-1
            )
        return pictures, masks

    @property
    def images(self) -> np.ndarray:
        """All images (N, H, W, C)."""
        return self.take(slice(None))[0]

    @property
    def masks(self) -> np.ndarray:
        """All masks (N, H, W, K)."""
        return self.take(slice(None))[1]


def select(
    store: Store, keys: Sequence[str], size: tuple[int, int], channels: int, limit: float
) -> Dataset:
    """Make a data set of the pairs named by `keys`, in memory if its slices take at most `limit` bytes."""
    entries = [store.entries[key] for key in keys]
    index = np.array(
        [row for entry in entries for row in range(entry.first, entry.first + entry.count)], int
    )
    pair = np.repeat(np.arange(len(entries)), [entry.count for entry in entries])
    rows: np.ndarray | Store = store
    if len(index) * store.width <= limit:
        rows, index = store[index], np.arange(len(index))
    return Dataset(
        rows, index, pair, size, channels, pd.DataFrame([entry.info for entry in entries])
    )
