"""What the scripts share: precision, and the model file.

A model file is plain HDF5 as Keras writes it (architecture and weights, in float32), with one more attribute, `metadata`:
JSON that says how to use it (input size, channels, preparation, class names, threshold, versions, validation Dice).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

import utils


def fuse_normalization(model: keras.Model) -> None:
    """Let batch normalization train by TensorFlow's fused kernel on the CPU, where Keras makes a dozen passes.

    The layers stay Keras's own, and so does what is saved. Nothing changes elsewhere: there XLA fuses the passes.
    """
    if utils.jit_compile():
        return
    import tensorflow as tf

    def normalize(
        layer: keras.Layer, stock: Callable, inputs: Any, training: bool = False, mask: Any = None
    ) -> Any:
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
        for average, new in (
            (layer.moving_mean, mean),
            (layer.moving_variance, variance * (count - 1) / count),
        ):
            average.assign(average * layer.momentum + new * (1 - layer.momentum))
        return tf.cast(outputs, inputs.dtype)

    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.call = partial(normalize, layer, layer.call)
