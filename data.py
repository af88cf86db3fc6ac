"""Data sets: find the pairs of image and mask, read them, split them.

    python data.py check DIR                  reports on your own images and masks
    python data.py download montgomery        fetches chest X-rays with lung masks
    python data.py phantoms DIR --count 500   draws synthetic chest X-rays with lung masks

docs/your-data.md shows how files may lie. dataset/layouts/ recognises it, dataset/batches.py makes
the batches of a training.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import utils
from dataset import annotations, copies, layouts, loading, patients, report
from dataset.cache import Dataset
from dataset.channels import detect_channels
from dataset.download import SOURCES, download_source
from dataset.layouts import Layout, Pair
from dataset.loading import Preprocessing
from dataset.notes import describe_masks, summarize_notes
from dataset.phantoms import make_phantoms
from dataset.report import consequences, plan, report_page
from dataset.report.fingerprint import take_fingerprint
from imaging.labels import Classes
from inference.sampler import Sampler
from utils import UserError

MAX_SHOWN = 20  # problems in an error message
MIN_VAL_PARTS = 4  # one patient of so many is the least that is validated on
MANY_PATIENTS = 1000  # more are shared out without a look at how many images each has
FOREGROUND = "foreground"  # the class where nobody names one


# ------------------------------------------------------------------------------------------- find


def find_data(data_dir: str | Path) -> Layout:
    """Recognise the layout of a data set: its pairs, classes, and what was noticed.

    Raises UserError if the layout is not known.
    """
    return layouts.find(Path(data_dir))


def find_pairs(data_dir: str | Path) -> tuple[list[Pair], list[str]]:
    """Pair images and masks; return the pairs, sorted, and the problems found.

    Raises UserError if the folder has no known layout.
    """
    layout = find_data(data_dir)
    return layout.pairs, layout.problems


def choose_classes(classes: str, layout: Layout | None = None) -> str:
    """Return the classes as given; else those that the layout names, else "foreground"."""
    return classes or (layout.classes if layout else "") or FOREGROUND


# ------------------------------------------------------------------------------------------- read


def load_dataset(
    layout: Layout,
    preprocessing: Preprocessing,
    cache_dir: str | Path = "",
    extra_dir: str | Path = "",
) -> tuple[list[Pair], Dataset]:
    """Decode a whole data set, and a further one for training alone.

    The pairs of `extra_dir` have the subset "extra". Raises UserError that lists every problem.
    """
    pairs, problems = list(layout.pairs), list(layout.problems)
    if extra_dir:
        extra, more = find_pairs(extra_dir)
        pairs += [replace(pair, subset="extra") for pair in extra]
        problems += more
    dataset, unreadable = loading.load_pairs(pairs, preprocessing, cache_dir)
    annotations.forget_files()
    problems += unreadable + copies.copies_in_extra(pairs, dataset)
    if problems:
        count = utils.counted(len(problems), "problem")
        shown = "\n  ".join(_shorten(problems))
        raise UserError(f"{count} in {layout.folder}. Fix or remove these files:\n  {shown}")
    for note in describe_notes(layout, dataset):
        print(f"note: {note}")
    pairs = loading.name_patients(pairs, dataset.info.patient)
    for warning in find_leaks(pairs, dataset):
        print(f"warning: {warning}")
    pairs = copies.keep_together(pairs, dataset)
    extra_patients = {pair.patient for pair in pairs if pair.subset == "extra"} - {""}
    shared = extra_patients & {pair.patient for pair in pairs if pair.subset != "extra"}
    if shared:
        raise UserError(
            f"patient {min(shared)} is in {layout.folder} and in {extra_dir}; remove one of them, "
            "so that no test image is trained on"
        )
    return pairs, dataset


def _shorten(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - MAX_SHOWN
    return [*lines[:MAX_SHOWN], *([f"… and {rest} more"] if rest > 0 else [])]


def find_leaks(pairs: Sequence[Pair], dataset: Dataset) -> list[str]:
    """Warn of images that should not be in different subsets: of one patient, or the same."""
    return [*patients.warn_of_patients(pairs), *copies.warn_of_copies(pairs, dataset)]


def describe_notes(layout: Layout, dataset: Dataset) -> list[str]:
    """List what a user must know of how the data lie and how the files were read, a line each."""
    notes = layouts.describe_layout(layout, dataset.classes.names)
    return [*notes, *summarize_notes(dataset.info.to_dict("records")), *describe_masks(dataset)]


# ------------------------------------------------------------------------------------------ split


def split(
    pairs: Sequence[Pair],
    val_fraction: float,
    test_fraction: float,
    seed: int = 0,
    folds: int = 0,
    fold: int = 0,
) -> list[str]:
    """Assign each pair to train, val or test. A patient is in one subset, labels are shared evenly.

    A test or val set that index.csv names is kept. One that it does not name is drawn from all
    others: test_fraction, then val_fraction of the rest, each rounded to 1/2, 1/3, 1/4 …; 0 draws
    none. Few patients give a larger val.
    Extra pairs are train.
    folds: the test set is fold number `fold` instead. Pairs that index.csv keeps for testing
    take no part then: their subset is "".
    Raises UserError if there are too few patients or index.csv has one patient in two subsets.
    """
    fixed = ("extra", "test") if folds else ("extra", "test", "val")
    subsets = [pair.subset if pair.subset in fixed else "train" for pair in pairs]
    if folds:
        subsets = ["" if subset == "test" else subset for subset in subsets]
        test_fraction = 1 / folds
    for name, fraction, number in (("test", test_fraction, fold), ("val", val_fraction, 0)):
        if fraction > 0 and name not in subsets:
            rest = [i for i, subset in enumerate(subsets) if subset == "train"]
            parts, own = round(1 / fraction), [pairs[i] for i in rest]
            if name == "val":  # a small data set validates on one of its few patients
                parts = min(parts, max(MIN_VAL_PARTS, len({pair.group for pair in own})))
            drawn = _draw_fold(own, parts, number, seed)
            for i in drawn:
                subsets[rest[i]] = name
    _check_patients(pairs, subsets)
    if "train" not in subsets:
        raise UserError(
            f"none of the {len(pairs)} images is left to train on; expected some that are neither "
            "val nor test"
        )
    return ["train" if subset == "extra" else subset for subset in subsets]


def _draw_fold(pairs: Sequence[Pair], folds: int, fold: int, seed: int) -> np.ndarray:
    """Draw one of `folds` parts with equal shares of each label: indices of its pairs."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    groups = [pair.group for pair in pairs]
    first = {group: i for i, group in reversed(list(enumerate(groups)))}  # an image of each group
    if len(first) < folds:
        raise UserError(
            f"{len(first)} patients (or images) are too few to set one of {folds} aside; "
            "add data, or set none aside with --val-fraction 0 or --test-fraction 0"
        )
    # A label of too few images cannot be shared out: it counts as the most common one.
    counts = Counter(pair.label for pair in pairs)
    common = counts.most_common(1)[0][0]
    labels = [pair.label if counts[pair.label] >= folds else common for pair in pairs]
    if len(first) <= MANY_PATIENTS:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        return list(splitter.split(labels, labels, groups))[fold][1]
    # That takes seconds for thousands. Of so many it is enough to share out the patients.
    own = [labels[i] for i in first.values()]
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    chosen = set(np.array(list(first))[list(splitter.split(own, own))[fold][1]])
    return np.flatnonzero([group in chosen for group in groups])


def _check_patients(pairs: Sequence[Pair], subsets: Sequence[str]) -> None:
    """Raise UserError if a patient is in two subsets."""
    known = {}
    for pair, subset in zip(pairs, subsets, strict=True):
        if pair.patient and known.setdefault(pair.patient, subset) != subset:
            raise UserError(
                f"index.csv puts patient {pair.patient} in {known[pair.patient]} and in {subset}; "
                "name one subset for all images of a patient"
            )


# --------------------------------------------------------------------------------------- commands


def check(
    data_dir: tyro.conf.Positional[Path],
    *,
    classes: str = "",
    ignore: str = "",
    overlap: bool = False,
    output: Path = Path("results/check"),
) -> None:
    """Report on a data set: OUTPUT/report.html with pictures, and the command that trains on it.

    Args:
        data_dir: the folder to look at
        classes: class names separated by commas, as in train.py; "" takes those of the layout
        ignore: value or colour of mask pixels that do not count
        overlap: a pixel may be of several classes
        output: where the report goes

    Exits with 2 if there is a problem.
    """
    utils.check_folder(data_dir)
    layout = find_data(data_dir)
    ignore = ignore or ("" if classes else layout.ignore)
    classes = choose_classes(classes, layout)
    parsed = Classes(classes, ignore, overlap)
    names = parsed.names
    pairs, problems = layout.pairs, list(layout.problems)
    preprocessing = Preprocessing(parsed, Sampler((128, 128)), detect_channels(pairs))
    dataset, unreadable = loading.load_pairs(pairs, preprocessing)
    problems += unreadable
    # Patients as training knows them: those of the headers, too.
    readable = copies.read_pairs(pairs, dataset)
    if readable:
        readable = loading.name_patients(readable, dataset.info.patient)
    by_image = {pair.image: pair for pair in readable}
    pairs = [by_image.get(pair.image, pair) for pair in pairs]
    fingerprint = take_fingerprint(readable, dataset.info, parsed)
    proposals = plan.suggest(dataset.info, fingerprint, dataset.channels)
    lines = [f"{'layout':10} {layout.name}", *report.describe(pairs, dataset, names)]
    ceilings = report.measure_ceilings(readable, dataset.info, fingerprint, proposals, parsed)
    lines += report.describe_objects(fingerprint, ceilings)
    notes = describe_notes(layout, dataset)
    notes += consequences.name_consequences(readable, dataset, fingerprint)
    lines += [f"{'note':10} {note}" for note in notes]
    warnings = find_leaks(pairs, dataset)
    lines += [f"{'warning':10} {warning}" for warning in warnings]
    if proposals:
        lines.append(f"{'time':10} {plan.describe_time(dataset.info, proposals)}")
    if any("index.csv" in warning for warning in warnings):
        path = patients.write_index(output / "index.csv", data_dir, pairs)
        lines.append(f"{'':10} copy {path} to {data_dir / 'index.csv'} to keep them together")
    shown = [*lines, *report.describe_proposals(proposals)]
    print(*shown, *(f"{'problem':10} {problem}" for problem in _shorten(problems)), sep="\n")
    given = {"data_dir": str(data_dir), "classes": classes}
    given |= {"ignore": ignore} if ignore else {}
    given |= {"overlap": overlap} if overlap else {}
    page = report_page.write_report(
        output, pairs, dataset, preprocessing, lines, problems, given, proposals
    )
    print(f"{page}: pictures and proposed hyperparameters")
    if problems:
        count = utils.counted(len(problems), "problem")
        raise UserError(f"{count} in {data_dir}. Fix or remove the files that {page} names")
    fields = given | {name: value for name, value, _ in proposals}
    command = report.train_command(fields, output / "report.json")
    print(f"no problems\nnext: {command}")


def download(
    name: tyro.conf.Positional[Literal["montgomery"]],
    *,
    output: Path = Path("files/montgomery-data"),
) -> None:
    """Fetch a public data set for train.py: 138 chest X-rays with lung masks (617 MB).

    Args:
        name: which one
        output: where it goes
    """
    folder = download_source(SOURCES[name], output)
    print(f"{folder}: ready. next: python train.py --data-dir {folder}")


def phantoms(
    output: tyro.conf.Positional[Path] = Path("files/phantoms"), *, count: int = 200, seed: int = 0
) -> None:
    """Draw synthetic chest X-rays with exact lung masks for train.py.

    Args:
        output: where they go
        count: how many
        seed: another number gives other phantoms
    """
    folder = make_phantoms(output, count, seed)
    print(f"{folder}: ready. next: python train.py --data-dir {folder}")


if __name__ == "__main__":
    utils.run_commands({"check": check, "download": download, "phantoms": phantoms}, __doc__)
