"""Recognise how the files of a data set lie: where its images and masks are, how their names pair.

To add a layout, write a function that returns a `Layout` if it recognises the folder, else None,
and add it to LAYOUTS. docs/contributing.md has an example.
"""

import glob
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from imaging.files import file_stem, is_series, normalize_name
from utils import UserError

if TYPE_CHECKING:
    import pandas as pd

SUBSETS = ("train", "val", "test")


@dataclass(frozen=True)
class Pair:
    """An image and its masks: one file, or a file per class or side."""

    image: Path
    masks: tuple[Path, ...]
    patient: str = ""  # images of one patient stay in one subset; "" is a patient of its own
    label: str = ""  # subsets get equal shares of each label
    subset: str = ""  # set by the data set's author, or ""
    more_channels: tuple[Path, ...] = ()  # further channels of the image, in files of their own

    @property
    def stem(self) -> str:
        """The name that image, mask and prediction share."""
        return file_stem(self.image)


def mask_name(path: Path) -> str:
    """Name the image that a mask belongs to: the mask's own name, without `_mask`."""
    return file_stem(path).removesuffix("_mask")


@dataclass(frozen=True)
class Layout:
    """Where the images and masks of a data set lie; those of equal names belong together."""

    name: str
    images: str  # glob pattern below the data set's folder, such as images/*
    masks: tuple[str, ...]  # glob patterns; an image has one mask of each
    classes: tuple[str, ...] = ()  # a name for each pattern of masks, if the layout has names
    image_name: Callable[[Path], str] = file_stem
    mask_name: Callable[[Path], str] = mask_name

    @property
    def folders(self) -> list[str]:
        """The folders that must exist, as glob patterns."""
        parents = [str(Path(pattern).parent) for pattern in (self.images, *self.masks)]
        return [parent for parent in parents if parent != "."]


# ---------------------------------------------------------------------------------- the layouts


def montgomery(root: Path) -> Layout | None:
    """Recognise the Montgomery County chest X-rays, as they are distributed."""
    if not (root / "CXR_png").is_dir():
        return None
    masks = ("ManualMask/leftMask/*", "ManualMask/rightMask/*")
    return Layout("Montgomery", "CXR_png/*", masks)


def folder_per_class(root: Path) -> Layout | None:
    """Recognise images/ + masks/CLASS/, a folder of masks for each class."""
    classes = tuple(folder.name for folder in class_folders(root / "masks"))
    if not classes:
        return None
    masks = tuple(f"masks/{glob.escape(name)}/*" for name in classes)
    return Layout("images/ + masks/CLASS/", "images/*", masks, classes)


def images_and_masks(root: Path) -> Layout | None:
    """Recognise images/ + masks/, the masks named as the images, with or without `_mask`."""
    if not ((root / "images").is_dir() or (root / "masks").is_dir()):
        return None
    return Layout("images/ + masks/", "images/*", ("masks/*",))


LAYOUTS = (montgomery, folder_per_class, images_and_masks)  # the first that recognises it is taken
EXPECTED = (
    "images/ + masks/ (or masks/CLASS/), or CXR_png/ + ManualMask/leftMask/ + ManualMask/rightMask/"
)


def recognise(root: Path) -> Layout:
    """Recognise the layout of a data set. Raises UserError if there is none, or a folder lacks."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected one that holds {EXPECTED}")
    layout = None
    for find in LAYOUTS:
        layout = layout or find(root)
    needed = layout.folders if layout else ["images", "masks"]
    missing = [name for name in needed if not any(root.glob(name))]
    if layout is None or missing:
        found = sorted(path.name for path in root.iterdir())[:8]
        raise UserError(
            f"{root} holds {', '.join(found) or 'nothing'} but not {', '.join(missing)}; "
            f"{_rename_advice(root, missing)}expected {EXPECTED}"
        )
    return layout


def _rename_advice(root: Path, missing: list[str]) -> str:
    """Say which folders have nearly the name of a missing one."""
    advice = ""
    for name in missing:
        parent, wanted = (root / name).parent, Path(name).name
        there = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        lower = {folder.lower(): folder for folder in there}
        for close in get_close_matches(wanted.lower(), lower, n=1, cutoff=0.7):
            advice += f"rename {lower[close]} to {wanted}; "
    return advice


def class_folders(masks: Path) -> list[Path]:
    """List the folders in DIR/masks that hold a class each; a folder of DICOM slices is a mask."""
    return sorted(path for path in masks.glob("[!.]*") if path.is_dir() and not is_series(path))


def merged_note(layout: Layout, names: list[str]) -> str:
    """Say that the layout's classes become one, where one is asked for; else ""."""
    if len(names) > 1 or len(layout.classes) < 2:
        return ""
    kept = ",".join(layout.classes)
    merged = ", ".join(layout.classes)
    return f'the masks of {merged} become one class; --classes "{kept}" keeps them apart'


def label_in_name(name: str) -> str:
    """Read the label at a name's end: Montgomery's are _0 (normal) and _1 (tuberculosis)."""
    found = re.search(r"_([01])$", name)
    return found.group(1) if found else ""


# ---------------------------------------------------------------------------------------- tables


def read_index(root: Path, names: Iterable[str], problems: list[str]) -> dict[str, dict[str, str]]:
    """Read root/index.csv, if there is one: the rows by stem. What is wrong goes to `problems`."""
    path = root / "index.csv"
    if not path.is_file():
        return {}
    table = read_table(path, {"stem"})
    table["stem"] = table.stem.map(normalize_name)
    for stem in table.stem[table.stem.duplicated()].unique():
        problems.append(f"{path}: stem {stem} twice; keep one row")
    rows = table.drop_duplicates("stem").set_index("stem").to_dict("index")
    for name in sorted(set(names) - set(rows)):
        problems.append(f"{path}: no row for {name}; add one")
    splits = {row.get("split", "").lower() for row in rows.values()}
    for value in sorted(splits - {"", *SUBSETS}):
        problems.append(f"{path}: split is {value!r}; expected train, val, test or nothing")
    return rows


def read_table(path: str | Path, columns: set[str]) -> "pd.DataFrame":
    """Read a CSV file as text, without blanks around it; column names become lower case.

    Raises UserError if it cannot be read or lacks one of `columns`.
    """
    import pandas as pd  # most predictions do without its half second

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected comma-separated UTF-8 text"
        ) from None
    table = table.rename(columns=lambda name: name.strip().lower())
    if not columns <= set(table) or not table.columns.is_unique:
        expected = ", ".join(sorted(columns))
        raise UserError(
            f"{path} has columns {', '.join(table)}; expected {expected}, each column once"
        )
    return table.apply(lambda column: column.str.strip())
