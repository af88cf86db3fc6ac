"""Small charts of `data.py check`'s page, as SVG and HTML: histograms, and bars of counts."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 360, 150  # of a histogram's bars, in pixels
BOTTOM = 22  # room for the numbers below them
MIN_BINS, MAX_BINS = 8, 48
TICKS = 5
MAX_ROWS = 8  # of bars of counts


def histogram(
    title: str,
    series: Mapping[str, tuple[str, np.ndarray]],
    log: bool = False,
    limits: tuple[float, float] | None = None,
    unit: str = "",
) -> str:
    """Draw how often values occur, as a <figure>; "" without values.

    series: by label, a CSS colour and the values. Each is scaled to its own bars, so that their
    shapes can be compared. A bar far above the others is cut. log: the axis shows powers of ten;
    values are above 0. limits: of the axis; values beyond count in the last bar.
    """
    filled = {label: one for label, one in series.items() if len(one[1])}
    if not filled:
        return ""
    low, high = limits or _limits([values for _, values in filled.values()])
    low, high = _widened(low, high, log)
    bins = _bins(max(len(values) for _, values in filled.values()))
    edges = np.geomspace(low, high, bins + 1) if log else np.linspace(low, high, bins + 1)
    drawn = []
    for colour, values in filled.values():
        drawn.append(_bars(np.histogram(np.clip(values, low, high), edges)[0], colour))
    drawn += [_tick(value, low, high, log, unit) for value in _ticks(low, high, log)]
    label = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{label}</figcaption>{_legend(filled)}'
        f'<svg viewBox="-8 -4 {WIDTH + 16} {HEIGHT + BOTTOM + 4}" role="img" aria-label="{label}">'
        f'{"".join(drawn)}<path class="axis" d="M0 {HEIGHT}H{WIDTH}"/></svg></figure>'
    )


def counts(title: str, number_of: Mapping[str, int]) -> str:
    """Draw how often each of a few names occurs, as a <figure> with a table of bars."""
    most = max(number_of.values())
    rows = ""
    for name, count in list(number_of.items())[:MAX_ROWS]:
        bar = f'<span class="bar" style="width:{100 * count / most:.0f}%"></span>'
        rows += f"<tr><th scope=row>{html.escape(name)}<td>{bar}<td>{count}"
    if len(number_of) > MAX_ROWS:
        rows += f"<tr><th scope=row>… {len(number_of) - MAX_ROWS} more"
    caption = html.escape(title)
    return f'<figure class="chart"><figcaption>{caption}</figcaption><table>{rows}</table></figure>'


def number(value: float) -> str:
    """Write a number with three digits that count: 0.0123, 45.6, 138,000."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def _limits(values: Sequence[np.ndarray]) -> tuple[float, float]:
    joined = np.concatenate(values)
    return float(joined.min()), float(joined.max())


def _widened(low: float, high: float, log: bool) -> tuple[float, float]:
    """Make room where all values are the same."""
    if high > low:
        return low, high
    return (low / 2, high * 2) if log else (low - 1, high + 1)


def _bins(count: int) -> int:
    """Choose how many bars so many values are shown in."""
    return int(np.clip(2 * math.sqrt(count), MIN_BINS, MAX_BINS))


def _bars(heights: np.ndarray, colour: str) -> str:
    """Draw bars as one outline; a mark crosses those that are cut."""
    top = heights.max()
    if len(heights) == MAX_BINS and top > 3 * np.sort(heights)[-3] > 0:
        # The black around a body would press all else flat.
        top = 1.5 * np.sort(heights)[-3]
    step = WIDTH / len(heights)
    path, marks = f"M0 {HEIGHT}", ""
    for i, height in enumerate(heights / max(1, top)):
        path += f"V{HEIGHT * (1 - min(1, height)):.1f}H{(i + 1) * step:.1f}"
        if height > 1:
            marks += f"M{i * step - 3:.1f} 16l{step + 6:.1f} -6"
    bars = f'<path d="{path}V{HEIGHT}Z" fill="{colour}" fill-opacity=".5" stroke="{colour}"/>'
    return bars + (f'<path class="cut" d="{marks}"/>' if marks else "")


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Choose round numbers between two numbers."""
    if log:
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        ticks = [10.0**power for power in decades]
        return ticks if len(ticks) > 1 else [low, math.sqrt(low * high), high]
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick(value: float, low: float, high: float, log: bool, unit: str) -> str:
    """Draw a number below the bars, and a line."""
    share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
    x = WIDTH * share
    anchor = "start" if share < 0.05 else "end" if share > 0.95 else "middle"
    return (
        f'<path class="axis" d="M{x:.1f} {HEIGHT}v4"/>'
        f'<text x="{x:.1f}" y="{HEIGHT + BOTTOM - 4}" text-anchor="{anchor}">'
        f"{number(value)}{unit}</text>"
    )


def _legend(series: Mapping[str, tuple[str, np.ndarray]]) -> str:
    """Name the series' colours where there are several."""
    if len(series) < 2:
        return ""
    chips = " ".join(chip(label, colour) for label, (colour, _) in series.items())
    return f'<p class="legend">{chips}</p>'


def chip(label: str, colour: str) -> str:
    """Name what a colour means."""
    return f'<span class="chip" style="background:{colour}"></span>{html.escape(label)}'
