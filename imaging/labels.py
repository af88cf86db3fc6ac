"""The classes: their names, and which values or colours stand for each in a mask file.

Masks in memory are arrays of class ids, uint8, 0 is background. Where classes may overlap they are
arrays of BITS: bit k - 1 of a pixel says whether it is of class k. `plane` reads both.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from utils import UserError

MAX_CLASSES = 255
BITS = np.uint32
MAX_OVERLAPPING = 8 * BITS().itemsize
MAX_BITS = 2**MAX_OVERLAPPING - 1
# The largest value of a range without an end, such as 1+.
MAX_VALUE = 2**32 - 1
# The name that is no class: what stands for nothing.
BACKGROUND = "background"
SIDE = re.compile("left|right", re.IGNORECASE)
# A side that stands as a word, or as part of one in camel case. "bright spot" has none.
SIDE_WORD = re.compile("(?<![A-Za-z])(left|right)|Left|Right|LEFT|RIGHT")
VALUES = re.compile(r"(\d{1,9})(?:(\+)|(?:-|\.\.)(\d{1,9}))?")
COLOUR = re.compile("#[0-9a-fA-F]{6}")

# First and last value of each range; a colour is the number 0xRRGGBB.
Ranges = tuple[tuple[int, int], ...]


def clean_name(name: str) -> str:
    """Write a file's own name of a class as `--classes` can have it."""
    return " ".join(re.sub(r"[,=\\]", " ", name).split()) or "class"


@dataclass(frozen=True)
class Classes:
    """What `--classes`, `--ignore` and `--overlap` say. Raises UserError for what they cannot mean.

    classes: "liver,tumour" (ids 1 and 2), "liver=63,tumour=126" (values), "nucleus=1+" (every value
    from 1 on), "lung=2|3" (several values), "liver=#ff0000" (colours); "background=255" is no
    class. "" is one class, foreground.
    ignore: values or colours of pixels that do not count, such as "255" or "254|255".
    overlap: whether a pixel may be of several classes.
    """

    classes: str = ""
    ignore: str = ""
    overlap: bool = False

    def __post_init__(self) -> None:
        most = MAX_OVERLAPPING if self.overlap else MAX_CLASSES
        # A backslash separates values in DICOM.
        if not self._are_names_fine() or len(self.names) > most or "\\" in self.classes:
            raise UserError(
                f"classes is {self.classes!r}; expected 1 to {most} different names separated by "
                "commas, without \\"
            )
        if self.overlap and any(re.search(r"/|^\.", name) for name in self.names):
            raise UserError(
                f"classes is {self.classes!r}; with --overlap each class gets a folder: expected "
                "names without / and without a dot in front"
            )
        if not self._are_values_fine():
            raise UserError(
                f"classes is {self.classes!r}{self._ignore_text()}; expected different grey levels "
                "above 0, as in liver=63,tumour=126, or 1+, or 2|3, or colours, as in "
                "liver=#ff0000,tumour=#00ff00"
            )

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "Classes":
        """Read them from a model's metadata, also from that of earlier versions."""
        if "masks" in metadata:
            return cls(**metadata["masks"])
        names = metadata["classes"]
        values = list(metadata.get("mask_values") or range(1, len(names) + 1))
        if values != list(range(1, len(names) + 1)):
            names = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
        return cls(",".join(names))

    @property
    def metadata(self) -> dict[str, Any]:
        """What the model file stores."""
        return {"masks": asdict(self)}

    @cached_property
    def names(self) -> list[str]:
        """Names of the classes 1, 2 …"""
        return [name for name in self._parts if name.lower() != BACKGROUND]

    @cached_property
    def ranges(self) -> list[Ranges]:
        """The values of each class: 1, 2 … where none are given."""
        found = []
        for number, name in enumerate(self.names, 1):
            text = self._parts[name]
            found.append(parse_ranges(text) if text else ((number, number),))
        return found

    @cached_property
    def background(self) -> Ranges:
        """The values of the background: 0, or black, unless others are given."""
        for name, text in self._parts.items():
            if name.lower() == BACKGROUND and text:
                return parse_ranges(text)
        return ((0, 0),)

    @cached_property
    def ignored(self) -> Ranges:
        """The values of the pixels that do not count."""
        return parse_ranges(self.ignore.replace(",", "|")) if self.ignore.strip() else ()

    @property
    def in_colour(self) -> bool:
        """Whether the values are colours."""
        return "#" in self.classes

    @property
    def is_any_value(self) -> bool:
        """Whether there is one class, and any value that is not 0 stands for it."""
        return len(self.names) == 1 and self.ranges == [((1, 1),)] and self.background == ((0, 0),)

    @property
    def num_planes(self) -> int:
        """How many planes a mask takes: one for each class, and one for what does not count."""
        return len(self.names) + bool(self.ignored)

    @property
    def num_channels(self) -> int:
        """How many channels the network gives.

        One class has one channel, several have the background too, unless they overlap.
        """
        several = len(self.names) > 1 and not self.overlap
        return len(self.names) + several

    @property
    def levels(self) -> list[int]:
        """The value of background and of each class in a mask that is written."""
        if self.in_colour:
            return list(range(len(self.names) + 1))
        return [self.background[0][0], *(ranges[0][0] for ranges in self.ranges)]

    @property
    def dtype(self) -> type:
        """The type of masks in memory."""
        return BITS if self.overlap else np.uint8

    @cached_property
    def _parts(self) -> dict[str, str]:
        """The values of each name as text."""
        parts = {}
        for part in (self.classes or "foreground").split(","):
            name, _, text = part.partition("=")
            parts[name.strip()] = text.strip()
        return parts

    def _are_names_fine(self) -> bool:
        is_each_once = len(self._parts) == len((self.classes or "foreground").split(","))
        return is_each_once and all(self._parts) and bool(self.names)

    def _are_values_fine(self) -> bool:
        try:
            groups = [*self.ranges, self.background, self.ignored]
        except ValueError:
            return False
        given = [text for text in (*self._parts.values(), self.ignore) if text]
        colours = ["#" in text for text in given]
        if any(colours) and not (all(colours) and all(self._parts[name] for name in self.names)):
            return False
        spans = sorted(span for group in groups for span in group)
        return all(one[1] < other[0] for one, other in pairwise(spans))

    def _ignore_text(self) -> str:
        return f", ignore is {self.ignore!r}" if self.ignore else ""


def parse_ranges(text: str) -> Ranges:
    """Read values such as "63", "1+", "2|3", "1-57", "#ff0000". Raises ValueError."""
    ranges = []
    for part in re.split(r"[|;]", text):
        part = part.strip()
        if COLOUR.fullmatch(part):
            ranges.append((int(part[1:], 16),) * 2)
            continue
        found = VALUES.fullmatch(part)
        if not found:
            raise ValueError(f"{part!r} is no value")
        first = int(found[1])
        last = MAX_VALUE if found[2] else int(found[3] or first)
        ranges.append((first, last))
    if any(first > last for first, last in ranges):
        raise ValueError(f"{text!r} is no range")
    return tuple(ranges)


def is_in(values: np.ndarray, ranges: Ranges) -> np.ndarray:
    """Say which values are in one of the ranges: bool, of the same shape."""
    found = np.zeros(values.shape, bool)
    for first, last in ranges:
        found |= values == first if first == last else (values >= first) & (values <= last)
    return found


def colour_text(colour: int) -> str:
    """Write a colour as `--classes` takes it."""
    return f"#{int(colour):06x}"


# ------------------------------------------------------------------------------ masks in memory


def plane(mask: np.ndarray, class_id: int) -> np.ndarray:
    """Say which pixels of a mask, ids or BITS, are of a class: bool, of the same shape."""
    if mask.dtype == BITS:
        return (mask >> BITS(class_id - 1)) & BITS(1) > 0
    return mask == class_id


def join_planes(planes: Iterable[np.ndarray], dtype: type = np.uint8) -> np.ndarray:
    """Make a mask of the classes' planes, bool. In a mask of ids the later class stays."""
    mask = None
    for class_id, one in enumerate(planes, 1):
        if mask is None:
            mask = np.zeros(one.shape, dtype)
        add_class(mask, class_id, one)
    return mask


def add_class(mask: np.ndarray, class_id: int, where: np.ndarray) -> None:
    """Make the pixels `where` those of a class. In a mask of ids they leave the class before."""
    if mask.dtype == BITS:
        mask[where] |= BITS(1 << (class_id - 1))
    else:
        mask[where] = class_id


def remove_class(mask: np.ndarray, class_id: int, where: np.ndarray) -> None:
    """Take the pixels `where` from a class."""
    if mask.dtype == BITS:
        mask[where] &= BITS(MAX_BITS ^ (1 << (class_id - 1)))
    else:
        mask[where & (mask == class_id)] = 0


def highest_class(mask: np.ndarray) -> int:
    """Return the last class that occurs in a mask; at least 1."""
    highest = int(mask.max())
    return max(1, highest.bit_length() if mask.dtype == BITS else highest)


# --------------------------------------------------------------------------------- left and right


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


def mirrored_outputs(metadata: dict[str, Any]) -> np.ndarray:
    """List which of the network's channels takes each one's place in a mirrored image."""
    classes = Classes.from_metadata(metadata)
    order = mirrored_channels(classes.names)
    return order if classes.num_channels == len(order) else order[1:] - 1


def _other_side(side: re.Match) -> str:
    return "right" if side[0].lower() == "left" else "left"
