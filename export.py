"""Export a model for servers, and check that its masks stay the same.

    python export.py                                files/model.h5 → export/
    python export.py --model files/lungs.h5         the pretrained lung model

    export/unet.onnx        the network for ONNX Runtime and OpenVINO: prepared images in,
                            probabilities out, with the model's metadata
    export/unet-int8.onnx   the same in 8-bit integers, calibrated on training images
    export/unet/1/          SavedModel for TensorFlow Serving, with two signatures. serving_default
                            takes prepared images and returns probabilities; encoded takes image
                            files (PNG, JPEG, BMP) and returns masks as PNG. A network of patches
                            has the first alone
    export/unet/1/model.onnx, export/unet/config.pbtxt, labels.txt
                            the network for NVIDIA's Triton
    export/manifest.json    metadata, checksums, the share of pixels that agree with the model
                            file, and how well masks of reduced precision agree on this processor

Exporting again adds version 2 beside 1 in export/unet/, so that servers can go back; the other
files are those of the last export. --version names the version, and replaces one that is there.
Needs `pip install -r requirements-export.txt` and the TensorFlow backend.
--verbose also shows what TensorFlow says.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import utils
from exporting.agreement import measure_agreement
from exporting.images import choose_images, read_prepared
from exporting.onnx_export import NoOnnx, write_int8, write_onnx
from exporting.saved_model import why_not_encoded, write_saved_model
from exporting.triton import write_triton_config
from imaging.labels import Classes, mirrored_outputs
from inference import engines, precision_check
from inference.merging import merge_metadata
from utils import UserError, atomic

if TYPE_CHECKING:
    import keras

MIN_AGREEMENT = 0.9999  # share of pixels


@dataclass(frozen=True)
class Config:
    """What is exported, and checked on which images."""

    model: str = "files/model.h5"  # the model file
    out_dir: str = "export"  # where to write
    version: int = 0  # number of the version for TensorFlow Serving and Triton; 0 is the next
    # A file or folder to check on. "" uses images of the model's run, or draws phantoms.
    images: str = ""
    merge: str = ""  # exports all classes as one of this name, such as lungs
    checked: int = 20  # how many images; as many more calibrate the integers


def export(config: Config) -> dict[str, Any]:
    """Write all formats and the manifest; return the manifest.

    Raises UserError if the masks of a format are not those of the model file. Of a network that
    cannot be ONNX only a SavedModel is written.
    """
    config = replace(config, model=utils.find_default(config.model))
    model, metadata = load_checked(config)
    images = choose_images(
        Path(config.model), config.images, config.checked, metadata.get("channel_endings", ())
    )
    out_dir = Path(config.out_dir)
    version = config.version or next_version(out_dir / "unet")
    print(f"exporting {config.model} to {out_dir}, version {version}", flush=True)

    if config.merge:
        model, metadata = merge(model, metadata, config.merge)

    # What was exported before stays until all is written and compared.
    with unfinished_folder(out_dir) as folder:
        saved_model, onnx_file = folder / "unet" / str(version), folder / "unet.onnx"
        network, votes = with_mirror(model, metadata)
        try:
            write_onnx(votes, metadata, onnx_file)
        except NoOnnx as error:
            write_saved_model(network, metadata, saved_model)
            replace_path(saved_model, out_dir / "saved_model")
            raise UserError(
                f"{config.model} cannot be exported to ONNX: {error}. What remains is "
                f"{out_dir / 'saved_model'}, written for TensorFlow, its masks not compared"
            ) from None
        write_saved_model(network, metadata, saved_model)
        shutil.copyfile(onnx_file, saved_model / "model.onnx")
        prepared = (read_prepared(path, metadata) for path in images.calibration)
        windows = itertools.chain.from_iterable(prepared)
        write_int8(onnx_file, folder / "unet-int8.onnx", windows)

        agreement = measure_agreement(model, metadata, onnx_file, saved_model, images.agreement)
        for name, share in agreement.items():
            print(f"{name:22} {share:.4%} of the pixels as in {config.model}")
        if min(agreement["saved_model"], agreement["onnx"]) < MIN_AGREEMENT:
            raise UserError(
                f"the masks of a format are not those of {config.model}; nothing was exported"
            )
        precisions, count = precision_check.measure_precisions(
            onnx_file, metadata, images.precision
        )
        precision_check.print_precisions(precisions)
        for name in (f"unet/{version}", "unet-int8.onnx", "unet.onnx"):
            replace_path(folder / name, out_dir / name)
    exact = engines.open_onnxruntime((out_dir / "unet.onnx").read_bytes())
    write_triton_config(out_dir / "unet", exact, metadata)

    # The manifest comes last: without it nothing is served.
    manifest = {
        "facts": metadata,
        "version": version,
        "model_sha256": file_sha256(Path(config.model)),
        "sha256": checksums(out_dir),
        # Of the SavedModel.
        "signatures": {
            "serving_default": "prepared images to probabilities",
            "encoded": why_not_encoded(metadata) or "image files to masks",
        },
        "agreement": {"images": len(images.agreement), **agreement},
        "precisions": {utils.kind_of_cpu(): {**precisions, "images": f"{count}, {images.source}"}},
    }
    with atomic(out_dir / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=2))
    print(f"written to {out_dir}: unet.onnx, unet-int8.onnx, unet/{version}, manifest.json")
    own = "" if config.out_dir == Config.out_dir else f" --model {out_dir / 'unet.onnx'}"
    print(f"next: python serve.py{own}")
    return manifest


def next_version(folder: Path) -> int:
    """Return the number after the highest version in a model's folder."""
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return max(numbers, default=0) + 1


@contextmanager
def unfinished_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a new folder in `out_dir`, which is removed at the end; what a kill left, at the start.

    It lies there so that its files can be moved.
    """
    folder = out_dir / ".unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_path(source: Path, target: Path) -> None:
    """Move a file or folder to where another of its kind may be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def load_checked(config: Config) -> tuple["keras.Model", dict[str, Any]]:
    """Load the model. Raises UserError for a config that cannot work."""
    if config.checked < 1:
        raise UserError(f"checked is {config.checked}; expected at least 1")
    if config.version < 0:
        raise UserError(f"version is {config.version}; expected at least 1, or 0 for the next")
    utils.load_metadata(config.model)  # a wrong file is refused before Keras is loaded
    utils.load_keras()
    import keras

    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"KERAS_BACKEND is {keras.backend.backend()}; expected tensorflow, which writes "
            "SavedModels"
        )
    return utils.load_model(config.model)


def merge(
    model: "keras.Model", metadata: dict[str, Any], name: str
) -> tuple["keras.Model", dict[str, Any]]:
    """Build the network whose classes count as one, and describe it."""
    import keras
    from keras import ops

    classes = Classes.from_metadata(metadata)
    inputs = keras.Input(model.input_shape[1:])
    probs = model(inputs)
    if classes.overlap or classes.num_channels == 1:
        merged = ops.max(probs, axis=-1, keepdims=True)
    else:
        merged = 1 - probs[..., :1]
    return keras.Model(inputs, merged), merge_metadata(metadata, name)


def with_mirror(
    model: "keras.Model", metadata: dict[str, Any]
) -> tuple["keras.Model", "keras.Model"]:
    """Build the network to export: averaged with the mirrored image, if the metadata ask for it.

    Returns it twice, then with the output "spread" as well, which `segment.average` computes.
    """
    import keras
    from keras import ops

    inputs = keras.Input(model.input_shape[1:], name="image")
    probs, spread = model(inputs), []
    if metadata.get("mirror"):
        # Slices, as `ops.flip` becomes two transpositions and a reversed sequence in ONNX.
        mirrored = model(inputs[..., ::-1, :])[..., ::-1, :]
        order = mirrored_outputs(metadata)
        if len(order) > 1:  # left and right are exchanged
            mirrored = ops.take(mirrored, order.astype("int32"), axis=-1)
        difference = ops.abs(probs - mirrored) / 2
        if len(order) > 1:
            difference = ops.max(difference, axis=-1, keepdims=True)
        spread = [keras.layers.Identity(name="spread", dtype="float32")(difference)]
        probs = (probs + mirrored) / 2
    outputs = keras.layers.Identity(name="probabilities", dtype="float32")(probs)
    networks = keras.Model(inputs, outputs), keras.Model(inputs, [outputs, *spread])
    for network in networks:
        network(np.zeros((1, *model.input_shape[1:]), np.float32))  # Keras exports what was called
    return networks


def checksums(out_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the manifest, by their paths."""
    found = {}
    for path in sorted(out_dir.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            found[path.relative_to(out_dir).as_posix()] = file_sha256(path)
    return found


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    utils.run_script(export, Config)
