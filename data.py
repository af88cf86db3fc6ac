"""Decode image/mask pairs, check them, split them, feed them.

python data.py check DIR                  reports on a data set, whose layouts `pairing.py` tells
python data.py download montgomery        fetches one
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import tyro
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

if TYPE_CHECKING:
    import pandas as pd
import utils
from dataset import checks, layouts, loading, report
from dataset.batches import Batches  # noqa: F401 (what `fit` is given; train.py takes it from here)
from dataset.cache import Dataset
from dataset.download import SOURCES, download_source
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from dataset.phantoms import make_phantoms
from imaging.files import SUFFIXES, files_by_stem
from imaging.labels import class_names, mask_values
from utils import UserError


def load_dataset(
    data_dir: str | Path,
    recipe: Preprocessing,
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
        pairs, problems = (
            [*pairs, *(replace(pair, subset="extra") for pair in more)],
            problems + faults,
        )
    dataset, unreadable = loading.load_pairs(pairs, recipe, cache_dir, memory_gb)
    problems += unreadable + checks.find_duplicates(dataset)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        rest = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(
            f"{len(problems)} problem(s) in {data_dir}; mend or remove these files:\n{shown}{rest}"
        )
    if note := checks.merged_note(pairs, recipe.names):
        print(note)
    pairs = loading.name_patients(pairs, dataset)
    extra, known = (
        {pair.patient for pair in pairs if (pair.subset == "extra") == one} for one in (True, False)
    )
    if extra & known - {""}:
        raise UserError(
            f"patient {min(extra & known - {''})} is in {data_dir} and in {extra_dir}; expected each in one"
        )
    return pairs, dataset


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
    seed: int = 0,
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
        raise UserError(
            f"labelled is {labelled}; expected at most the {len(train)} training images"
        )
    if 0 < labelled < len(train):
        labels = [pairs[i].label for i in train]
        counts = Counter(labels)
        shared = min(counts.values()) > 1 and len(counts) <= min(labelled, len(train) - labelled)
        parts = train_test_split(
            train, train_size=labelled, random_state=seed, stratify=labels if shared else None
        )
        subsets[parts[1]] = ""
    return ["train" if subset == "extra" else subset for subset in subsets]


# ------------------------------------------------------------------------------------------------------ command line


def check(
    data_dir: tyro.conf.Positional[Path],
    *,
    classes: str = "foreground",
    output: Path = Path("results/check"),
) -> None:
    """Report on a data set: OUTPUT/report.html, a page to look at, and report.json, proposals for train.py.

    Args:
        data_dir: the folder to look at
        classes: class names separated by commas, as in train.py
        output: where the report goes

    Exits 2 if there is a problem.
    """

    names = class_names(classes)
    pairs, problems = find_pairs(data_dir)
    dataset, unreadable = loading.load_pairs(
        pairs, Preprocessing(names, (128, 128), levels=mask_values(classes))
    )
    lines = [checks.describe(dataset, names)]
    if note := checks.merged_note(pairs, names):
        lines.append(f"{'note':10} {note}")
    for name in ("patient", "label", "subset"):
        counts = Counter(getattr(pair, name) for pair in pairs if getattr(pair, name))
        if counts:
            common = [f"{value} ({count})" for value, count in counts.most_common(4)]
            lines.append(
                f"{name + 's':10} {len(counts)}: {', '.join(common)}{', …' if len(counts) > 4 else ''}"
            )
    problems += unreadable + checks.find_duplicates(dataset)
    print("\n".join([*lines, *(f"{'problem':10} {problem}" for problem in problems)]))
    given = {"data_dir": str(data_dir), "classes": classes}
    path = report.write_report(output, dataset, names, "\n".join(lines), problems, given)
    if len(dataset.info):
        command = f"python train.py --from-report {path.with_suffix('.json')} --out-dir files/mine"
        print(f"{path}: pictures, and hyperparameters for `{command}`")
    if problems:
        raise UserError(
            f"{len(problems)} problem(s) in {data_dir}; mend or remove the files named above"
        )
    print("no problems")


def download(
    name: tyro.conf.Positional[Literal["montgomery"]],
    *,
    output: Path = Path("files/montgomery-data"),
) -> None:
    """Fetch a public data set, 138 chest X-rays with lung masks (617 MB), into a folder that train.py reads.

    Args:
        name: which one
        output: where it goes
    """

    folder = download_source(SOURCES[name], output)
    print(f"{folder}: ready for `python train.py --data-dir {folder}`")


def find_pairs(data_dir: str | Path) -> tuple[list[Pair], list[str]]:
    """Pair images and masks by stem: the pairs, sorted, and the problems found on the way, each naming its file.

    Raises UserError where the folder has neither layout.
    """
    root, problems = Path(data_dir), []
    image_dir, mask_dirs = layouts.find_folders(root)
    found = files_by_stem(image_dir, "", problems)
    masks = [files_by_stem(folder, "_mask", problems) for folder in mask_dirs]
    for folder, there in zip(mask_dirs, masks, strict=True):
        problems += [
            f"{found[stem]}: no mask of that stem in {folder}"
            for stem in sorted(set(found) - set(there))
        ]
        problems += [
            f"{there[stem]}: no image of that stem in {image_dir}"
            for stem in sorted(set(there) - set(found))
        ]
    rows = layouts.read_index(root, found, problems)
    pairs = []
    for stem, image in found.items():
        if all(stem in there for there in masks):
            row = rows.get(stem, {})
            named = re.search(
                r"_([01])$", stem
            )  # Montgomery's names end in _0 (normal) or _1 (tuberculosis)
            label = row.get("label", named.group(1) if named else "")
            paths = tuple(there[stem] for there in masks)
            pairs.append(
                Pair(image, paths, row.get("patient", ""), label, row.get("split", "").lower())
            )
    if not found:
        problems.append(f"{image_dir}: no image; expected files ending in {' '.join(SUFFIXES)}")
    return pairs, problems


def phantoms(
    output: tyro.conf.Positional[Path] = Path("files/phantoms"), *, count: int = 200, seed: int = 0
) -> None:
    """Draw synthetic chest X-rays with exact lung masks into a folder that train.py reads.

    Args:
        output: where they go
        count: how many
        seed: another one gives other phantoms
    """
    print(f"{make_phantoms(output, count, seed)}: ready for `python train.py --data-dir {output}`")


if __name__ == "__main__":
    utils.run_commands({"check": check, "download": download, "phantoms": phantoms}, __doc__)
