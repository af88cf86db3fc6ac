"""Find image/mask pairs and read them: names, layouts, class ids, and the table of a split.

Layouts, recognised by themselves:

    DIR/CXR_png/*.png with DIR/ManualMask/leftMask/*.png and DIR/ManualMask/rightMask/*.png     (Montgomery)
    DIR/images/* with DIR/masks/*, a mask having its image's stem, with or without `_mask`       (anything else)
    DIR/images/* with DIR/masks/CLASS/*, a folder for each class, named as --classes names it

An optional DIR/index.csv (columns stem and any of patient, label, split) keeps a patient's images in one subset,
stratifies by label, and fixes the test set. Masks are 0/255 or 0/1 for one class, for K classes ids 0..K or the grey
levels that --classes names. An image is a file, or a folder that holds a DICOM series.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    pass
from dataset.layouts import Pair
from imaging import formats
from imaging.files import name_file_in_errors
from imaging.scan import Scan
from utils import UserError

# ---------------------------------------------------------------------------------------------------------- reading


def read_ids(pair: Pair, names: Sequence[str], levels: Sequence[int] = ()) -> np.ndarray:
    """Read a pair's masks as uint8 class ids (S, H, W) in 0..len(names). Raises UserError naming the file.

    levels: the classes' values in a mask, if these are not 1, 2 …
    """
    targets = _targets(pair, names)
    masks = collect_errors(
        [
            lambda path=path: name_file_in_errors(
                path, lambda mask: formats.read_mask_scan(mask, pair.image, names)
            )
            for path in pair.masks
        ]
    )
    ids = np.zeros(masks[0].shape, np.uint8)
    for path, mask, target in sorted(
        zip(pair.masks, masks, targets, strict=True), key=lambda one: one[2]
    ):
        if mask.shape != ids.shape:
            raise UserError(f"{path}: {_size(mask)}; its image's other mask is {_size(ids)}")
        values = _values(mask)
        if target and list(levels) not in ([], [1]) and len(names) == 1:
            if not values <= {0, *levels}:
                raise UserError(
                    f"{path}: values {_some(values)}; expected 0 and {levels[0]}, as --classes says"
                )
            ids[mask > 0] = target
        elif target:
            if not (values <= {0, 255} or values <= {0, 1}):
                raise UserError(
                    f"{path}: values {_some(values)}; expected 0/255 or 0/1{_advice(path, values)}"
                )
            ids[mask > 0] = target
        else:
            levels = levels or range(1, len(names) + 1)
            if not values <= {0, *levels}:
                expected = f"{_some({0, *levels})}, the values of --classes"
                raise UserError(
                    f"{path}: values {_some(values)}; expected {expected}{_advice(path, values)}"
                )
            for i, level in enumerate(levels, 1):
                ids[mask == level] = i
    return ids


def _values(mask: np.ndarray) -> set[float]:
    """List the values in a mask."""
    ends = {mask.min().item(), mask.max().item()}
    if (
        sum(np.count_nonzero(mask == value) for value in ends) == mask.size
    ):  # most masks; np.unique is much slower
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
        folders = [
            next((name for name in known if side in name), side) for side in ("left", "right")
        ]
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


def collect_errors(calls: Sequence[Callable[[], Any]]) -> list[Any]:
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


def _size(array: np.ndarray) -> str:
    slices = f"{array.shape[0]} slices of " if len(array) > 1 else ""
    return f"{slices}{array.shape[1]}x{array.shape[2]} pixels"


def _some(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values)[:6]) + (
        ", …" if len(values) > 6 else ""
    )


def read_pair(
    pair: Pair, names: Sequence[str], levels: Sequence[int] = (), window: str = ""
) -> tuple[Scan, np.ndarray]:
    """Read a pair as stored: the image, its class ids (S, H, W), see `read_ids`. Raises UserError naming the file."""
    scan, ids = collect_errors(
        [lambda: formats.read_named_scan(pair.image, window), lambda: read_ids(pair, names, levels)]
    )
    if scan.pixels.shape[:3] != ids.shape:
        raise UserError(
            f"{pair.masks[0]}: {_size(ids)}; its image {pair.image.name} is {_size(scan.pixels)}"
        )
    for path in pair.masks:
        name_file_in_errors(path, lambda path: formats.check_alignment(pair.image, path))
    return scan, ids
