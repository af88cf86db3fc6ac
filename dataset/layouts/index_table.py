"""Read index.csv, which gives images a patient, a label and a subset; any table as text."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dataset.folder import split_name
from dataset.pairs import SUBSETS, Layout, Pair
from imaging.files import normalize_name
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd

# Names that people give the column of the images.
SYNONYMS = {
    "stem": ("image", "file", "filename", "file_name", "image_id"),
    "patient": ("patient_id", "patientid", "patient id", "subject", "subject_id"),
    "split": ("subset", "set", "partition"),
}
COLUMNS = ("stem", "patient", "label", "split")
MASK_COLUMNS = ("mask", "mask_path", "mask_file", "mask_name", "segmentation")
SUBSET_NAMES = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}
DELIMITERS = ",;\t"
MAX_LISTED = 3


def apply_index(root: Path, layout: Layout) -> None:
    """Give the pairs of a layout what root/index.csv says, if there is one.

    What is wrong with the table goes to the layout's problems.
    """
    path = root / "index.csv"
    if not path.is_file():
        return
    layout.other.append(path)
    table = read_table(path, {"stem"})
    rows = _rows_of_pairs(root, path, table, layout)
    _note_other_columns(table, layout)
    pairs = []
    for pair in layout.pairs:
        row = rows.get(pair.image)
        if row is None:
            layout.problems.append(f"{path}: no row for {pair.stem}; add one")
            pairs.append(pair)
            continue
        layout.problems += _other_masks(path, pair, row)
        subset = row.get("split", "").lower()
        subset = SUBSET_NAMES.get(subset, subset)
        patient = row.get("patient", "") or pair.patient
        label = row.get("label", pair.label)
        pairs.append(replace(pair, patient=patient, label=label, subset=subset or pair.subset))
    layout.pairs = pairs
    subsets = {pair.subset for pair in pairs}
    for value in sorted(subsets - {"", *SUBSETS}):
        layout.problems.append(f"{path}: split is {value!r}; expected train, val, test or nothing")


def _note_other_columns(table: "pd.DataFrame", layout: Layout) -> None:
    """Name the columns without a meaning: one may be a misspelt patient."""
    other = [name for name in table.columns if name not in (*COLUMNS, *MASK_COLUMNS)]
    if other:
        layout.notes.append(
            f"columns of index.csv that are not used: {', '.join(other)}; those that count are "
            f"{', '.join(COLUMNS)}"
        )


def _other_masks(path: Path, pair: Pair, row: dict[str, str]) -> list[str]:
    """Say if a row names another mask than the one that lies in the folder under its name."""
    named = next((row[column] for column in MASK_COLUMNS if row.get(column)), "")
    own = normalize_name(named.replace("\\", "/").rpartition("/")[2])
    there = [normalize_name(mask.name) for mask in pair.masks]
    if not own or own in there or own in [split_name(name)[0] for name in there]:
        return []
    return [
        f"{path}: mask of {pair.stem} is {named}; by its name it is {', '.join(there) or 'none'}: "
        "give image and mask the same name"
    ]


def _rows_of_pairs(
    root: Path, path: Path, table: "pd.DataFrame", layout: Layout
) -> dict[Path, dict[str, str]]:
    """Find the image of each row, by name with or without ending and folders: {image: row}."""
    images: dict[str, list[Path]] = defaultdict(list)
    for pair in layout.pairs:
        for name in names_of(root, pair):
            images[name].append(pair.image)
    rows: dict[Path, dict[str, str]] = {}
    unknown = []
    for row in table.to_dict("records"):
        name = normalize_name(row["stem"].replace("\\", "/").removeprefix("./"))
        found = images.get(name) or images.get(split_name(name)[0]) or []
        if not found:
            unknown.append(name)
        elif len(found) > 1:
            layout.problems.append(
                f"{path}: stem {name} is the name of {len(found)} images; write it with its "
                f"folder, as {found[0].relative_to(root).as_posix()}"
            )
            rows |= dict.fromkeys(found, row)
        elif found[0] in rows:
            layout.problems.append(f"{path}: stem {name} twice; keep one row")
        else:
            rows[found[0]] = row
    if unknown:
        some = ", ".join(unknown[:MAX_LISTED]) + (", …" if len(unknown) > MAX_LISTED else "")
        layout.notes.append(f"{len(unknown)} rows of index.csv name no image: {some}")
    return rows


def names_of(root: Path, pair: Pair) -> list[str]:
    """List the names that index.csv may use for an image, the shortest first."""
    own = normalize_name(pair.image.name)
    parts = [normalize_name(part) for part in pair.image.relative_to(root).parts[:-1]]
    stem = split_name(own)[0]
    names = [stem, own]
    for i in range(len(parts) - 1, -1, -1):
        folder = "/".join(parts[i:])
        names += [f"{folder}/{stem}", f"{folder}/{own}"]
    # images/ may be left out: patient1/scan7 names patient1/images/scan7.
    for i in range(len(parts)):
        shorter = "/".join([*parts[:i], *parts[i + 1 :]])
        names += [f"{shorter}/{stem}", f"{shorter}/{own}"] if shorter else []
    channel = stem.removesuffix("_0000")
    return list(dict.fromkeys([*names, channel]))


def read_table(path: str | Path, columns: set[str]) -> "pd.DataFrame":
    """Read a CSV file as text, without blanks around it; column names become lower case.

    Columns are separated by commas, semicolons or tabs. Raises UserError if it cannot be read or
    lacks one of `columns`.
    """
    import pandas as pd  # most predictions do without its half second

    try:
        encoding = find_encoding(path)
        with Path(path).open(encoding=encoding) as file:
            first = file.readline()
            skipped = int(first.lower().startswith("sep="))  # a line for Excel
            first = file.readline() if skipped else first
        delimiter = max(DELIMITERS, key=first.count)
        table = pd.read_csv(
            path,
            dtype=str,
            keep_default_na=False,
            skipinitialspace=True,
            sep=delimiter,
            encoding=encoding,
            skiprows=skipped,
            index_col=False,
        )
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected comma-separated UTF-8 text (in Excel: "
            "CSV UTF-8)"
        ) from None
    table = table.rename(columns=lambda name: str(name).strip().lower())
    for name, synonyms in SYNONYMS.items() if "stem" in columns else ():
        there = [synonym for synonym in synonyms if synonym in table]
        if there and name not in table:
            table = table.rename(columns={there[0]: name})
    if not columns <= set(table) or not table.columns.is_unique:
        expected = ", ".join(sorted(columns))
        raise UserError(
            f"{path} has columns {', '.join(table)}; expected {expected}, each column once"
        )
    table = table.apply(lambda column: column.str.strip())
    # Spreadsheets save rows in which nothing is.
    return table[(table != "").any(axis=1)].reset_index(drop=True)


def find_encoding(path: str | Path) -> str:
    """Find a text file's encoding by its byte order mark; UTF-8 where it has none."""
    with Path(path).open("rb") as file:
        mark = file.read(2)
    return "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
