"""Choose the pairs that a run may be scored on: no image that it was trained on is a test image."""

from collections.abc import Sequence
from pathlib import Path

from dataset.fingerprints import fingerprints
from dataset.pairs import KEPT_APART, Pair
from dataset.split_table import Row, mark_split, read_rows
from utils import UserError, load_metadata

WARNING = "so images of the training may be among them"


def find_split(model: str | Path) -> Path | None:
    """Find the split.csv beside a model; None if there is none, or if it is of another run."""
    path = Path(model).with_name("split.csv")
    if not path.is_file():
        return None
    # Exported models, and those of earlier versions, do not say which split they had.
    mark = load_metadata(model).get("split") if Path(model).suffix == ".h5" else ""
    return path if not mark or mark == mark_split(read_rows(path)) else None


def read_subset(model: str | Path, subset: str) -> tuple[dict[Path, Pair], list[str]]:
    """Read the pairs of a subset from the split.csv beside a model, by their images.

    Returns also the problems: images that changed since the run are left out. Raises UserError if
    there is no split.csv, if its images are gone, or if they changed places.
    """
    path = find_split(model)
    if path is None:
        raise UserError(
            f"no split.csv of its run beside {model}; name images with --input, or a data set with "
            "--data-dir"
        )
    rows = read_rows(path)
    chosen = [row for row in rows if row.subset == subset]
    problems = _find_changes(path, rows, chosen)
    pairs = {row.pair.image: row.pair for row in chosen if not problems.get(row.pair.image)}
    if chosen and not pairs:
        raise UserError(
            f"all {len(chosen)} {subset} images of {path} changed since the run, {WARNING}. Put "
            "the files back, or score a whole data set with --data-dir, which leaves out what was "
            "trained on"
        )
    return pairs, list(problems.values())


def _find_changes(path: Path, rows: Sequence[Row], chosen: Sequence[Row]) -> dict[Path, str]:
    """Describe the images of a subset that are not those of the run, by their paths."""
    images = [row.pair.image for row in chosen]
    gone = [image for image in images if not image.exists()]
    if gone:
        raise UserError(
            f"{path} names {gone[0]}, which is gone ({len(gone)} of {len(chosen)} images). If the "
            "data were moved, name their folder with --data-dir; if they were renamed, rename them "
            "back"
        )
    known = {row.fingerprints[0] for row in rows if row.fingerprints}
    now = fingerprints(images) if known else {}
    problems = {}
    for row in chosen:
        image = row.pair.image
        if not row.fingerprints or now[image] == row.fingerprints[0]:
            continue
        if now[image] in known:
            raise UserError(
                f"{image} changed since the run: its content is that of another image of {path}, "
                f"{WARNING}. Undo the renaming, or score the whole data set with --data-dir, "
                "which leaves out what was trained on"
            )
        problems[image] = f"{image}: changed since the run, so it may not be a {row.subset} image"
    return problems


def keep_subset(
    pairs: Sequence[Pair], models: Sequence[str], subset: str
) -> tuple[list[Pair], list[str]]:
    """Leave out the images of a data set that belong to another subset of a model's run.

    Images are known by their content, wherever they are; those that no run has seen are test
    images. Returns also notes. Raises UserError if no image is left, or if no run is known for
    another subset than test.
    """
    notes, tables = [], []
    for model in models:
        path = find_split(model)
        if path:
            tables.append(read_rows(path))
        else:
            notes.append(f"no split.csv of its run beside {model}, {WARNING}")
    if not tables:
        if subset != "test":
            raise UserError(f"--subset {subset}: {notes[0]}")
        return list(pairs), notes
    marks = fingerprints(pair.image for pair in pairs)
    subsets = []
    for table in tables:
        by_mark = {row.fingerprints[0]: row.subset for row in table if row.fingerprints}
        by_path = {row.pair.image.absolute(): row.subset for row in table if not row.fingerprints}
        subsets.append((by_mark, by_path))
    kept = []
    for pair in pairs:
        mark, place = marks[pair.image], pair.image.absolute()
        found = {by_mark.get(mark, by_path.get(place, "test")) for by_mark, by_path in subsets}
        if {"test" if one == KEPT_APART else one for one in found} == {subset}:
            kept.append(pair)
    left_out = len(pairs) - len(kept)
    if pairs and not kept:
        raise UserError(
            f"none of the {len(pairs)} images is {subset} in the split.csv beside the model; name "
            "another --subset, or other images"
        )
    if left_out:
        others = "were trained on or chose the epoch" if subset == "test" else f"are not {subset}"
        notes.append(f"{left_out} of {len(pairs)} images are left out: they {others}")
    return kept, notes
