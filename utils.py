"""What the scripts share: precision, and the model file.

A model file is plain HDF5 as Keras writes it (architecture and weights, in float32), with one more attribute, `facts`:
JSON that says how to use it (input size, channels, preparation, class names, threshold, versions, validation Dice).
"""

import json
import os
import platform
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import h5py
import keras
import numpy as np

import engines
import images
from images import UserError

THRESHOLD = 0.5  # of a single class's probability
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


# --------------------------------------------------------------------------------------------------------- precision


def gpus() -> list[str]:
    """List the GPUs that Keras computes on."""
    try:
        return keras.distribution.list_devices("gpu")
    except RuntimeError:  # how JAX says that there is none
        return []


def has_amx() -> bool:
    """Tell whether the processor multiplies bfloat16 matrices in hardware.

    AVX512-BF16 alone does not pay: the step takes longer than in float32 (README, "On a GPU workstation").
    """
    return "amx_bf16" in engines.cpu().get("flags", "").split()


def _has_fast_bfloat16() -> bool:
    """Tell whether the device that Keras will use multiplies bfloat16 matrices in hardware."""
    if gpus():
        if keras.backend.backend() == "jax":
            import jax

            return float(jax.devices()[0].compute_capability) >= 8
        import tensorflow as tf

        gpu = tf.config.list_physical_devices("GPU")[0]
        return tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) >= (8, 0)
    return has_amx()


def set_precision(name: str) -> str:
    """Set Keras's dtype policy from auto, float32, bfloat16 or float16; return the precision that was set.

    auto is bfloat16 where the hardware multiplies it (AMX processors; GPUs since Ampere), else float32. Raises
    UserError for another name.
    """
    if name not in ("auto", *PRECISIONS):
        raise UserError(f"precision is {name!r}; expected auto, {', '.join(PRECISIONS)}")
    if name == "auto":
        name = "bfloat16" if _has_fast_bfloat16() else "float32"
    keras.config.set_dtype_policy(PRECISIONS[name])
    return name


def jit_compile() -> bool | str:
    """Choose XLA for Keras's `compile`: its convolutions are slow on TensorFlow's CPU device, fast elsewhere."""
    return "auto" if gpus() or keras.backend.backend() != "tensorflow" else False


def fuse_normalisation(model: keras.Model) -> None:
    """Let batch normalisation train by TensorFlow's fused kernel on the CPU, where Keras makes a dozen passes.

    The layers stay Keras's own, and so does what is saved. Nothing changes elsewhere: there XLA fuses the passes.
    """
    if jit_compile():
        return
    import tensorflow as tf

    def normalise(layer: keras.Layer, stock: Callable, inputs: Any, training: bool = False, mask: Any = None) -> Any:
        if not (training and layer.trainable):
            return stock(inputs, training=training, mask=mask)
        # oneDNN's kernel for bfloat16 is slow unless channels come in sixteens.
        kind = inputs.dtype if inputs.shape[-1] % 16 == 0 else tf.float32
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=tf.cast(inputs, kind),
            scale=layer.gamma.value,
            offset=layer.beta.value,
            mean=tf.zeros(0),
            variance=tf.zeros(0),
            epsilon=layer.epsilon,
        )
        count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:-1]), tf.float32)
        # The kernel's variance is that of a sample, Keras's that of the whole.
        for average, new in ((layer.moving_mean, mean), (layer.moving_variance, variance * (count - 1) / count)):
            average.assign(average * layer.momentum + new * (1 - layer.momentum))
        return tf.cast(outputs, inputs.dtype)

    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.call = partial(normalise, layer, layer.call)


def device_name() -> str:
    """Name what Keras computes on, for people."""
    return ", ".join(gpus()) or f"{os.cpu_count()} CPU cores"


# -------------------------------------------------------------------------------------------------------- model file


def make_facts(names: list[str], image_size: tuple[int, int], channels: int, **more: Any) -> dict[str, Any]:
    """Collect what a user of the model must know; `more` is kept as it is (validation Dice, epoch)."""
    versions = {module.__name__: module.__version__ for module in (keras, np, cv2, h5py)}
    versions |= {"python": platform.python_version(), "backend": keras.backend.backend()}
    return {
        "image_size": list(image_size),
        "channels": channels,
        "preparation": images.PREPARATION,
        "classes": names,
        "threshold": THRESHOLD,
        "versions": versions,
        **more,
    }


def save_model(model: keras.Model, path: str | Path, facts: dict[str, Any]) -> None:
    """Write model and facts to one HDF5 file, whole or not at all; mixed precision is written as float32."""
    with images.atomic(path) as temporary:
        model.save(temporary, include_optimizer=False)
        with h5py.File(temporary, "r+") as file:
            config = file.attrs["model_config"]
            for policy in ("mixed_bfloat16", "mixed_float16"):
                config = config.replace(policy, "float32")
            file.attrs["model_config"] = config
            file.attrs["facts"] = json.dumps(facts)


def load_facts(path: str | Path) -> dict[str, Any]:
    """Read the facts of a model file. Raises UserError if it is not one."""
    if not Path(path).is_file():
        raise UserError(f"no model at {path}; run `python train.py` first, or name one with --model")
    try:
        with h5py.File(path) as file:
            return json.loads(file.attrs["facts"])
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is not a model written by train.py ({error})") from None


def add_facts(path: str | Path, **more: Any) -> None:
    """Add facts to a model file, or change them; a file that holds them stays untouched."""
    old = load_facts(path)
    facts = old | more
    if facts == old:
        return
    with images.atomic(path) as temporary:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+") as file:
            file.attrs["facts"] = json.dumps(facts)


def copy_weights(path: str | Path, model: keras.Model) -> None:
    """Copy the weights of a model file into `model`, layer by layer, as far as names and shapes are the same; say so.

    Raises UserError if nothing fits.
    """
    source = {layer.name: layer for layer in load_model(path)[0].layers}
    copied, other = [], []
    for layer in model.layers:
        if not layer.weights:
            continue
        known = source[layer.name].get_weights() if layer.name in source else []
        fits = [weight.shape for weight in known] == [tuple(weight.shape) for weight in layer.weights]
        if fits:
            layer.set_weights(known)
        (copied if fits else other).append(layer.name)
    if not copied:
        raise UserError(
            f"{path}: none of its weights fit {model.name}; give the architecture and filters it was made with"
        )
    print(f"{path}: weights of {len(copied)} layers taken over" + (f", anew: {', '.join(other)}" if other else ""))


def load_model(path: str | Path) -> tuple[keras.Model, dict[str, Any]]:
    """Read a model file: the model, in float32 and not compiled, and its facts. Raises UserError if it is not one."""
    facts = load_facts(path)
    if facts["preparation"] != images.PREPARATION:
        raise UserError(f"{path} expects images prepared by {facts['preparation']!r}, not {images.PREPARATION!r}")
    return keras.models.load_model(path, compile=False), facts
