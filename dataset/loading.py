"""Decode a data set's images and masks to cases, in parallel, with a cache on disk."""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset import cache
from dataset.cache import Case, Dataset, Store
from dataset.measures import describe_pair
from dataset.pairs import Pair
from dataset.reading import read_pair
from imaging import preprocess
from imaging.files import is_litter, split_by_size
from imaging.labels import Classes
from imaging.masks.encodings import Truth
from imaging.partners import voxels_of
from imaging.scan import Scan
from inference.sampler import Sampler
from utils import PREPARATION, ROOT, UserError, atomic

CHUNK = 64  # pairs that are decoded before the next are begun
# What decodes files and prepares cases.
SOURCE = ("imaging", "dataset/loading.py", "dataset/reading.py", "inference/sampler.py")


@dataclass(frozen=True)
class Preprocessing:
    """How files become cases, and these what the network sees."""

    classes: Classes
    sampler: Sampler
    channels: int = 1  # 1 grey, 3 RGB, or as many as the images have
    window: str = ""  # grey levels, see `preprocess.prepare_scan`

    @property
    def key(self) -> str:
        """Name what decides the pixels of a case: patches of any size share their cases."""
        sampler = self.sampler
        if sampler.patches:
            sampler = replace(sampler, size=sampler.dimensions * (0,))
        return repr((self.classes, replace(sampler, neighbours=0), self.channels, self.window))


def load_pairs(
    pairs: Sequence[Pair], preprocessing: Preprocessing, cache_dir: str | Path = ""
) -> tuple[Dataset, list[str]]:
    """Decode pairs, or take them from the cache; return the readable ones and the problems.

    cache_dir: "" keeps nothing. Only files that are new or changed are decoded.
    """
    keys = [_fingerprint(pair) for pair in pairs]
    path = _store_path(pairs, preprocessing, cache_dir)
    layout = preprocessing.channels, preprocessing.classes.num_planes
    store = cache.open_store(path, *layout) if path else None
    problems = []
    if store is None or not set(keys) <= set(store.entries):
        store, problems = _renew_store(
            store, path, dict(zip(keys, pairs, strict=True)), preprocessing
        )
    keys = [key for key in keys if key in store.entries]
    sampler, classes = preprocessing.sampler, preprocessing.classes
    return cache.select(store, keys, sampler, preprocessing.channels, classes), problems


def name_patients(pairs: Sequence[Pair], headers: Sequence[str]) -> list[Pair]:
    """Give each pair without a patient the one of its DICOM header, `Scan.patient`.

    A header that is the same in all files that have one names nobody.
    """
    if len({header for header in headers if header}) < 2:
        return list(pairs)
    named = []
    for pair, patient in zip(pairs, headers, strict=True):
        named.append(replace(pair, patient=pair.patient or patient))
    return named


# -------------------------------------------------------------------------------------- the cache


def _fingerprint(pair: Pair) -> str:
    """Name a pair's files, their sizes and times: changes with any of them, and with the source."""
    files = []
    for path in (pair.image, *pair.more_channels, *pair.masks):
        place = _resolve(path.parent) / path.name
        if place.is_dir():
            files += [file for file in sorted(place.iterdir()) if not is_litter(file.name)]
        else:
            files.append(place)
    seen: list[Any] = [source_mark()]
    for file in files:
        try:
            seen.append(_file_mark(file))
            if voxels := voxels_of(file):
                seen.append(_file_mark(voxels))
        except OSError:  # reported when it is read
            seen.append(str(file))
    return repr(seen)


@functools.cache
def _resolve(folder: Path) -> Path:
    return folder.resolve()


def _file_mark(file: Path) -> tuple[str, int, int, int]:
    stat = file.stat()
    # The last changes when two files swap their names.
    return str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.cache
def source_mark() -> str:
    """Hash the source that decides a case's pixels: after an edit everything is decoded anew."""
    files = [path for name in SOURCE for path in sorted((ROOT / name).rglob("*.py"))]
    files += [ROOT / name for name in SOURCE if name.endswith(".py")]
    content = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()[:16]


def _store_path(
    pairs: Sequence[Pair], preprocessing: Preprocessing, cache_dir: str | Path
) -> Path | None:
    """Name the cache's file; None if nothing is to be kept. Warns if nothing can be kept."""
    if not cache_dir:
        return None
    try:
        with atomic(Path(cache_dir) / "writable") as temporary:
            temporary.touch()
    except OSError as error:
        warnings.warn(f"decoded images are not kept: {cache_dir}: {error.strerror}", stacklevel=2)
        return None
    folder = str(pairs[0].image.resolve().parent) if pairs else ""
    parts = json.dumps([folder, preprocessing.key, PREPARATION])
    return Path(cache_dir) / f"{hashlib.sha256(parts.encode()).hexdigest()[:16]}.cases"


def _renew_store(
    old: Store | None, path: Path | None, pairs: dict[str, Pair], preprocessing: Preprocessing
) -> tuple[Store, list[str]]:
    """Write a store of `pairs`, by fingerprint: copy what the old one has, decode the rest."""
    problems = []
    layout = preprocessing.channels, preprocessing.classes.num_planes
    with cache.new_store(path, *layout) as store:
        for key in pairs:
            if old and key in old.entries:
                store.add(key, old.case(key), old.entries[key].info)
        missing = [key for key in pairs if key not in store.entries]
        results = _read_pairs([pairs[key] for key in missing], preprocessing)
        for key, result in zip(missing, results, strict=True):
            if isinstance(result, UserError):
                problems += str(result).splitlines()
            else:
                store.add(key, *result)
    return (cache.open_store(path, *layout) if path else store), problems


# ---------------------------------------------------------------------------------------- reading


def _read_pairs(
    pairs: Sequence[Pair], preprocessing: Preprocessing
) -> Iterator[tuple[Case, dict[str, Any]] | UserError]:
    """Read pairs in parallel, in order, with a progress bar. An unreadable one gives its error."""

    def attempt(pair: Pair) -> tuple[Case, dict[str, Any]] | UserError:
        try:
            return _read_prepared(pair, preprocessing)
        except UserError as error:
            return error

    # In chunks: results that wait to be written fill the memory.
    chunks = split_by_size([pair.image for pair in pairs], CHUNK)
    bar = tqdm(total=len(pairs), desc="reading", unit="pair", disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk in chunks:
            for result in pool.map(attempt, pairs[chunk]):
                bar.update()
                yield result


def read_as_stored(pair: Pair, preprocessing: Preprocessing) -> tuple[Scan, Truth]:
    """Read a pair: the image, and what its masks say. Raises UserError, see `read_pair`."""
    return read_pair(pair, preprocessing.classes, preprocessing.window)


def _read_prepared(pair: Pair, preprocessing: Preprocessing) -> tuple[Case, dict[str, Any]]:
    """Read a pair: its case, and information on the files."""
    classes, window = preprocessing.classes, preprocessing.window
    scan, truth = read_as_stored(pair, preprocessing)
    try:
        grid = preprocessing.sampler.grid(scan)
    except UserError as error:
        raise UserError(f"{pair.image}: {error}") from None
    image = np.asarray(preprocess.prepare_scan(scan, grid, preprocessing.channels, window))
    notes = [*scan.notes, *truth.notes]
    if window and np.ptp(image) == 0 < np.ptp(scan.pixels):
        levels = f"{scan.pixels.min():g} to {scan.pixels.max():g}"
        nothing = f"nothing is seen in window {window} of grey levels"
        if truth.mask.any():
            raise UserError(f"{pair.image}: {nothing} {levels}; choose another window")
        notes.append(nothing)  # a slice of air
    masks = truth.prepare(grid, classes)
    digest = hashlib.sha256(image.tobytes()).hexdigest()[:16]
    info = {"image": str(pair.image), "digest": digest, "notes": notes}
    case = Case(image, masks, cache.find_places(masks))
    return case, info | describe_pair(scan, truth.mask, classes)
