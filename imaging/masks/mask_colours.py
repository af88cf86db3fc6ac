"""Masks whose colours are classes."""

import cv2
import numpy as np

from imaging.labels import Classes, colour_text, is_in
from imaging.masks.mask_advice import MAX_SUGGESTED_CLASSES
from utils import UserError

Note = str | tuple[str, int]

# So many colours are looked at whether they fill an area.
MAX_SOLID = 64
# A colour that is not named is a class of its own from this share of the pixels on, else an edge.
MIN_COLOUR_SHARE = 0.005
MIN_COLOUR_PIXELS = 16
# JPEG rounds the channels of an area by no more.
ROUNDING = 4
# Colours that differ by no more in any channel from a named one are that one.
COLOUR_TOLERANCE = 24
# The largest share of the pixels that edges have.
MAX_EDGES = 0.5
# A mask has fewer, also with soft edges.
MAX_COLOURS = 100_000
NEAREST = "colours that are not named, such as soft edges or JPEG's, become the nearest named one"


def colour_numbers(pixels: np.ndarray) -> np.ndarray:
    """Make one number 0xRRGGBB of each colour (S, H, W, 3)."""
    if pixels.dtype != np.uint8:
        pixels = pixels / (257 if pixels.max() > 255 else 1)
        if pixels.min() < 0 or pixels.max() > 255:
            raise UserError("colours that are not of 8 or 16 bits; expected a mask")
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), -1, 0)
    return red << 16 | green << 8 | blue


def nearest_named(
    colours: np.ndarray, ignored: np.ndarray | None, classes: Classes, notes: list[Note]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Replace colours that nothing names by the nearest that is named.

    Raises UserError if one of them covers so much that it is no edge.
    """
    named = [first for one in classes.ranges for first, _ in one]
    named += [first for one in (classes.background, classes.ignored) for first, _ in one]
    if (is_in(colours, tuple((one, one) for one in named))).all():
        return colours, ignored
    for colour in main_colours(colours):
        if _distances(np.array([colour]), named).max(-1).min() > COLOUR_TOLERANCE:
            raise UserError(describe_colours(colours))
    replaced = _to_nearest(colours, named, notes)
    return replaced, is_in(replaced, classes.ignored) if classes.ignored else None


def only_colour(colours: np.ndarray, notes: list[Note]) -> np.ndarray:
    """Find the pixels of the only colour that is not black, with soft edges. Raises UserError."""
    found = list(main_colours(colours))
    dark = [one for one in found if _distances(np.array([one]), [0]).max() <= COLOUR_TOLERANCE]
    if len(found) != 2 or len(dark) != 1:
        raise UserError(describe_colours(colours))
    return _to_nearest(colours, found, notes) != dark[0]


def main_colours(colours: np.ndarray) -> dict[int, float]:
    """Find the colours that fill an area, the most common first, and each one's share.

    Colours that differ by JPEG's rounding are one.
    """
    seen, counts = np.unique(colours, return_counts=True)
    least = max(MIN_COLOUR_PIXELS, MIN_COLOUR_SHARE / 5 * colours.size)
    found: dict[int, float] = {}
    for i in np.argsort(-counts, kind="stable")[:MAX_SOLID]:
        if counts[i] < least or not _is_solid(colours, seen[i]):
            continue
        if not found or _distances(seen[[i]], list(found)).max(-1).min() > ROUNDING:
            found[int(seen[i])] = counts[i] / colours.size
    return found


def _to_nearest(colours: np.ndarray, named: list[int], notes: list[Note]) -> np.ndarray:
    """Replace each colour by the nearest of `named`."""
    seen, place, counts = np.unique(colours, return_inverse=True, return_counts=True)
    if len(seen) > MAX_COLOURS:
        raise UserError(f"a picture of {len(seen)} colours; expected a mask")
    distances = _distances(seen, named)
    if counts[distances.max(-1).min(-1) > COLOUR_TOLERANCE].sum() > MAX_EDGES * colours.size:
        raise UserError(describe_colours(colours))
    nearest = np.array(named)[(distances**2).sum(-1).argmin(-1)]
    if others := int(counts[~np.isin(seen, named)].sum()):
        notes.append((NEAREST, others))
    return nearest[place].reshape(colours.shape)


def _distances(colours: np.ndarray, named: list[int]) -> np.ndarray:
    """Compare colours (N,) with others (M,): the difference of each channel, (N, M, 3)."""
    return np.abs(_channels(colours)[:, None] - _channels(np.array(named))[None])


def _is_solid(values: np.ndarray, value: int) -> bool:
    """Say whether a value (S, H, W) fills some area; edges are thin."""
    kernel = np.ones((3, 3), np.uint8)
    return any(cv2.erode((one == value).astype(np.uint8), kernel).any() for one in values)


def _channels(colours: np.ndarray) -> np.ndarray:
    """Split numbers 0xRRGGBB into (N, 3)."""
    return np.stack([colours >> 16 & 255, colours >> 8 & 255, colours & 255], -1).astype(np.int64)


def describe_colours(colours: np.ndarray) -> str:
    """List a mask's colours with their shares, and the flag that names them."""
    shares = main_colours(colours)
    if not 1 < len(shares) <= 2 * MAX_SUGGESTED_CLASSES:
        advice = ' (if each is one object of the same class, instance labels: --classes "NAME=1+")'
        found = f"a picture of {len(np.unique(colours))} colours; expected a mask"
        return found + (advice if len(shares) > 1 else "")
    listed = ", ".join(f"{colour_text(one)} ({share:.1%})" for one, share in shares.items())
    background = 0 if 0 in shares else next(iter(shares))
    others = [one for one in shares if one != background]
    named = [f"NAME{i}={colour_text(one)}" for i, one in enumerate(others, 1)]
    if background:
        named.append(f"background={colour_text(background)}")
    return f'colours {listed}; name them: --classes "{",".join(named)}"'
