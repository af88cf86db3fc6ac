"""Names and values of the classes, as `--classes` gives them."""

import re
from collections.abc import Sequence

import numpy as np

from utils import UserError

MAX_CLASSES = 255
SIDE = re.compile("left|right", re.IGNORECASE)
# A side that stands as a word, or as part of one in camel case. "bright spot" has none.
SIDE_WORD = re.compile("(?<![A-Za-z])(left|right)|Left|Right|LEFT|RIGHT")


def class_names(classes: str) -> list[str]:
    """Read the names in `classes`, such as "liver,tumour" or "liver=63,tumour=126".

    Raises UserError if a name is missing or given twice.
    """
    names = [part.partition("=")[0].strip() for part in classes.split(",")]
    distinct = all(names) and len(set(names)) == len(names)
    # A backslash separates values in DICOM.
    if not distinct or len(names) > MAX_CLASSES or "\\" in classes:
        raise UserError(
            f"classes is {classes!r}; expected 1 to {MAX_CLASSES} different names separated by "
            "commas, without \\"
        )
    return names


def mask_values(classes: str) -> list[int]:
    """Read each class's value in the masks: 63 and 126 for "liver=63,tumour=126", else 1, 2 …

    Raises UserError for values that are not different whole numbers above 0.
    """
    values = []
    for number, part in enumerate(classes.split(","), 1):
        value = part.partition("=")[2].strip() or str(number)
        values.append(int(value) if value.isdecimal() else 0)
    if 0 in values or len(set(values)) < len(values):
        raise UserError(
            f"classes is {classes!r}; expected different grey levels above 0, as in "
            "liver=63,tumour=126"
        )
    return values


def output_channels(names: Sequence[str]) -> int:
    """Count the network's output channels: 1 for one class, else the classes and background."""
    return 1 if len(names) == 1 else len(names) + 1


def mirrored_channels(names: Sequence[str]) -> np.ndarray | None:
    """List which channel takes each one's place in a mirrored image: uint8 (K + 1,).

    Background is the first. "left lung" and "right lung" change places. None if a class has a side
    but no partner: then mirrored images are wrong.
    """
    channel_of = {name.lower(): channel for channel, name in enumerate(names, 1)}
    order = [0]
    for channel, name in enumerate(names, 1):
        partner = channel
        if SIDE.search(name):
            partner = channel_of.get(SIDE.sub(_other_side, name).lower())
        if partner is None and SIDE_WORD.search(name):
            return None
        order.append(partner or channel)
    return np.array(order, np.uint8)


def _other_side(side: re.Match) -> str:
    return "right" if side[0].lower() == "left" else "left"
