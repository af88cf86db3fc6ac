"""Export a model for servers: `python export.py` turns files/model.h5 into export/ and checks that masks stay the same.

    export/unet/1/         SavedModel in TensorFlow Serving's layout. Signatures: serving_default takes prepared images
                           and gives probabilities; encoded takes image files (PNG, JPEG, BMP) and gives masks as PNG
    export/unet.onnx       the network for ONNX Runtime, prepared images in, probabilities out, metadata as metadata
    export/unet-int8.onnx  the same in 8-bit integers, calibrated on training images
    export/manifest.json   metadata, SHA-256 of every file, how many pixels agree with files/model.h5, and for each reduced
                           precision the mean Dice of its masks with those of float32 on this kind of processor: of the
                           run's validation images where it has some, or those named, never of those that calibrated

Needs `pip install -r requirements-export.txt` and the TensorFlow backend.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np
import pandas as pd
from keras import ops

import predict
import utils
from dataset.phantoms import make_phantoms
from imaging import formats, preprocess
from imaging.labels import mirrored_channels
from inference import engines, postprocess, precision_check, segment
from inference.inputs import list_inputs
from utils import UserError, atomic

GREY = (0.299, 0.587, 0.114)  # weights of red, green, blue, as OpenCV's


@dataclass(frozen=True)
class Config:
    """What is exported, and checked on which images."""

    model: str = "files/model.h5"  # the model file
    out_dir: str = "export"  # where it goes
    images: str = (
        ""  # a file or folder to check on; "" takes images of the model's run, or phantoms
    )
    checked: int = 20  # how many of them; so many more calibrate the integers


def with_mirror(model: keras.Model, metadata: dict[str, Any]) -> keras.Model:
    """Build the network that gives what `predict.py` decides on: averaged with the mirror where the metadata say so."""
    inputs = keras.Input(model.input_shape[1:], name="image")
    probs = model(inputs)
    if metadata.get("mirror"):
        mirrored = ops.flip(model(ops.flip(inputs, axis=2)), axis=2)
        order = mirrored_channels(metadata["classes"])
        probs = (
            probs
            + (mirrored if len(order) == 2 else ops.take(mirrored, order.astype("int32"), axis=-1))
        ) / 2
    return keras.Model(inputs, keras.layers.Identity(name="probabilities", dtype="float32")(probs))


# -------------------------------------------------------------------------------------------------------------- ONNX


def write_onnx(network: keras.Model, metadata: dict[str, Any], path: Path) -> None:
    """Write the network with its metadata as metadata; a batch may have any size. Raises UserError without ONNX."""
    try:
        import onnx
        import tf2onnx  # noqa: F401 (Keras needs it)
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed: pip install -r requirements-export.txt"
        ) from None
    with atomic(path) as temporary:
        network.export(temporary, format="onnx", verbose=False)
        graph = onnx.load(temporary)
        for value in (graph.graph.input[0], graph.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        rename_output(graph, "probabilities")
        onnx.helper.set_model_props(
            graph, {name: json.dumps(value) for name, value in metadata.items()}
        )
        onnx.checker.check_model(graph, full_check=True)
        onnx.save(graph, temporary)


def rename_output(graph: Any, name: str) -> None:
    """Give the network's only output a name that clients can guess."""
    old = graph.graph.output[0].name
    graph.graph.output[0].name = name
    for node in graph.graph.node:
        node.output[:] = [name if output == old else output for output in node.output]


def write_int8(source: Path, path: Path, prepared: Sequence[np.ndarray]) -> None:
    """Write an ONNX file's network in 8-bit integers of the ranges that `prepared` images (1, h, w, C) show."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = engines.open_onnxruntime(source.read_bytes()).input_name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{name: image} for image in prepared])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    with atomic(path) as temporary, tempfile.TemporaryDirectory() as folder:
        fused = Path(folder) / "fused.onnx"
        quant_pre_process(source, fused, skip_symbolic_shape=True)
        quantize_static(fused, temporary, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)


# -------------------------------------------------------------------------------------------------------- SavedModel
# The second signature does what images.py does, in TensorFlow's operations, for a client that has only a file.


def _box(shape: Any, size: tuple[int, int]) -> tuple[Any, Any]:
    """Give height and width, and top and left, of an image of `shape` in a canvas of `size`: see `images.fit`."""
    import tensorflow as tf

    scale = tf.reduce_min(tf.constant(size, tf.float64) / tf.cast(shape, tf.float64))
    inner = tf.cast(tf.round(tf.cast(shape, tf.float64) * scale), tf.int32)
    inner = tf.clip_by_value(inner, 1, size)
    return inner, (tf.constant(size) - inner) // 2


def _resize(image: Any, size: Any) -> Any:
    """Resize (H, W, C) float32: see `images.resize`."""
    import tensorflow as tf

    shrinks = tf.reduce_any(size < tf.shape(image)[:2])
    method = tf.image.ResizeMethod
    return tf.cond(
        shrinks,
        lambda: tf.image.resize(image, size, method.AREA),
        lambda: tf.image.resize(image, size, method.BILINEAR),
    )


def _prepare(content: Any, metadata: dict[str, Any]) -> tuple[Any, Any]:
    """Decode an image file and prepare it (H, W, C) as `images.prepare_scan` does; its own size too."""
    import tensorflow as tf

    size, channels = tuple(metadata["image_size"]), metadata["channels"]
    image = tf.io.decode_image(content, dtype=tf.uint16, expand_animations=False)
    image.set_shape((None, None, None))
    image = tf.cast(image[..., :3], tf.float32)
    if channels == 1:
        image = tf.cond(
            tf.shape(image)[-1] == 3,
            lambda: tf.reduce_sum(image * GREY, -1, keepdims=True),
            lambda: image[..., :1],
        )
    else:
        image = image * tf.ones(channels)
    shape = tf.shape(image)[:2]
    inner, start = _box(shape, size)
    small = _resize(image, inner)
    if metadata.get("window"):
        centre, width = preprocess.parse_window(metadata["window"])
        deep = (
            tf.strings.substr(content, 24, 1) == b"\x10"
        )  # a PNG of 16 bits; 8 bits were stretched to 16
        unit = tf.where(deep, 1.0, 65535 / 255)
        low, high = unit * (centre - width / 2), unit * (centre + width / 2)
    else:
        ranked = tf.sort(tf.reshape(small, [-1]))
        places = (
            tf.constant(preprocess.PERCENTILES) / 100 * tf.cast(tf.size(ranked) - 1, tf.float32)
        )
        below = tf.cast(tf.floor(places), tf.int32)
        above = tf.minimum(below + 1, tf.size(ranked) - 1)
        share = places - tf.floor(places)
        levels = tf.gather(ranked, below) * (1 - share) + tf.gather(ranked, above) * share
        flat = levels[1] <= levels[0]
        low, high = tf.where(flat, ranked[0], levels[0]), tf.where(flat, ranked[-1], levels[1])
    stretched = tf.math.divide_no_nan(small - low, high - low)
    steps = tf.round(255 * tf.clip_by_value(stretched, 0, 1)) / 255
    rest = tf.constant(size) - inner - start
    padding = [[start[0], rest[0]], [start[1], rest[1]], [0, 0]]
    return tf.ensure_shape(tf.pad(steps, padding), (*size, channels)), shape


def _to_png(probs: Any, shape: Any, metadata: dict[str, Any]) -> Any:
    """Bring probabilities (h, w, K) back to an image's own size, decide, encode the mask as PNG."""
    import tensorflow as tf

    inner, start = _box(shape, tuple(metadata["image_size"]))
    part = probs[start[0] : start[0] + inner[0], start[1] : start[1] + inner[1]]
    whole = _resize(part, shape)
    if len(metadata["classes"]) == 1:
        ids = 255 * tf.cast(whole >= metadata["threshold"], tf.uint8)
    else:
        ids = tf.cast(tf.argmax(whole, -1), tf.uint8)[..., None]
    return tf.io.encode_png(ids)


def write_saved_model(network: keras.Model, metadata: dict[str, Any], path: Path) -> None:
    """Write the signatures to the folder `path`, whole or not at all."""
    import tensorflow as tf

    def encoded(contents: Any) -> dict[str, Any]:
        def one(content: Any) -> Any:
            prepared, shape = _prepare(content, metadata)
            return _to_png(network(prepared[None])[0], shape, metadata)

        return {"mask_png": tf.map_fn(one, contents, fn_output_signature=tf.string)}

    archive = keras.export.ExportArchive()
    archive.track(network)
    images_in = tf.TensorSpec(network.input_shape, tf.float32, name="images")
    archive.add_endpoint(
        "serving_default", lambda images: {"probabilities": network(images)}, [images_in]
    )
    if metadata.get("window") != "file":  # which only DICOM has, that TensorFlow cannot read
        archive.add_endpoint(
            "encoded", encoded, [tf.TensorSpec([None], tf.string, name="image_bytes")]
        )
    temporary = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    archive.write_out(str(temporary), verbose=False)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


# ------------------------------------------------------------------------------------------------------------ parity


def choose_files(config: Config, subset: str) -> list[Path]:
    """List the images that are there to check on: those named, else a subset of the model's run, else phantoms.

    A run without images in the subset gives all of its.
    """
    split = Path(config.model).parent / "split.csv"
    if config.images:
        paths, _ = list_inputs(Path(config.images))
    elif split.is_file():
        table = pd.read_csv(split)
        chosen = table.image[table.subset == subset]
        paths = [Path(image) for image in (chosen if len(chosen) else table.image)]
    else:
        paths = sorted((make_phantoms("", 2 * config.checked, seed=1) / "CXR_png").iterdir())
    paths = [path for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp")]
    if not paths:
        raise UserError("no PNG, JPEG or BMP file to check the formats on; name some with --images")
    return paths


def compare(
    model: keras.Model, metadata: dict[str, Any], out_dir: Path, paths: Sequence[Path]
) -> dict[str, float]:
    """Give the share of pixels, over all images, in which each format's mask is that of the model file.

    The network's masks are compared as `predict.py` writes them; those of image files without cleaning, which
    TensorFlow cannot do.
    """
    import tensorflow as tf

    saved = tf.saved_model.load(out_dir / "unet" / "1")
    run_onnx = engines.open_onnxruntime((out_dir / "unet.onnx").read_bytes()).run
    plain = metadata | {"clean": None}
    config = predict.Config(batch_size=1)
    same: dict[str, list[float]] = {"saved_model": [], "onnx": []}
    for path in paths:
        scan = formats.read_scan(path)
        prepared = (
            segment.prepare_inputs(scan, tuple(metadata["image_size"]), metadata).astype(np.float32)
            / 255
        )
        probs = next(segment.segment_scans([(model, metadata)], [scan], config)).probs
        shape = scan.pixels.shape[1:3]
        found = {
            "saved_model": saved.signatures["serving_default"](images=tf.constant(prepared))[
                "probabilities"
            ].numpy(),
            "onnx": run_onnx(prepared),
        }
        for name, values in found.items():
            ids = postprocess.decide(preprocess.restore(values[0], shape), metadata)
            same[name].append(float(np.mean(ids == postprocess.decide(probs, metadata))))
        if "encoded" not in saved.signatures:
            continue
        content = saved.signatures["encoded"](image_bytes=tf.constant([path.read_bytes()]))[
            "mask_png"
        ].numpy()[0]
        mask = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        scale = 255 if len(metadata["classes"]) == 1 else 1
        same.setdefault("saved_model, encoded", []).append(
            float(np.mean(mask == scale * postprocess.decide(probs, plain)))
        )
    return {name: float(np.mean(shares)) for name, shares in same.items()}


def checksum(path: Path) -> str:
    """Give a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(config: Config) -> dict[str, Any]:
    """Write all formats and the manifest; return it. Raises UserError if a format's masks are not the model's."""
    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"KERAS_BACKEND is {keras.backend.backend()}; expected tensorflow, which writes SavedModels"
        )
    model, metadata = utils.load_model(config.model)
    if metadata.get("neighbours"):
        raise UserError(
            f"{config.model} looks at neighbouring slices, which servers of single images do not have"
        )
    if config.checked < 1:
        raise UserError(f"checked is {config.checked}; expected at least 1")
    out_dir, paths = Path(config.out_dir), choose_files(config, "test")[: config.checked]
    out_dir.mkdir(parents=True, exist_ok=True)
    network = with_mirror(model, metadata)
    network(np.zeros((1, *model.input_shape[1:]), np.float32))  # Keras exports only what was called
    write_onnx(network, metadata, out_dir / "unet.onnx")
    write_saved_model(network, metadata, out_dir / "unet" / "1")
    size = tuple(metadata["image_size"])
    measured = choose_files(config, "val")
    measured = measured[
        : min(config.checked, max(1, len(measured) // 2))
    ]  # some must be left to calibrate on
    others = [path for path in choose_files(config, "train") if path not in measured][
        -config.checked :
    ]
    if not others:
        raise UserError(
            f"{measured[0]} is the only image; expected another one to calibrate the integers on"
        )
    shown = [formats.read_scan(path) for path in others]
    prepared = [
        segment.prepare_inputs(scan, size, metadata).astype(np.float32) / 255 for scan in shown
    ]
    write_int8(out_dir / "unet.onnx", out_dir / "unet-int8.onnx", prepared)
    split = Path(config.model).with_name("split.csv").is_file()
    source = (
        Path(config.images).name
        if config.images
        else "of the split.csv beside the model"
        if split
        else "phantoms"
    )
    agreement = compare(model, metadata, out_dir, paths)
    precisions, count = precision_check.measure_precisions(
        out_dir / "unet.onnx", metadata, measured
    )
    files = sorted(
        path for path in out_dir.rglob("*") if path.is_file() and path.name != "manifest.json"
    )
    manifest = {
        "facts": metadata,
        "model_sha256": checksum(Path(config.model)),
        "sha256": {path.relative_to(out_dir).as_posix(): checksum(path) for path in files},
        "agreement": {"images": len(paths), **agreement},
        "precisions": {utils.kind_of_cpu(): {**precisions, "images": f"{count}, {source}"}},
    }
    for name, share in agreement.items():
        print(
            f"{name:22} {share:.4%} of the pixels as {config.model} has them, {len(paths)} images"
        )
    precision_check.print_precisions(precisions)
    if min(agreement["saved_model"], agreement["onnx"]) < 0.9999:
        raise UserError(
            f"{out_dir}: a format's masks are not those of {config.model}; do not serve it"
        )
    with atomic(out_dir / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=2))
    print(
        f"{out_dir}: unet/1 for TensorFlow Serving, unet.onnx for ONNX Runtime and OpenVINO, manifest.json"
    )
    return manifest


if __name__ == "__main__":
    utils.run_script(export, Config)
