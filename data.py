"""Find image/mask pairs, check them, split them, feed them: `python data.py check DIR` reports on a data set.

Layouts, recognised by themselves:

    DIR/CXR_png/*.png with DIR/ManualMask/leftMask/*.png and DIR/ManualMask/rightMask/*.png     (Montgomery)
    DIR/images/* with DIR/masks/*, a mask having its image's stem, with or without `_mask`       (anything else)
    DIR/images/* with DIR/masks/CLASS/*, a folder for each class, named as --classes names it

An optional DIR/index.csv (columns stem and any of patient, label, split) keeps a patient's images in one subset,
stratifies by label, and fixes the test set. Masks are 0/255 or 0/1 for one class, for K classes ids 0..K or the grey
levels that --classes names. An image is a file, or a folder that holds a DICOM series.
"""

import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from augment import augmentation
from cache import Dataset
from images import UserError

LARGE = 2**24  # bytes of a file that is decoded alone
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
        return images.stem(self.image)


def class_names(classes: str) -> list[str]:
    """Split the comma-separated `classes` of a config; raises UserError for none or the same twice."""
    names = [part.partition("=")[0].strip() for part in classes.split(",")]
    if not all(names) or len(set(names)) < len(names) or len(names) > 255 or "\\" in classes:
        raise UserError(f"classes is {classes!r}; expected 1 to 255 different names separated by commas, without \\")
    return names


def mask_values(classes: str) -> list[int]:
    """Tell the value of each class in the masks: 63 and 126 for "liver=63,tumour=126", else 1, 2 … Raises UserError."""
    parts = [part.partition("=")[2].strip() for part in classes.split(",")]
    values = [int(part) if part.isdecimal() else i for i, part in enumerate(parts, 1)]
    if any(part and not part.isdecimal() for part in parts) or len(set(values)) < len(values) or 0 in values:
        raise UserError(f"classes is {classes!r}; expected different grey levels above 0, as in liver=63,tumour=126")
    return values


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
    for path in sorted(path for path in folder.iterdir() if images.is_image(path) or images.is_series(path)):
        stem = normal(images.stem(path)).removesuffix(suffix)
        if not str(path).isprintable():  # bytes that are no UTF-8 stand as surrogates; tables cannot hold them
            problems.append(f"{str(path)!a}: its name has unprintable characters; rename it")
        elif stem in found:
            problems.append(f"{path}: same stem as {found[stem].name}; keep one of them")
        else:
            found[stem] = path
    return found


def _class_folders(masks: Path) -> list[Path]:
    """List the folders in DIR/masks that hold a class each; one that holds a DICOM series is a mask itself."""
    return sorted(path for path in masks.glob("[!.]*") if path.is_dir() and not images.is_series(path))


def _folders(root: Path) -> tuple[Path, list[Path]]:
    """Recognise the layout: the image folder and the mask folders (one, or left and right)."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; --data-dir names the folder that holds images/ and masks/")
    if (root / "CXR_png").is_dir():
        folders = root / "CXR_png", [root / "ManualMask" / "leftMask", root / "ManualMask" / "rightMask"]
    else:
        folders = root / "images", _class_folders(root / "masks") or [root / "masks"]
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


def read_ids(pair: Pair, names: Sequence[str], levels: Sequence[int] = ()) -> np.ndarray:
    """Read a pair's masks as uint8 class ids (S, H, W) in 0..len(names). Raises UserError naming the file.

    levels: the classes' values in a mask, if these are not 1, 2 …
    """
    targets = _targets(pair, names)
    masks = read_all(
        [
            lambda path=path: read_named(path, lambda mask: images.read_mask_scan(mask, pair.image, names))
            for path in pair.masks
        ]
    )
    ids = np.zeros(masks[0].shape, np.uint8)
    for path, mask, target in sorted(zip(pair.masks, masks, targets, strict=True), key=lambda one: one[2]):
        if mask.shape != ids.shape:
            raise UserError(f"{path}: {_size(mask)}; its image's other mask is {_size(ids)}")
        values = set(np.unique(mask).tolist())
        if target and list(levels) not in ([], [1]) and len(names) == 1:
            if not values <= {0, *levels}:
                raise UserError(f"{path}: values {_some(values)}; expected 0 and {levels[0]}, as --classes says")
            ids[mask > 0] = target
        elif target:
            if not (values <= {0, 255} or values <= {0, 1}):
                raise UserError(f"{path}: values {_some(values)}; expected 0/255 or 0/1{_advice(path, values)}")
            ids[mask > 0] = target
        else:
            levels = levels or range(1, len(names) + 1)
            if not values <= {0, *levels}:
                expected = f"{_some({0, *levels})}, the values of --classes"
                raise UserError(f"{path}: values {_some(values)}; expected {expected}{_advice(path, values)}")
            for i, level in enumerate(levels, 1):
                ids[mask == level] = i
    return ids


def _targets(pair: Pair, names: Sequence[str]) -> list[int]:
    """Tell which class id each mask file of a pair paints; 0 for a file that holds class ids itself."""
    if len(names) == 1:
        return [1] * len(pair.masks)
    if len(pair.masks) == 1 and pair.masks[0].parent.name == "masks":
        return [0]
    folders, known = [path.parent.name for path in pair.masks], [name.lower() for name in names]
    if folders == ["leftMask", "rightMask"]:
        folders = [next((name for name in known if side in name), side) for side in ("left", "right")]
    if sorted(folder.lower() for folder in folders) != sorted(known):
        found, wanted = ", ".join(folders), ", ".join(known)
        raise UserError(
            f"{pair.masks[0].parents[1]}: folders of masks for {found}; --classes names {wanted}, or one for all"
        )
    return [1 + known.index(folder.lower()) for folder in folders]


def _advice(path: Path, values: set[float]) -> str:
    """Say what to do about mask values that are not binary."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return " (JPEG blurs masks: save them as PNG)"
    several = sorted(values - {0})
    if len(several) > 8 or any(value < 1 or value != int(value) for value in several):
        return ""
    given = ",".join(f"NAME{i}={value:.0f}" for i, value in enumerate(several, 1))
    return f' (if these are classes, name them: --classes "{given}")'


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
    slices = f"{array.shape[0]} slices of " if len(array) > 1 else ""
    return f"{slices}{array.shape[1]}x{array.shape[2]} pixels"


def _some(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values)[:6]) + (", …" if len(values) > 6 else "")


def read_input(path: Path, window: str = "") -> images.Scan:
    """Read an image for `window`, see `images.prepare_scan`. Raises UserError naming the file."""
    return read_named(path, lambda path: images.read_scan(path, window))


def read_pair(
    pair: Pair, names: Sequence[str], levels: Sequence[int] = (), window: str = ""
) -> tuple[images.Scan, np.ndarray]:
    """Read a pair as stored: the image, its class ids (S, H, W), see `read_ids`. Raises UserError naming the file."""
    scan, ids = read_all([lambda: read_input(pair.image, window), lambda: read_ids(pair, names, levels)])
    if scan.pixels.shape[:3] != ids.shape:
        raise UserError(f"{pair.masks[0]}: {_size(ids)}; its image {pair.image.name} is {_size(scan.pixels)}")
    for path in pair.masks:
        read_named(path, lambda path: images.check_place(pair.image, path))
    return scan, ids


def _quantiles(pixels: np.ndarray) -> list[float]:
    """Describe grey levels by 21 quantiles, of a sample where there are many."""
    sample = pixels.ravel()[:: max(1, pixels.size // 100_000)]
    return np.quantile(sample, np.linspace(0, 1, 21)).tolist() if sample.size else []


def _extent(mask: np.ndarray) -> float:
    """Measure the mask's bounding box, in the slice with most of it: its larger side as a share of the image's."""
    plane = mask[np.argmax(mask.sum((1, 2)))]
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
    scan, ids = read_pair(pair, names, recipe.levels, recipe.window)
    pixels = scan.pixels
    pictures = images.prepare_scan(scan, size, recipe.channels, recipe.window)
    if recipe.window and np.ptp(pictures) == 0 < np.ptp(pixels):
        span = f"{pixels.min():g} to {pixels.max():g}"
        raise UserError(
            f"{pair.image}: nothing is seen in window {recipe.window} of grey levels {span}; choose another"
        )
    masks = np.stack([images.prepare_mask(one, size, len(names)) for one in ids])
    shares = np.bincount(ids.ravel(), minlength=len(names) + 1) / ids.size
    facts = {"image": str(pair.image), "size": f"{pixels.shape[1]}x{pixels.shape[2]}", "slices": len(pixels)}
    facts |= {"bits": 8 * pixels.dtype.itemsize, "channels": pixels.shape[-1], "constant": bool(np.ptp(pixels) == 0)}
    facts |= {"spacing": scan.spacing_mm and " x ".join(f"{side:.3g}" for side in scan.spacing_mm)}
    facts |= {"patient": scan.patient, "digest": hashlib.sha256(pictures.tobytes()).hexdigest()[:16]}
    facts |= {"quantiles": _quantiles(pixels[..., 0]), "object": _quantiles(pixels[..., 0][ids > 0])}
    for i, (name, share) in enumerate(zip(names, shares[1:].tolist(), strict=True), 1):
        facts |= {f"share: {name}": share, f"extent: {name}": _extent(ids == i)}
    return np.concatenate([pictures.reshape(len(ids), -1), masks.reshape(len(ids), -1)], axis=1), facts


def chunks(paths: Sequence[Path], count: int) -> Iterator[slice]:
    """Part a list of files, at most `count` together; a file of many megabytes, or a folder, stays alone.

    So several volumes, decoded at once, do not fill the memory.
    """
    large = [not path.is_file() or path.stat().st_size > LARGE for path in paths]
    start = 0
    while start < len(paths):
        end = start + (1 if any(large[start : start + count]) else count)
        yield slice(start, end)
        start = end


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
            done = (one for chunk in chunks(places, 64) for one in pool.map(attempt, todo[chunk]))
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
    pairs, problems = find_pairs(data_dir)
    if extra_dir:
        more, faults = find_pairs(extra_dir)
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


def _all_folders(folder: Path) -> list[Path]:
    """List the mask folders of a layout by one of them, the first."""
    if folder.name == "leftMask":
        return [folder, folder.with_name("rightMask")]
    return _class_folders(folder.parent) if folder.parent.name == "masks" else []


def write_split(path: str | Path, pairs: Sequence[Pair], subsets: Sequence[str]) -> None:
    """Write split.csv (image, mask, subset); of several masks the first is named, the others follow from its folder.

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
    pairs, there = [], {}
    for image, mask in zip(table.image.map(Path), table["mask"].map(Path), strict=True):
        folders = _all_folders(mask.parent)
        for folder in folders:
            if folder not in there:
                there[folder] = by_stem(folder, "_mask", []) if folder.is_dir() else {}
        stem = normal(images.stem(mask)).removesuffix("_mask")
        others = tuple(there[folder].get(stem, folder / mask.name) for folder in folders)
        pairs.append(Pair(image, others or (mask,)))
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
        pictures, masks = self.dataset.take(rows)
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

    names = class_names(classes)
    pairs, problems = find_pairs(data_dir)
    dataset, unreadable = load(pairs, Recipe(names, (128, 128), levels=mask_values(classes)))
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
        print(f"{path}: pictures, and hyperparameters for `python train.py --from-report {path.with_suffix('.json')}`")
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
