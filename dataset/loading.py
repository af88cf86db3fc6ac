"""Decode image/mask pairs, check them, split them, feed them.

python data.py check DIR                  reports on a data set, whose layouts `pairing.py` tells
python data.py download montgomery        fetches one
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset import cache
from dataset.cache import Dataset
from dataset.layouts import Pair
from dataset.reading import read_pair
from imaging import preprocess
from imaging.files import split_by_size
from utils import PREPARATION, UserError, atomic

# ------------------------------------------------------------------------------------------------ decoding, caching


def _quantiles(pixels: np.ndarray) -> list[float]:
    """Describe grey levels by 21 quantiles, of a sample where there are many."""
    sample = pixels.ravel()[:: max(1, pixels.size // 100_000)]
    return np.quantile(sample, np.linspace(0, 1, 21)).tolist() if sample.size else []


def _extent(mask: np.ndarray) -> float:
    """Measure the mask's bounding box, in the slice with most of it: its larger side as a share of the image's."""
    plane = max(mask, key=np.count_nonzero)
    sides = [np.flatnonzero(plane.any(axis)) for axis in (1, 0)]
    return (
        max(float(side[-1] - side[0] + 1) for side in sides) / max(plane.shape)
        if plane.any()
        else 0.0
    )


@dataclass(frozen=True)
class Preprocessing:
    """How files become what the network sees."""

    names: Sequence[str]  # of the classes
    size: tuple[int, int]  # (H, W) of the network
    channels: int = 1  # 1 grey, 3 RGB
    window: str = ""  # see `images.prepare_scan`
    levels: Sequence[int] = ()  # see `read_ids`


def _load_pair(pair: Pair, recipe: Preprocessing) -> tuple[np.ndarray, dict[str, Any]]:
    """Read one pair: rows (S, bytes) of its prepared slices and masks, info about the files. Raises UserError."""
    names, size = recipe.names, recipe.size
    scan, ids = read_pair(pair, names, recipe.levels, recipe.window)
    pixels = scan.pixels
    pictures = preprocess.prepare_scan(scan, size, recipe.channels, recipe.window)
    if recipe.window and np.ptp(pictures) == 0 < np.ptp(pixels):
        span = f"{pixels.min():g} to {pixels.max():g}"
        raise UserError(
            f"{pair.image}: nothing is seen in window {recipe.window} of grey levels {span}; choose another"
        )
    masks = np.stack([preprocess.prepare_mask(one, size, len(names)) for one in ids])
    shares = [np.count_nonzero(ids == i) / ids.size for i in range(1, len(names) + 1)]
    info = {
        "image": str(pair.image),
        "size": f"{pixels.shape[1]}x{pixels.shape[2]}",
        "slices": len(pixels),
    }
    info |= {
        "bits": 8 * pixels.dtype.itemsize,
        "channels": pixels.shape[-1],
        "constant": bool(np.ptp(pixels) == 0),
    }
    info |= {"spacing": scan.spacing_mm and " x ".join(f"{side:.3g}" for side in scan.spacing_mm)}
    info |= {
        "patient": scan.patient,
        "digest": hashlib.sha256(pictures.tobytes()).hexdigest()[:16],
    }
    info |= {
        "quantiles": _quantiles(pixels[..., 0]),
        "object": _quantiles(pixels[..., 0][ids > 0]),
    }
    for i, (name, share) in enumerate(zip(names, shares, strict=True), 1):
        info |= {f"share: {name}": share, f"extent: {name}": _extent(ids == i)}
    return np.concatenate(
        [pictures.reshape(len(ids), -1), masks.reshape(len(ids), -1)], axis=1
    ), info


def _fingerprint(pair: Pair) -> str:
    """Change whenever one of the pair's files changes."""
    places = [path.resolve() for path in (pair.image, *pair.masks)]
    files = [
        file for path in places for file in (sorted(path.iterdir()) if path.is_dir() else [path])
    ]
    stats = [path.stat() if path.exists() else None for path in files]
    return repr(
        [
            (str(path), stat and (stat.st_size, stat.st_mtime_ns))
            for path, stat in zip(files, stats, strict=True)
        ]
    )


def load_pairs(
    pairs: Sequence[Pair], recipe: Preprocessing, cache_dir: str | Path = "", memory_gb: float = 4.0
) -> tuple[Dataset, list[str]]:
    """Decode pairs in parallel, or take them from the disk cache: the readable ones, in order, and the problems.

    cache_dir: "" keeps nothing. Changed files are read anew, the others come from the cache. What takes more than
    `memory_gb` stays on the disk and is read when it is needed.
    """
    keys = [_fingerprint(pair) for pair in pairs]
    parts = [str(pairs[0].image.resolve().parent) if pairs else "", repr(recipe), PREPARATION]
    path = _cache_path(
        cache_dir, f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.rows"
    )
    width = recipe.size[0] * recipe.size[1] * (recipe.channels + len(recipe.names))
    store, problems = path and cache.open_store(path, width), []
    known = store.entries if store else {}

    def attempt(i: int) -> tuple | UserError:
        try:
            return _load_pair(pairs[i], recipe)
        except UserError as error:
            return error

    todo = [i for i, key in enumerate(keys) if key not in known]
    if todo or not store:
        with cache.new_store(path, width) as new, ThreadPoolExecutor(os.cpu_count()) as pool:
            for key in dict.fromkeys(key for key in keys if key in known):
                first, count, info = known[key]
                new.add(key, store[np.arange(first, first + count)], info)
            places = [
                pairs[i].image for i in todo
            ]  # not all at once: what waits to be written fills the memory
            done = (
                one for chunk in split_by_size(places, 64) for one in pool.map(attempt, todo[chunk])
            )
            for i, result in zip(
                todo, tqdm(done, "reading", len(todo), unit="pair", disable=None), strict=True
            ):
                if isinstance(result, UserError):
                    problems += str(result).splitlines()
                elif keys[i] not in new.entries:
                    new.add(keys[i], *result)
        store = cache.open_store(path, width) if path else new
    good = [key for key in keys if key in store.entries]
    return cache.select(store, good, recipe.size, recipe.channels, memory_gb * 2**30), problems


def _cache_path(cache_dir: str | Path, name: str) -> Path | None:
    """Name the cache's file; None if nothing is to be kept, or nothing can be, which is told."""
    if not cache_dir:
        return None
    try:
        with atomic(Path(cache_dir) / "writable") as temporary:
            temporary.touch()
    except OSError as error:
        warnings.warn(f"decoded images are not kept: {cache_dir}: {error.strerror}", stacklevel=2)
        return None
    return Path(cache_dir) / name


def name_patients(pairs: Sequence[Pair], dataset: Dataset) -> list[Pair]:
    """Give pairs without a patient that of their DICOM header, unless all have the same: then it is nobody's name."""
    if len(set(dataset.info.patient)) == 1:
        return list(pairs)
    known = zip(pairs, dataset.info.patient, strict=True)
    return [replace(pair, patient=pair.patient or patient) for pair, patient in known]
