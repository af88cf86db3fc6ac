"""Batch normalization that trains by TensorFlow's fused kernel, where Keras makes a dozen passes.

Only TensorFlow's CPU device needs it: elsewhere XLA fuses the passes. The model that is saved
keeps Keras's own layers.
"""

import keras
from keras import KerasTensor

import utils


class FusedBatchNormalization(keras.layers.Layer):
    """Train a `keras.layers.BatchNormalization`, whose weights it uses, by the fused kernel.

    (N, H, W, C) → (N, H, W, C); the slices of volumes are put one below the other for it. Outside
    of training it calls the layer itself.
    """

    def __init__(self, layer: keras.layers.BatchNormalization) -> None:
        super().__init__(name=layer.name, dtype=layer.dtype_policy)
        self.layer = layer

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return input_shape

    def call(
        self, inputs: KerasTensor, training: bool = False, mask: KerasTensor | None = None
    ) -> KerasTensor:
        layer = self.layer
        if not (training and layer.trainable):
            return layer(inputs, training=training)
        import tensorflow as tf

        # oneDNN's kernel for bfloat16 is slow unless the channels come in sixteens.
        dtype = inputs.dtype if inputs.shape[-1] % 16 == 0 else tf.float32
        shape, planes = tf.shape(inputs), inputs
        if inputs.shape.rank == 5:
            planes = tf.reshape(inputs, (shape[0], shape[1] * shape[2], shape[3], shape[4]))
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=tf.cast(planes, dtype),
            scale=layer.gamma.value,
            offset=layer.beta.value,
            mean=tf.zeros(0),
            variance=tf.zeros(0),
            epsilon=layer.epsilon,
        )
        # The kernel divides by (count - 1), Keras by count.
        count = tf.cast(tf.reduce_prod(shape[:-1]), tf.float32)
        self._update(layer.moving_mean, mean)
        self._update(layer.moving_variance, variance * (count - 1) / count)
        return tf.reshape(tf.cast(outputs, inputs.dtype), shape)

    def _update(self, average: keras.Variable, new: KerasTensor) -> None:
        momentum = self.layer.momentum
        average.assign(average * momentum + new * (1 - momentum))


def _fuse_layer(layer: keras.Layer) -> keras.Layer:
    is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
    return FusedBatchNormalization(layer) if is_batch_norm else layer


def fuse_batch_norm(model: keras.Model) -> keras.Model:
    """Return a model for training that shares all layers and weights with `model`.

    It is `model` itself where the fused kernel is not needed.
    """
    if utils.jit_compile():  # not TensorFlow on a CPU
        return model
    return keras.models.clone_model(model, clone_function=_fuse_layer)
