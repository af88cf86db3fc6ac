"""The twin that trains gives what the network itself would."""

import keras
import numpy as np
import pytest

import utils
from model import build_unet
from training.twin import MatrixUpConvolution, ReshapedPooling, make_twin


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow's CPU device needs it"
)
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", [(32, 32, 1), (4, 16, 16, 1)])
def test_fused_normalization_trains_as_keras_does(tmp_path, precision, shape):
    """8 and 16 channels take different kernels. Losses, moving averages and the file are those of
    Keras's own.
    """
    keras.config.set_dtype_policy(precision)
    rng = np.random.default_rng(0)
    x = rng.random((4, *shape), np.float32)
    y = np.float32(x > 0.5)
    results, averages = [], []
    try:
        for fuse in (False, True):
            keras.utils.set_random_seed(0)
            model = build_unet(shape, filters=8, depth=1)
            trained = make_twin(model) if fuse else model
            trained.compile(keras.optimizers.SGD(0.05), "binary_crossentropy", jit_compile=False)
            results.append([float(trained.train_on_batch(x, y)) for _ in range(5)])
            averages.append(model.get_layer("bottleneck_norm1").moving_variance.numpy())
    finally:
        utils.set_precision("float32")
    exact = precision == "float32"
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5 if exact else 1e-2)
    np.testing.assert_allclose(averages[0], averages[1], rtol=1e-4 if exact else 5e-2)
    model.save(tmp_path / "m.h5")
    loaded = keras.models.load_model(tmp_path / "m.h5", compile=False)
    assert type(loaded.get_layer("bottleneck_norm1")) is keras.layers.BatchNormalization
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-5 if exact else 0.03)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow's CPU device needs it"
)
def test_fused_normalization_leaves_frozen_layers_alone():
    model = build_unet((16, 16, 1), filters=2, depth=1)
    twin = make_twin(model).get_layer("encoder0_norm1")
    layer = model.get_layer("encoder0_norm1")
    layer.trainable = False
    x = np.random.default_rng(0).random((2, 16, 16, 2), np.float32)
    before = layer.moving_mean.numpy()
    np.testing.assert_allclose(twin(x, training=True), layer(x, training=False))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow's CPU device needs it"
)
def test_the_fused_twin_shares_all_weights():
    model = build_unet((16, 16, 1), filters=2, depth=1)
    twin = make_twin(model)
    assert {id(one) for one in twin.variables} == {id(one) for one in model.variables}


@pytest.fixture
def gpu(monkeypatch):
    """The twin for JAX on a GPU; it computes on the processor here, by any backend."""
    monkeypatch.setattr(utils, "gpus", lambda: ["gpu:0"])
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")


@pytest.mark.parametrize(
    "shape",
    [
        (32, 32, 1),
        (6, 16, 16, 1),  # too few slices to be halved
        pytest.param(
            (16, 16, 16, 1),
            marks=pytest.mark.skipif(
                keras.backend.backend() == "tensorflow", reason="too many axes for TensorFlow"
            ),
        ),
    ],
)
def test_a_gpus_twin_trains_as_keras_does(gpu, shape):
    rng = np.random.default_rng(0)
    x = rng.random((4, *shape), np.float32)
    y = np.float32(x > 0.5)
    results, weights = [], []
    for exchange in (False, True):
        keras.utils.set_random_seed(0)
        model = build_unet(shape, filters=4, depth=2)
        trained = make_twin(model) if exchange else model
        trained.compile(keras.optimizers.SGD(0.05), "binary_crossentropy", jit_compile=False)
        results.append([float(trained.train_on_batch(x, y)) for _ in range(3)])
        weights.append([np.asarray(one) for one in model.trainable_weights])
    kinds = {type(layer) for layer in trained.layers}
    assert {MatrixUpConvolution, ReshapedPooling} <= kinds
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_gpus_twin_keeps_what_it_does_not_know(gpu):
    """Pooling with overlap, sides that cannot be halved, up-convolutions with an activation."""
    inputs = keras.Input((9, 8, 3))
    x = keras.layers.MaxPooling2D(3, strides=2, padding="same")(inputs)
    x = keras.layers.MaxPooling2D(2)(x)
    x = keras.layers.Conv2DTranspose(4, 2, strides=2, activation="relu")(x)
    x = keras.layers.Conv2DTranspose(4, 3, strides=2)(x)
    model = keras.Model(inputs, x)
    twin = make_twin(model)
    assert [type(one) for one in twin.layers] == [type(one) for one in model.layers]


def test_a_gpus_twin_shares_all_weights(gpu):
    model = build_unet((16, 16, 1), filters=2, depth=1)
    twin = make_twin(model)
    assert {id(one) for one in twin.variables} == {id(one) for one in model.variables}
