"""Use a trained model: score the test images and draw panels, or segment any file or folder.

    python predict.py                                  the run's test images: results/<stem>.png, results/metrics.csv
    python predict.py --data-dir DIR                   every pair of another data set, likewise
    python predict.py --model "files/run/fold*/model.h5" …             several models, averaged
    python predict.py --input PATH --output DIR        masks DIR/<stem>.png, panels DIR/panels/<stem>.png

Masks have the image's own size and kind: PNG or TIFF (0/255 for one class), NIfTI, DICOM SEG, with the
training masks' values. A bad file is reported and the others are done; the exit code is then 2.
"""

import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import cli


@dataclass(frozen=True)
class Config:
    """What to predict, with what, and where to."""

    model: str = ""  # model file, or several with commas or as files/robust/fold*/model.h5; "" is files/model.h5
    input: str = ""  # a file or folder to segment; "" scores images that have masks
    output: str = ""  # where to write; "" is results, with --input results/masks
    data_dir: str = ""  # a data set to score whole; "" is the run's own split
    subset: str = "test"  # which part of the split: train, val or test
    tile: bool = False  # keep the images' own resolution, window by window (for a model trained at that resolution)
    clean: bool = True  # drop small parts and fill holes, where the model file says that it helps
    uncertainty: bool = False  # also tell where several models, or mirroring, disagree
    engine: str = "auto"  # of an exported model (.onnx): onnxruntime, openvino; auto is openvino for bfloat16
    precision: str = "auto"  # of it: float32, bfloat16, int8; auto is bfloat16 where OpenVINO, model and CPU allow
    panels: bool = True  # also draw what was found; a panel takes longer than the rest together
    batch_size: int = 8  # images at once


if __name__ == "__main__":  # --help and wrong flags are answered before what takes seconds to import
    CONFIG = cli.parse(Config)

import numpy as np
from tqdm import tqdm

import draw
import engines
import images
import pairing
from augment import mirrored_ids
from images import Scan, UserError

# Keras, pandas and SciPy take seconds to import: an exported network segments files without them.
if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class Network(Protocol):
    """What computes probabilities: a Keras model or an `engines.Engine`."""

    def predict_on_batch(self, prepared: np.ndarray) -> np.ndarray:
        """Turn images (N, h, w, C) float32 in [0, 1] into probabilities (N, h, w, K)."""


Member = tuple[Network, dict[str, Any]]  # a network and its facts
IN_THE_BOX = "files/lungs/unet.onnx"  # made of files/lungs.h5


class Segmentation(NamedTuple):
    """What is found in one image."""

    probs: np.ndarray  # (H, W, K) float32, at the image's own size
    uncertainty: np.ndarray | None  # (H, W) float32, standard deviation over the votes, if asked for
    disagreement: float  # mean over the votes of 1 - Dice(vote, decision), if asked for, else NaN


def model_paths(config: Config) -> list[str]:
    """List the model files that `config` names, those of patterns in order."""
    names = config.model or "files/model.h5"
    box = "files/lungs.h5" if config.uncertainty else IN_THE_BOX
    if not config.model and config.input and not Path(names).exists() and Path(box).exists():
        print(f"no {names} of your own yet: taking {box}, which knows lungs in chest X-rays (README)")
        return [box]
    if Path(names).exists():  # whatever signs it has in it
        return [names]
    return [path for name in names.split(",") for path in sorted(glob.glob(name)) or [name]]  # noqa: PTH207


def load_member(path: str, config: Config) -> Member:
    """Load a model file, with Keras, or what `export.py` made of one, without. Raises UserError."""
    if path.endswith(".onnx"):
        opened, facts, _ = engines.load(Path(path), config.engine, config.precision)
        print(f"{path}: {opened.engine}, {opened.precision}")
        if config.uncertainty and facts.get("mirror"):
            raise UserError(f"{path} averages with the mirrored image itself; --uncertainty needs its .h5 file")
        return opened, facts | {"mirror": False}  # which is in the network already
    if config.engine != "auto" or config.precision not in ("auto", "float32"):
        raise UserError(
            f"{path} runs in Keras and float32; `python export.py --model {path}` makes it ready for engines"
        )
    import utils

    model, facts = utils.load_model(path)
    print(f"{path}: Keras, float32")
    return model, facts


def load_members(config: Config) -> list[Member]:
    """Load the model, or the ensemble's members. Raises UserError if there is none or they do not go together.

    Masks are cleaned where all members want the same cleaning, unless `config` will not have it.
    """
    paths = model_paths(config)
    if len({path.endswith(".onnx") for path in paths}) > 1:
        raise UserError("an ensemble needs models of one kind; name .h5 files or .onnx files")
    members = [load_member(path, config) for path in paths]
    for name in ("classes", "channels", "image_size", "window", "neighbours"):
        values = {json.dumps(facts.get(name) or None) for _, facts in members}  # older files lack some
        if len(values) > 1:
            raise UserError(f"the models' {name} are {' and '.join(sorted(values))}; an ensemble needs the same")
    if config.uncertainty and len(members) == 1 and mirrored_ids(members[0][1]["classes"]) is None:
        raise UserError("--uncertainty needs several models, because a class with one side cannot be mirrored")
    wanted = [facts.get("clean") for _, facts in members]
    agreed = wanted[0] if config.clean and all(parts == wanted[0] for parts in wanted) else None
    return [(model, facts | {"clean": agreed}) for model, facts in members]


def infer(model: Network, prepared: np.ndarray) -> np.ndarray:
    """Run the network: prepared images (N, H, W, C) uint8 → probabilities (N, H, W, K) float32."""
    return np.asarray(model.predict_on_batch(prepared.astype(np.float32) / 255), np.float32)


def tiled_size(shape: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Give the smallest size (H, W) that holds `shape` and that windows overlapping by half cover exactly."""
    return tuple(
        side + max(0, -(-(whole - side) // (side // 2))) * (side // 2)
        for whole, side in zip(shape, window, strict=True)
    )


def infer_tiled(model: Network, prepared: np.ndarray, window: tuple[int, int], batch_size: int = 8) -> np.ndarray:
    """Do as `infer` for images of a `tiled_size`: windows (h, w) that overlap by half, their middles counting most.

    A Gaussian of an eighth of the window weighs them (nnU-Net, Isensee et al. 2021).
    """
    bell = [np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 8)) ** 2) for side in window]
    weight = np.maximum(np.outer(*bell), 1e-4).astype(np.float32)[..., None]  # (h, w, 1); corners must count a little
    sizes = zip(prepared.shape[1:3], window, strict=True)
    starts = list(itertools.product(*(range(0, whole - side + 1, side // 2) for whole, side in sizes)))
    places = [(n, np.s_[y : y + window[0], x : x + window[1]]) for n in range(len(prepared)) for y, x in starts]
    total, seen = None, np.zeros((*prepared.shape[:3], 1), np.float32)
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        probs = infer(model, np.stack([prepared[n][place] for n, place in some]))
        total = np.zeros((*prepared.shape[:3], probs.shape[-1]), np.float32) if total is None else total
        for (n, place), prob in zip(some, probs, strict=True):
            total[n][place] += weight * prob
            seen[n][place] += weight
    return total / seen


def collect_votes(members: Sequence[Member], prepared: np.ndarray, config: Config) -> tuple[np.ndarray, int]:
    """Ask every model, and again in the mirror where its file says so: votes (V, N, H, W, K), how many of them count.

    For the uncertainty of a single model the mirror is asked in any case; its vote then does not count.
    """
    votes, extra = [], []
    for model, facts in members:
        window = tuple(facts["image_size"])
        run = partial(infer_tiled, window=window, batch_size=config.batch_size) if config.tile else infer
        votes.append(run(model, prepared))
        swapped = mirrored_ids(facts["classes"])
        if facts.get("mirror") or (config.uncertainty and len(members) == 1):
            mirrored = run(model, np.ascontiguousarray(prepared[:, :, ::-1]))[:, :, ::-1]
            mirrored = mirrored if len(swapped) == 2 else mirrored[..., swapped]
            (votes if facts.get("mirror") else extra).append(mirrored)
    return np.stack(votes + extra), len(votes)


def disagreement(votes: np.ndarray, decided: np.ndarray, threshold: float) -> float:
    """Average 1 - Dice between the foreground of each vote (V, H, W, K) and the decided class ids (H, W)."""
    found = [images.to_ids(vote, threshold) for vote in votes]
    sums = [int((ids > 0).sum() + (decided > 0).sum()) for ids in found]
    hits = [int(((ids == decided) & (ids > 0)).sum()) for ids in found]
    return float(np.mean([1 - 2 * hit / total if total else 0.0 for hit, total in zip(hits, sums, strict=True)]))


def prepare(scan: Scan, size: tuple[int, int], facts: dict[str, Any]) -> np.ndarray:
    """Make the network's inputs of a scan's slices, with their neighbours where the model wants them: (S, h, w, C)."""
    prepared = images.prepare_scan(scan, size, facts["channels"], facts.get("window", ""))
    count, last = facts.get("neighbours", 0), len(prepared) - 1
    near = [prepared[np.clip(np.arange(last + 1) + step, 0, last)] for step in range(-count, count + 1)]
    return np.concatenate(near, axis=-1)


def segment(members: Sequence[Member], scans: Sequence[Scan], config: Config = Config()) -> Iterator[Segmentation]:
    """Segment decoded scans of any sizes, slice after slice, each at its own size."""
    facts = members[0][1]
    if config.tile:
        for scan in scans:
            for prepared in prepare(scan, scan.pixels.shape[1:3], facts):
                yield segment_tiled(members, prepared, config)
        return
    size = tuple(facts["image_size"])
    shapes = [scan.pixels.shape[1:3] for scan in scans for _ in scan.pixels]
    prepared = np.concatenate([prepare(scan, size, facts) for scan in scans] or [np.zeros(0)])
    for start in range(0, len(prepared), config.batch_size):
        votes, counted = collect_votes(members, prepared[start : start + config.batch_size], config)
        for i, shape in enumerate(shapes[start : start + config.batch_size]):  # one by one: they may be large
            probs, spread, apart = weigh(votes[:, i], counted, config, facts)
            spread = None if spread is None else images.restore(spread[..., None], shape)[..., 0]
            yield Segmentation(images.restore(probs, shape), spread, apart)


def segment_tiled(members: Sequence[Member], prepared: np.ndarray, config: Config) -> Segmentation:
    """Segment a prepared slice (H, W, C) at its own resolution, padded with zeros so that windows cover it."""
    facts, (height, width) = members[0][1], prepared.shape[:2]
    canvas = tiled_size((height, width), tuple(facts["image_size"]))
    padded = np.pad(prepared, ((0, canvas[0] - height), (0, canvas[1] - width), (0, 0)))
    votes, counted = collect_votes(members, padded[None], config)
    return Segmentation(*weigh(votes[:, 0, :height, :width], counted, config, facts))


def weigh(votes: np.ndarray, counted: int, config: Config, facts: dict[str, Any]) -> Segmentation:
    """Average the first `counted` votes (V, H, W, K) of an image; where asked for, tell how far all votes are apart."""
    probs = votes[:counted].mean(0)
    if not config.uncertainty:
        return Segmentation(probs, None, float("nan"))
    apart = disagreement(votes, images.to_ids(probs, facts["threshold"]), facts["threshold"])
    return Segmentation(probs, votes.std(0).max(-1), apart)


class Found(NamedTuple):
    """What is found in one scan."""

    ids: np.ndarray  # (S, H, W) class ids
    uncertainty: np.ndarray | None  # (S, H, W), if asked for
    disagreement: float  # mean over the slices


def collect(results: Iterator[Segmentation], count: int, facts: dict[str, Any]) -> Found:
    """Take the next `count` slices of `segment`, decided and put together."""
    ids, spreads, apart = [], [], []
    for result in itertools.islice(results, count):
        ids.append(images.decide(result.probs, facts))
        spreads.append(result.uncertainty)
        apart.append(result.disagreement)
    return Found(np.stack(ids), None if spreads[0] is None else np.stack(spreads), float(np.mean(apart)))


def read_each(
    items: Sequence[T], path_of: Callable[[T], Path], read: Callable[[T], Any], count: int
) -> Iterator[list[tuple[T, Any]]]:
    """Read items in parallel, at most `count` at a time: chunks of (item, what was read, or its UserError).

    While a chunk is in use the next one is read, unless that is a large file.
    """

    def attempt(item: T) -> Any:
        try:
            return read(item)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool, tqdm(total=len(items), desc="predicting", unit="image", disable=None) as bar:
        paths = [path_of(item) for item in items]
        ahead: Iterator[Any] = iter(())
        for part, after in itertools.pairwise([*pairing.chunks(paths, count), slice(0, 0)]):
            done = list(ahead) or list(pool.map(attempt, items[part]))
            ahead = iter(()) if any(map(pairing.is_large, paths[after])) else pool.map(attempt, items[after])
            yield list(zip(items[part], done, strict=True))
            bar.update(len(items[part]))


def split_errors(chunk: list[tuple[T, Any]], problems: list[str]) -> list[tuple[T, Any]]:
    """Keep what was read; append the errors to `problems`."""
    problems += [line for _, what in chunk if isinstance(what, UserError) for line in str(what).splitlines()]
    return [(item, what) for item, what in chunk if not isinstance(what, UserError)]


def score_pairs(
    members: Sequence[Member],
    pairs: Sequence[pairing.Pair],
    config: Config = Config(),
    panel_dir: str | Path | None = None,
) -> tuple["pd.DataFrame", list[str]]:
    """Segment each pair's image and compare with its mask at the image's own size.

    Returns a table (image, the columns of `metrics.score_classes`, the distances' unit) and the problems, a line
    per unreadable pair; draws panels into `panel_dir` unless it is None.
    """
    import pandas as pd

    import metrics

    rows, problems, facts = [], [], members[0][1]
    names, levels, window = facts["classes"], facts.get("mask_values", ()), facts.get("window", "")
    for chunk in read_each(
        pairs, lambda pair: pair.image, lambda pair: pairing.read_pair(pair, names, levels, window), config.batch_size
    ):
        good = split_errors(chunk, problems)
        results = segment(members, [scan for _, (scan, _) in good], config)
        for (pair, (scan, truth)), found in ((one, collect(results, len(one[1][1]), facts)) for one in good):
            row = metrics.score_classes(truth, found.ids, names, scan.spacing_mm)
            row |= {"unit": "mm" if scan.spacing_mm else "pixels"}
            row |= {"disagreement": found.disagreement} if config.uncertainty else {}
            rows.append({"image": pair.image.as_posix(), **row})
            if panel_dir is not None:
                parts = {"ground truth": truth, f"prediction, Dice {row['dice']:.3f}": found.ids}
                draw.draw_panel(Path(panel_dir) / f"{pair.stem}.png", scan, parts, names, found.uncertainty, window)
    return pd.DataFrame(rows, columns=None if rows else ["image"]), problems


def segment_files(
    members: Sequence[Member],
    source: str | Path,
    output: str | Path,
    config: Config = Config(),
) -> tuple[int, list[str]]:
    """Segment one file or a folder's images into `output`: how many, and the problems, a line per file left out.

    Raises UserError if masks or panels would take the images' place.
    """
    paths, problems = list_inputs(Path(source))
    check_output([Path(output), *([Path(output) / "panels"] if config.panels else [])], paths)
    facts = members[0][1]
    names, window, levels = facts["classes"], facts.get("window", ""), facts.get("mask_values", ())
    count = 0
    for chunk in read_each(paths, lambda path: path, lambda path: pairing.read_input(path, window), config.batch_size):
        good = split_errors(chunk, problems)
        results = segment(members, [scan for _, scan in good], config)
        count += len(good)
        for path, scan in good:
            found = collect(results, len(scan.pixels), facts)
            place, stem = Path(output), images.stem(path)
            try:
                images.write_mask(place / stem, found.ids, names, path, levels)
            except UserError as error:
                problems.append(f"{path}: {error}")
            if config.panels:
                parts = {"prediction": found.ids}
                draw.draw_panel(place / "panels" / f"{stem}.png", scan, parts, names, found.uncertainty, window)
    return count, problems


def check_output(folders: Sequence[Path], sources: Iterable[Path]) -> None:
    """Raise UserError if one of the folders that are written to holds one of the sources."""
    taken = {folder.resolve() for folder in {source.parent for source in sources}}
    for folder in folders:
        if folder.resolve() in taken:
            raise UserError(f"{folder} holds the images; name another folder with --output, or they would be replaced")


def list_inputs(source: Path) -> tuple[list[Path], list[str]]:
    """List the images of a file or folder, one per stem, and the problems. Raises UserError if there are none."""
    if not source.exists():
        raise UserError(f"{source} does not exist; --input takes an image file or a folder of them")
    if source.is_file() or pairing.read_named(source, images.is_one_volume):
        return [source], []
    problems: list[str] = []
    paths = list(pairing.by_stem(source, "", problems).values())
    if not paths:
        below = next((f", but {path.parent} has" for path in sorted(source.rglob("*")) if images.is_image(path)), "")
        raise UserError(f"{source} has no image{below}; expected files ending in {' '.join(images.SUFFIXES)}")
    return paths, problems


def pairs_to_score(config: Config) -> tuple[list[pairing.Pair], list[str]]:
    """Choose the pairs: a whole data set, or a subset of the run that made the model; and the problems found."""
    if config.data_dir:
        return pairing.find_pairs(config.data_dir)
    if config.subset not in pairing.SUBSETS:
        raise UserError(f"subset is {config.subset!r}; expected one of {', '.join(pairing.SUBSETS)}")
    chosen: dict[Path, pairing.Pair] = {}
    for number, path in enumerate(Path(name).parent / "split.csv" for name in model_paths(config)):
        if not path.is_file():
            raise UserError(f"no {path} beside the model; name images with --input, or a data set with --data-dir")
        there = {
            pair.image: pair for pair, subset in zip(*pairing.read_split(path), strict=True) if subset == config.subset
        }
        chosen = {image: pair for image, pair in (chosen if number else there).items() if image in there}
    if not chosen:
        raise UserError(
            f"no image is {config.subset} in the split.csv of every model; name another --subset, or images with "
            "--data-dir or --input"
        )
    return list(chosen.values()), []


def format_summary(table: "pd.DataFrame") -> str:
    """Lay out the means of a table of `score_pairs` for the terminal."""
    import metrics

    summary, units = metrics.summarise(table), " and ".join(sorted(set(table.unit)))
    lines = [f"{'':24} {'mean':>8}   95 % interval (hd95, assd in {units})"]
    for name, row in summary.iterrows():
        digits = 4 if row["mean"] <= 1 and "hd95" not in name and "assd" not in name else 2
        lines.append(f"{name:24} {row['mean']:8.{digits}f}   {row['low']:.{digits}f} to {row['high']:.{digits}f}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Score or segment, and say what was written. Raises UserError at the end if files were left out."""
    if config.batch_size < 1:
        raise UserError(f"batch_size is {config.batch_size}; expected at least 1")
    if config.input and config.data_dir:
        raise UserError("--input segments images, --data-dir scores those that have masks; expected one of them")
    members = load_members(config)
    if config.input:
        output = Path(config.output or "results/masks")
        count, problems = segment_files(members, config.input, output, config)
        if count:
            print(f"{count} masks in {output}" + (f", panels in {output / 'panels'}" if config.panels else ""))
    else:
        output = Path(config.output or "results")
        pairs, problems = pairs_to_score(config)
        check_output([output], (path for pair in pairs for path in (pair.image, *pair.masks)))
        table, unreadable = score_pairs(members, pairs, config, output if config.panels else None)
        problems += unreadable
        if len(table):
            with images.atomic(output / "metrics.csv") as temporary:
                table.to_csv(temporary, index=False)
            print(format_summary(table))
            if config.uncertainty and len(table) > 2:
                rank = table.disagreement.corr(1 - table.dice, method="spearman")
                print(f"rank correlation of disagreement with 1 - Dice: {rank:.2f}")
            drawn = f"panels in {output}, " if config.panels else ""
            print(f"{len(table)} images; {drawn}a row per image in {output / 'metrics.csv'}")
    if problems:
        raise UserError(f"{len(problems)} file(s) left out:\n" + "\n".join(f"  {problem}" for problem in problems))


if __name__ == "__main__":
    cli.run_cli(lambda: main(CONFIG))
