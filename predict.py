"""Use a trained model: score the test images and draw panels, or segment any file or folder.

    python predict.py                                  the run's test images: results/<stem>.png, results/metrics.csv
    python predict.py --data-dir DIR                   every pair of another data set, likewise
    python predict.py --input PATH --output DIR        masks DIR/<stem>.png, panels DIR/panels/<stem>.png

Masks have the image's own size: 0/255 for one class, class ids for several. A bad file is reported and the others are
done; the exit code is then 2.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

import data
import images
import metrics
import utils
from images import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """What to predict, with what, and where to."""

    model: str = "files/model.h5"  # written by train.py
    input: str = ""  # a file or folder to segment; "" scores images that have masks
    output: str = ""  # where to write; "" is results, with --input results/masks
    data_dir: str = ""  # a data set to score whole; "" is the run's own split
    subset: str = "test"  # which part of the split: train, val or test
    batch_size: int = 8  # images at once


def segment(model: keras.Model, facts: dict[str, Any], pictures: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Segment decoded images (H, W, C) of any sizes: for each, probabilities (H, W, K) float32 at its own size."""
    if not pictures:
        return
    prepared = [images.prepare(picture, tuple(facts["image_size"]), facts["channels"]) for picture in pictures]
    probs = np.asarray(model.predict_on_batch(np.stack(prepared).astype(np.float32) / 255))
    for prob, picture in zip(probs, pictures, strict=True):  # one by one: at their own size they may be large
        yield images.restore(prob, picture.shape[:2])


def read_each(items: Sequence[T], read: Callable[[T], Any], count: int) -> Iterator[list[tuple[T, Any]]]:
    """Read items in parallel, `count` at a time: chunks of (item, what was read, or the UserError that it raised)."""

    def attempt(item: T) -> Any:
        try:
            return read(item)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool, tqdm(total=len(items), desc="predicting", unit="image", disable=None) as bar:
        for start in range(0, len(items), count):
            chunk = items[start : start + count]
            yield list(zip(chunk, pool.map(attempt, chunk), strict=True))
            bar.update(len(chunk))


def split_errors(chunk: list[tuple[T, Any]], problems: list[str]) -> list[tuple[T, Any]]:
    """Keep what was read; append the errors to `problems`."""
    problems += [line for _, what in chunk if isinstance(what, UserError) for line in str(what).splitlines()]
    return [(item, what) for item, what in chunk if not isinstance(what, UserError)]


def score_pairs(
    model: keras.Model,
    facts: dict[str, Any],
    pairs: Sequence[data.Pair],
    panel_dir: str | Path | None = None,
    batch_size: int = 8,
) -> tuple[pd.DataFrame, list[str]]:
    """Segment each pair's image and compare with its mask at the image's own size.

    Returns a table (image and the columns of `metrics.score_classes`) and the problems, a line per unreadable pair;
    draws panels into `panel_dir` unless it is None.
    """
    rows, problems = [], []
    for chunk in read_each(pairs, lambda pair: data.read_pair(pair, facts["classes"]), batch_size):
        good = split_errors(chunk, problems)
        probs = segment(model, facts, [image for _, (image, _) in good])
        for (pair, (image, truth)), prob in zip(good, probs, strict=True):
            found = images.to_ids(prob, facts["threshold"])
            row = metrics.score_classes(truth, found, facts["classes"])
            rows.append({"image": pair.image.as_posix(), **row})
            if panel_dir is not None:
                title = f"prediction, Dice {row['dice']:.3f}"
                draw_panel(Path(panel_dir) / f"{pair.stem}.png", image, {"ground truth": truth, title: found})
    return pd.DataFrame(rows, columns=None if rows else ["image"]), problems


def draw_panel(path: Path, image: np.ndarray, masks: dict[str, np.ndarray]) -> None:
    """Draw a decoded image and beside it, for each title, that mask's outline over it; write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only pictures need it
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    shrink = min(1, 640 / max(height, width))
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    picture = images.prepare(image, size, 3)
    parts = {"input": picture}
    for title, ids in masks.items():
        small = images.prepare_mask(ids, size, int(ids.max()))
        parts[title] = images.draw_contours(picture, small)
    tall = min(12, max(1, 4 * size[0] / size[1]))  # inches
    figure = Figure(figsize=(4 * len(parts), tall + 0.4), layout="constrained", dpi=100)
    for axes, (title, part) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        axes.imshow(part)
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    with images.atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def segment_files(
    model: keras.Model, facts: dict[str, Any], source: str | Path, output: str | Path, batch_size: int = 8
) -> list[str]:
    """Segment one file or a folder's images into `output`; return the problems, a line per file that was left out.

    Raises UserError if the masks would take the images' place.
    """
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if Path(output).resolve() == folder.resolve():
        raise UserError(f"{output} holds the images; name another folder with --output, or masks would replace them")
    paths, problems = list_inputs(Path(source))
    scale = 255 if len(facts["classes"]) == 1 else 1
    for chunk in read_each(paths, lambda path: data.read_named(path, images.read), batch_size):
        good = split_errors(chunk, problems)
        probs = segment(model, facts, [image for _, image in good])
        for (path, image), prob in zip(good, probs, strict=True):
            ids = images.to_ids(prob, facts["threshold"])
            images.write(Path(output) / f"{path.stem}.png", scale * ids)
            draw_panel(Path(output) / "panels" / f"{path.stem}.png", image, {"prediction": ids})
    return problems


def list_inputs(source: Path) -> tuple[list[Path], list[str]]:
    """List the images of a file or folder, one per stem, and the problems. Raises UserError if there are none."""
    if source.is_file():
        return [source], []
    if not source.is_dir():
        raise UserError(f"{source} does not exist; --input takes an image file or a folder of them")
    problems: list[str] = []
    paths = list(data.by_stem(source, "", problems).values())
    if not paths:
        raise UserError(f"{source} has no image; expected files ending in {' '.join(images.SUFFIXES)}")
    return paths, problems


def pairs_to_score(config: Config) -> tuple[list[data.Pair], list[str]]:
    """Choose the pairs: a whole data set, or a subset of the run that made the model; and the problems found."""
    if config.data_dir:
        return data.find_pairs(config.data_dir)
    if config.subset not in data.SUBSETS:
        raise UserError(f"subset is {config.subset!r}; expected one of {', '.join(data.SUBSETS)}")
    path = Path(config.model).parent / "split.csv"
    if not path.is_file():
        raise UserError(f"no {path} beside the model; name images with --input, or a data set with --data-dir")
    pairs, subsets = data.read_split(path)
    return [pair for pair, subset in zip(pairs, subsets, strict=True) if subset == config.subset], []


def format_summary(summary: pd.DataFrame) -> str:
    """Lay out the table of `metrics.summarise` for the terminal."""
    lines = [f"{'':24} {'mean':>8}   95 % interval"]
    for name, row in summary.iterrows():
        digits = 4 if row["mean"] <= 1 and "hd95" not in name and "assd" not in name else 2
        lines.append(f"{name:24} {row['mean']:8.{digits}f}   {row['low']:.{digits}f} to {row['high']:.{digits}f}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Score or segment, and say what was written. Raises UserError at the end if files were left out."""
    if config.batch_size < 1:
        raise UserError(f"batch_size is {config.batch_size}; expected at least 1")
    model, facts = utils.load_model(config.model)
    if config.input:
        output = Path(config.output or "results/masks")
        problems = segment_files(model, facts, config.input, output, config.batch_size)
        print(f"masks in {output}, panels in {output / 'panels'}")
    else:
        output = Path(config.output or "results")
        pairs, problems = pairs_to_score(config)
        table, unreadable = score_pairs(model, facts, pairs, output, config.batch_size)
        problems += unreadable
        if len(table):
            with images.atomic(output / "metrics.csv") as temporary:
                table.to_csv(temporary, index=False)
            print(format_summary(metrics.summarise(table)))
            print(f"{len(table)} images; panels in {output}, a row per image in {output / 'metrics.csv'}")
    if problems:
        raise UserError(f"{len(problems)} file(s) left out:\n" + "\n".join(f"  {problem}" for problem in problems))


if __name__ == "__main__":
    utils.run(main, Config)
