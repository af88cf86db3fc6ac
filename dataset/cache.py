"""Keep decoded cases in one file, so that they are decoded once. It is mapped into memory.

A case is what a pair's files become at working resolution: image, masks, and some places of each
class. Training reads from it what it needs and no more.
"""

import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from imaging.grid import Shape
from imaging.labels import Classes
from imaging.preprocess import shares_to_ids
from inference.sampler import Sampler
from inference.windows import read_box, read_window, window_starts
from utils import atomic

if TYPE_CHECKING:
    import pandas as pd

FOOTER = struct.Struct("<Q")  # the file's last bytes: the length of the table before them
MAX_PLACES = 500  # of each class that a case keeps
FOREGROUND_SHARE = 1 / 3  # of the patches are drawn around a pixel of some class
# The first slice of a window whose place is drawn; no window starts there.
DRAWN = -(2**31)


class Entry(NamedTuple):
    """Where a case is in the file, and information on its source files."""

    offset: int
    shape: Shape
    info: dict[str, Any]


class Case(NamedTuple):
    """A pair at working resolution."""

    image: np.ndarray  # (D, H, W, C) uint8
    masks: np.ndarray  # (D, H, W, K) uint8: the share of the pixel that is of each class
    places: np.ndarray  # (K, MAX_PLACES) int64: pixels of each class by their number, then -1

    def truth(self, classes: Classes) -> tuple[np.ndarray, np.ndarray | None]:
        """Get the mask (D, H, W), ids or BITS, and which pixels do not count, if any may."""
        ids = np.empty(self.masks.shape[:3], classes.dtype)
        for place, one in enumerate(self.masks):
            ids[place] = shares_to_ids(one[..., : len(classes.names)], classes.dtype)
        return ids, self.masks[..., -1] > 127 if classes.ignored else None

    def thinned(self, slices: int, side: int) -> "Case":
        """Leave out slices, rows and columns so that at most so many remain. It has no places."""
        most = (slices, side, side)
        kept = tuple(
            slice(None, None, -(-length // limit))
            for length, limit in zip(self.image.shape[:3], most, strict=True)
        )
        return Case(self.image[kept], self.masks[kept], self.places[:, :0])


class Store:
    """A file of cases. A table in JSON follows them.

    channels: of an image. planes: of its masks.
    """

    def __init__(self, file: BinaryIO, channels: int, planes: int) -> None:
        self.file, self.channels, self.planes = file, channels, planes
        self.entries: dict[str, Entry] = {}  # by the fingerprint of a pair's files
        self.end = 0

    def add(self, key: str, case: Case, info: dict[str, Any]) -> None:
        """Append a case."""
        for array in case:
            self.file.write(np.ascontiguousarray(array).data)
        self.entries[key] = Entry(self.end, tuple(case.image.shape[:3]), info)
        self.end += sum(array.nbytes for array in case)

    @cached_property
    def content(self) -> np.ndarray:
        """The file's bytes. It stays mapped, so another process may replace it in the meantime."""
        self.file.flush()
        return np.memmap(self.file, np.uint8, "r") if self.end else np.zeros(0, np.uint8)

    def case(self, key: str) -> Case:
        """Return a case, whose pixels are read when they are used."""
        offset, shape, _ = self.entries[key]
        arrays = []
        for last, dtype in (
            ((*shape, self.channels), np.uint8),
            ((*shape, self.planes), np.uint8),
            ((self.planes, MAX_PLACES), np.int64),
        ):
            size = int(np.prod(last)) * np.dtype(dtype).itemsize
            part = self.content[offset : offset + size]
            arrays.append(part.view(np.ndarray).view(dtype).reshape(last))
            offset += size
        return Case(*arrays)


def open_store(path: Path, channels: int, planes: int) -> Store | None:
    """Open a file that `new_store` wrote; None if there is none or it is damaged."""
    try:
        store = Store(path.open("rb"), channels, planes)
        end = store.file.seek(-FOOTER.size, 2)
        (length,) = FOOTER.unpack(store.file.read(FOOTER.size))
        store.file.seek(end - length)
        for key, offset, shape, info in json.loads(store.file.read(length)):
            store.entries[key] = Entry(offset, tuple(shape), info)
            pixels = int(np.prod(shape)) * (channels + planes)
            store.end = max(store.end, offset + pixels + planes * MAX_PLACES * 8)
        return store if store.end == end - length else None
    except (OSError, ValueError, TypeError, struct.error):
        return None


@contextmanager
def new_store(path: Path | None, channels: int, planes: int) -> Iterator[Store]:
    """Make a store at `path`, whole or not at all. Without a path it ends with the process."""
    if path is None:
        # Open as long as the data set.
        yield Store(tempfile.TemporaryFile(), channels, planes)  # noqa: SIM115
        return
    with atomic(path) as temporary, temporary.open("wb+") as file:
        store = Store(file, channels, planes)
        yield store
        table = [[key, *entry] for key, entry in store.entries.items()]
        content = json.dumps(table).encode()
        file.write(content + FOOTER.pack(len(content)))


def find_places(masks: np.ndarray) -> np.ndarray:
    """Choose pixels of each class at random, seeded: (K, MAX_PLACES) numbers of pixels, then -1.

    masks: (D, H, W, K) uint8.
    """
    rng = np.random.default_rng(0)
    places = np.full((masks.shape[-1], MAX_PLACES), -1, np.int64)
    for k in range(masks.shape[-1]):
        found = np.flatnonzero(masks[..., k] > 127)
        if len(found) > MAX_PLACES:
            found = np.sort(rng.choice(found, MAX_PLACES, replace=False))
        places[k, : len(found)] = found
    return places


# -------------------------------------------------------------------------------------- data set


@dataclass(frozen=True)
class Dataset:
    """The cases of all pairs, and how network inputs are taken from them.

    An example is an array (4,): a case's number, and the first slice, row and column of a window.
    Windows of patches for training have no place yet: their slice is DRAWN.
    """

    cases: Sequence[Case]  # one for each pair
    sampler: Sampler
    channels: int
    classes: Classes
    info: "pd.DataFrame"  # a row per pair: size, bits, channels, each class's share of the pixels …

    def examples(self, pairs: Sequence[int]) -> np.ndarray:
        """List what training shows of pairs: their slices, or a patch drawn of each pair."""
        if self.sampler.patches:
            return np.array([(number, DRAWN, 0, 0) for number in pairs], int).reshape(-1, 4)
        return self.cover(pairs)

    def cover(self, pairs: Sequence[int]) -> np.ndarray:
        """List windows that cover pairs without overlap: an example each."""
        found = []
        for number in pairs:
            shape = self.cases[number].image.shape[:3]
            starts = [
                window_starts(length, side, overlap=0)
                for length, side in zip(shape, self.sampler.window, strict=True)
            ]
            grid = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 3)
            found.append(np.insert(grid, 0, number, axis=1))
        return np.concatenate([np.zeros((0, 4), int), *found])

    def draw(self, example: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Give an example its place. A third of the patches show a pixel of some class, if any."""
        number, first = example[:2]
        if first != DRAWN:
            return example
        case, window = self.cases[number], self.sampler.window
        shape = case.image.shape[:3]
        last = np.subtract(shape, window)
        start = np.array([rng.integers(max(0, most) + 1) for most in last])
        shown = np.flatnonzero(case.places[: len(self.classes.names), 0] >= 0)
        if len(shown) and rng.random() < FOREGROUND_SHARE:
            places = case.places[rng.choice(shown)]
            place = rng.choice(places[places >= 0])
            middle = np.array(np.unravel_index(place, shape)) - np.array(window) // 2
            start = np.clip(middle, 0, np.maximum(last, 0))
        # What is smaller than the window lies in its middle.
        start = np.where(last < 0, -(-last // 2), start)
        return np.array([number, *start])

    def take(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read examples (n, 4): images (n, [D,] H, W, C) and masks (n, [D,] H, W, K), uint8.

        A mask's value is the share of the pixel that is of the class: 255 is all of it. With
        `--ignore` a further mask is the share that does not count.
        """
        images, masks = [], []
        for number, *start in examples:
            case = self.cases[number]
            images.append(read_window(case.image, start, self.sampler))
            mask = read_box(case.masks, start, self.sampler.window)
            masks.append(mask if self.sampler.dimensions == 3 else mask[0])
        return np.stack(images), np.stack(masks)


def select(
    store: Store, keys: Sequence[str], sampler: Sampler, channels: int, classes: Classes
) -> Dataset:
    """Make a data set of the pairs named by `keys`."""
    import pandas as pd  # a wrong path is answered without its half second

    info = pd.DataFrame([store.entries[key].info for key in keys])
    return Dataset([store.case(key) for key in keys], sampler, channels, classes, info)
