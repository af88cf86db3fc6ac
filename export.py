"""Export a model for servers, and check that its masks stay the same.

    python export.py                                files/model.h5 → export/
    python export.py --model files/lungs.h5         the pretrained lung model

    export/unet.onnx        the network for ONNX Runtime and OpenVINO: prepared images in,
                            probabilities out, with the model's metadata
    export/unet-int8.onnx   the same in 8-bit integers, calibrated on training images
    export/unet/1/          SavedModel for TensorFlow Serving, with two signatures. serving_default
                            takes prepared images and returns probabilities; encoded takes image
                            files (PNG, JPEG, BMP) and returns masks as PNG
    export/manifest.json    metadata, checksums, the share of pixels that agree with the model
                            file, and how well masks of reduced precision agree on this processor

Needs `pip install -r requirements-export.txt` and the TensorFlow backend.
--verbose also shows what TensorFlow says.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

import utils
from dataset.phantoms import make_phantoms
from dataset.split_table import read_split
from imaging import formats, preprocess
from imaging.labels import mirrored_outputs
from inference import engines, postprocess, precision_check
from inference.inputs import list_inputs
from inference.onnx_export import write_int8, write_onnx
from inference.segment import Options, prepare_inputs, segment_scans
from utils import UserError, atomic

if TYPE_CHECKING:
    import keras

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")  # TensorFlow decodes no others
MIN_AGREEMENT = 0.9999  # share of pixels
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue, as in OpenCV


@dataclass(frozen=True)
class Config:
    """What is exported, and checked on which images."""

    model: str = "files/model.h5"  # the model file
    out_dir: str = "export"  # where to write
    # A file or folder to check on. "" uses images of the model's run, or draws phantoms.
    images: str = ""
    checked: int = 20  # how many images; as many more calibrate the integers


class Images(NamedTuple):
    """Which images are used for what."""

    agreement: list[Path]  # test images: the formats' masks are compared with the model file's
    precision: list[Path]  # validation images: reduced precision is compared with float32
    calibration: list[Path]  # training images, none of them above: ranges of the integers
    source: str  # where the validation images come from


def export(config: Config) -> dict[str, Any]:
    """Write all formats and the manifest; return the manifest.

    Raises UserError if the masks of a format are not those of the model file.
    """
    model, metadata = load_checked(config)
    images = choose_images(config)
    out_dir = Path(config.out_dir)
    print(f"exporting {config.model} to {out_dir}", flush=True)

    # Write.
    network = with_mirror(model, metadata)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_onnx(network, metadata, out_dir / "unet.onnx")
    write_saved_model(network, metadata, out_dir / "unet" / "1")
    prepared = [read_prepared(path, metadata) for path in images.calibration]
    write_int8(out_dir / "unet.onnx", out_dir / "unet-int8.onnx", prepared)

    # Check.
    agreement = measure_agreement(model, metadata, out_dir, images.agreement)
    for name, share in agreement.items():
        print(f"{name:22} {share:.4%} of the pixels as in {config.model}")
    if min(agreement["saved_model"], agreement["onnx"]) < MIN_AGREEMENT:
        raise UserError(
            f"{out_dir}: the masks of a format are not those of {config.model}; do not serve it"
        )
    precisions, count = precision_check.measure_precisions(
        out_dir / "unet.onnx", metadata, images.precision
    )
    precision_check.print_precisions(precisions)

    # The manifest comes last: without it nothing is served.
    manifest = {
        "facts": metadata,
        "model_sha256": file_sha256(Path(config.model)),
        "sha256": checksums(out_dir),
        "agreement": {"images": len(images.agreement), **agreement},
        "precisions": {utils.kind_of_cpu(): {**precisions, "images": f"{count}, {images.source}"}},
    }
    with atomic(out_dir / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=2))
    print(f"written to {out_dir}: unet.onnx, unet-int8.onnx, unet/1, manifest.json")
    own = "" if config.out_dir == Config.out_dir else f" --model {out_dir / 'unet.onnx'}"
    print(f"next: python serve.py{own}")
    return manifest


def load_checked(config: Config) -> tuple["keras.Model", dict[str, Any]]:
    """Load the model. Raises UserError for a config that cannot work."""
    if config.checked < 1:
        raise UserError(f"checked is {config.checked}; expected at least 1")
    metadata = utils.load_metadata(config.model)  # a wrong file is refused before Keras is loaded
    if metadata.get("neighbours"):
        raise UserError(
            f"{config.model} uses neighbouring slices, which servers of single images do not have"
        )
    utils.load_keras()
    import keras

    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"KERAS_BACKEND is {keras.backend.backend()}; expected tensorflow, which writes "
            "SavedModels"
        )
    return utils.load_model(config.model)


def with_mirror(model: "keras.Model", metadata: dict[str, Any]) -> "keras.Model":
    """Build the network to export: averaged with the mirrored image, if the metadata ask for it."""
    import keras
    from keras import ops

    inputs = keras.Input(model.input_shape[1:], name="image")
    probs = model(inputs)
    if metadata.get("mirror"):
        mirrored = ops.flip(model(ops.flip(inputs, axis=2)), axis=2)
        order = mirrored_outputs(metadata)
        if len(order) > 1:  # left and right are exchanged
            mirrored = ops.take(mirrored, order.astype("int32"), axis=-1)
        probs = (probs + mirrored) / 2
    outputs = keras.layers.Identity(name="probabilities", dtype="float32")(probs)
    network = keras.Model(inputs, outputs)
    network(np.zeros((1, *model.input_shape[1:]), np.float32))  # Keras exports what was called
    return network


# ---------------------------------------------------------------------------------------- images


def choose_images(config: Config) -> Images:
    """Choose the images to check on. Raises UserError if there are too few."""
    limit = config.checked
    candidates = list_pictures(config, "val")
    # Some of the same images may have to calibrate.
    precision = candidates[: min(limit, max(1, len(candidates) // 2))]
    others = [path for path in list_pictures(config, "train") if path not in precision]
    if not others:
        raise UserError(
            f"{precision[0]} is the only image; expected another one to calibrate the integers on"
        )
    source = "phantoms"
    if config.images:
        source = Path(config.images).name
    elif split_path(config).is_file():
        source = "of the split.csv beside the model"
    return Images(list_pictures(config, "test")[:limit], precision, others[-limit:], source)


def list_pictures(config: Config, subset: str) -> list[Path]:
    """List the pictures that `config` names, else a subset of the model's run, else phantoms.

    If the run has no image in this subset, all its images are taken.
    """
    if config.images:
        paths, _ = list_inputs(Path(config.images))
    elif split_path(config).is_file():
        pairs, subsets = read_split(split_path(config))
        images = [pair.image for pair in pairs]
        chosen = [image for image, other in zip(images, subsets, strict=True) if other == subset]
        paths = chosen or images
    else:
        paths = sorted((make_phantoms("", 2 * config.checked, seed=1) / "CXR_png").iterdir())
    paths = [path for path in paths if path.suffix.lower() in PICTURES]
    if not paths:
        raise UserError("no PNG, JPEG or BMP file to check the formats on; name some with --images")
    return paths


def split_path(config: Config) -> Path:
    """Return where the split of the model's run would be."""
    return Path(config.model).with_name("split.csv")


def read_prepared(path: Path, metadata: dict[str, Any]) -> np.ndarray:
    """Read an image and prepare it: (1, h, w, C) float32 in [0, 1]."""
    scan = formats.read_scan(path)
    prepared = prepare_inputs(scan, tuple(metadata["image_size"]), metadata)
    return prepared.astype(np.float32) / 255


# ------------------------------------------------------------------------------------ SavedModel
# The signature `encoded` does what imaging/preprocess.py does, in TensorFlow's operations.


def write_saved_model(network: "keras.Model", metadata: dict[str, Any], path: Path) -> None:
    """Write both signatures to the folder `path`, whole or not at all."""
    import keras
    import tensorflow as tf

    def segment_file(content: Any) -> Any:
        prepared, shape = prepare_in_graph(content, metadata)
        return mask_png_in_graph(network(prepared[None])[0], shape, metadata)

    def encoded(contents: Any) -> dict[str, Any]:
        return {"mask_png": tf.map_fn(segment_file, contents, fn_output_signature=tf.string)}

    def serving_default(images: Any) -> dict[str, Any]:
        return {"probabilities": network(images)}

    archive = keras.export.ExportArchive()
    archive.track(network)
    images = tf.TensorSpec(network.input_shape, tf.float32, name="images")
    archive.add_endpoint("serving_default", serving_default, [images])
    # Only DICOM files propose a window, and TensorFlow does not read them.
    if metadata.get("window") != "file":
        contents = tf.TensorSpec([None], tf.string, name="image_bytes")
        archive.add_endpoint("encoded", encoded, [contents])
    temporary = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    archive.write_out(str(temporary), verbose=False)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def prepare_in_graph(content: Any, metadata: dict[str, Any]) -> tuple[Any, Any]:
    """Decode an image file and prepare it like `preprocess.prepare_scan`.

    Returns the network's input (h, w, C) in [0, 1] and the image's own height and width.
    """
    import tensorflow as tf

    size, channels = tuple(metadata["image_size"]), metadata["channels"]
    image = decode_in_graph(content, channels)
    shape = tf.shape(image)[:2]
    inner, start = letterbox_in_graph(shape, size)
    small = resize_in_graph(image, inner)
    if metadata.get("window"):
        low, high = window_in_graph(content, metadata["window"])
    else:
        low, high = percentiles_in_graph(small)
    stretched = tf.clip_by_value(tf.math.divide_no_nan(small - low, high - low), 0, 1)
    rounded = tf.round(255 * stretched) / 255
    end = tf.constant(size) - inner - start
    padded = tf.pad(rounded, [[start[0], end[0]], [start[1], end[1]], [0, 0]])
    return tf.ensure_shape(padded, (*size, channels)), shape


def decode_in_graph(content: Any, channels: int) -> Any:
    """Decode an image file: (H, W, channels) float32, 8 bits stretched to 16."""
    import tensorflow as tf

    image = tf.io.decode_image(content, dtype=tf.uint16, expand_animations=False)
    image.set_shape((None, None, None))
    image = tf.cast(image[..., :3], tf.float32)  # without alpha
    if channels > 1:
        return image * tf.ones(channels)
    return tf.cond(
        tf.shape(image)[-1] == 3,
        lambda: tf.reduce_sum(image * GREY_WEIGHTS, -1, keepdims=True),
        lambda: image[..., :1],
    )


def letterbox_in_graph(shape: Any, size: tuple[int, int]) -> tuple[Any, Any]:
    """Return height and width, and top and left, of an image of `shape` in a canvas of `size`.

    The same as `preprocess.letterbox`.
    """
    import tensorflow as tf

    shape = tf.cast(shape, tf.float64)
    scale = tf.reduce_min(tf.constant(size, tf.float64) / shape)
    inner = tf.clip_by_value(tf.cast(tf.round(shape * scale), tf.int32), 1, size)
    return inner, (tf.constant(size) - inner) // 2


def resize_in_graph(image: Any, size: Any) -> Any:
    """Resize (H, W, C) float32 like `preprocess.resize`."""
    import tensorflow as tf

    method = tf.image.ResizeMethod
    return tf.cond(
        tf.reduce_any(size < tf.shape(image)[:2]),
        lambda: tf.image.resize(image, size, method.AREA),
        lambda: tf.image.resize(image, size, method.BILINEAR),
    )


def window_in_graph(content: Any, window: str) -> tuple[Any, Any]:
    """Return the grey levels that become 0 and 1 by a window "centre,width"."""
    import tensorflow as tf

    centre, width = preprocess.parse_window(window)
    has_16_bits = tf.strings.substr(content, 24, 1) == b"\x10"  # in the header of a PNG
    unit = tf.where(has_16_bits, 1.0, 65535 / 255)
    return unit * (centre - width / 2), unit * (centre + width / 2)


def percentiles_in_graph(small: Any) -> tuple[Any, Any]:
    """Return the grey levels that become 0 and 1 by percentiles, like `np.percentile`."""
    import tensorflow as tf

    ordered = tf.sort(tf.reshape(small, [-1]))
    last = tf.size(ordered) - 1
    places = tf.constant(preprocess.PERCENTILES) / 100 * tf.cast(last, tf.float32)
    below = tf.cast(tf.floor(places), tf.int32)
    above = tf.minimum(below + 1, last)
    fraction = places - tf.floor(places)
    levels = tf.gather(ordered, below) * (1 - fraction) + tf.gather(ordered, above) * fraction
    is_flat = levels[1] <= levels[0]
    low = tf.where(is_flat, ordered[0], levels[0])
    return low, tf.where(is_flat, ordered[-1], levels[1])


def mask_png_in_graph(probs: Any, shape: Any, metadata: dict[str, Any]) -> Any:
    """Restore probabilities (h, w, K) to the image's own size, decide, encode the mask as PNG."""
    import tensorflow as tf

    inner, start = letterbox_in_graph(shape, tuple(metadata["image_size"]))
    inside = probs[start[0] : start[0] + inner[0], start[1] : start[1] + inner[1]]
    restored = resize_in_graph(inside, shape)
    if len(metadata["classes"]) == 1:
        ids = 255 * tf.cast(restored >= metadata["threshold"], tf.uint8)
    else:
        ids = tf.cast(tf.argmax(restored, -1), tf.uint8)[..., None]
    return tf.io.encode_png(ids)


# --------------------------------------------------------------------------------------- checking


def measure_agreement(
    model: "keras.Model", metadata: dict[str, Any], out_dir: Path, paths: Sequence[Path]
) -> dict[str, float]:
    """Return the share of pixels in which each format's masks are those of the model file.

    Masks are compared as `predict.py` writes them. Those of image files are compared without
    cleaning, which TensorFlow does not do.
    """
    import tensorflow as tf

    saved = tf.saved_model.load(out_dir / "unet" / "1")
    onnx = engines.open_onnxruntime((out_dir / "unet.onnx").read_bytes())
    shares: dict[str, list[float]] = {"saved_model": [], "onnx": []}
    for path in paths:
        scan = formats.read_scan(path)
        options = Options(batch_size=1, probabilities=True)
        expected = segment_scans([(model, metadata)], [scan], options)[0]
        images = read_prepared(path, metadata)
        answer = saved.signatures["serving_default"](images=tf.constant(images))
        probs = {"saved_model": answer["probabilities"].numpy(), "onnx": onnx.run(images)}
        for name, values in probs.items():
            restored = preprocess.restore(values[0], scan.pixels.shape[1:3])
            ids = postprocess.decide(restored, metadata)
            shares[name].append(float(np.mean(ids == expected.ids[0])))
        if "encoded" in saved.signatures:
            plain = postprocess.decide(expected.probs[0], metadata | {"clean": None})
            ids = read_encoded(saved, path, len(metadata["classes"]))
            shares.setdefault("saved_model, encoded", []).append(float(np.mean(ids == plain)))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def read_encoded(saved: Any, path: Path, num_classes: int) -> np.ndarray:
    """Let a SavedModel segment an image file: class ids (H, W)."""
    import tensorflow as tf

    answer = saved.signatures["encoded"](image_bytes=tf.constant([path.read_bytes()]))
    png = np.frombuffer(answer["mask_png"].numpy()[0], np.uint8)
    mask = cv2.imdecode(png, cv2.IMREAD_UNCHANGED)
    return mask // 255 if num_classes == 1 else mask


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
