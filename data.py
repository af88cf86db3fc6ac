"""Decode image/mask pairs, check them, split them, feed them.

python data.py check DIR                  reports on a data set, whose layouts `pairing.py` tells
python data.py download montgomery        fetches one
"""

import hashlib
import json
import os
import random
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import pandas as pd
import tyro
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from tqdm import tqdm

import cache
import images
import pairing
from augment import augmentation
from cache import Dataset
from cluster import Share
from images import UserError
from pairing import Pair

AHEAD = 2  # batches that each thread makes before they are asked for

# ------------------------------------------------------------------------------------------------ decoding, caching


def _quantiles(pixels: np.ndarray) -> list[float]:
    """Describe grey levels by 21 quantiles, of a sample where there are many."""
    sample = pixels.ravel()[:: max(1, pixels.size // 100_000)]
    return np.quantile(sample, np.linspace(0, 1, 21)).tolist() if sample.size else []


def _extent(mask: np.ndarray) -> float:
    """Measure the mask's bounding box, in the slice with most of it: its larger side as a share of the image's."""
    plane = max(mask, key=np.count_nonzero)
    sides = [np.flatnonzero(plane.any(axis)) for axis in (1, 0)]
    return max(float(side[-1] - side[0] + 1) for side in sides) / max(plane.shape) if plane.any() else 0.0


@dataclass(frozen=True)
class Recipe:
    """How files become what the network sees."""

    names: Sequence[str]  # of the classes
    size: tuple[int, int]  # (H, W) of the network
    channels: int = 1  # 1 grey, 3 RGB
    window: str = ""  # see `images.prepare_scan`
    levels: Sequence[int] = ()  # see `read_ids`


def _load_pair(pair: Pair, recipe: Recipe) -> tuple[np.ndarray, dict[str, Any]]:
    """Read one pair: rows (S, bytes) of its prepared slices and masks, facts about the files. Raises UserError."""
    names, size = recipe.names, recipe.size
    scan, ids = pairing.read_pair(pair, names, recipe.levels, recipe.window)
    pixels = scan.pixels
    pictures = images.prepare_scan(scan, size, recipe.channels, recipe.window)
    if recipe.window and np.ptp(pictures) == 0 < np.ptp(pixels):
        span = f"{pixels.min():g} to {pixels.max():g}"
        raise UserError(
            f"{pair.image}: nothing is seen in window {recipe.window} of grey levels {span}; choose another"
        )
    masks = np.stack([images.prepare_mask(one, size, len(names)) for one in ids])
    shares = [np.count_nonzero(ids == i) / ids.size for i in range(1, len(names) + 1)]
    facts = {"image": str(pair.image), "size": f"{pixels.shape[1]}x{pixels.shape[2]}", "slices": len(pixels)}
    facts |= {"bits": 8 * pixels.dtype.itemsize, "channels": pixels.shape[-1], "constant": bool(np.ptp(pixels) == 0)}
    facts |= {"spacing": scan.spacing_mm and " x ".join(f"{side:.3g}" for side in scan.spacing_mm)}
    facts |= {"patient": scan.patient, "digest": hashlib.sha256(pictures.tobytes()).hexdigest()[:16]}
    facts |= {"quantiles": _quantiles(pixels[..., 0]), "object": _quantiles(pixels[..., 0][ids > 0])}
    for i, (name, share) in enumerate(zip(names, shares, strict=True), 1):
        facts |= {f"share: {name}": share, f"extent: {name}": _extent(ids == i)}
    return np.concatenate([pictures.reshape(len(ids), -1), masks.reshape(len(ids), -1)], axis=1), facts


def _fingerprint(pair: Pair) -> str:
    """Change whenever one of the pair's files changes."""
    places = [path.resolve() for path in (pair.image, *pair.masks)]
    files = [file for path in places for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stats = [path.stat() if path.exists() else None for path in files]
    return repr(
        [(str(path), stat and (stat.st_size, stat.st_mtime_ns)) for path, stat in zip(files, stats, strict=True)]
    )


def load(
    pairs: Sequence[Pair], recipe: Recipe, cache_dir: str | Path = "", memory_gb: float = 4.0
) -> tuple[Dataset, list[str]]:
    """Decode pairs in parallel, or take them from the disk cache: the readable ones, in order, and the problems.

    cache_dir: "" keeps nothing. Changed files are read anew, the others come from the cache. What takes more than
    `memory_gb` stays on the disk and is read when it is needed.
    """
    keys = [_fingerprint(pair) for pair in pairs]
    parts = [str(pairs[0].image.resolve().parent) if pairs else "", repr(recipe), images.PREPARATION]
    path = _cache_path(cache_dir, f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.rows")
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
                first, count, facts = known[key]
                new.add(key, store[np.arange(first, first + count)], facts)
            places = [pairs[i].image for i in todo]  # not all at once: what waits to be written fills the memory
            done = (one for chunk in pairing.chunks(places, 64) for one in pool.map(attempt, todo[chunk]))
            for i, result in zip(todo, tqdm(done, "reading", len(todo), unit="pair", disable=None), strict=True):
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
        with images.atomic(Path(cache_dir) / "writable") as temporary:
            temporary.touch()
    except OSError as error:
        warnings.warn(f"decoded images are not kept: {cache_dir}: {error.strerror}", stacklevel=2)
        return None
    return Path(cache_dir) / name


def load_checked(
    data_dir: str | Path,
    recipe: Recipe,
    cache_dir: str | Path = "",
    memory_gb: float = 4.0,
    extra_dir: str | Path = "",
) -> tuple[list[Pair], Dataset]:
    """Find and decode a whole data set, and all of a further one for training (its pairs' subset is "extra").

    Raises UserError that lists every problem, if there is one.
    """
    pairs, problems = pairing.find_pairs(data_dir)
    if extra_dir:
        more, faults = pairing.find_pairs(extra_dir)
        pairs, problems = [*pairs, *(replace(pair, subset="extra") for pair in more)], problems + faults
    dataset, unreadable = load(pairs, recipe, cache_dir, memory_gb)
    problems += unreadable + find_copies(dataset)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        rest = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{len(problems)} problem(s) in {data_dir}; mend or remove these files:\n{shown}{rest}")
    if note := merged_note(pairs, recipe.names):
        print(note)
    pairs = name_patients(pairs, dataset)
    extra, known = ({pair.patient for pair in pairs if (pair.subset == "extra") == one} for one in (True, False))
    if extra & known - {""}:
        raise UserError(
            f"patient {min(extra & known - {''})} is in {data_dir} and in {extra_dir}; expected each in one"
        )
    return pairs, dataset


def name_patients(pairs: Sequence[Pair], dataset: Dataset) -> list[Pair]:
    """Give pairs without a patient that of their DICOM header, unless all have the same: then it is nobody's name."""
    if len(set(dataset.facts.patient)) == 1:
        return list(pairs)
    known = zip(pairs, dataset.facts.patient, strict=True)
    return [replace(pair, patient=pair.patient or patient) for pair, patient in known]


def merged_note(pairs: Sequence[Pair], names: Sequence[str]) -> str:
    """Tell that class folders become one class, where one is asked for; else nothing."""
    folders = [path.parent.name for path in pairs[0].masks] if pairs else []
    if len(names) > 1 or len(folders) < 2 or folders == ["leftMask", "rightMask"]:
        return ""
    return f'the masks of {", ".join(folders)} become one class; --classes "{",".join(folders)}" keeps them apart'


def find_copies(dataset: Dataset) -> list[str]:
    """Name the images that are there twice: one could be trained on and the other tested."""
    found, firsts = [], {}
    for path, digest, constant in dataset.facts.reindex(columns=["image", "digest", "constant"]).itertuples(
        index=False
    ):
        if digest in firsts and not constant:  # a blank one tells nothing
            found.append(f"{path}: the same image as {firsts[digest]}; keep one of them")
        firsts.setdefault(digest, path)
    return found


def describe(dataset: Dataset, names: Sequence[str]) -> str:
    """Describe a data set in lines of text: pairs, sizes, bit depths, channels, classes, and what deserves a look."""
    facts = dataset.facts
    lines = [f"{'pairs':10} {len(facts)}"]
    for column in ("size", "slices", "spacing", "bits", "channels"):
        counts = facts[column].value_counts() if len(facts) else {}
        if not len(counts) or (column == "slices" and set(counts.index) == {1}):
            continue
        common = [f"{value} ({count})" for value, count in list(counts.items())[:6]]
        lines.append(f"{column:10} {', '.join(common)}" + (f", … {len(counts)} kinds" if len(counts) > 6 else ""))
    for name in names if len(facts) else ():
        share = facts[f"share: {name}"]
        lines.append(f"{'class':10} {name}: {share.mean():.2%} of the pixels, empty in {(share == 0).sum()} mask(s)")
    notes = [
        ("constant image, nothing to see", facts.get("constant") == True),  # noqa: E712  (None for no pairs)
        ("16 bits or more, stretched to 8 between its own percentiles", facts.get("bits", pd.Series()) > 8),
        ("has an alpha channel, which is ignored", facts.get("channels", pd.Series()) == 4),
    ]
    for text, where in notes:
        if len(facts) and 0 < where.sum() <= max(5, len(facts) // 10):  # the odd ones out; else it is the rule
            lines += [f"{'note':10} {path}: {text}" for path in facts.image[where]]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- splitting


def _fold(pairs: Sequence[Pair], folds: int, fold: int, seed: int) -> np.ndarray:
    """Give the indices of one of `folds` parts, equal in labels, patients kept together."""
    groups = [pair.patient or pair.stem for pair in pairs]
    if len(set(groups)) < folds:
        raise UserError(
            f"{len(set(groups))} patients (or images) are there when one of {folds} is to be set aside; add data, or "
            "set aside none, --val-fraction 0 or --test-fraction 0, or a larger share"
        )
    counts = Counter(pair.label for pair in pairs)
    common = counts.most_common(1)[0][0]
    labels = [
        pair.label if counts[pair.label] >= folds else common for pair in pairs
    ]  # a rare one cannot be shared out
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(labels, labels, groups))[fold][1]


def split(
    pairs: Sequence[Pair],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    folds: int = 0,
    fold: int = 0,
    labelled: int = 0,
) -> list[str]:
    """Assign each pair to train, val or test: seeded, stratified by label, grouped by patient.

    With `folds` the test set is fold `fold` of all pairs but those that index.csv keeps for testing, which are left
    out (""). Without, index.csv's val and test are taken, and what it does not name is drawn: test_fraction, then
    val_fraction of the rest, each rounded to 1/2, 1/3, 1/4 …, 0 for none. With `labelled` only so many of the training
    pairs stay train, drawn likewise, the others get "". Extra pairs are train in any case. Raises UserError where
    there are too few patients, or index.csv puts one patient in two subsets.
    """
    kept = {"extra", "test"} if folds else {"extra", "val", "test"}
    fixed = [pair.subset if pair.subset in kept else "" for pair in pairs]
    subsets = np.array([name or "train" for name in fixed], dtype=object)
    if folds:  # a data set's own test images take no part
        subsets[subsets == "test"] = ""
        fixed = []
    shares = {"test": 1 / folds if folds else test_fraction, "val": val_fraction}
    for name, share in shares.items():
        if name not in fixed and share > 0:
            parts = round(1 / share)
            rest = np.flatnonzero(subsets == "train")
            drawn = _fold([pairs[i] for i in rest], parts, fold if name == "test" else 0, seed)
            subsets[rest[drawn]] = name
    table = pd.DataFrame({"patient": [pair.patient for pair in pairs], "subset": subsets})
    spread = table[table.patient != ""].groupby("patient").subset.nunique()
    if (spread > 1).any():
        raise UserError(
            f"index.csv would part patient {spread.idxmax()}; name one subset for all of a patient's images"
        )
    train = np.flatnonzero(subsets == "train")
    if not len(train):
        raise UserError(
            f"none of the {len(pairs)} images is left to train on; expected some that are neither val nor test"
        )
    if labelled > len(train):
        raise UserError(f"labelled is {labelled}; expected at most the {len(train)} training images")
    if 0 < labelled < len(train):
        labels = [pairs[i].label for i in train]
        counts = Counter(labels)
        shared = min(counts.values()) > 1 and len(counts) <= min(labelled, len(train) - labelled)
        parts = train_test_split(train, train_size=labelled, random_state=seed, stratify=labels if shared else None)
        subsets[parts[1]] = ""
    return ["train" if subset == "extra" else subset for subset in subsets]


# ---------------------------------------------------------------------------------------------------------- batches


class Batches(keras.utils.PyDataset):
    """Batches for `fit`: images (N, H, W, C) and masks (N, H, W, K), float32 in [0, 1].

    strength: of the augmentation, see `augment.augmentation`; "" keeps images and order as they are, for validation.
    at_least: so many images make an epoch, shown again where there are fewer.
    share: this process's part of each batch, where several train together. For training, images are shown again until
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
        share: Share = Share(),  # noqa: B008 (it cannot be changed)
    ) -> None:
        super().__init__(workers=1)  # Keras's own would wait a tenth of a second at the end of each epoch
        self.dataset, self.rows, self.names, self.batch_size = dataset, rows, names, batch_size
        self.strength, self.seed, self.epoch = strength, seed, 0
        self.share, self.count = share, max(len(rows), at_least)
        # To augment an image of 512x512 takes some 8 ms, so that a GPU would wait for two threads.
        self.count_threads = max(2, min(8, (os.cpu_count() or 2) // 2))
        self.threads = ThreadPoolExecutor(self.count_threads)
        self.own = threading.local()  # an augmentation for each thread
        self.ahead: dict[int, Future] = {}
        self.missing = -self.count % share.devices
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
        for number in range(place, place + 1 + AHEAD * self.count_threads):
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
        fill = -len(rows) % self.share.devices
        weights = np.append(np.full(len(rows), 1 + self.missing / self.count), np.zeros(fill)).astype(np.float32)
        rows = np.append(rows, np.repeat(rows[-1:], fill))
        length = len(rows) // self.share.processes
        part = slice(self.share.process * length, (self.share.process + 1) * length)
        pictures, masks = self.dataset.take(rows[part])
        if self.strength not in ("", "none"):
            if not hasattr(self.own, "augment"):
                self.own.augment = augmentation(self.names, 0, self.strength)
            augment, done = self.own.augment, []
            for place, picture, mask in zip(range(part.start, part.stop), pictures, masks, strict=True):
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


# ------------------------------------------------------------------------------------------------------ command line


def check(
    data_dir: tyro.conf.Positional[Path], *, classes: str = "foreground", output: Path = Path("results/check")
) -> None:
    """Report on a data set: OUTPUT/report.html, a page to look at, and report.json, proposals for train.py.

    Args:
        data_dir: the folder to look at
        classes: class names separated by commas, as in train.py
        output: where the report goes

    Exits 2 if there is a problem.
    """
    import report

    names = pairing.class_names(classes)
    pairs, problems = pairing.find_pairs(data_dir)
    dataset, unreadable = load(pairs, Recipe(names, (128, 128), levels=pairing.mask_values(classes)))
    lines = [describe(dataset, names)]
    if note := merged_note(pairs, names):
        lines.append(f"{'note':10} {note}")
    for name in ("patient", "label", "subset"):
        counts = Counter(getattr(pair, name) for pair in pairs if getattr(pair, name))
        if counts:
            common = [f"{value} ({count})" for value, count in counts.most_common(4)]
            lines.append(f"{name + 's':10} {len(counts)}: {', '.join(common)}{', …' if len(counts) > 4 else ''}")
    problems += unreadable + find_copies(dataset)
    print("\n".join([*lines, *(f"{'problem':10} {problem}" for problem in problems)]))
    given = {"data_dir": str(data_dir), "classes": classes}
    path = report.write(output, dataset, names, "\n".join(lines), problems, given)
    if len(dataset.facts):
        command = f"python train.py --from-report {path.with_suffix('.json')} --out-dir files/mine"
        print(f"{path}: pictures, and hyperparameters for `{command}`")
    if problems:
        raise UserError(f"{len(problems)} problem(s) in {data_dir}; mend or remove the files named above")
    print("no problems")


def download(
    name: tyro.conf.Positional[Literal["montgomery"]], *, output: Path = Path("files/montgomery-data")
) -> None:
    """Fetch a public data set, 138 chest X-rays with lung masks (617 MB), into a folder that train.py reads.

    Args:
        name: which one
        output: where it goes
    """
    import download

    folder = download.download(download.SOURCES[name], output)
    print(f"{folder}: ready for `python train.py --data-dir {folder}`")


if __name__ == "__main__":
    from cli import run_cli

    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"check": check, "download": download}, description=__doc__))
