"""Find image/mask pairs and read them: names, layouts, class ids, and the table of a split.

Layouts, recognised by themselves:

    DIR/CXR_png/*.png with DIR/ManualMask/leftMask/*.png and DIR/ManualMask/rightMask/*.png     (Montgomery)
    DIR/images/* with DIR/masks/*, a mask having its image's stem, with or without `_mask`       (anything else)
    DIR/images/* with DIR/masks/CLASS/*, a folder for each class, named as --classes names it

An optional DIR/index.csv (columns stem and any of patient, label, split) keeps a patient's images in one subset,
stratifies by label, and fixes the test set. Masks are 0/255 or 0/1 for one class, for K classes ids 0..K or the grey
levels that --classes names. An image is a file, or a folder that holds a DICOM series.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
from imaging.files import file_stem, is_series, normalize_name
from utils import UserError

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
        return file_stem(self.image)


def class_folders(masks: Path) -> list[Path]:
    """List the folders in DIR/masks that hold a class each; one that holds a DICOM series is a mask itself."""
    return sorted(path for path in masks.glob("[!.]*") if path.is_dir() and not is_series(path))


def find_folders(root: Path) -> tuple[Path, list[Path]]:
    """Recognise the layout: the image folder and the mask folders (one, or left and right)."""
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder; --data-dir names the folder that holds images/ and masks/"
        )
    if (root / "CXR_png").is_dir():
        folders = (
            root / "CXR_png",
            [root / "ManualMask" / "leftMask", root / "ManualMask" / "rightMask"],
        )
    else:
        folders = root / "images", class_folders(root / "masks") or [root / "masks"]
    missing = [
        str(folder.relative_to(root)) for folder in (folders[0], *folders[1]) if not folder.is_dir()
    ]
    if missing:
        names = sorted(path.name for path in root.iterdir())[:8]
        raise UserError(
            f"{root} holds {', '.join(names) or 'nothing'} but not {', '.join(missing)}; expected "
            "images/ + masks/, or CXR_png/ + ManualMask/leftMask/ + ManualMask/rightMask/"
        )
    return folders


def read_index(root: Path, stems: Iterable[str], problems: list[str]) -> dict[str, dict[str, str]]:
    """Read root/index.csv where there is one: stem → its row; stems that it lacks go to `problems`."""
    path = root / "index.csv"
    if not path.is_file():
        return {}
    table = read_table(path, {"stem"})
    table["stem"] = table.stem.map(normalize_name)
    problems += [
        f"{path}: stem {stem} twice" for stem in table.stem[table.stem.duplicated()].unique()
    ]
    rows = table.drop_duplicates("stem").set_index("stem").to_dict("index")
    problems += [f"{path}: no row for {stem}" for stem in sorted(set(stems) - set(rows))]
    known = ("", *SUBSETS)
    bad = {row.get("split", "").lower() for row in rows.values()} - set(known)
    problems += [
        f"{path}: split is {value!r}; expected train, val, test or nothing" for value in sorted(bad)
    ]
    return rows


def read_table(path: str | Path, columns: set[str]) -> "pd.DataFrame":
    """Read a CSV file of strings, blanks around them dropped, column names in lower case.

    Raises UserError if it cannot be read or lacks one of `columns`.
    """
    import pandas as pd  # here, because most predictions do without its half second

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected comma-separated UTF-8 text"
        ) from None
    table = table.rename(columns=lambda name: name.strip().lower())
    if not columns <= set(table) or not table.columns.is_unique:
        raise UserError(
            f"{path} has columns {', '.join(table)}; expected each once, {', '.join(sorted(columns))} too"
        )
    return table.apply(lambda column: column.str.strip())


# ------------------------------------------------------------------------------------------------ the table of a split


def sibling_folders(folder: Path) -> list[Path]:
    """List the mask folders of a layout by one of them, the first."""
    if folder.name == "leftMask":
        return [folder, folder.with_name("rightMask")]
    return class_folders(folder.parent) if folder.parent.name == "masks" else []
