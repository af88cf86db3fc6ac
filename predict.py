"""Use a trained model: score test images, or segment any file or folder.

    python predict.py                                the test images of files/model.h5
    python predict.py --data-dir DIR                 all images and masks of another data set
    python predict.py --input PATH --output DIR      masks of a file or of a folder's images
    python predict.py --model "files/run/fold*/model.h5"      several models, averaged

Scoring writes metrics.csv and a panel per image to results/. Segmenting writes a mask per image to
results/masks, in the format and size of the image: PNG, TIFF, NIfTI or DICOM SEG. A file that
cannot be read is named, and the others are done; the exit code is then 2.
--verbose also shows what TensorFlow or JAX says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import data
import utils
from dataset.layouts import SUBSETS, Pair
from dataset.reading import read_pair
from dataset.split_table import read_split
from imaging import formats
from imaging.files import file_stem
from imaging.labels import Classes
from imaging.plots import draw_panel
from inference import models
from inference.inputs import list_inputs, read_chunks
from inference.segment import DEFAULT_OPTIONS, Member, Options, segment_scans
from utils import UserError, atomic

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Config:
    """What to predict, with what, and where to."""

    # A model file; several are averaged: a.h5,b.h5 or "files/run/fold*/model.h5".
    # "" is files/model.h5, and for --input the pretrained lung model if there is no better one.
    model: str = ""
    input: str = ""  # a file or folder to segment; "" scores images that have masks
    output: str = ""  # where to write; "" is results, with --input results/masks
    data_dir: str = ""  # a data set to score as a whole; "" is the split of the model's run
    subset: str = "test"  # which part of the split: train, val or test
    tile: bool = False  # window by window at the images' own resolution, not scaled to fit
    clean: bool = True  # remove small parts and fill holes, if the model file asks for it
    uncertainty: bool = False  # also show where several models, or mirrored images, disagree
    engine: str = "auto"  # for an exported model: onnxruntime or openvino
    precision: str = "auto"  # for an exported model: float32, bfloat16 or int8
    panels: bool = True  # also draw what was found
    batch_size: int = 8  # images at once

    @property
    def options(self) -> Options:
        """How to run the network."""
        return Options(self.batch_size, self.tile, self.uncertainty)

    @property
    def folder(self) -> Path:
        """Where to write."""
        return Path(self.output or ("results/masks" if self.input else "results"))


def main(config: Config) -> None:
    """Score or segment, and print what was written.

    Raises UserError for a wrong config, and at the end if files were left out.
    """
    check_config(config)
    problems = run_segmentation(config) if config.input else run_scoring(config)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{len(problems)} file(s) left out:\n{lines}")


def check_config(config: Config) -> None:
    """Raise UserError for a value that cannot work, before anything is read."""
    if config.batch_size < 1:
        raise UserError(f"batch_size is {config.batch_size}; expected at least 1")
    if config.subset not in SUBSETS:
        raise UserError(f"subset is {config.subset!r}; expected one of {', '.join(SUBSETS)}")
    if config.input and config.data_dir:
        raise UserError(
            "--input segments images, --data-dir scores images that have masks; "
            "expected one of them"
        )
    for folder in (config.folder, *config.folder.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; expected a folder for --output")


def model_paths(config: Config) -> list[str]:
    """List the model files that `config` names."""
    if config.input and not config.model:
        return [models.choose_model(config.uncertainty)[0]]
    return models.expand_paths(config.model or models.OWN_MODEL)


def load_members(config: Config) -> list[Member]:
    """Load the model, or the members of an ensemble, see `models.load_members`."""
    return models.load_members(
        model_paths(config), config.engine, config.precision, config.uncertainty, config.clean
    )


# -------------------------------------------------------------------------------------- scoring


def run_scoring(config: Config) -> list[str]:
    """Score the pairs that `config` names, write and print the result; return the problems."""
    output = config.folder
    print(f"model: {config.model or models.OWN_MODEL}", flush=True)
    members = load_members(config)
    utils.load_keras()  # metrics.py needs it, also for an exported model
    pairs, problems = pairs_to_score(config)
    check_output([output], (path for pair in pairs for path in (pair.image, *pair.masks)))
    source = f"images of {config.data_dir}" if config.data_dir else f"{config.subset} images"
    print(f"scoring {len(pairs)} {source} ({models.describe_network(members)})", flush=True)
    panel_dir = output if config.panels else None
    table, unreadable = score_pairs(members, pairs, config.options, panel_dir)
    if len(table):
        with atomic(output / "metrics.csv") as temporary:
            table.to_csv(temporary, index=False)
        print_scores(table, output, config)
    return problems + unreadable


def print_scores(table: "pd.DataFrame", output: Path, config: Config) -> None:
    """Print the means, the worst image, what was written and what to do next."""
    import metrics

    print(metrics.format_summary(table))
    if "disagreement" in table and len(table) > 2:
        rank = table.disagreement.corr(1 - table.dice, method="spearman")
        print(f"rank correlation of disagreement with 1 - Dice: {rank:.2f}")
    worst = table.loc[table.dice.idxmin()]
    print(f"lowest Dice: {worst.dice:.4f}, {worst.image}")
    panels = f", and {len(table)} panels" if config.panels else ""
    print(f"written to {output}: metrics.csv with a row per image{panels}")
    model = f" --model {config.model}" if config.model else ""
    if not model.endswith(".onnx") and len(model_paths(config)) == 1:
        print(f"next: python export.py{model}    makes the model ready for python serve.py")


def score_run(folder: Path) -> "pd.DataFrame":
    """Score a run folder's test images with its best model; write and return its metrics.csv."""
    config = Config(model=str(folder / "model.h5"))
    pairs, _ = pairs_to_score(config)
    table, problems = score_pairs(load_members(config), pairs)
    if problems:
        raise UserError("\n".join(problems))
    with atomic(folder / "metrics.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def pairs_to_score(config: Config) -> tuple[list[Pair], list[str]]:
    """Choose the pairs, and name the problems found: a whole data set, or a subset of the run.

    Of an ensemble, the images that are in this subset in every member's run. Raises UserError.
    """
    if config.data_dir:
        return data.find_pairs(config.data_dir)
    subsets = [read_subset(Path(path), config.subset) for path in model_paths(config)]
    common = set.intersection(*(set(subset) for subset in subsets))
    pairs = [pair for image, pair in subsets[0].items() if image in common]
    if not pairs:
        raise UserError(
            f"no image is {config.subset} in the split.csv of every model; name another --subset, "
            "or images with --data-dir or --input"
        )
    return pairs, []


def read_subset(model: Path, subset: str) -> dict[Path, Pair]:
    """Read the pairs of a subset from the split.csv beside a model, by their images."""
    path = model.with_name("split.csv")
    if not path.is_file():
        raise UserError(
            f"no {path} beside the model; name images with --input, or a data set with --data-dir"
        )
    pairs = {}
    for pair, pair_subset in zip(*read_split(path), strict=True):
        if pair_subset == subset:
            pairs[pair.image] = pair
    return pairs


def score_pairs(
    members: Sequence[Member],
    pairs: Sequence[Pair],
    options: Options = DEFAULT_OPTIONS,
    panel_dir: str | Path | None = None,
) -> tuple["pd.DataFrame", list[str]]:
    """Segment each pair's image and compare it with the mask at the image's own size.

    Returns a table (image, the columns of `metrics.score_classes`, the unit of distances) and the
    problems, a line per unreadable pair. Panels are drawn into `panel_dir`, if there is one.
    """
    import pandas as pd

    import metrics

    metadata = members[0][1]
    names, window = metadata["classes"], metadata.get("window", "")
    classes = Classes.from_metadata(metadata)
    rows, problems = [], []
    chunks = read_chunks(
        pairs,
        [pair.image for pair in pairs],
        lambda pair: read_pair(pair, classes, window),
        options.batch_size,
        problems,
    )
    for chunk in chunks:
        predictions = segment_scans(members, [scan for _, (scan, _) in chunk], options)
        for (pair, (scan, truth)), found in zip(chunk, predictions, strict=True):
            scores = metrics.score_classes(
                truth.mask, found.ids, names, scan.spacing_mm, truth.ignored
            )
            unit = "mm" if scan.spacing_mm else "pixels"
            row = {"image": pair.image.as_posix(), **scores, "unit": unit}
            if options.uncertainty:
                row["disagreement"] = found.disagreement
            rows.append(row)
            if panel_dir is not None:
                path = Path(panel_dir) / f"{pair.stem}.png"
                title = (
                    f"{pair.image.name}    Dice {row['dice']:.3f}    HD95 {row['hd95']:.1f} {unit}"
                )
                draw_panel(
                    path, scan, found.ids, names, title, truth.mask, found.uncertainty, window
                )
    return pd.DataFrame(rows, columns=None if rows else ["image"]), problems


# ----------------------------------------------------------------------------------- segmenting


def run_segmentation(config: Config) -> list[str]:
    """Segment the files that `config` names and print what was written; return the problems."""
    output = config.folder
    paths, problems = list_inputs(Path(config.input))
    check_output([output, output / "panels"] if config.panels else [output], paths)
    if config.model:
        print(f"model: {config.model}", flush=True)
    else:
        model, reason = models.choose_model(config.uncertainty)
        print(f"model: {model}, {reason}", flush=True)
        config = replace(config, model=model)
    members = load_members(config)
    print(f"segmenting {len(paths)} image(s) ({models.describe_network(members)})", flush=True)
    count, failed = segment_files(members, paths, output, config.options, config.panels)
    if count:
        panels = f", panels to {output / 'panels'}" if config.panels else ""
        print(f"{count} mask(s) written to {output}{panels}")
    return problems + failed


def segment_files(
    members: Sequence[Member],
    paths: Sequence[Path],
    output: str | Path,
    options: Options = DEFAULT_OPTIONS,
    panels: bool = True,
) -> tuple[int, list[str]]:
    """Write the masks of image files to `output`, and panels to the folder panels in it.

    Returns how many masks, and the problems, a line per file that was left out.
    """
    metadata = members[0][1]
    window, classes = metadata.get("window", ""), Classes.from_metadata(metadata)
    problems: list[str] = []
    count = 0
    chunks = read_chunks(
        paths,
        paths,
        lambda path: formats.read_named_scan(path, window),
        options.batch_size,
        problems,
    )
    for chunk in chunks:
        predictions = segment_scans(members, [scan for _, scan in chunk], options)
        for (path, scan), found in zip(chunk, predictions, strict=True):
            count += 1
            place, names = Path(output) / file_stem(path), classes.names
            written = formats.write_masks(place, found.ids, classes, scan)
            for note in (*scan.notes, *(one.note for one in written if one.note)):
                print(f"note  {path}: {note}")
            if panels:
                panel = place.parent / "panels" / f"{place.name}.png"
                title, uncertainty = path.name, found.uncertainty
                draw_panel(panel, scan, found.ids, names, title, None, uncertainty, window)
    return count, problems


def check_output(folders: Sequence[Path], sources: Iterable[Path]) -> None:
    """Raise UserError if a folder that is written to holds one of the images or masks."""
    taken = {folder.resolve() for folder in {source.parent for source in sources}}
    for folder in folders:
        if folder.resolve() in taken:
            raise UserError(
                f"{folder} holds the images; name another folder with --output, "
                "or they would be replaced"
            )


if __name__ == "__main__":
    utils.run_script(main, Config)
