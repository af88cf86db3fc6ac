"""Compare the masks of exported formats with those of the model file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from exporting.images import prepare, read_few_slices
from inference import engines, postprocess
from inference.sampler import Sampler
from inference.segment import Options, segment_scans

if TYPE_CHECKING:
    import keras

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")  # TensorFlow decodes no others


def measure_agreement(
    model: "keras.Model",
    metadata: dict[str, Any],
    onnx_file: Path,
    saved_model: Path,
    paths: Sequence[Path],
) -> dict[str, float]:
    """Return the share of pixels in which each format's masks are those of the model file.

    Masks are compared as `predict.py` writes them. Those of image files are compared without
    cleaning, which TensorFlow does not do.
    """
    import tensorflow as tf

    saved = tf.saved_model.load(saved_model)
    onnx = engines.open_onnxruntime(onnx_file.read_bytes())
    shares: dict[str, list[float]] = {"saved_model": [], "onnx": []}
    for path in paths:
        scan = read_few_slices(path, metadata)
        grid = Sampler.from_metadata(metadata).grid(scan.slice(0))
        options = Options(batch_size=1, probabilities=True)
        expected = segment_scans([(model, metadata)], [scan], options)[0]
        for i, image in enumerate(prepare(scan, metadata)):
            answer = saved.signatures["serving_default"](images=tf.constant(image[None]))
            found = {"saved_model": answer["probabilities"].numpy(), "onnx": onnx.run(image[None])}
            for name, values in found.items():
                ids = postprocess.decide(next(grid.restore(values)), metadata)
                shares[name].append(float(np.mean(ids == expected.ids[i])))
        if "encoded" in saved.signatures and path.suffix.lower() in PICTURES:
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
