"""Find image/mask pairs, check them, split them, feed them: `python data.py check DIR` reports on a data set.

Layouts, recognised by themselves:

    DIR/CXR_png/*.png with DIR/ManualMask/leftMask/*.png and DIR/ManualMask/rightMask/*.png     (Montgomery)
    DIR/images/* with DIR/masks/*, a mask having its image's stem, with or without `_mask`       (anything else)

An optional DIR/index.csv (columns stem and any of patient, label, split) keeps a patient's images in one subset,
stratifies by label, and fixes the test set. Masks are 0/255 or 0/1 for one class, class ids 0..K for K classes.
"""

import hashlib
import json
import os
import re
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tyro
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from tqdm import tqdm

import images
from augment import augmentation
from images import UserError

SUBSETS = ("train", "val", "test")


@dataclass(frozen=True)
class Pair:
    """One image file with its mask file, or its two (left, right) in the Montgomery layout."""

    image: Path
    masks: tuple[Path, ...]
    patient: str = ""  # images of one patient stay in one subset; "" is a patient of its own
    label: str = ""  # subsets get equal shares of each label
    subset: str = ""  # fixed by the data set's author, or ""

    @property
    def stem(self) -> str:
        """The name that image, mask and prediction share."""
        return self.image.stem


def class_names(classes: str) -> list[str]:
    """Split the comma-separated `classes` of a config; raises UserError for none or the same twice."""
    names = [name.strip() for name in classes.split(",")]
    if not all(names) or len(set(names)) < len(names) or len(names) > 255:
        raise UserError(f"classes is {classes!r}; expected 1 to 255 different names separated by commas")
    return names


def channels_of(names: Sequence[str]) -> int:
    """Count the network's output channels: 1 for one class, else one per class and one for the background, first."""
    return 1 if len(names) == 1 else len(names) + 1


# ---------------------------------------------------------------------------------------------------- finding pairs


def normal(name: str) -> str:
    """Compose accents: macOS takes é apart in file names, and the same name would not be found."""
    return unicodedata.normalize("NFC", name)


def by_stem(folder: Path, suffix: str, problems: list[str]) -> dict[str, Path]:
    """Map stems (less `suffix`) to the folder's image files, sorted; the same stem twice goes to `problems`."""
    found: dict[str, Path] = {}
    for path in sorted(filter(images.is_image, folder.iterdir())):
        stem = normal(path.stem).removesuffix(suffix)
        if not str(path).isprintable():  # bytes that are no UTF-8 stand as surrogates; tables cannot hold them
            problems.append(f"{str(path)!a}: its name has unprintable characters; rename it")
        elif stem in found:
            problems.append(f"{path}: same stem as {found[stem].name}; keep one of them")
        else:
            found[stem] = path
    return found


def _folders(root: Path) -> tuple[Path, list[Path]]:
    """Recognise the layout: the image folder and the mask folders (one, or left and right)."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; --data-dir names the folder that holds images/ and masks/")
    if (root / "CXR_png").is_dir():
        folders = root / "CXR_png", [root / "ManualMask" / "leftMask", root / "ManualMask" / "rightMask"]
    else:
        folders = root / "images", [root / "masks"]
    missing = [str(folder.relative_to(root)) for folder in (folders[0], *folders[1]) if not folder.is_dir()]
    if missing:
        names = sorted(path.name for path in root.iterdir())[:8]
        raise UserError(
            f"{root} holds {', '.join(names) or 'nothing'} but not {', '.join(missing)}; expected "
            "images/ + masks/, or CXR_png/ + ManualMask/leftMask/ + ManualMask/rightMask/"
        )
    return folders


def _index(root: Path, stems: Iterable[str], problems: list[str]) -> dict[str, dict[str, str]]:
    """Read root/index.csv where there is one: stem → its row; stems that it lacks go to `problems`."""
    path = root / "index.csv"
    if not path.is_file():
        return {}
    table = read_table(path, {"stem"})
    table["stem"] = table.stem.map(normal)
    problems += [f"{path}: stem {stem} twice" for stem in table.stem[table.stem.duplicated()].unique()]
    rows = table.drop_duplicates("stem").set_index("stem").to_dict("index")
    problems += [f"{path}: no row for {stem}" for stem in sorted(set(stems) - set(rows))]
    known = ("", *SUBSETS)
    bad = {row.get("split", "").lower() for row in rows.values()} - set(known)
    problems += [f"{path}: split is {value!r}; expected train, val, test or nothing" for value in sorted(bad)]
    return rows


def read_table(path: str | Path, columns: set[str]) -> pd.DataFrame:
    """Read a CSV file of strings, blanks around them dropped, column names in lower case.

    Raises UserError if it cannot be read or lacks one of `columns`.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected comma-separated UTF-8 text") from None
    table = table.rename(columns=lambda name: name.strip().lower())
    if not columns <= set(table) or not table.columns.is_unique:
        raise UserError(f"{path} has columns {', '.join(table)}; expected each once, {', '.join(sorted(columns))} too")
    return table.apply(lambda column: column.str.strip())


def find_pairs(data_dir: str | Path) -> tuple[list[Pair], list[str]]:
    """Pair images and masks by stem: the pairs, sorted, and the problems found on the way, each naming its file.

    Raises UserError where the folder has neither layout.
    """
    root, problems = Path(data_dir), []
    image_dir, mask_dirs = _folders(root)
    found = by_stem(image_dir, "", problems)
    masks = [by_stem(folder, "_mask", problems) for folder in mask_dirs]
    for folder, there in zip(mask_dirs, masks, strict=True):
        problems += [f"{found[stem]}: no mask of that stem in {folder}" for stem in sorted(set(found) - set(there))]
        problems += [f"{there[stem]}: no image of that stem in {image_dir}" for stem in sorted(set(there) - set(found))]
    rows = _index(root, found, problems)
    pairs = []
    for stem, image in found.items():
        if all(stem in there for there in masks):
            row = rows.get(stem, {})
            named = re.search(r"_([01])$", stem)  # Montgomery's names end in _0 (normal) or _1 (tuberculosis)
            label = row.get("label", named.group(1) if named else "")
            paths = tuple(there[stem] for there in masks)
            pairs.append(Pair(image, paths, row.get("patient", ""), label, row.get("split", "").lower()))
    if not found:
        problems.append(f"{image_dir}: no image; expected files ending in {' '.join(images.SUFFIXES)}")
    return pairs, problems


# ---------------------------------------------------------------------------------------- reading, checking, caching


def read_ids(pair: Pair, names: Sequence[str]) -> np.ndarray:
    """Read a pair's masks as uint8 class ids (H, W) in 0..len(names). Raises UserError naming the file."""
    targets = _targets(pair, names)
    masks = read_all([lambda path=path: read_named(path, images.read_mask) for path in pair.masks])
    ids = np.zeros(masks[0].shape, np.uint8)
    for path, mask, target in zip(pair.masks, masks, targets, strict=True):
        if mask.shape != ids.shape:
            raise UserError(f"{path}: {_size(mask)}; its image's other mask is {_size(ids)}")
        values = set(np.unique(mask).tolist())
        if target:
            if not (values <= {0, 255} or values <= {0, 1}):
                raise UserError(f"{path}: values {_some(values)}; expected 0/255 or 0/1{_advice(path, values)}")
            ids[mask > 0] = target
        else:
            if not values <= set(range(len(names) + 1)):
                raise UserError(f"{path}: values {_some(values)}; expected class ids 0..{len(names)}, see --classes")
            ids = mask.astype(np.uint8)
    return ids


def _targets(pair: Pair, names: Sequence[str]) -> list[int]:
    """Tell which class id each mask file of a pair paints; 0 for a file that holds class ids itself."""
    if len(names) == 1:
        return [1] * len(pair.masks)
    if len(pair.masks) == 1:
        return [0]
    targets = [[i for i, name in enumerate(names, 1) if side in name.lower()] for side in ("left", "right")]
    if len(names) != 2 or [len(found) for found in targets] != [1, 1]:
        raise UserError(
            f"{pair.masks[0]} and rightMask; expected one class, or two named left and right, not {', '.join(names)}"
        )
    return [found[0] for found in targets]


def _advice(path: Path, values: set[float]) -> str:
    """Say what to do about mask values that are not binary."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return " (JPEG blurs masks: save them as PNG)"
    return " (if they are class ids, name the classes: --classes liver,tumour)" if max(values) < 32 else ""


def read_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Make every call; raise one UserError with a line for each that failed."""
    results, faults = [], []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return results


def read_named(path: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """Read a file, its name put before whatever is wrong with it."""
    try:
        return read(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]} pixels"


def _some(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values)[:6]) + (", …" if len(values) > 6 else "")


def read_pair(pair: Pair, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a pair as stored: image (H, W, C) and class ids (H, W). Raises UserError naming the file."""
    image, ids = read_all([lambda: read_named(pair.image, images.read), lambda: read_ids(pair, names)])
    if image.shape[:2] != ids.shape:
        raise UserError(f"{pair.masks[0]}: {_size(ids)}; its image {pair.image.name} is {_size(image)}")
    return image, ids


def _load_pair(pair: Pair, names: Sequence[str], size: tuple[int, int], channels: int) -> tuple:
    """Read one pair: prepared image (H, W, C) and masks (H, W, K), facts about the files. Raises UserError."""
    image, ids = read_pair(pair, names)
    shares = np.bincount(ids.ravel(), minlength=len(names) + 1) / ids.size
    facts = {"image": str(pair.image), "size": f"{image.shape[0]}x{image.shape[1]}"}
    facts |= {"bits": 8 * image.dtype.itemsize, "channels": image.shape[-1], "constant": bool(np.ptp(image) == 0)}
    facts |= {f"share: {name}": share for name, share in zip(names, shares[1:].tolist(), strict=True)}
    return images.prepare(image, size, channels), images.prepare_mask(ids, size, len(names)), facts


@dataclass(frozen=True)
class Dataset:
    """Pairs decoded once, at the network's size."""

    images: np.ndarray  # (N, H, W, C) uint8
    masks: np.ndarray  # (N, H, W, K) uint8, the share of each pixel that is of the class: 255 is all of it
    facts: pd.DataFrame  # a row per pair: image, size, bits, channels, constant, each class's share of the pixels


def join(one: Dataset, other: Dataset) -> Dataset:
    """Put one data set after another. Raises UserError if they share an image: it could be tested and trained on."""
    firsts, seconds = ([image.tobytes() for image in dataset.images] for dataset in (one, other))
    shared = {image for image in set(firsts) & set(seconds) if any(image)}  # a blank one tells nothing
    if shared:
        same = shared.pop()
        places = one.facts.image[firsts.index(same)], other.facts.image[seconds.index(same)]
        raise UserError(f"{' and '.join(places)} are the same image ({len(shared) + 1} in all); keep one of them")
    arrays = (np.concatenate(pair) for pair in ((one.images, other.images), (one.masks, other.masks)))
    return Dataset(*arrays, pd.concat([one.facts, other.facts], ignore_index=True))


def _fingerprint(pair: Pair) -> str:
    """Change whenever one of the pair's files changes."""
    paths = [path.resolve() for path in (pair.image, *pair.masks)]
    stats = [path.stat() if path.exists() else None for path in paths]
    return repr(
        [(str(path), stat and (stat.st_size, stat.st_mtime_ns)) for path, stat in zip(paths, stats, strict=True)]
    )


def load(
    pairs: Sequence[Pair], names: Sequence[str], size: tuple[int, int], channels: int, cache_dir: str | Path = ""
) -> tuple[Dataset, list[str]]:
    """Decode pairs in parallel, or take them from the disk cache: the readable ones, in order, and the problems.

    size: (H, W) of the network; channels: 1 grey, 3 RGB; cache_dir: "" keeps nothing on disk. Changed files are read
    anew, the others come from the cache.
    """
    keys = [_fingerprint(pair) for pair in pairs]
    recipe = json.dumps([str(pairs[0].image.resolve().parent) if pairs else "", *names, size, channels])
    cache = Path(cache_dir) / f"{hashlib.sha256((recipe + images.PREPARATION).encode()).hexdigest()[:16]}.npz"
    known = _read_cache(cache) if cache_dir else {}
    pictures, masks = (np.zeros((len(pairs), *size, count), np.uint8) for count in (channels, len(names)))
    facts: list[dict[str, Any] | None] = [None] * len(pairs)
    problems: list[str] = []

    def attempt(i: int) -> str:
        try:
            pictures[i], masks[i], facts[i] = known.get(keys[i]) or _load_pair(pairs[i], names, size, channels)
        except UserError as error:
            return str(error)
        return ""

    todo = [i for i, key in enumerate(keys) if key not in known]
    for i in set(range(len(pairs))) - set(todo):
        attempt(i)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault in tqdm(pool.map(attempt, todo), "reading", len(todo), unit="pair", disable=None if todo else True):
            problems += fault.splitlines()
    good = [i for i, fact in enumerate(facts) if fact]
    if len(good) < len(pairs):
        pictures, masks = pictures[good], masks[good]
    dataset = Dataset(pictures, masks, pd.DataFrame([facts[i] for i in good]))
    if cache_dir and todo and good:
        _write_cache(cache, [keys[i] for i in good], dataset)
    return dataset, problems


def _read_cache(path: Path) -> dict[str, tuple]:
    """Read what `_write_cache` left: fingerprint → (image, masks, facts); empty if there is none or it is damaged."""
    try:
        with np.load(path) as file:
            keys, facts = json.loads(str(file["facts"]))
            return {key: row for key, *row in zip(keys, file["images"], file["masks"], facts, strict=True)}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}


def _write_cache(path: Path, keys: list[str], dataset: Dataset) -> None:
    """Write a cache file; training goes on without where that is not possible."""
    facts = json.dumps([keys, dataset.facts.to_dict("records")])
    try:
        with images.atomic(path) as temporary:
            np.savez(temporary, images=dataset.images, masks=dataset.masks, facts=np.array(facts))
    except OSError as error:
        warnings.warn(f"decoded images are not kept: {path.parent}: {error.strerror}", stacklevel=2)


def load_checked(
    data_dir: str | Path, names: Sequence[str], size: tuple[int, int], channels: int, cache_dir: str | Path = ""
) -> tuple[list[Pair], Dataset]:
    """Find and decode a whole data set. Raises UserError that lists every problem, if there is one."""
    pairs, problems = find_pairs(data_dir)
    dataset, unreadable = load(pairs, names, size, channels, cache_dir)
    problems += unreadable
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        rest = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{len(problems)} problem(s) in {data_dir}; mend or remove these files:\n{shown}{rest}")
    return pairs, dataset


def report(dataset: Dataset, names: Sequence[str]) -> str:
    """Describe a data set in lines of text: pairs, sizes, bit depths, channels, classes, and what deserves a look."""
    facts = dataset.facts
    lines = [f"{'pairs':10} {len(facts)}"]
    for column in ("size", "bits", "channels"):
        counts = facts[column].value_counts() if len(facts) else {}
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
        raise UserError(f"{len(set(groups))} patients (or images) cannot be split in {folds} parts; add data")
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

    With `folds` the test set is fold `fold` of all pairs. Without, index.csv's val and test are taken, and what it does
    not name is drawn: test_fraction, then val_fraction of the rest, each rounded to 1/2, 1/3, 1/4 …, 0 for none. With
    `labelled` only so many of the training pairs stay train, drawn likewise, the others get "". Raises UserError where
    there are too few patients, or index.csv puts one patient in two subsets.
    """
    fixed = [pair.subset if pair.subset != "train" and not folds else "" for pair in pairs]
    subsets = np.array([name or "train" for name in fixed], dtype=object)
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
    return subsets.tolist()


def write_split(path: str | Path, pairs: Sequence[Pair], subsets: Sequence[str]) -> None:
    """Write split.csv (image, mask, subset); of two masks the left one is named, the right one follows from it.

    Pairs of no subset are left out.
    """
    rows = [
        (pair.image.as_posix(), pair.masks[0].as_posix(), subset)
        for pair, subset in zip(pairs, subsets, strict=True)
        if subset
    ]
    with images.atomic(path) as temporary:
        pd.DataFrame(rows, columns=["image", "mask", "subset"]).to_csv(temporary, index=False)


def read_split(path: str | Path) -> tuple[list[Pair], list[str]]:
    """Read split.csv back: the pairs and each one's subset. Raises UserError if it is not one."""
    table = read_table(path, {"image", "mask", "subset"})
    if not set(table.subset) <= set(SUBSETS):
        raise UserError(f"{path} has subsets {', '.join(sorted(set(table.subset)))}; expected train, val, test")
    pairs, rights = [], {}
    for image, mask in zip(table.image.map(Path), table["mask"].map(Path), strict=True):
        masks = (mask,)
        if mask.parent.name == "leftMask":
            folder = mask.parents[1] / "rightMask"
            if folder not in rights:
                rights[folder] = by_stem(folder, "_mask", []) if folder.is_dir() else {}
            stem = normal(mask.stem).removesuffix("_mask")
            masks = (mask, rights[folder].get(stem, folder / mask.name))
        pairs.append(Pair(image, masks))
    return pairs, table.subset.tolist()


# ---------------------------------------------------------------------------------------------------------- batches


class Batches(keras.utils.PyDataset):
    """Batches for `fit`: images (N, H, W, C) and masks (N, H, W, K), float32 in [0, 1].

    strength: of the augmentation, see `augment.augmentation`; "" keeps images and order as they are, for validation.
    at_least: so many images make an epoch, shown again where there are fewer.

    Order and augmentation follow from (seed, epoch, batch) alone: the same in every run and after a resume, whichever
    thread makes which batch.
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
    ) -> None:
        super().__init__(workers=2, max_queue_size=8)
        self.dataset, self.rows, self.names, self.batch_size = dataset, rows, names, batch_size
        self.strength, self.seed, self.epoch = strength, seed, 0
        self.count = max(len(rows), at_least)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        order = self.rows
        if self.strength:
            rng, repeats = np.random.default_rng((self.seed, self.epoch)), -(-self.count // len(order))
            order = np.concatenate([rng.permutation(order) for _ in range(repeats)])[: self.count]
        rows = order[index * self.batch_size : (index + 1) * self.batch_size]
        pictures, masks = self.dataset.images[rows], self.dataset.masks[rows]
        if self.strength:
            seed = int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])
            augment = augmentation(self.names, seed, self.strength)
            done = [augment(image=picture, mask=mask) for picture, mask in zip(pictures, masks, strict=True)]
            pictures, masks = (np.stack([one[key] for one in done]) for key in ("image", "mask"))
        masks = with_background(masks.astype(np.float32) / 255)
        return pictures.astype(np.float32) / 255, masks

    def on_epoch_end(self) -> None:
        """Move on to the next epoch's order and augmentation."""
        self.epoch += 1


def with_background(masks: np.ndarray) -> np.ndarray:
    """Put what several classes leave of each pixel before them, as a class of its own; a single one needs none."""
    if masks.shape[-1] == 1:
        return masks
    return np.concatenate([np.maximum(1 - masks.sum(-1, keepdims=True), 0), masks], axis=-1)


# ------------------------------------------------------------------------------------------------------ command line


def check(data_dir: tyro.conf.Positional[Path], *, classes: str = "foreground") -> None:
    """Report on a data set: pairs, sizes, bit depths, classes, problems. Exits 2 if there is a problem.

    Args:
        data_dir: the folder to look at
        classes: class names separated by commas, as in train.py
    """
    names = class_names(classes)
    pairs, problems = find_pairs(data_dir)
    dataset, unreadable = load(pairs, names, (images.MIN_SIDE, images.MIN_SIDE), 1)
    print(report(dataset, names))
    for name in ("patient", "label", "subset"):
        counts = Counter(getattr(pair, name) for pair in pairs if getattr(pair, name))
        if counts:
            common = [f"{value} ({count})" for value, count in counts.most_common(4)]
            print(f"{name + 's':10} {len(counts)}: {', '.join(common)}{', …' if len(counts) > 4 else ''}")
    problems += unreadable
    for problem in problems:
        print(f"{'problem':10} {problem}")
    if problems:
        raise UserError(f"{len(problems)} problem(s) in {data_dir}; mend or remove the files named above")
    print("no problems")


if __name__ == "__main__":
    from utils import run_cli

    run_cli(lambda: tyro.extras.subcommand_cli_from_dict({"check": check}, description=__doc__))
