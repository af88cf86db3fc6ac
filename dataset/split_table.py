"""The table of a split, split.csv: the files of each pair, its subset, and their fingerprints.

    image,more_channels,mask,subset,patient,fingerprint
    /data/set/images/a.png,,/data/set/masks/left/a.png|/data/set/masks/right/a.png,train,p7,…

The patient is empty where none is known; older tables have no such column. Several files, and
their fingerprints, are separated by `|`. Paths are absolute. If they are not there any more, they
are looked for beside the table: a project that was moved as a whole is found.
"""

import csv
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.fingerprints import fingerprints
from dataset.pairs import KEPT_APART, SUBSETS, Pair
from imaging.files import file_stem, is_image
from utils import UserError, atomic

COLUMNS = ("image", "more_channels", "mask", "subset", "patient", "fingerprint")


class Row(NamedTuple):
    """A pair of a run, and its files as they were when the run started."""

    pair: Pair
    subset: str
    fingerprints: tuple[str, ...] = ()  # of `files_of(pair)`; none in tables of version 1

    @property
    def key(self) -> tuple:
        """Tell this pair from others wherever its folder is: its files' names and contents."""
        return tuple(path.name for path in files_of(self.pair)), self.fingerprints


def files_of(pair: Pair) -> tuple[Path, ...]:
    """List the files of a pair, the image first."""
    return (pair.image, *pair.more_channels, *pair.masks)


def make_rows(pairs: Sequence[Pair], subsets: Sequence[str]) -> list[Row]:
    """Take the fingerprints of pairs. Those whose subset is "" are left out."""
    chosen = [(pair, subset) for pair, subset in zip(pairs, subsets, strict=True) if subset]
    found = fingerprints(path for pair, _ in chosen for path in files_of(pair))
    return [
        Row(pair, subset, tuple(found[path] for path in files_of(pair))) for pair, subset in chosen
    ]


def write_split(path: str | Path, pairs: Sequence[Pair], subsets: Sequence[str]) -> None:
    """Write split.csv. Pairs whose subset is "" are left out."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for pair, subset, prints in make_rows(pairs, subsets):
            groups = ([pair.image], pair.more_channels, pair.masks)
            names = [_join([one.absolute().as_posix() for one in group]) for group in groups]
            table.writerow([*names, subset, pair.patient, _join(prints)])


def read_split(path: str | Path) -> tuple[list[Pair], list[str]]:
    """Read split.csv: the pairs and the subset of each. Raises UserError if it is another table."""
    rows = read_rows(path)
    return [row.pair for row in rows], [row.subset for row in rows]


def read_rows(path: str | Path) -> list[Row]:
    """Read split.csv with its fingerprints. Raises UserError if it is another table."""
    records = _read_records(Path(path))
    images = [_split(record["image"])[0] for record in records]
    locate = _locator(images, Path(path).absolute().parent)
    rows = []
    for image, record in zip(images, records, strict=True):
        masks = tuple(map(locate, _split(record["mask"])))
        prints = tuple(_split(record.get("fingerprint", "")))
        if not prints and masks:
            masks = _masks_of_version_1(masks[0])
        more = tuple(map(locate, _split(record.get("more_channels", ""))))
        pair = Pair(locate(image), masks, record.get("patient", ""), more_channels=more)
        rows.append(Row(pair, record["subset"], prints))
    return rows


def mark_split(rows: Sequence[Row]) -> str:
    """Return a text by which a model file knows the split of its run: by its files' contents."""
    lines = sorted(" ".join(row.fingerprints) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read_records(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            records = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected comma-separated UTF-8 text"
        ) from None
    needed = {"image", "mask", "subset"}
    if any(None in record or None in record.values() for record in records) or (
        records and not needed <= set(records[0])
    ):
        found = ", ".join(map(str, records[0]))
        raise UserError(f"{path} has columns {found}; expected {', '.join(COLUMNS)}")
    if not all(record["image"] for record in records):
        raise UserError(f"{path} has a row without an image; expected one in each row")
    found = sorted({record["subset"] for record in records})
    if not set(found) <= {*SUBSETS, KEPT_APART}:
        raise UserError(f"{path} has subsets {', '.join(found)}; expected {', '.join(SUBSETS)}")
    return records


# ---------------------------------------------------------------------------------------- places


def _locator(images: Sequence[str], folder: Path) -> Callable[[str], Path]:
    """Return the function that finds the files of a table that lies in `folder`.

    A file is taken as it is named if it is there. Else the table and its images may have been
    moved together.
    """
    moved = _find_move(Path(images[0]), folder) if images else None

    def locate(name: str) -> Path:
        path = Path(name)
        if moved is None or path.exists() or not path.is_relative_to(moved[0]):
            return path
        return moved[1] / path.relative_to(moved[0])

    return locate


def _find_move(image: Path, folder: Path) -> tuple[Path, Path] | None:
    """Find the folder that an image's project was in, and the one it is in now; None if neither."""
    if image.exists():
        return None
    for old in reversed(image.parents):
        for new in (folder, *folder.parents):
            if (new / image.relative_to(old)).exists():
                return old, new
    return None


def _masks_of_version_1(mask: Path) -> tuple[Path, ...]:
    """List an image's masks by the first of them: version 1 wrote no others."""
    folders = [mask.parent]
    if mask.parent.name == "leftMask":
        folders.append(mask.parent.with_name("rightMask"))
    elif mask.parent.parent.name == "masks":
        folders = sorted(one for one in mask.parent.parent.glob("[!.]*") if one.is_dir())
    name = file_stem(mask).removesuffix("_mask")
    masks = []
    for folder in folders:
        same = [folder / mask.name] if (folder / mask.name).exists() else []
        same += sorted(
            path
            for path in (folder.iterdir() if folder.is_dir() else ())
            if is_image(path) and file_stem(path).removesuffix("_mask") == name
        )
        masks.append(same[0] if same else folder / mask.name)
    return tuple(masks)


# ------------------------------------------------------------------------------- several in a cell


def _join(values: Sequence[str]) -> str:
    return "|".join(re.sub(r"([\\|])", r"\\\1", value) for value in values)


def _split(cell: str) -> list[str]:
    parts = re.findall(r"((?:[^\\|]|\\.)*)\|", f"{cell}|", re.DOTALL) if cell else []
    return [re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in parts]
