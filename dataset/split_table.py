"""Find image/mask pairs and read them: names, layouts, class ids, and the table of a split.

Layouts, recognised by themselves:

    DIR/CXR_png/*.png with DIR/ManualMask/leftMask/*.png and DIR/ManualMask/rightMask/*.png     (Montgomery)
    DIR/images/* with DIR/masks/*, a mask having its image's stem, with or without `_mask`       (anything else)
    DIR/images/* with DIR/masks/CLASS/*, a folder for each class, named as --classes names it

An optional DIR/index.csv (columns stem and any of patient, label, split) keeps a patient's images in one subset,
stratifies by label, and fixes the test set. Masks are 0/255 or 0/1 for one class, for K classes ids 0..K or the grey
levels that --classes names. An image is a file, or a folder that holds a DICOM series.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from dataset import layouts
from dataset.layouts import SUBSETS, Pair
from imaging.files import file_stem, files_by_stem, normalize_name
from utils import UserError, atomic


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
    with atomic(path) as temporary:
        pd.DataFrame(rows, columns=["image", "mask", "subset"]).to_csv(temporary, index=False)


def read_split(path: str | Path) -> tuple[list[Pair], list[str]]:
    """Read split.csv back: the pairs and each one's subset. Raises UserError if it is not one."""
    table = layouts.read_table(path, {"image", "mask", "subset"})
    if not set(table.subset) <= set(SUBSETS):
        raise UserError(
            f"{path} has subsets {', '.join(sorted(set(table.subset)))}; expected train, val, test"
        )
    pairs, there = [], {}
    for image, mask in zip(table.image.map(Path), table["mask"].map(Path), strict=True):
        folders = layouts.sibling_folders(mask.parent)
        for folder in folders:
            if folder not in there:
                there[folder] = files_by_stem(folder, "_mask", []) if folder.is_dir() else {}
        stem = normalize_name(file_stem(mask)).removesuffix("_mask")
        others = tuple(there[folder].get(stem, folder / mask.name) for folder in folders)
        pairs.append(Pair(image, others or (mask,)))
    return pairs, table.subset.tolist()
