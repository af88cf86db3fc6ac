"""Compare the masks of exported formats with those of the model file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from exporting.images import read_middle
from imaging import pictures
from inference import engines, postprocess
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
    formats = {
        "saved_model": SavedModel(saved),
        "onnx": engines.open_onnxruntime(onnx_file.read_bytes()),
    }
    # They average with the mirrored image themselves.
    facts = metadata | {"mirror": False}
    shares: dict[str, list[float]] = {name: [] for name in formats}
    for path in paths:
        scan = read_middle(path, metadata)
        options = Options(batch_size=1, probabilities=True)
        expected = segment_scans([(model, metadata)], [scan], options)[0]
        for name, network in formats.items():
            ids = segment_scans([(network, facts)], [scan], Options(batch_size=1))[0].ids
            shares[name].append(float(np.mean(ids == expected.ids)))
        if "encoded" in saved.signatures and path.suffix.lower() in PICTURES:
            plain = postprocess.decide(expected.probs[0], metadata | {"clean": None})
            ids = read_encoded(saved, path, len(metadata["classes"]))
            if ids is not None:
                shares.setdefault("saved_model, encoded", []).append(float(np.mean(ids == plain)))
    return {name: float(np.mean(values)) for name, values in shares.items()}


class SavedModel:
    """A SavedModel, which computes probabilities as a Keras model does."""

    def __init__(self, saved: Any) -> None:
        self.saved = saved

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Turn windows (N, …, C) float32 into probabilities (N, …, K)."""
        import tensorflow as tf

        answer = self.saved.signatures["serving_default"](images=tf.constant(images))
        return answer["probabilities"].numpy()


def read_encoded(saved: Any, path: Path, num_classes: int) -> np.ndarray | None:
    """Let a SavedModel segment an image file: class ids (H, W).

    Returns None for what TensorFlow reads otherwise, or not at all: a tag that turns the picture, a
    CMYK JPEG.
    """
    import tensorflow as tf

    content = path.read_bytes()
    if pictures.orientation_of(content) != 1:
        return None
    try:
        answer = saved.signatures["encoded"](image_bytes=tf.constant([content]))
    except tf.errors.InvalidArgumentError:
        return None
    png = np.frombuffer(answer["mask_png"].numpy()[0], np.uint8)
    mask = cv2.imdecode(png, cv2.IMREAD_UNCHANGED)
    return mask // 255 if num_classes == 1 else mask
