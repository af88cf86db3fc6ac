"""Use a trained model: score the test images and draw panels, or segment any file or folder.

    python predict.py                                  the run's test images: results/<stem>.png, results/metrics.csv
    python predict.py --data-dir DIR                   every pair of another data set, likewise
    python predict.py --model "files/run/fold*/model.h5" …             several models, averaged
    python predict.py --input PATH --output DIR        masks DIR/<stem>.png, panels DIR/panels/<stem>.png

Masks have the image's own size and kind: PNG or TIFF (0/255 for one class), NIfTI, DICOM SEG, with the
training masks' values. A bad file is reported and the others are done; the exit code is then 2.
"""

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
import utils
from dataset.layouts import SUBSETS, Pair
from dataset.reading import read_pair
from dataset.split_table import read_split
from imaging import formats, plots
from imaging.files import file_stem
from imaging.labels import mirrored_channels
from inference import engines, segment
from inference.bundled import BUNDLED_MODEL
from inference.inputs import list_inputs, read_ahead, split_errors
from inference.segment import Member
from utils import UserError, atomic


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
    engine: str = (
        "auto"  # of an exported model (.onnx): onnxruntime, openvino; auto is openvino for bfloat16
    )
    precision: str = "auto"  # of it: float32, bfloat16, int8; auto is bfloat16 where OpenVINO, model and CPU allow
    panels: bool = True  # also draw what was found; a panel takes longer than the rest together
    batch_size: int = 8  # images at once


def model_paths(config: Config) -> list[str]:
    """List the model files that `config` names, those of patterns in order."""
    names = config.model or "files/model.h5"
    box = "files/lungs.h5" if config.uncertainty else BUNDLED_MODEL
    if not config.model and config.input and not Path(names).exists() and Path(box).exists():
        print(
            f"no {names} of your own yet: taking {box}, which knows lungs in chest X-rays (README)"
        )
        return [box]
    if Path(names).exists():  # whatever signs it has in it
        return [names]
    return [path for name in names.split(",") for path in sorted(glob.glob(name)) or [name]]  # noqa: PTH207


def load_member(path: str, config: Config) -> Member:
    """Load a model file, with Keras, or what `export.py` made of one, without. Raises UserError."""
    if path.endswith(".onnx"):
        opened, metadata, _ = engines.load_engine(Path(path), config.engine, config.precision)
        print(f"{path}: {opened.engine}, {opened.precision}")
        if config.uncertainty and metadata.get("mirror"):
            raise UserError(
                f"{path} averages with the mirrored image itself; --uncertainty needs its .h5 file"
            )
        return opened, metadata | {"mirror": False}  # which is in the network already
    if config.engine != "auto" or config.precision not in ("auto", "float32"):
        raise UserError(
            f"{path} runs in Keras and float32; `python export.py --model {path}` makes it ready for engines"
        )

    model, metadata = utils.load_model(path)
    print(f"{path}: Keras, float32")
    return model, metadata


def load_members(config: Config) -> list[Member]:
    """Load the model, or the ensemble's members. Raises UserError if there is none or they do not go together.

    Masks are cleaned where all members want the same cleaning, unless `config` will not have it.
    """
    paths = model_paths(config)
    if len({path.endswith(".onnx") for path in paths}) > 1:
        raise UserError("an ensemble needs models of one kind; name .h5 files or .onnx files")
    members = [load_member(path, config) for path in paths]
    for name in ("classes", "channels", "image_size", "window", "neighbours"):
        values = {
            json.dumps(metadata.get(name) or None) for _, metadata in members
        }  # older files lack some
        if len(values) > 1:
            raise UserError(
                f"the models' {name} are {' and '.join(sorted(values))}; an ensemble needs the same"
            )
    if (
        config.uncertainty
        and len(members) == 1
        and mirrored_channels(members[0][1]["classes"]) is None
    ):
        raise UserError(
            "--uncertainty needs several models, because a class with one side cannot be mirrored"
        )
    wanted = [metadata.get("clean") for _, metadata in members]
    agreed = wanted[0] if config.clean and all(parts == wanted[0] for parts in wanted) else None
    return [(model, metadata | {"clean": agreed}) for model, metadata in members]


def score_pairs(
    members: Sequence[Member],
    pairs: Sequence[Pair],
    config: Config = Config(),
    panel_dir: str | Path | None = None,
) -> tuple["pd.DataFrame", list[str]]:
    """Segment each pair's image and compare with its mask at the image's own size.

    Returns a table (image, the columns of `metrics.score_classes`, the distances' unit) and the problems, a line
    per unreadable pair; draws panels into `panel_dir` unless it is None.
    """
    import pandas as pd

    import metrics

    rows, problems, metadata = [], [], members[0][1]
    names, levels, window = (
        metadata["classes"],
        metadata.get("mask_values", ()),
        metadata.get("window", ""),
    )
    for chunk in read_ahead(
        pairs,
        lambda pair: pair.image,
        lambda pair: read_pair(pair, names, levels, window),
        config.batch_size,
    ):
        good = split_errors(chunk, problems)
        results = segment.segment_scans(members, [scan for _, (scan, _) in good], config)
        for (pair, (scan, truth)), found in (
            (one, segment.to_volume(results, len(one[1][1]), metadata)) for one in good
        ):
            row = metrics.score_classes(truth, found.ids, names, scan.spacing_mm)
            row |= {"unit": "mm" if scan.spacing_mm else "pixels"}
            row |= {"disagreement": found.disagreement} if config.uncertainty else {}
            rows.append({"image": pair.image.as_posix(), **row})
            if panel_dir is not None:
                parts = {"ground truth": truth, f"prediction, Dice {row['dice']:.3f}": found.ids}
                plots.draw_panel(
                    Path(panel_dir) / f"{pair.stem}.png",
                    scan,
                    parts,
                    names,
                    found.uncertainty,
                    window,
                )
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
    metadata = members[0][1]
    names, window, levels = (
        metadata["classes"],
        metadata.get("window", ""),
        metadata.get("mask_values", ()),
    )
    count = 0
    for chunk in read_ahead(
        paths,
        lambda path: path,
        lambda path: formats.read_named_scan(path, window),
        config.batch_size,
    ):
        good = split_errors(chunk, problems)
        results = segment.segment_scans(members, [scan for _, scan in good], config)
        count += len(good)
        for path, scan in good:
            found = segment.to_volume(results, len(scan.pixels), metadata)
            place, stem = Path(output), file_stem(path)
            try:
                formats.write_mask(place / stem, found.ids, names, scan, levels)
            except UserError as error:
                problems.append(f"{path}: {error}")
            if config.panels:
                parts = {"prediction": found.ids}
                plots.draw_panel(
                    place / "panels" / f"{stem}.png", scan, parts, names, found.uncertainty, window
                )
    return count, problems


def check_output(folders: Sequence[Path], sources: Iterable[Path]) -> None:
    """Raise UserError if one of the folders that are written to holds one of the sources."""
    taken = {folder.resolve() for folder in {source.parent for source in sources}}
    for folder in folders:
        if folder.resolve() in taken:
            raise UserError(
                f"{folder} holds the images; name another folder with --output, or they would be replaced"
            )


def pairs_to_score(config: Config) -> tuple[list[Pair], list[str]]:
    """Choose the pairs: a whole data set, or a subset of the run that made the model; and the problems found."""
    if config.data_dir:
        import data  # loads Keras

        return data.find_pairs(config.data_dir)
    if config.subset not in SUBSETS:
        raise UserError(f"subset is {config.subset!r}; expected one of {', '.join(SUBSETS)}")
    chosen: dict[Path, Pair] = {}
    for number, path in enumerate(Path(name).parent / "split.csv" for name in model_paths(config)):
        if not path.is_file():
            raise UserError(
                f"no {path} beside the model; name images with --input, or a data set with --data-dir"
            )
        there = {
            pair.image: pair
            for pair, subset in zip(*read_split(path), strict=True)
            if subset == config.subset
        }
        chosen = {
            image: pair for image, pair in (chosen if number else there).items() if image in there
        }
    if not chosen:
        raise UserError(
            f"no image is {config.subset} in the split.csv of every model; name another --subset, or images with "
            "--data-dir or --input"
        )
    return list(chosen.values()), []


def score_run(folder: Path) -> "pd.DataFrame":
    """Score a run folder's test images with its best model; write metrics.csv, return the table."""
    config = Config(model=str(folder / "model.h5"))
    table, problems = score_pairs(load_members(config), pairs_to_score(config)[0])
    if problems:
        raise UserError("\n".join(problems))
    with atomic(folder / "metrics.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def format_summary(table: "pd.DataFrame") -> str:
    """Lay out the means of a table of `score_pairs` for the terminal."""

    import metrics

    summary, units = metrics.summarize(table), " and ".join(sorted(set(table.unit)))
    lines = [f"{'':24} {'mean':>8}   95 % interval (hd95, assd in {units})"]
    for name, row in summary.iterrows():
        digits = 4 if row["mean"] <= 1 and "hd95" not in name and "assd" not in name else 2
        lines.append(
            f"{name:24} {row['mean']:8.{digits}f}   {row['low']:.{digits}f} to {row['high']:.{digits}f}"
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    """Score or segment, and say what was written. Raises UserError at the end if files were left out."""
    if config.batch_size < 1:
        raise UserError(f"batch_size is {config.batch_size}; expected at least 1")
    if config.input and config.data_dir:
        raise UserError(
            "--input segments images, --data-dir scores those that have masks; expected one of them"
        )
    members = load_members(config)
    if config.input:
        output = Path(config.output or "results/masks")
        count, problems = segment_files(members, config.input, output, config)
        if count:
            print(
                f"{count} masks in {output}"
                + (f", panels in {output / 'panels'}" if config.panels else "")
            )
    else:
        output = Path(config.output or "results")
        pairs, problems = pairs_to_score(config)
        check_output([output], (path for pair in pairs for path in (pair.image, *pair.masks)))
        table, unreadable = score_pairs(members, pairs, config, output if config.panels else None)
        problems += unreadable
        if len(table):
            with atomic(output / "metrics.csv") as temporary:
                table.to_csv(temporary, index=False)
            print(format_summary(table))
            if config.uncertainty and len(table) > 2:
                rank = table.disagreement.corr(1 - table.dice, method="spearman")
                print(f"rank correlation of disagreement with 1 - Dice: {rank:.2f}")
            drawn = f"panels in {output}, " if config.panels else ""
            print(f"{len(table)} images; {drawn}a row per image in {output / 'metrics.csv'}")
    if problems:
        raise UserError(
            f"{len(problems)} file(s) left out:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


if __name__ == "__main__":
    utils.run_script(main, Config)
