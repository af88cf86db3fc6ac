"""The charts of `data.py check`'s page: what they show, and titles that say it."""

import html
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dataset.report import charts

if TYPE_CHECKING:
    import pandas as pd

MAX_CHARTS = 8  # of classes
ALL_PIXELS = "#7c8794"
MANY_TIMES = 20  # between grey levels of files, from which on powers of ten are shown


def draw_charts(info: "pd.DataFrame", names: Sequence[str], palette: Sequence[str]) -> str:
    """Draw the sizes, the grey levels, and how much of the images each class fills."""
    drawn = [_sizes(info), _slices(info), _grey_levels(info, palette[0])]
    for i, name in enumerate(names[:MAX_CHARTS]):
        drawn.append(_shares(info, name, palette[i % len(palette)]))
    return "".join(drawn)


def _sizes(info: "pd.DataFrame") -> str:
    sizes = Counter(info["size"])
    (common, count), *others = sizes.most_common()
    if not others:
        return charts.counts(f"All images have {common} pixels (height x width)", dict(sizes))
    if len(sizes) <= charts.MAX_ROWS:
        title = f"Sizes: {count} of {len(info)} images have {common} pixels (height x width)"
        return charts.counts(title, dict(sizes.most_common()))
    sides = np.array([max(map(int, size.split("x"))) for size in info["size"]], float)
    title = f"Longer side of the images: {sides.min():.0f} to {sides.max():.0f} pixels"
    log = sides.max() > 8 * sides.min()
    return charts.histogram(title, {"": (ALL_PIXELS, sides)}, log)


def _slices(info: "pd.DataFrame") -> str:
    slices = info["slices"].to_numpy(float)
    if slices.max() == 1:
        return ""
    if slices.min() == slices.max():
        return charts.counts("Slices of the volumes: all alike", {f"{slices[0]:.0f}": len(info)})
    title = f"Slices of the volumes: {slices.min():.0f} to {slices.max():.0f}"
    return charts.histogram(title, {"": (ALL_PIXELS, slices)})


def _grey_levels(info: "pd.DataFrame", colour: str) -> str:
    """Compare the grey levels of all pixels with those of the foreground."""
    pixels, objects = (_sample_levels(info[column]) for column in ("quantiles", "object"))
    # A few extreme pixels or files would press all others into one bar.
    ends = np.array([(levels[1], levels[-2]) for levels in info["quantiles"]], float)
    low, high = float(np.quantile(ends[:, 0], 0.05)), float(np.quantile(ends[:, 1], 0.95))
    usual = float(np.median(ends[:, 1]))
    title = "Grey levels as stored, of all pixels"
    if log := low >= 0 and high > MANY_TIMES * usual > 0:
        between = f"{charts.number(ends[:, 1].min())} and {charts.number(ends[:, 1].max())}"
        title, low = f"Grey levels differ by file: the brightest are between {between}", usual / 100
    elif len(objects):
        between = " to ".join(charts.number(one) for one in np.quantile(objects, (0.1, 0.9)))
        title = f"Grey levels as stored: the foreground is mostly {between}"
    series = {"all pixels": (ALL_PIXELS, pixels), "foreground": (colour, objects)}
    return charts.histogram(title, series, log, limits=(low, high))


def _sample_levels(quantiles: "pd.Series") -> np.ndarray:
    """Draw grey levels of every image from its quantiles."""
    places = np.linspace(0, 1, 200)
    sampled = [
        np.interp(places, np.linspace(0, 1, len(levels)), levels)
        for levels in quantiles
        if len(levels)
    ]
    return np.concatenate([np.zeros(0), *sampled])


def _shares(info: "pd.DataFrame", name: str, colour: str) -> str:
    """Show how much of the images a class fills, of those that have it."""
    shares = 100 * info[f"share: {name}"].to_numpy(float)
    present = shares[shares > 0]
    if not len(present):
        return f'<p class="problem">{html.escape(name)} is in no mask.</p>'
    title = (
        f"{name}: {np.median(present):.2g} % of the pixels (median), in {len(present)} of "
        f"{len(shares)} masks"
    )
    log = present.max() > 20 * present.min()
    return charts.histogram(title, {"": (colour, present)}, log, unit=" %")
