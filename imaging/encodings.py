"""What the numbers and colours of a mask file mean: from its pixels to classes.

Values, colours, an alpha channel, soft edges. What cannot be read without a guess is refused, with
the flag that would say what is meant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from imaging.labels import MAX_VALUE, Classes, Ranges, colour_text, is_in, plane
from imaging.preprocess import prepare_mask, resize_plane
from imaging.scan import Scan
from utils import UserError

# `Scan.format` of a mask whose pixels are class ids already, whatever --classes says of values.
IDS = "ids"
# Channels that differ by no more are grey: JPEG's rounding.
GREY_TOLERANCE = 2
# Values within this share of the range from 0 or the largest value are that value, blurred.
END = 0.125
# The largest share of blurred pixels that may lie away from an edge.
STRAY = 0.05
# More values than this are labels of objects, or grey levels, not classes.
MAX_SUGGESTED_CLASSES = 8
# Larger values beside 255 are grey levels, not ids.
MAX_ID = 32
# What stands for the only class in most masks.
USUAL = {1, 255, 65535}
# So many colours are looked at whether they fill an area.
MAX_SOLID = 64
# A colour that is not named is a class of its own from this share of the pixels on, else an edge.
MIN_COLOUR_SHARE = 0.005
MIN_COLOUR_PIXELS = 16
# Colours that differ by no more in any channel are the same one, rounded by JPEG.
COLOUR_TOLERANCE = 24

SOFT = "grey values between its two, such as soft edges or JPEG's, are cut at half"
ALPHA = "the mask is in its alpha channel"
CLEAR = "transparent pixels are background"
NEAREST = "colours that are not named, such as soft edges or JPEG's, become the nearest named one"

Note = str | tuple[str, int]


@dataclass(frozen=True)
class Truth:
    """What the masks of an image say of its pixels."""

    # (S, H, W) ids or BITS, see `labels`.
    mask: np.ndarray
    # (S, H, W): pixels that do not count. None if there can be none.
    ignored: np.ndarray | None = None
    # See `dataset.notes`.
    notes: Sequence[Note] = ()

    def prepare(self, size: tuple[int, int], classes: Classes) -> np.ndarray:
        """Resize like the image: uint8 (S, h, w, `classes.num_planes`), see `prepare_mask`."""
        count = len(classes.names)
        planes = np.stack([prepare_mask(one, size, count) for one in self.mask])
        if self.ignored is None:
            return planes
        ignored = np.stack([resize_plane(one, size) for one in self.ignored])
        return np.concatenate([planes, ignored[..., None]], axis=-1)


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
    values = _colour_numbers(pixels) if is_colour else _whole_numbers(pixels[..., 0])
    ignored = is_in(values, classes.ignored) if classes.ignored else None
    if class_id or classes.is_any_value:
        found = _only_class(values, ignored, is_colour, notes)
        return Decoded({class_id or 1: found}, ignored, notes)
    if classes.in_colour and is_colour:
        values, ignored = _nearest_named(values, ignored, classes, notes)
    elif is_colour and classes.ranges == [((1, MAX_VALUE),)]:
        # Objects in a colour each are one class with 1+.
        return Decoded({1: values > 0}, ignored, notes)
    elif is_colour:
        raise UserError(_describe_colours(values))
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
    if (values == np.round(values)).all():
        return values.astype(np.int64)
    if values.min() >= 0 and values.max() <= 1:
        return np.round(255 * values).astype(np.uint8)
    raise UserError(
        f"values {_list_some(np.unique(values).tolist())}; expected whole numbers, or shares from "
        "0 to 1"
    )


def _colour_numbers(pixels: np.ndarray) -> np.ndarray:
    """Make one number 0xRRGGBB of each colour (S, H, W, 3)."""
    if pixels.dtype != np.uint8:
        pixels = pixels / (257 if pixels.max() > 255 else 1)
        if pixels.min() < 0 or pixels.max() > 255:
            raise UserError("colours that are not of 8 or 16 bits; expected a mask")
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), -1, 0)
    return red << 16 | green << 8 | blue


# ---------------------------------------------------------------------------------- a single class


def _only_class(
    values: np.ndarray, ignored: np.ndarray | None, is_colour: bool, notes: list[Note]
) -> np.ndarray:
    """Find the pixels of the only class: those of the only value that is not 0."""
    counted = values if ignored is None else np.where(ignored, 0, values)
    found = find_values(counted) - {0}
    if len(found) < 2 and not min(found, default=0) < 0:
        if found and not is_colour and not found <= USUAL:
            notes.append(f"its only value, {min(found)}, is taken for the class")
        return counted > 0
    if is_colour:
        raise UserError(_describe_colours(values))
    middle = _soft_pixels(counted, found)
    if middle is None:
        raise UserError(
            f"values {_list_some({0, *found})}; expected 0 and one other value"
            f"{_advise_one(counted, found)}"
        )
    inside, blurred = middle
    notes.append((SOFT, blurred))
    return inside


def _soft_pixels(values: np.ndarray, found: set[int]) -> tuple[np.ndarray, int] | None:
    """Cut a mask with soft edges at half: the pixels inside, and how many are between.

    Returns None if the values between are elsewhere than at the edges: then they mean something.
    """
    highest = int(values.max())
    full = 255 if highest <= 255 else 65535
    if not full / 2 < highest <= full or values.min() < 0:
        return None
    inside = values > full / 2
    blurred = (values > 0) & (values < full)
    between = (values > END * full) & (values < (1 - END) * full)
    rounding = GREY_TOLERANCE * full // 255
    ringing = (values > rounding) & (values < full - rounding) & ~between
    reach = max(4, min(inside.shape[1:]) // 50)
    if _strays(between, inside, reach) or _strays(ringing, inside, 4 * reach):
        return None
    is_blur = len(found) > MAX_SUGGESTED_CLASSES
    if not is_blur and any(_is_solid(values, one) for one in found - {full}):
        return None
    return inside, int(np.count_nonzero(blurred))


def _strays(blurred: np.ndarray, inside: np.ndarray, reach: int) -> bool:
    """Say whether many blurred pixels (S, H, W) are further than `reach` from an edge."""
    if not blurred.any():
        return False
    near = np.stack([_near_edge(one, reach) for one in inside])
    return np.count_nonzero(blurred & ~near) > STRAY * np.count_nonzero(blurred)


def _near_edge(inside: np.ndarray, reach: int) -> np.ndarray:
    """Say which pixels of a plane (H, W) lie within `reach` pixels of its edge."""
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    plane = inside.astype(np.uint8)
    return cv2.dilate(plane, kernel) > cv2.erode(plane, kernel)


def _advise_one(values: np.ndarray, found: set[int]) -> str:
    """Advise what to do about a mask of several values where one class is asked for."""
    if min(found) < 0:
        return ""
    is_of_objects = _are_objects(values, found)
    if len(found) > MAX_SUGGESTED_CLASSES and not is_of_objects:
        return ' (if all of them are one class: --classes "NAME=1+")'
    if len(found) > MAX_SUGGESTED_CLASSES:
        return (
            f" (instance labels: {len(found)} values, each of one object. All of them become one "
            'class with --classes "NAME=1+", such as nucleus=1+)'
        )
    advice = name_values(found)
    if is_of_objects and len(found) > 1:
        advice += ', or if each value is one object of the same class (instance labels), "NAME=1+"'
    return f" (if these are classes, name them: {advice})"


def _are_objects(values: np.ndarray, found: set[int]) -> bool:
    """Say whether nearly each of a mask's values is one connected object, in the first slices."""
    plane = max(values, key=np.count_nonzero)
    labels = sorted(set(np.unique(plane).tolist()) & found)[:64]
    single = [cv2.connectedComponents((plane == one).astype(np.uint8))[0] == 2 for one in labels]
    return bool(labels) and sum(single) >= 0.8 * len(labels)


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
    expected = ", ".join(_range_text(*one) for one in [*classes.background, *sum(ranges, ())])
    if len(classes.names) == 1:
        expected = f"{expected}, as --classes says"
    else:
        expected = f"{expected}, the values of --classes"
    raise UserError(
        f"values {_list_some(found)}; expected {expected}{_advise_several(found, others)}"
    )


def _advise_several(found: set[int], others: list[int]) -> str:
    """Advise what to do about values that --classes does not name."""
    if max(others) == 255 and len(others) == 1 and len(found) > 2:
        return " (if 255 means that nobody knows: --ignore 255)"
    if len(found - {0}) > MAX_SUGGESTED_CLASSES:
        return " (many values: is it a JPEG, or smoothed? Save ids, as PNG)"
    if min(found) < 0:
        return ""
    return (
        f" (if these are classes, name them: {name_values(found - {0})}; --ignore leaves a value "
        "out)"
    )


def name_values(found: set[int]) -> str:
    """Write the flags that name values."""
    values = sorted(found)
    ignore = ""
    if values[-1] == 255 and len(values) > 1 and values[-2] <= MAX_ID:
        values, ignore = values[:-1], " --ignore 255"
    named = ",".join(f"NAME{i}={value}" for i, value in enumerate(values, 1))
    return f'--classes "{named}"{ignore}'


# --------------------------------------------------------------------------------------- colours


def _nearest_named(
    colours: np.ndarray, ignored: np.ndarray | None, classes: Classes, notes: list[Note]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Replace colours that nothing names by the nearest that is named.

    Raises UserError if one of them covers so much that it is no edge.
    """
    named = [first for one in classes.ranges for first, _ in one]
    named += [first for one in (classes.background, classes.ignored) for first, _ in one]
    seen, place, counts = np.unique(colours, return_inverse=True, return_counts=True)
    distances = np.abs(_channels(seen)[:, None] - _channels(np.array(named))[None])
    is_other = ~np.isin(seen, named)
    is_large = counts >= max(MIN_COLOUR_PIXELS, MIN_COLOUR_SHARE * colours.size)
    is_far = distances.max(-1).min(-1) > COLOUR_TOLERANCE
    if any(_is_solid(colours, colour) for colour in seen[is_other & is_large & is_far]):
        raise UserError(_describe_colours(colours))
    if not is_other.any():
        return colours, ignored
    notes.append((NEAREST, int(counts[is_other].sum())))
    nearest = np.array(named)[(distances.astype(np.float64) ** 2).sum(-1).argmin(-1)]
    replaced = nearest[place].reshape(colours.shape)
    return replaced, is_in(replaced, classes.ignored) if classes.ignored else None


def _is_solid(values: np.ndarray, value: int) -> bool:
    """Say whether a value (S, H, W) fills some area; edges are thin."""
    kernel = np.ones((3, 3), np.uint8)
    return any(cv2.erode((one == value).astype(np.uint8), kernel).any() for one in values)


def _channels(colours: np.ndarray) -> np.ndarray:
    """Split numbers 0xRRGGBB into (N, 3)."""
    return np.stack([colours >> 16 & 255, colours >> 8 & 255, colours & 255], -1).astype(np.int64)


def _describe_colours(colours: np.ndarray) -> str:
    """List a mask's colours with their shares, and the flag that names them."""
    seen, counts = np.unique(colours, return_counts=True)
    least = max(MIN_COLOUR_PIXELS, MIN_COLOUR_SHARE / 5 * colours.size)
    common = [i for i in np.argsort(-counts, kind="stable") if counts[i] >= least]
    solid = [i for i in common[:MAX_SOLID] if _is_solid(colours, seen[i])]
    if not common or len(solid or common) > 2 * MAX_SUGGESTED_CLASSES:
        advice = ' (if each is one object of the same class, instance labels: --classes "NAME=1+")'
        return f"a picture of {len(seen)} colours; expected a mask{advice if solid else ''}"
    shares = {int(seen[i]): counts[i] / colours.size for i in solid or common}
    listed = ", ".join(f"{colour_text(one)} ({share:.1%})" for one, share in shares.items())
    background = 0 if 0 in shares else next(iter(shares))
    others = [one for one in shares if one != background]
    named = [f"NAME{i}={colour_text(one)}" for i, one in enumerate(others, 1)]
    if background:
        named.append(f"background={colour_text(background)}")
    return f'colours {listed}; name them: --classes "{",".join(named)}"'


# ------------------------------------------------------------------------------------------ values


def find_values(mask: np.ndarray) -> set[int]:
    """List the values in a mask."""
    extremes = {mask.min().item(), mask.max().item()}
    # Most masks have two values. np.unique is much slower.
    if sum(np.count_nonzero(mask == value) for value in extremes) == mask.size:
        return extremes
    return set(np.unique(mask).tolist())


def _range_text(first: int, last: int) -> str:
    if first == last:
        return f"{first}"
    return f"{first}+" if last >= 2**32 - 1 else f"{first}-{last}"


def _list_some(values: Sequence[float]) -> str:
    """List the first values."""
    listed = ", ".join(f"{value:g}" for value in sorted(values)[:6])
    return listed + (", …" if len(values) > 6 else "")
