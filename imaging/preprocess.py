"""Turn images and masks into what the network takes: grey levels and shares of pixels.

Training, prediction and serving share this. Where the pixels lie says a `grid.Grid`. Two
percentiles of an image's intensities become 0 and 1, so that files of 8 and 16 bits, dark and
bright ones, look alike.
"""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import cv2
import numpy as np

from imaging import lazy
from imaging.grid import Change, Grid, Pixels, fit_grid
from imaging.labels import BITS, join_planes, plane
from imaging.lazy import LazyPixels, part_of
from imaging.scan import Scan
from utils import UserError

# Of an image's own pixels: they become 0 and 1.
PERCENTILES = (0.5, 99.5)


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Turn (H, W, C) without alpha into float32 (H, W, channels).

    Three channels become grey by luminance, one becomes three equal ones. Raises UserError for any
    other difference: which channel is meant would be a guess.
    """
    # 8 bits would round before the intensities are stretched. OpenCV cannot resize 32-bit integers.
    image = image.astype(np.float32)
    found = image.shape[-1]
    if found == 3 and channels == 1:
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[..., None]
    if found == 1 and channels == 3:
        return np.broadcast_to(image, (*image.shape[:2], 3))
    check_channels(found, channels)
    return image


def check_channels(found: int, channels: int) -> None:
    """Raise UserError unless an image has as many channels as the network takes."""
    if found != channels:
        raise UserError(
            f"an image of {count_channels(found)}; the network takes {count_channels(channels)}"
        )


def count_channels(count: int) -> str:
    """Say how many channels."""
    return "1 channel" if count == 1 else f"{count} channels"


def parse_window(window: str) -> tuple[float, float]:
    """Read "centre,width", such as 40,400 for the soft tissue of CT. Raises UserError."""
    try:
        centre, width = map(float, window.split(","))
    except ValueError:
        centre, width = 0.0, np.nan
    if not np.isfinite(centre) or not 0 < width < np.inf:
        raise UserError(
            f"window is {window!r}; expected centre,width (40,400), file, or nothing for "
            "percentiles"
        )
    return centre, width


def grey_range(pixels: np.ndarray, scan: Scan, window: str) -> tuple[float, float]:
    """Choose the grey levels that become 0 and 1, by `window` as in `prepare_scan`."""
    if window:
        centre, width = scan.window if window == "file" else parse_window(window)
        return centre - width / 2, centre + width / 2
    low, high = np.percentile(pixels, PERCENTILES)
    if low == high:
        # Flat but for a few pixels.
        return pixels.min(), pixels.max()
    return low, high


def grey_ranges(
    measured: np.ndarray, scan: Scan, window: str, is_padding: np.ndarray | None = None
) -> tuple[Any, Any]:
    """Choose the levels that become 0 and 1 by pixels (D, h, w, C) that stand for all.

    Grey and colour images have one range: two numbers. Other channels have one each: two arrays
    (C,). is_padding: (D, h, w), the share of padding. It has no say.
    """
    channels = measured.shape[-1]
    if is_padding is not None and not is_padding.all():
        # (N, C)
        inside = is_padding == 0
        measured = measured[inside if inside.any() else is_padding < 1]
    if channels in (1, 3) and not (channels == 3 and scan.separate):
        return grey_range(measured, scan, window)
    ranges = [grey_range(measured[..., i], scan, window) for i in range(channels)]
    low, high = np.transpose(ranges)
    return low.astype(np.float32), high.astype(np.float32)


def prepare_scan(scan: Scan, grid: Grid, channels: int, window: str = "") -> Pixels:
    """Make the working array of a scan: uint8 (D, H, W, channels) as `grid` says, 255 is 1.0.

    window: the grey levels that become 0 and 1. "centre,width" is in the file's units (HU for CT),
    "file" is what its header proposes, "" is two percentiles of the whole scan, of each channel if
    these are measurements of their own. Those of a volume are never turned into others. What is
    constant becomes all zeros. A large file at its own resolution is read when it is needed. Raises
    UserError.
    """
    colours, change = grid.orient(scan.colours), partial(to_channels, channels=channels)
    if scan.separate and scan.affine is not None:  # sequences of MRI; stains may pass as colours
        check_channels(colours.shape[-1], channels)
    count = prod(grid.inner) * channels
    is_large = count > lazy.LARGE_ARRAY or isinstance(colours, LazyPixels)
    if is_large and grid.is_native and scan.padding is None:
        return _prepare_when_read(colours, change, scan, window)
    step, is_padding = lazy.sampling_step(count), None
    measured = _scaled_sample(colours, grid, change, step)
    if scan.padding is not None:
        is_padding = _scaled_sample(grid.orient(scan.padding), grid, np.float32, step)
    levels = grey_ranges(measured, scan, window, is_padding)
    # Many are scaled again, because all of them would fill the memory.
    slices = measured if step == 1 else grid.scale(colours, change)
    canvas = np.zeros((*grid.canvas, channels), np.uint8)
    for number, image in enumerate(slices):
        canvas[number, grid.rows, grid.columns] = stretch(image, scan, levels, window)
    return canvas


def _scaled_sample(array: Pixels, grid: Grid, change: Change, step: int) -> np.ndarray:
    """Scale an oriented array, and keep every so many rows and columns."""
    return np.stack([one[::step, ::step] for one in grid.scale(array, change)])


def _prepare_when_read(colours: Pixels, change: Change, scan: Scan, window: str) -> LazyPixels:
    """Prepare pixels at their own resolution when they are read; some squares stand for all."""
    if not isinstance(colours, LazyPixels):
        colours = LazyPixels(colours.shape, colours.dtype, colours.__getitem__)
    changed = colours.map(lambda part: np.stack([change(one) for one in part]))
    levels = grey_ranges(lazy.sample(changed), scan, window)
    return changed.map(lambda part: stretch(part, scan, levels, window))


def stretch(image: np.ndarray, scan: Scan, levels: tuple[Any, Any], window: str) -> np.ndarray:
    """Make the lower and upper of two grey levels 0 and 255: uint8 of the same shape."""
    low, high = levels
    if window == "file" and scan.voi_curve is not None:
        image, low, high = np.interp(image, *scan.voi_curve), 0, 1
    # What is constant is divided by infinity.
    width = np.where(high > low, high - low, np.inf) if np.ndim(low) else high - low
    if not np.ndim(low) and high <= low:
        return np.zeros(image.shape, np.uint8)
    return np.round(255 * np.clip((image - low) / width, 0, 1)).astype(np.uint8)


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Show images (..., C) as RGB (..., 3): the first three channels; two are red and green."""
    shown = images[..., :3]
    if shown.shape[-1] == 1:
        return np.repeat(shown, 3, axis=-1)
    missing = 3 - shown.shape[-1]
    return np.pad(shown, ((0, 0),) * (images.ndim - 1) + ((0, missing),))


def to_picture(scan: Scan, size: tuple[int, int], window: str = "") -> np.ndarray:
    """Show a scan as RGB, uint8 (S, size[0], size[1], 3)."""
    colours = scan.colours
    if colours.shape[-1] not in (1, 3):
        shown = part_of(colours, (..., slice(3)))
        scan = replace(scan, pixels=shown, has_alpha=False, separate=True)
    grid = fit_grid(scan.pixels.shape[:3], size)
    return to_rgb(prepare_scan(scan, grid, scan.colours.shape[-1], window))


def prepare_image(image: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Prepare one image (H, W, C) as `prepare_scan` does: uint8 (size[0], size[1], channels)."""
    return prepare_scan(Scan(image[None]), fit_grid((1, *image.shape[:2]), size), channels)[0]


def prepare_mask(mask: np.ndarray, grid: Grid, classes: int) -> np.ndarray:
    """Scale a mask (S, H, W), ids or BITS, like its image: uint8 (D, H, W, classes).

    Each value is the share of the pixel that belongs to the class, 255 is all of it. Shares keep
    where in a pixel a border runs; class ids would round that away.
    """
    grey = np.uint8(255)
    changes = [lambda part, i=i: grey * plane(part, i) for i in range(1, classes + 1)]
    return np.stack([_scale_shares(mask, grid, change) for change in changes], axis=-1)


def prepare_plane(plane: np.ndarray, grid: Grid) -> np.ndarray:
    """Scale a plane (S, H, W) of bool like its image: uint8 (D, H, W), the share of each pixel.

    255 is all of it.
    """
    return _scale_shares(plane, grid, lambda part: np.uint8(255) * part)


def _scale_shares(mask: np.ndarray, grid: Grid, change: Change) -> np.ndarray:
    canvas = np.zeros(grid.canvas, np.uint8)
    for number, share in enumerate(grid.scale(grid.orient(mask), change)):
        canvas[number, grid.rows, grid.columns] = share
    return canvas


def shares_to_ids(shares: np.ndarray, dtype: type = np.uint8) -> np.ndarray:
    """Turn shares (..., K) of `prepare_mask` into a mask (...).

    Of ids, uint8, the largest share wins. Of BITS each class counts that covers half of a pixel.
    """
    if dtype == BITS:
        return join_planes((shares[..., k] > 127 for k in range(shares.shape[-1])), BITS)
    background = np.maximum(255 - shares.sum(-1, dtype=np.int32), 0)
    shares = np.concatenate([background[..., None], shares], axis=-1)
    return np.argmax(shares, axis=-1).astype(np.uint8)
