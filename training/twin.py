"""A twin of the network for training: the same weights, by operations that its device does faster.

The model that is saved keeps Keras's own layers. What each exchange gains: docs/speed.md.
"""

import math
from typing import Any

import keras
from keras import KerasTensor, ops

import utils


class FusedBatchNormalization(keras.layers.Layer):
    """Train a `keras.layers.BatchNormalization`, whose weights it uses, by one fused kernel.

    For TensorFlow's CPU device, where Keras makes a dozen passes; XLA fuses them. (N, H, W, C) →
    (N, H, W, C); the slices of volumes are put one below the other for it. Outside of training it
    calls the layer itself.
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


class ReshapedPooling(keras.layers.Layer):
    """Max pooling without overlap as the maximum of an axis: its gradient is not scattered.

    (N, H, W, C) → (N, H/2, W/2, C). Pixels that share the maximum share the gradient.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(name=layer.name, dtype=layer.dtype_policy)
        self.factors = layer.pool_size

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        batch, *sides, channels = input_shape
        return batch, *(a // b for a, b in zip(sides, self.factors, strict=True)), channels

    def call(self, inputs: KerasTensor) -> KerasTensor:
        _, *sides, channels = self.compute_output_shape(inputs.shape)
        blocks = []
        for side, factor in zip(sides, self.factors, strict=True):
            blocks += [side, factor]
        split = ops.reshape(inputs, (-1, *blocks, channels))  # (N, H/2, 2, W/2, 2, C)
        return ops.max(split, axis=range(2, 2 * len(sides) + 1, 2))


class MatrixUpConvolution(keras.layers.Layer):
    """A 2x2 up-convolution, whose weights it uses, as a product of matrices.

    (N, H, W, C) → (N, 2H, 2W, F). cuDNN computes its gradient with an old kernel.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(name=layer.name, dtype=layer.dtype_policy)
        self.layer = layer

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return self.layer.compute_output_shape(input_shape)

    def call(self, inputs: KerasTensor) -> KerasTensor:
        layer, strides = self.layer, self.layer.strides
        *_, filters, channels = layer.kernel.shape  # ([d,] h, w, F, C)
        matrix = ops.reshape(layer.kernel, (math.prod(strides) * filters, channels))
        product = ops.matmul(inputs, ops.transpose(ops.cast(matrix, inputs.dtype)))
        sides = inputs.shape[1:-1]
        product = ops.reshape(product, (-1, *sides, *strides, filters))  # (N, H, W, 2, 2, F)
        count = len(sides)
        order = [0]
        for axis in range(1, count + 1):
            order += [axis, axis + count]
        product = ops.transpose(product, (*order, 2 * count + 1))  # (N, H, 2, W, 2, F)
        outputs = ops.reshape(product, (-1, *self.compute_output_shape(inputs.shape)[1:]))
        return outputs + ops.cast(layer.bias, outputs.dtype)


def _for_tensorflow_cpu(layer: keras.Layer) -> keras.Layer:
    is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
    return FusedBatchNormalization(layer) if is_batch_norm else layer


def _for_jax_gpu(layer: keras.Layer) -> keras.Layer:
    if isinstance(layer, keras.layers.MaxPooling2D | keras.layers.MaxPooling3D):
        sides = layer.input.shape[1:-1]
        is_whole = None not in sides and layer.padding == "valid"
        if is_whole and tuple(layer.pool_size) == tuple(layer.strides):
            is_whole = all(a % b == 0 for a, b in zip(sides, layer.pool_size, strict=True))
            return ReshapedPooling(layer) if is_whole else layer
    if isinstance(layer, keras.layers.Conv2DTranspose | keras.layers.Conv3DTranspose):
        is_plain = layer.use_bias and layer.activation is keras.activations.linear
        is_plain = is_plain and None not in layer.input.shape[1:]
        if is_plain and tuple(layer.kernel_size) == tuple(layer.strides):
            return MatrixUpConvolution(layer)
    return layer


def make_twin(model: keras.Model) -> keras.Model:
    """Return a model for training that shares all layers and weights with `model`.

    It is `model` itself where no exchange was measured to be faster.
    """
    if utils.gpus() and keras.backend.backend() == "jax":
        return keras.models.clone_model(model, clone_function=_for_jax_gpu)
    if utils.jit_compile():  # JAX on a CPU, TensorFlow on a GPU
        return model
    return keras.models.clone_model(model, clone_function=_for_tensorflow_cpu)
