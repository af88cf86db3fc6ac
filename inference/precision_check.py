"""May a network compute in reduced precision here? Compare its masks with those of float32, and note the answer.

    python gate.py --images DIR [--model export/unet.onnx]

Writes into the manifest beside the model what `engines.py` asks for, under this kind of processor. `export.py` does so
where it runs; run this where the network is served, if that is of another kind: OpenVINO's int8 masks of one and the
same file had a mean Dice of 0.9994 with float32's on an Intel with AMX, and of 0.997 on an AMD. It needs no Keras.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from imaging import formats, preprocess
from imaging.files import is_image
from imaging.scan import Scan
from inference import engines, postprocess
from utils import UserError, atomic


@dataclass(frozen=True)
class Config:
    """What is compared, on which images."""

    images: str  # a file or folder of images such as the model will see, but not those that it was trained on
    model: str = "export/unet.onnx"  # what export.py wrote
    checked: int = 20  # how many of them


def mean_dice(truth: np.ndarray, found: np.ndarray, classes: int) -> float:
    """Average the Dice of class ids (H, W) over the classes that are there, in one at least; NaN if none is."""
    scores = []
    for i in range(1, classes + 1):
        pair = truth == i, found == i
        if both := sum(int(mask.sum()) for mask in pair):
            scores.append(2 * int((pair[0] & pair[1]).sum()) / both)
    return float(np.mean(scores)) if scores else float("nan")


def measure_precisions(
    model: Path, metadata: dict[str, Any], paths: Sequence[Path]
) -> tuple[dict[str, float], int]:
    """Give for each engine and reduced precision that run here the mean Dice of their masks with those of float32.

    model: an ONNX file, its int8 version beside it. Gives also how many images were compared: one that cannot be read,
    or in which float32 finds nothing, is named and left out.
    """
    exact, integers = (
        path.read_bytes() for path in (model, model.with_name(f"{model.stem}-int8.onnx"))
    )
    runs = {"onnxruntime int8": engines.open_onnxruntime(integers)}
    if engines.has_openvino():
        runs["openvino int8"] = engines.open_openvino(integers)
    if engines.has_bfloat16():
        runs["openvino bfloat16"] = engines.open_openvino(exact, precision="bfloat16")
    scores: dict[str, list[float]] = {name: [] for name in runs}
    reference, window, count = engines.open_onnxruntime(exact), metadata.get("window", ""), 0
    for path in paths:
        try:
            found = compare_engines(
                formats.read_scan(path, window), metadata, [reference, *runs.values()]
            )
        except UserError as error:
            print(f"{path}: {error}; left out")
            continue
        count += 1
        for name, dice in zip(runs, found, strict=True):
            scores[name].append(dice)
    return {name: float(np.mean(values)) for name, values in scores.items() if values}, count


def compare_engines(
    scan: Scan, metadata: dict[str, Any], networks: Sequence[engines.Engine]
) -> list[float]:
    """Give the Dice of each network's masks with the first one's, averaged over the slices in which either has any.

    Raises UserError where the first one's are all empty.
    """
    rows, empty = [], True
    size, window = networks[0].input_shape[:2], metadata.get("window", "")
    for picture in preprocess.prepare_scan(scan, size, metadata["channels"], window):
        prepared = picture[None].astype(np.float32) / 255
        truth, *found = (
            postprocess.decide(
                preprocess.restore(one.run(prepared)[0], scan.pixels.shape[1:3]), metadata
            )
            for one in networks
        )
        rows.append([mean_dice(truth, ids, len(metadata["classes"])) for ids in found])
        empty = empty and not truth.any()
    if empty:
        raise UserError("nothing is found in it")
    return np.nanmean(rows, axis=0).tolist()


def print_precisions(precisions: dict[str, float]) -> None:
    """Print what may be used."""
    for name, dice in precisions.items():
        told = (
            "may be used"
            if dice >= engines.MIN_DICE_VS_FLOAT32
            else f"not used, as less than {engines.MIN_DICE_VS_FLOAT32}"
        )
        print(f"{name:22} Dice {dice:.5f} with the masks of float32, {told}")


def list_images(source: Path) -> list[Path]:
    """List the images of a folder, or one file. Raises UserError where there are none."""
    paths = [source] if source.is_file() else sorted(filter(is_image, source.glob("*")))
    if not paths:
        raise UserError(f"no images at {source}; name a file or folder of some with --images")
    return paths


def main(config: Config) -> None:
    """Measure, tell, and note it in the manifest. Raises UserError."""
    if config.checked < 1:
        raise UserError(f"checked is {config.checked}; expected at least 1")
    model, source = Path(config.model), Path(config.images)
    metadata = engines.load_engine(model, "onnxruntime", "float32")[1]
    paths = list_images(source)[: config.checked]
    (precisions, count), place = (
        measure_precisions(model, metadata, paths),
        model.with_name("manifest.json"),
    )
    if not count:
        raise UserError(
            f"none of the {len(paths)} files shows anything to compare; name others with --images"
        )
    print_precisions(precisions)
    manifest = json.loads(place.read_text())
    noted = {**precisions, "images": f"{count}, {source.name}"}
    manifest.setdefault("precisions", {})[utils.kind_of_cpu()] = noted
    with atomic(place) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2))
    print(f"{place} has this for {utils.kind_of_cpu()} now")


if __name__ == "__main__":
    utils.run_script(main, Config)
