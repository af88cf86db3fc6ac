"""What the numbers and colours of a mask file mean: from its pixels to classes.

Values, colours, an alpha channel, soft edges. What cannot be read without a guess is refused, with
the flag that would say what is meant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from imaging.grid import Grid
from imaging.labels import MAX_VALUE, Classes, Ranges, is_in, plane
from imaging.masks.mask_advice import advise_classes, advise_one_class, list_some, range_text
from imaging.masks.mask_colours import (
    Note,
    colour_numbers,
    describe_colours,
    nearest_named,
    only_colour,
)
from imaging.masks.soft_masks import GREY_TOLERANCE, cut_soft_edges
from imaging.preprocess import prepare_mask, prepare_plane
from imaging.scan import Scan
from utils import UserError

# `Scan.format` of a mask whose pixels are class ids already, whatever --classes says of values.
IDS = "ids"
# A whole number that was stored scaled differs from one by no more.
ROUNDING = 1e-3
# What stands for the only class in most masks.
USUAL = {1, 255, 65535}

SOFT = "grey values between its two, such as soft edges or JPEG's, are cut at half"
ALPHA = "the mask is in its alpha channel"
CLEAR = "transparent pixels are background"


@dataclass(frozen=True)
class Truth:
    """What the masks of an image say of its pixels."""

    # (S, H, W) ids or BITS, see `labels`.
    mask: np.ndarray
    # (S, H, W): pixels that do not count. None if there can be none.
    ignored: np.ndarray | None = None
    # See `dataset.notes`.
    notes: Sequence[Note] = ()

    def prepare(self, grid: Grid, classes: Classes) -> np.ndarray:
        """Scale like the image: uint8 (D, H, W, `classes.num_planes`), see `prepare_mask`."""
        shares = prepare_mask(self.mask, grid, len(classes.names))
        if self.ignored is None:
            return shares
        return np.concatenate([shares, prepare_plane(self.ignored, grid)[..., None]], axis=-1)


class Decoded(NamedTuple):
    """What a mask file says: the pixels of each class that it can show, and those without one."""

    planes: dict[int, np.ndarray]
    ignored: np.ndarray | None
    notes: list[Note]


def decode(scan: Scan, classes: Classes, class_id: int = 0) -> Decoded:
    """Find the classes in a mask file.

    class_id: the only class that it shows; 0 if its values tell the classes. Raises UserError for
    values that `classes` does not name.
    """
    if scan.format == IDS:
        mask = scan.pixels[..., 0]
        present = [class_id] if class_id else range(1, len(classes.names) + 1)
        planes = {i: mask > 0 if class_id else plane(mask, i) for i in present}
        ignored = np.zeros(mask.shape, bool) if classes.ignored else None
        return Decoded(planes, ignored, list(scan.notes))
    notes: list[Note] = [*scan.notes]
    pixels = without_alpha(scan, notes)
    if pixels.shape[-1] == 1 and classes.in_colour and pixels.max() > len(classes.names):
        pixels = np.repeat(pixels, 3, axis=-1)
    elif pixels.shape[-1] == 3 and not classes.in_colour and _is_grey(pixels):
        pixels = pixels[..., :1]
    is_colour = pixels.shape[-1] == 3
    values = colour_numbers(pixels) if is_colour else _whole_numbers(pixels[..., 0])
    ignored = is_in(values, classes.ignored) if classes.ignored else None
    if class_id or classes.is_any_value:
        found = _only_class(values, ignored, is_colour, notes)
        return Decoded({class_id or 1: found}, ignored, notes)
    if classes.in_colour and is_colour:
        values, ignored = nearest_named(values, ignored, classes, notes)
    elif is_colour and classes.ranges == [((1, MAX_VALUE),)]:
        # Objects in a colour each are one class with 1+.
        return Decoded({1: values > 0}, ignored, notes)
    elif is_colour:
        raise UserError(describe_colours(values))
    ranges = classes.ranges
    if classes.in_colour and not is_colour:  # as masks of such a model are written
        ranges = [((i, i),) for i in range(1, len(classes.names) + 1)]
    _check_named(values, ignored, ranges, classes)
    return Decoded({i: is_in(values, one) for i, one in enumerate(ranges, 1)}, ignored, notes)


# ---------------------------------------------------------------------------- one number per pixel


def without_alpha(scan: Scan, notes: list[Note]) -> np.ndarray:
    """Reduce a mask to its values (S, H, W, 1) or colours (S, H, W, 3)."""
    pixels = scan.pixels.astype(np.uint8) if scan.pixels.dtype == bool else scan.pixels
    if scan.has_alpha:
        pixels, alpha = pixels[..., :-1], pixels[..., -1:]
        if alpha.max() > alpha.min():
            opaque = np.where(alpha > alpha.max() / 2, pixels, 0)
            # Where all that is seen is of one colour, the alpha channel draws the shape.
            is_drawn = not _is_plain(pixels) and not _is_plain(opaque)
            notes.append(CLEAR if is_drawn else ALPHA)
            pixels = opaque if is_drawn else alpha
    if pixels.shape[-1] not in (1, 3):
        raise UserError(
            f"{pixels.shape[-1]} channels; expected a mask with one value or colour per pixel"
        )
    return pixels


def _is_grey(pixels: np.ndarray) -> bool:
    """Say whether the channels (S, H, W, 3) are the same."""
    if pixels.dtype != np.uint8:
        return bool((pixels == pixels[..., :1]).all())
    return bool((pixels.max(-1) - pixels.min(-1)).max() <= GREY_TOLERANCE)


def _is_plain(pixels: np.ndarray) -> bool:
    """Say whether all pixels (S, H, W, C) are the same."""
    return bool((pixels == pixels[0, 0, 0]).all())


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    """Give values (S, H, W) an integer type; shares from 0 to 1 become 0 to 255."""
    if values.dtype.kind != "f":
        return values
    rounded = np.round(values)
    if np.abs(values - rounded).max() <= ROUNDING:
        return rounded.astype(np.int64)
    if values.min() >= 0 and values.max() <= 1:
        return np.round(255 * values).astype(np.uint8)
    raise UserError(
        f"values {list_some(np.unique(values).tolist())}; expected whole numbers, or shares from "
        "0 to 1"
    )


# ---------------------------------------------------------------------------------- a single class


def _only_class(
    values: np.ndarray, ignored: np.ndarray | None, is_colour: bool, notes: list[Note]
) -> np.ndarray:
    """Find the pixels of the only class: those of the only value that is not 0."""
    counted = values if ignored is None else np.where(ignored, 0, values)
    found = find_values(counted) - {0}
    if len(found) < 2 and not min(found, default=0) < 0:
        if found and not is_colour and not found <= USUAL:
            notes.append(
                f"its only value, {min(found)}, is taken for the class; if other values are other "
                "classes, name them: --classes"
            )
        return counted > 0
    if is_colour:
        return only_colour(counted, notes)
    middle = cut_soft_edges(counted, found)
    if middle is None:
        raise UserError(
            f"values {list_some({0, *found})}; expected 0 and one other value"
            f"{advise_one_class(counted, found)}"
        )
    inside, blurred = middle
    notes.append((SOFT, blurred))
    return inside


# --------------------------------------------------------------------------------- several classes


def _check_named(
    values: np.ndarray, ignored: np.ndarray | None, ranges: Sequence[Ranges], classes: Classes
) -> None:
    """Raise UserError if a mask has values that nothing names."""
    found = find_values(values if ignored is None else np.where(ignored, 0, values))
    listed = np.array(sorted(found))
    named = is_in(listed, classes.background if ranges is classes.ranges else ((0, 0),))
    named |= listed == 0 if ignored is not None and ignored.any() else False
    for one in ranges:
        named |= is_in(listed, one)
    others = listed[~named].tolist()
    if not others:
        return
    expected = ", ".join(range_text(*one) for one in [*classes.background, *sum(ranges, ())])
    if len(classes.names) == 1:
        expected = f"{expected}, as --classes says"
    else:
        expected = f"{expected}, the values of --classes"
    raise UserError(
        f"values {list_some(found)}; expected {expected}{advise_classes(found, others)}"
    )


# ------------------------------------------------------------------------------------------ values


def find_values(mask: np.ndarray) -> set[int]:
    """List the values in a mask."""
    extremes = {mask.min().item(), mask.max().item()}
    # Most masks have two values. np.unique is much slower.
    if sum(np.count_nonzero(mask == value) for value in extremes) == mask.size:
        return extremes
    return set(np.unique(mask).tolist())
