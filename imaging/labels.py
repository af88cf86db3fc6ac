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
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from utils import UserError


def mirrored_channels(names: Sequence[str]) -> np.ndarray | None:
    """Tell which channel a mirrored image needs in each one's place: uint8 (K + 1,), the background first.

    "left lung" and "right lung" change places. None where a side has no partner, so that mirroring would be wrong.
    """
    order = [0]
    for name in names:
        other = re.sub(
            "(?i)left|right", lambda side: "right" if side[0].lower() == "left" else "left", name
        )
        partners = [i for i, candidate in enumerate(names, 1) if candidate.lower() == other.lower()]
        if not partners and re.search("(?<![A-Za-z])(left|right)|Left|Right|LEFT|RIGHT", name):
            return None
        order.append(partners[0] if partners else names.index(name) + 1)  # "bright spot" is no side
    return np.array(order, np.uint8)


def class_names(classes: str) -> list[str]:
    """Split the comma-separated `classes` of a config; raises UserError for none or the same twice."""
    names = [part.partition("=")[0].strip() for part in classes.split(",")]
    if not all(names) or len(set(names)) < len(names) or len(names) > 255 or "\\" in classes:
        raise UserError(
            f"classes is {classes!r}; expected 1 to 255 different names separated by commas, without \\"
        )
    return names


def mask_values(classes: str) -> list[int]:
    """Tell the value of each class in the masks: 63 and 126 for "liver=63,tumour=126", else 1, 2 … Raises UserError."""
    parts = [part.partition("=")[2].strip() for part in classes.split(",")]
    values = [int(part) if part.isdecimal() else i for i, part in enumerate(parts, 1)]
    if (
        any(part and not part.isdecimal() for part in parts)
        or len(set(values)) < len(values)
        or 0 in values
    ):
        raise UserError(
            f"classes is {classes!r}; expected different grey levels above 0, as in liver=63,tumour=126"
        )
    return values


def output_channels(names: Sequence[str]) -> int:
    """Count the network's output channels: 1 for one class, else one per class and one for the background, first."""
    return 1 if len(names) == 1 else len(names) + 1
