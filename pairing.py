"""Find image/mask pairs and read them: names, layouts, class ids, and the table of a split.

Layouts, recognised by themselves:

    DIR/CXR_png/*.png with DIR/ManualMask/leftMask/*.png and DIR/ManualMask/rightMask/*.png     (Montgomery)
    DIR/images/* with DIR/masks/*, a mask having its image's stem, with or without `_mask`       (anything else)
    DIR/images/* with DIR/masks/CLASS/*, a folder for each class, named as --classes names it

An optional DIR/index.csv (columns stem and any of patient, label, split) keeps a patient's images in one subset,
stratifies by label, and fixes the test set. Masks are 0/255 or 0/1 for one class, for K classes ids 0..K or the grey
levels that --classes names. An image is a file, or a folder that holds a DICOM series.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import images
from images import UserError

if TYPE_CHECKING:
    import pandas as pd

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


def class_folders(masks: Path) -> list[Path]:
    """List the folders in DIR/masks that hold a class each; one that holds a DICOM series is a mask itself."""
    return sorted(path for path in masks.glob("[!.]*") if path.is_dir() and not images.is_series(path))


def _folders(root: Path) -> tuple[Path, list[Path]]:
    """Recognise the layout: the image folder and the mask folders (one, or left and right)."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; --data-dir names the folder that holds images/ and masks/")
    if (root / "CXR_png").is_dir():
        folders = root / "CXR_png", [root / "ManualMask" / "leftMask", root / "ManualMask" / "rightMask"]
    else:
        folders = root / "images", class_folders(root / "masks") or [root / "masks"]
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


def read_table(path: str | Path, columns: set[str]) -> "pd.DataFrame":
    """Read a CSV file of strings, blanks around them dropped, column names in lower case.

    Raises UserError if it cannot be read or lacks one of `columns`.
    """
    import pandas as pd  # here, because most predictions do without its half second

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


# ---------------------------------------------------------------------------------------------------------- reading


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
        values = _values(mask)
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


def _values(mask: np.ndarray) -> set[float]:
    """List the values in a mask."""
    ends = {mask.min().item(), mask.max().item()}
    if sum(np.count_nonzero(mask == value) for value in ends) == mask.size:  # most masks; np.unique is much slower
        return ends
    return set(np.unique(mask).tolist())


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


def is_large(path: Path) -> bool:
    """Tell whether a file has many megabytes, or is a folder of slices."""
    return not path.is_file() or path.stat().st_size > LARGE


def chunks(paths: Sequence[Path], count: int) -> Iterator[slice]:
    """Part a list of files, at most `count` together; a file of many megabytes, or a folder, stays alone.

    So several volumes, decoded at once, do not fill the memory.
    """
    large = [is_large(path) for path in paths]
    start = 0
    while start < len(paths):
        end = start + (1 if any(large[start : start + count]) else count)
        yield slice(start, end)
        start = end


# ------------------------------------------------------------------------------------------------ the table of a split


def _all_folders(folder: Path) -> list[Path]:
    """List the mask folders of a layout by one of them, the first."""
    if folder.name == "leftMask":
        return [folder, folder.with_name("rightMask")]
    return class_folders(folder.parent) if folder.parent.name == "masks" else []


def write_split(path: str | Path, pairs: Sequence[Pair], subsets: Sequence[str]) -> None:
    """Write split.csv (image, mask, subset); of several masks the first is named, the others follow from its folder.

    Pairs of no subset are left out.
    """
    import pandas as pd

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
