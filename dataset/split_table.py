"""The table of a split, split.csv: image, mask, subset."""

from collections.abc import Sequence
from pathlib import Path

from dataset import layouts
from dataset.layouts import SUBSETS, Pair
from imaging.files import file_stem, files_by_stem, normalize_name
from utils import UserError, atomic


def write_split(path: str | Path, pairs: Sequence[Pair], subsets: Sequence[str]) -> None:
    """Write split.csv. Pairs whose subset is "" are left out.

    Of several masks the first is written; `read_split` finds the others by its folder.
    """
    # Most predictions need no pandas, which takes half a second to import.
    import pandas as pd

    rows = [
        (pair.image.as_posix(), pair.masks[0].as_posix(), subset)
        for pair, subset in zip(pairs, subsets, strict=True)
        if subset
    ]
    with atomic(path) as temporary:
        pd.DataFrame(rows, columns=["image", "mask", "subset"]).to_csv(temporary, index=False)


def read_split(path: str | Path) -> tuple[list[Pair], list[str]]:
    """Read split.csv: the pairs and the subset of each. Raises UserError if it is another table."""
    table = layouts.read_table(path, {"image", "mask", "subset"})
    found = sorted(set(table.subset))
    if not set(found) <= set(SUBSETS):
        raise UserError(f"{path} has subsets {', '.join(found)}; expected {', '.join(SUBSETS)}")
    masks_in: dict[Path, dict[str, Path]] = {}
    pairs = []
    for image, mask in zip(table.image, table["mask"], strict=True):
        pairs.append(Pair(Path(image), _all_masks(Path(mask), masks_in)))
    return pairs, table.subset.tolist()


def _all_masks(mask: Path, masks_in: dict[Path, dict[str, Path]]) -> tuple[Path, ...]:
    """List an image's masks, one in each mask folder of the layout, by the first of them.

    masks_in: masks by stem of the folders that were listed before; new folders are added.
    """
    stem = normalize_name(file_stem(mask)).removesuffix("_mask")
    masks = []
    for folder in layouts.sibling_folders(mask.parent):
        if folder not in masks_in:
            masks_in[folder] = files_by_stem(folder, "_mask", []) if folder.is_dir() else {}
        masks.append(masks_in[folder].get(stem, folder / mask.name))
    return tuple(masks) or (mask,)
