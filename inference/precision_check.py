"""Check whether a network may compute in reduced precision on this processor.

    python -m inference.precision_check --images DIR [--model export/unet.onnx]

Compares its masks with those of float32 and writes the mean Dice into manifest.json beside the
model, for this kind of processor. `export.py` does this where it runs. Run it where the network is
served if that processor is of another kind: OpenVINO's int8 masks of the same file had a mean Dice
of 0.9994 with those of float32 on an Intel processor with AMX, and of 0.997 on an AMD processor.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from imaging.files import is_image
from imaging.labels import plane
from imaging.scan import Scan
from inference import engines
from inference.inputs import read_one
from inference.sampler import Sampler
from inference.segment import Options, segment_scans, take_middle
from utils import UserError, atomic

# Of a network of patches, along each side of an image: its middle is enough.
MAX_WINDOWS = 3


@dataclass(frozen=True)
class Config:
    """What is compared, on which images."""

    images: str  # a file or folder of images like those to come, none that the model trained on
    model: str = "export/unet.onnx"  # what export.py wrote
    checked: int = 20  # how many images


def main(config: Config) -> None:
    """Measure, print, and write the result into the manifest. Raises UserError."""
    if config.checked < 1:
        raise UserError(f"checked is {config.checked}; expected at least 1")
    model, source = Path(utils.find_default(config.model)), Path(config.images)
    _, metadata, _ = engines.load_engine(model, "onnxruntime", "float32")
    paths = list_images(source)[: config.checked]
    print(f"comparing the masks of {len(paths)} image(s)", flush=True)
    dice, count = measure_precisions(model, metadata, paths)
    if not count:
        raise UserError(
            f"none of the {len(paths)} files shows anything to compare; name others with --images"
        )
    print_precisions(dice)
    place = model.with_name("manifest.json")
    manifest = json.loads(place.read_text())
    results = manifest.setdefault("precisions", {})
    results[utils.kind_of_cpu()] = {**dice, "images": f"{count}, {source.name}"}
    with atomic(place) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2))
    print(f"written to {place} for {utils.kind_of_cpu()}")


def list_images(source: Path) -> list[Path]:
    """List the images of a folder, or one file. Raises UserError if there are none."""
    paths = [source] if source.is_file() else sorted(filter(is_image, source.glob("*")))
    if not paths:
        raise UserError(f"no images at {source}; name a file or folder of some with --images")
    return paths


def measure_precisions(
    model: Path, metadata: dict[str, Any], paths: Sequence[Path]
) -> tuple[dict[str, float], int]:
    """Measure each engine and reduced precision that runs here.

    model: an ONNX file, its int8 version beside it. Returns the mean Dice of their masks with those
    of float32, and the number of images compared. An image that cannot be read, or in which float32
    finds nothing, is named and left out.
    """
    exact, int8 = model.read_bytes(), engines.int8_path(model).read_bytes()
    networks = {"onnxruntime int8": engines.open_onnxruntime(int8)}
    if engines.has_openvino():
        networks["openvino int8"] = engines.open_openvino(int8)
    if engines.has_bfloat16():
        networks["openvino bfloat16"] = engines.open_openvino(exact, precision="bfloat16")
    reference = engines.open_onnxruntime(exact)
    scores = []
    for path in paths:
        try:
            scan = take_middle(read_one(path, metadata), metadata, MAX_WINDOWS)
            scores.append(compare_masks(scan, metadata, reference, list(networks.values())))
        except UserError as error:
            print(f"{error}; left out" if str(path) in str(error) else f"{path}: {error}; left out")
    means = np.mean(scores, axis=0).tolist() if scores else []
    return dict(zip(networks, means, strict=False)), len(scores)


def compare_masks(
    scan: Scan,
    metadata: dict[str, Any],
    reference: engines.Engine,
    networks: Sequence[engines.Engine],
) -> list[float]:
    """Return the Dice of each network's masks with the reference's, averaged over the slices.

    Slices in which neither finds anything do not count. Of a 3-D network the whole masks are
    compared. Raises UserError if the reference finds nothing in the whole scan.
    """
    # The exported network averages with the mirrored image itself.
    facts = metadata | {"mirror": False}
    is_3d = Sampler.from_metadata(metadata).dimensions == 3

    def find(network: engines.Engine) -> Sequence[np.ndarray]:
        ids = segment_scans([(network, facts)], [scan], Options(batch_size=1))[0].ids
        return [ids] if is_3d else ids

    truth = find(reference)
    if not np.any(truth):
        raise UserError("nothing is found in it")
    columns = []
    for network in networks:
        pairs = zip(truth, find(network), strict=True)
        columns.append([mean_dice(*pair, len(metadata["classes"])) for pair in pairs])
    return np.nanmean(columns, axis=1).tolist()


def mean_dice(truth: np.ndarray, found: np.ndarray, num_classes: int) -> float:
    """Average the Dice of masks over the classes that occur; NaN if none does.

    `metrics.py` has the same, but needs Keras.
    """
    scores = []
    for class_id in range(1, num_classes + 1):
        true_pixels, found_pixels = plane(truth, class_id), plane(found, class_id)
        total = int(true_pixels.sum()) + int(found_pixels.sum())
        if total:
            scores.append(2 * int((true_pixels & found_pixels).sum()) / total)
    return float(np.mean(scores)) if scores else float("nan")


def print_precisions(dice: dict[str, float]) -> None:
    """Print which engines and precisions are allowed."""
    for name, value in dice.items():
        allowed = value >= engines.MIN_DICE_VS_FLOAT32
        verdict = "allowed" if allowed else f"not used, below {engines.MIN_DICE_VS_FLOAT32}"
        print(f"{name:22} Dice {value:.5f} with the masks of float32: {verdict}")


if __name__ == "__main__":
    utils.run_script(main, Config)
