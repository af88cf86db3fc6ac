"""Draw pictures: the curves of a training, and panels that show a prediction."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from imaging import labels, preprocess
from imaging.grid import fit_grid, resize_slice
from imaging.pictures import write_picture
from imaging.scan import Scan
from utils import atomic

if TYPE_CHECKING:  # predictions do without them
    import pandas as pd
    from PIL.ImageFont import FreeTypeFont

Colour = tuple[int, int, int]  # red, green, blue

# One colour per class, as in web/app.js.
COLOURS = (
    (230, 60, 60),
    (60, 140, 240),
    (250, 190, 40),
    (70, 190, 90),
    (170, 90, 220),
    (60, 200, 200),
)
# Okabe and Ito's colours, which colour-blind people can distinguish.
MISSED = (86, 180, 233)
EXTRA = (230, 159, 0)
CONFUSED = (204, 121, 167)
IGNORED = (128, 128, 128)

TILE_SIDE = 480  # pixels of a picture's longer side in a panel
MIN_TILE_WIDTH = 200  # room for the caption
GAP = 12  # pixels between two pictures
TEXT_SIZE = 20
LINE = TEXT_SIZE + GAP


# ------------------------------------------------------------------------------------------ curves


def new_figure(width: float, height: float) -> Any:
    """Make an empty matplotlib figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def write_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def draw_curves(log: "pd.DataFrame", best: int, path: Path) -> None:
    """Draw loss, Dice and, if the log has it, learning rate over the epochs; write a PNG.

    log: a row per epoch, columns epoch, loss, dice and perhaps val_loss, val_dice, learning_rate.
    best: the epoch that is saved.
    """
    labels = {"loss": "loss", "dice": "Dice", "learning_rate": "learning rate"}
    names = [name for name in labels if name in log]
    figure = new_figure(5 * len(names), 3.8)
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        curves = {"training (augmented)": log[name]}
        if f"val_{name}" in log:
            curves["validation"] = log[f"val_{name}"]
        for label, values in curves.items():
            axes.plot(log.epoch, values, marker="." if len(log) < 20 else "", label=label)
        if "val_dice" in log:
            axes.axvline(best, color="grey", linestyle=":", label="saved")
        axes.set(xlabel="epoch", ylabel=labels[name])
        axes.grid(alpha=0.3)
        if name != "learning_rate":
            axes.set_ylim(interesting_range(list(curves.values())))
            axes.legend(frameon=False)
    figure.suptitle(curves_title(log, best))
    write_figure(figure, path)


def curves_title(log: "pd.DataFrame", best: int) -> str:
    """Name the epoch whose model is saved."""
    if "val_dice" not in log:
        return f"{len(log)} epochs, the last one is saved (no validation images)"
    dice = log.val_dice[best - 1]
    return f"epoch {best} of {len(log)} is saved, validation Dice {dice:.4f}"


def interesting_range(curves: Sequence["pd.Series"]) -> tuple[float, float]:
    """Choose the y-axis: the values after the first fifth of the epochs, and 10 % above and below.

    The first epochs change so much that the later ones would look like one flat line.
    """
    later = np.concatenate([values[len(values) // 5 :] for values in curves])
    low, high = float(np.nanmin(later)), float(np.nanmax(later))
    margin = 0.1 * (high - low) or 0.1
    return low - margin, high + margin


# ------------------------------------------------------------------------------------------ panels


def draw_panel(
    path: str | Path,
    scan: Scan,
    found: np.ndarray,
    names: Sequence[str],
    title: str,
    truth: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
    window: str = "",
    ignored: np.ndarray | None = None,
) -> None:
    """Draw an image and its mask side by side under a title, of a volume one slice; write a PNG.

    found, truth: ids or BITS (S, H, W). With the truth the panel also shows it, and the pixels in
    which both differ. ignored: (S, H, W), pixels that do not count, painted grey.
    uncertainty: (S, H, W) in [0, 1]. window: see `preprocess.prepare_scan`.
    The slice shown is the one with most foreground.
    """
    foreground = np.array([np.count_nonzero(one) for one in found])
    if truth is not None:
        foreground += [np.count_nonzero(one) for one in truth]
    number = int(np.argmax(foreground))
    size = tile_size(scan.pixels.shape[1:3])
    one_slice = scan.slice(number)
    picture = preprocess.to_picture(one_slice, size, window)[0]
    found_ids = resize_ids(found[number], size)

    count = len(scan.pixels)
    tiles = {"image" if count == 1 else f"image, slice {number + 1} of {count}": picture}
    legends = []
    if len(names) > 1:
        legends.append([(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)])
    if truth is not None:
        true_ids = resize_ids(truth[number], size)
        hidden = None
        if ignored is not None:
            grid = fit_grid((1, *ignored.shape[1:]), size)
            hidden = preprocess.prepare_plane(ignored[number, None], grid)[0] > 127
        tiles["ground truth"] = grey_out(draw_contours(picture, true_ids), hidden)
    tiles["prediction"] = draw_contours(picture, found_ids)
    if truth is not None:
        tiles["errors"] = grey_out(draw_errors(picture, true_ids, found_ids), hidden)
        kinds = [("missed", MISSED), ("too much", EXTRA), ("wrong class", CONFUSED)]
        legends.append(kinds if len(names) > 1 else kinds[:2])
    if uncertainty is not None:
        shown = resize_slice(uncertainty, number, size, np.asarray)
        tiles[f"uncertainty, 0 to {shown.max():.2f}"] = colour_map(shown)
    # Drawn again by the same command, so a power cut may take it.
    write_picture(path, compose_panel(tiles, title, legends), is_lasting=False)


def tile_size(shape: tuple[int, int]) -> tuple[int, int]:
    """Scale (H, W) so that the longer side has TILE_SIDE pixels."""
    scale = TILE_SIDE / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def resize_ids(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize class ids (H, W) to `size` with smooth outlines."""
    grid = fit_grid((1, *ids.shape), size)
    shares = preprocess.prepare_mask(ids[None], grid, labels.highest_class(ids))
    return preprocess.shares_to_ids(shares[0], ids.dtype)


def draw_contours(picture: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return RGB `picture` (H, W, 3) with each class of `ids` (H, W) outlined in its colour."""
    drawn = np.ascontiguousarray(picture).copy()
    thickness = max(1, round(max(ids.shape) / 160))
    for class_id in range(1, labels.highest_class(ids) + 1):
        mask = labels.plane(ids, class_id).astype(np.uint8)
        outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        colour = COLOURS[(class_id - 1) % len(COLOURS)]
        cv2.drawContours(drawn, outlines, -1, colour, thickness)
    return drawn


def draw_errors(picture: np.ndarray, truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return RGB `picture` (H, W, 3) with the pixels painted in which two masks (H, W) differ."""
    drawn = picture.copy()
    drawn[(truth > 0) & (found == 0)] = MISSED
    drawn[(truth == 0) & (found > 0)] = EXTRA
    drawn[(truth > 0) & (found > 0) & (truth != found)] = CONFUSED
    return drawn


def grey_out(picture: np.ndarray, ignored: np.ndarray | None) -> np.ndarray:
    """Return RGB `picture` (H, W, 3) with the pixels painted grey that do not count."""
    if ignored is None or not ignored.any():
        return picture
    return np.where(ignored[..., None], np.uint8(IGNORED), picture)


def colour_map(values: np.ndarray) -> np.ndarray:
    """Turn values (H, W) into RGB colours (H, W, 3), from black for 0 to yellow for the largest."""
    scaled = np.uint8(255 * values / max(float(values.max()), 1e-6))
    return cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO)[..., ::-1]


def compose_panel(
    tiles: dict[str, np.ndarray], title: str, legends: Sequence[Sequence[tuple[str, Colour]]]
) -> np.ndarray:
    """Lay out pictures (H, W, 3) of one size with their captions: RGB (H', W', 3).

    The title stands above them. Below them each legend, a list of names and colours, has a line.
    """
    from PIL import Image, ImageDraw

    height, width = next(iter(tiles.values())).shape[:2]
    column = max(width, MIN_TILE_WIDTH)
    full_width = len(tiles) * (column + GAP) + GAP
    font = text_font()
    labels = place_legends(legends, full_width, font)
    legend_height = LINE + labels[-1][1] if labels else 0
    canvas = Image.new("RGB", (full_width, 2 * LINE + height + GAP + legend_height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP // 2), shorten(title, full_width - 2 * GAP, font), "black", font)
    x = GAP
    for caption, tile in tiles.items():
        draw.text((x, LINE + GAP // 2), shorten(caption, column, font), "dimgrey", font)
        canvas.paste(Image.fromarray(tile), (x + (column - width) // 2, 2 * LINE))
        x += column + GAP
    for x, y, name, colour in labels:
        y += 2 * LINE + height + GAP
        draw.rectangle((x, y + 3, x + TEXT_SIZE, y + 3 + TEXT_SIZE), colour)
        draw.text((x + TEXT_SIZE + GAP // 2, y), name, "black", font)
    return np.asarray(canvas)


def place_legends(
    legends: Sequence[Sequence[tuple[str, Colour]]], width: int, font: "FreeTypeFont"
) -> list[tuple[int, int, str, Colour]]:
    """Give each label its place: x, y, name, colour. A legend that is too long goes on below."""
    labels, y = [], 0
    for legend in legends:
        x = GAP
        for name, colour in legend:
            name = shorten(name, width - TEXT_SIZE - 3 * GAP, font)
            needed = TEXT_SIZE + GAP // 2 + round(font.getlength(name))
            if x > GAP and x + needed > width:
                x, y = GAP, y + LINE
            labels.append((x, y, name, colour))
            x += needed + 2 * GAP
        y += LINE
    return labels


@cache
def text_font() -> "FreeTypeFont":
    """Load the font that comes with matplotlib: it knows Latin, Greek and Cyrillic letters."""
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", TEXT_SIZE)


def printable(text: str) -> str:
    """Replace what no font can draw: line breaks, and bytes of a file name that are not UTF-8."""
    text = text.encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shorten(text: str, width: int, font: "FreeTypeFont") -> str:
    """Cut the text to `width` pixels; an ellipsis shows where."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
