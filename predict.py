"""Use a trained model: score test images, or segment any file or folder.

    python predict.py                                the test images of files/model.h5
    python predict.py --data-dir DIR                 another data set, or one that was moved
    python predict.py --input PATH --output DIR      masks of a file, or of a folder and those in it
    python predict.py --model "files/run/fold*/model.h5"      several models, averaged
    python predict.py --adapt DIR                    the model adapted to images without masks

Scoring writes metrics.csv and a panel per image to results/. Segmenting writes a mask per image to
results/masks, in the format and size of the image, and tables/measurements.csv, a row per class. A
file that cannot be read is named, and the others are done; the exit code is then 2. Adapting
writes adapted.h5 beside the model.
--verbose also shows what TensorFlow or JAX says.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import data
import utils
from dataset import run_split
from dataset.layouts import SUBSETS, Pair
from dataset.loading import name_patients
from dataset.notes import summarize_notes
from dataset.reading import read_pair, read_truth
from imaging import formats
from imaging.labels import SIDE, Classes
from imaging.masks.encodings import Truth
from imaging.plots import draw_panel
from imaging.scan import Scan
from inference import adapt, models
from inference.inputs import MEASUREMENTS, Inputs, describe_passed_over, list_inputs
from inference.merging import Merged, merge_metadata
from inference.output_names import name_outputs
from inference.problems import Problems
from inference.read_ahead import read_chunks
from inference.segment import DEFAULT_OPTIONS, Member, Options, Prediction
from inference.segment_files import segment_each, segment_files, side_by_side
from utils import UserError, atomic, printable

if TYPE_CHECKING:
    import pandas as pd

ASKED = 5  # pairs whose masks say whether they have the model's classes


@dataclass(frozen=True)
class Config:
    """What to predict, with what, and where to."""

    # A model file; several are averaged: a.h5,b.h5 or "files/run/fold*/model.h5".
    # "" is files/model.h5, and for --input the pretrained lung model if there is no better one.
    model: str = ""
    input: str = ""  # a file or folder to segment; "" scores images that have masks
    output: str = ""  # where to write; "" is results, with --input results/masks
    # A folder of images of, say, another hospital. The model is adapted to them: no masks needed.
    adapt: str = ""
    # A data set to score, but for what the model was trained on; "" is the split of its run.
    data_dir: str = ""
    subset: str = "test"  # which part of the split: train, val or test
    tile: bool = False  # window by window at the images' own resolution, not scaled to fit
    merge: str = ""  # show all classes as one of this name, such as lungs
    clean: bool = True  # remove small parts and fill holes, if the model file asks for it
    # Probability from which a pixel is of the class, "0.5", or one for each class: "0.3,0.6".
    threshold: str = ""
    probabilities: bool = False  # also write a map of each class's probability, with --input
    format: str = ""  # of masks: png, tiff, nifti, nrrd, seg (DICOM); "" is that of the image
    uncertainty: bool = False  # also show where several models, or mirrored images, disagree
    engine: str = "auto"  # for an exported model: onnxruntime, openvino or cuda
    precision: str = "auto"  # for an exported model: float32, bfloat16 or int8
    panels: bool = True  # also draw what was found
    batch_size: int = 8  # images at once

    @property
    def options(self) -> Options:
        """How to run the network."""
        return Options(self.batch_size, self.tile, self.uncertainty, self.probabilities)

    @property
    def folder(self) -> Path:
        """Where to write."""
        return Path(self.output or ("results/masks" if self.input else "results"))


def main(config: Config) -> None:
    """Score or segment, and print what was written.

    Raises UserError for a wrong config, and at the end if there were problems.
    """
    check_config(config)
    if config.adapt:
        problems = run_adapting(config)
    else:
        problems = run_segmentation(config) if config.input else run_scoring(config)
    if problems:
        lines = "\n".join(f"  {printable(problem)}" for problem in problems)
        raise UserError(f"{utils.counted(len(problems), 'problem')}:\n{lines}")


def check_config(config: Config) -> None:
    """Raise UserError for a value that cannot work, before anything is read."""
    if config.batch_size < 1:
        raise UserError(f"batch_size is {config.batch_size}; expected at least 1")
    if config.subset not in SUBSETS:
        raise UserError(f"subset is {config.subset!r}; expected one of {', '.join(SUBSETS)}")
    if config.format not in ("", *formats.KINDS):
        raise UserError(f"format is {config.format!r}; expected {', '.join(formats.KINDS)}")
    if (config.probabilities or config.format) and not config.input:
        raise UserError("--probabilities and --format need --input")
    if config.input and config.data_dir:
        raise UserError(
            "--input segments images, --data-dir scores images that have masks; "
            "expected one of them"
        )
    if config.adapt and (config.input or config.data_dir):
        raise UserError("--adapt writes a model; use --input or --data-dir with that one")
    for folder in () if config.adapt else (config.folder, *config.folder.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; expected a folder for --output")
    if config.data_dir:
        utils.check_folder(config.data_dir)


def model_paths(config: Config) -> list[str]:
    """List the model files that `config` names."""
    if config.input and not config.model:
        return [models.choose_model(config.uncertainty)[0]]
    return models.expand_paths(config.model or models.OWN_MODEL)


def load_members(config: Config) -> list[Member]:
    """Load the model, or the members of an ensemble, see `models.load_members`."""
    members = models.load_members(
        model_paths(config), config.engine, config.precision, config.uncertainty, config.clean
    )
    if config.merge:
        members = merge_members(members, config.merge)
    if not config.threshold:
        return members
    threshold = parse_threshold(config.threshold, members[0][1]["classes"])
    return [(network, metadata | {"threshold": threshold}) for network, metadata in members]


def merge_members(members: Sequence[Member], name: str) -> list[Member]:
    """Show all classes of the models as one."""
    classes = Classes.from_metadata(members[0][1])
    return [(Merged(network, classes), merge_metadata(one, name)) for network, one in members]


def parse_threshold(text: str, names: Sequence[str]) -> float | list[float]:
    """Read `--threshold`: a number for a single class, a list for several. Raises UserError."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, len(names)) or not all(0 < value < 1 for value in values):
        raise UserError(
            f"threshold is {text!r}; expected a number between 0 and 1, or one for each class "
            f"({', '.join(names)}), separated by commas"
        )
    return values[0] if len(names) == 1 else values * (len(names) // len(values))


# -------------------------------------------------------------------------------------- scoring


def run_scoring(config: Config) -> list[str]:
    """Score the pairs that `config` names, write and print the result; return the problems."""
    output = config.folder
    print(f"model: {config.model or models.OWN_MODEL}", flush=True)
    members = load_members(config)
    utils.load_keras()  # metrics.py needs it, also for an exported model
    pairs, problems = pairs_to_score(config)
    panels = {(output / name).parent for name in panel_names(pairs)} if config.panels else set()
    check_output([output, *panels], (path for pair in pairs for path in (pair.image, *pair.masks)))
    if name := name_of_all(Classes.from_metadata(members[0][1]), pairs):
        print(f"note: the masks have one class, so those of the model are shown as one, {name}")
        members = merge_members(members, name)
    source = f"images of {config.data_dir}" if config.data_dir else f"{config.subset} images"
    print(f"scoring {len(pairs)} {source} ({models.describe_network(members)})", flush=True)
    panel_dir = output if config.panels else None
    table, unreadable = score_pairs(members, pairs, config.options, panel_dir, output)
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
    if "predicted_dice" in table:
        print(metrics.format_predictions(table))
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
    """Choose the pairs, and name the problems found: a data set, or a subset of the run.

    Of an ensemble, the images that are in this subset in every member's run. Raises UserError.
    """
    if config.data_dir:
        pairs, problems = data.find_pairs(config.data_dir)
        pairs, notes = run_split.keep_subset(pairs, model_paths(config), config.subset)
        for note in notes:
            print(f"note: {config.data_dir}: {note}")
        return pairs, problems
    found = [run_split.read_subset(path, config.subset) for path in model_paths(config)]
    common = set.intersection(*(set(pairs) for pairs, _ in found))
    pairs = [pair for image, pair in found[0][0].items() if image in common]
    if not pairs:
        raise UserError(
            f"no image is {config.subset} in the split.csv of every model; name another --subset, "
            "or images with --data-dir or --input"
        )
    return pairs, list(dict.fromkeys(problem for _, problems in found for problem in problems))


def name_of_all(classes: Classes, pairs: Sequence[Pair]) -> str:
    """Name all classes as one if the first masks have one class where the model has several.

    "" if they do not. Left and right lung are together called lung.
    """
    names = classes.names
    if len(names) == 1:
        return ""
    for pair in pairs[:ASKED]:
        with suppress(UserError):
            read_truth(pair, classes)
            return ""
        try:
            read_truth(pair, Classes())
        except UserError:
            return ""
    common = {SIDE.sub("", name).strip(" -_") for name in names}
    return common.pop() if len(common) == 1 and "" not in common else "foreground"


def score_pairs(
    members: Sequence[Member],
    pairs: Sequence[Pair],
    options: Options = DEFAULT_OPTIONS,
    panel_dir: str | Path | None = None,
    log_dir: str | Path | None = None,
) -> tuple["pd.DataFrame", list[str]]:
    """Segment each pair's image and compare it with the mask at the image's own size.

    Returns a table (image, patient, the columns of `metrics.score_classes`, the unit of distances)
    and the problems, a line per pair that was left out. Where no patient is known, the table has
    neither them nor `metrics.PIXELS`. Panels are drawn into `panel_dir`, if there is one.
    """
    import pandas as pd

    metadata = members[0][1]
    names, window = metadata["classes"], metadata.get("window", "")
    classes = Classes.from_metadata(metadata)
    rows, scored, noted, problems = [], [], [], Problems(log_dir or panel_dir)
    panels = dict(zip(pairs, panel_names(pairs), strict=True))
    chunks = read_chunks(
        pairs,
        [pair.image for pair in pairs],
        lambda pair: read_pair(pair, classes, window),
        options.batch_size,
        problems,
    )
    for chunk in chunks:
        paths, scans = [pair.image for pair, _ in chunk], [scan for _, (scan, _) in chunk]
        results = list(segment_each(members, scans, options, paths, problems))
        jobs = []
        for i, found in results:
            pair, (scan, truth) = chunk[i]
            panel = Path(panel_dir) / f"{panels[pair]}.png" if panel_dir is not None else None
            jobs.append(partial(score_and_draw, pair, scan, truth, found, names, panel, window))
        for (i, _), scores in zip(results, side_by_side(jobs), strict=True):
            pair, (scan, truth) = chunk[i]
            if isinstance(scores, Exception):
                problems.add(pair.image, scores)
                continue
            row, panel_error = scores
            rows.append(row)
            scored.append((pair, scan.patient))
            noted.append({"image": pair.image, "notes": [*scan.notes, *truth.notes]})
            if panel_error:
                problems.add(f"the panel {Path(panel_dir) / panels[pair]}.png", panel_error)
    for note in summarize_notes(noted):
        print(f"note: {note}")
    table = pd.DataFrame(rows, columns=None if rows else ["image"])
    return add_patients(table, scored), problems.lines


def score_prediction(
    pair: Pair, scan: Scan, truth: Truth, found: Prediction, names: Sequence[str]
) -> dict[str, Any]:
    """Compare what was found in an image with its mask: a row of the table."""
    import metrics

    scores = metrics.score_classes(truth.mask, found.ids, names, scan.spacing_mm, truth.ignored)
    unit = "mm" if scan.spacing_mm else "pixels"
    row = {"image": pair.image.as_posix(), **scores, "unit": unit}
    if found.quality:
        row |= found.quality.describe()
    # NaN if it was not asked for.
    return row if isnan(found.disagreement) else row | {"disagreement": found.disagreement}


def score_and_draw(
    pair: Pair,
    scan: Scan,
    truth: Truth,
    found: Prediction,
    names: Sequence[str],
    panel: Path | None,
    window: str,
) -> tuple[dict[str, Any], Exception | None]:
    """Score what was found in an image, and draw it; return the row, and why there is no panel."""
    row = score_prediction(pair, scan, truth, found, names)
    try:
        if panel is not None:
            draw_scored(panel, row, scan, truth, found, names, window)
    except Exception as error:  # of any kind: the scores count without it
        return row, error
    return row, None


def draw_scored(
    path: Path,
    row: dict[str, Any],
    scan: Scan,
    truth: Truth,
    found: Prediction,
    names: Sequence[str],
    window: str,
) -> None:
    """Draw an image, its mask and what was found, under its scores."""
    name = printable(Path(row["image"]).name)
    title = f"{name}    Dice {row['dice']:.3f}    HD95 {row['hd95']:.1f} {row['unit']}"
    title += f"    {found.quality}" if found.quality else ""
    draw_panel(
        path, scan, found.ids, names, title, truth.mask, found.uncertainty, window, truth.ignored
    )


def add_patients(table: "pd.DataFrame", scored: Sequence[tuple[Pair, str]]) -> "pd.DataFrame":
    """Add the column patient, "" where none is known; without any, leave out their PIXELS.

    scored: of each row the pair, and the patient of its DICOM header.
    """
    import metrics

    headers = [header for _, header in scored]
    pairs = name_patients([pair for pair, _ in scored], headers)
    if len(scored) > 1 and len(set(headers)) == 1 and headers[0] and pairs[0].patient == "":
        print("note: all headers name the same patient; the intervals count images as independent")
    if not any(pair.patient for pair in pairs):
        return table.drop(columns=[name for name in table if name.startswith(metrics.PIXELS)])
    table.insert(1, "patient", [pair.patient for pair in pairs])
    return table


def panel_names(pairs: Sequence[Pair]) -> list[str]:
    """Name each pair's panel by its image; images of one name keep the folders that differ."""
    stems = [pair.stem for pair in pairs]
    if len({stem.casefold() for stem in stems}) == len(stems):
        return name_outputs([(pair.stem, pair.image.name) for pair in pairs])
    root = os.path.commonpath([pair.image.absolute().parent for pair in pairs])
    names = []
    for pair in pairs:
        folder = pair.image.absolute().parent.relative_to(root)
        names.append(((folder / pair.stem).as_posix(), pair.image.name))
    return name_outputs(names)


# ----------------------------------------------------------------------------------- segmenting


def run_segmentation(config: Config) -> list[str]:
    """Segment the files that `config` names and print what was written; return the problems."""
    output = config.folder
    model, reason = config.model, ""
    if not model:
        model, reason = models.choose_model(config.uncertainty)
        reason = f", {reason}"
    if not Path(config.input).exists():
        list_inputs(Path(config.input))
    print(f"model: {model}{reason}", flush=True)
    config = replace(config, model=model)
    members = load_members(config)
    found = list_inputs(Path(config.input), output, members[0][1].get("channel_endings", ()))
    folders = output_folders(config, found, Classes.from_metadata(members[0][1]))
    check_output(folders, (file for one in found.items for file in one.files))
    for line in (*found.notes, describe_passed_over(found.passed_over)):
        if line:
            print(f"note  {line}")
    network = models.describe_network(members)
    print(f"segmenting {len(found.items)} image(s) ({network})", flush=True)
    count, failed = segment_files(
        members, found.items, output, config.options, config.panels, config.format
    )
    if count:
        panels = f", panels to {output / 'panels'}" if config.panels else ""
        print(f"{count} mask(s) and {MEASUREMENTS} written to {output}{panels}")
    return found.problems + failed


def output_folders(config: Config, found: Inputs, classes: Classes) -> list[Path]:
    """List the folders that are written to; classes that overlap have one each."""
    places = [config.folder, *(config.folder / name for name in classes.names if classes.overlap)]
    if config.panels:
        places.append(config.folder / "panels")
    below = {Path(item.name).parent for item in found.items}
    return [place / folder for place in places for folder in below]


def check_output(folders: Sequence[Path], sources: Iterable[Path]) -> None:
    """Raise UserError if a folder that is written to holds one of the images or masks."""
    taken = {folder.resolve() for folder in {source.parent for source in sources}}
    for folder in folders:
        if folder.resolve() in taken:
            raise UserError(
                f"{folder} holds the images; name another folder with --output, "
                "or they would be replaced"
            )


# ------------------------------------------------------------------------------------- adapting


def run_adapting(config: Config) -> list[str]:
    """Write a model that is adapted to images without masks; return the problems."""
    path = Path(utils.find_default(config.model or models.OWN_MODEL))
    output = Path(config.output) if config.output else path.with_name("adapted.h5")
    adapt.check_paths(path, output)
    utils.load_keras()

    def score(member: Member) -> float | None:
        return score_validation(path, member)

    problems = adapt.adapt_model(path, Path(config.adapt), output, score)
    print(f"next: python predict.py --model {output} --input PATH")
    return problems


def score_validation(path: Path, member: Member) -> float | None:
    """Give the mean Dice on the validation images of a model's run; None if they are not there."""
    try:
        pairs = list(run_split.read_subset(path, "val")[0].values())
    except UserError:
        return None
    table = score_pairs([member], pairs)[0] if pairs else ()
    return float(table.dice.mean()) if len(table) else None


if __name__ == "__main__":
    utils.run_script(main, Config)
