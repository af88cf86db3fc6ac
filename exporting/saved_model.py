"""Write a SavedModel for TensorFlow Serving.

The signature `encoded` does what imaging/preprocess.py does, in TensorFlow's operations.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from imaging import preprocess
from imaging.labels import Classes
from inference.sampler import Sampler

if TYPE_CHECKING:
    import keras

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue, as in OpenCV


def write_saved_model(network: "keras.Model", metadata: dict[str, Any], path: Path) -> None:
    """Write the signatures to the folder `path`; see also `why_not_encoded`."""
    import keras
    import tensorflow as tf

    def segment_file(content: Any) -> Any:
        prepared, shape = prepare_in_graph(content, metadata)
        return mask_png_in_graph(network(prepared[None], training=False)[0], shape, metadata)

    def encoded(contents: Any) -> dict[str, Any]:
        return {"mask_png": tf.map_fn(segment_file, contents, fn_output_signature=tf.string)}

    def serving_default(images: Any) -> dict[str, Any]:
        return {"probabilities": network(images, training=False)}

    archive = keras.export.ExportArchive()
    archive.track(network)
    images = tf.TensorSpec(network.input_shape, tf.float32, name="images")
    archive.add_endpoint("serving_default", serving_default, [images])
    if not why_not_encoded(metadata):
        contents = tf.TensorSpec([None], tf.string, name="image_bytes")
        archive.add_endpoint("encoded", encoded, [contents])
    archive.write_out(str(path), verbose=False)


def why_not_encoded(metadata: dict[str, Any]) -> str:
    """Say why the signature `encoded` does not fit a network; "" if it does."""
    if Sampler.from_metadata(metadata).patches:
        return "the network takes patches, which the client cuts and blends"
    if metadata.get("window") == "file":
        return "only DICOM files propose a window, and TensorFlow does not read them"
    if metadata["channels"] not in (1, 3) or metadata.get("channel_endings"):
        return "the channels of an image are no grey or colour picture"
    if Classes.from_metadata(metadata).overlap:
        return "classes that overlap do not fit into one PNG"
    return ""


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
    # A single image stands for the slices before and after it, too.
    slices = 1 + 2 * Sampler.from_metadata(metadata).neighbours
    repeated = tf.tile(padded, [1, 1, slices])
    return tf.ensure_shape(repeated, (*size, channels * slices)), shape


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

    The same as `grid.fit_grid`.
    """
    import tensorflow as tf

    shape = tf.cast(shape, tf.float64)
    scale = tf.reduce_min(tf.constant(size, tf.float64) / shape)
    inner = tf.clip_by_value(tf.cast(tf.round(shape * scale), tf.int32), 1, size)
    return inner, (tf.constant(size) - inner) // 2


def resize_in_graph(image: Any, size: Any) -> Any:
    """Resize (H, W, C) float32 like `grid.resize`."""
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
