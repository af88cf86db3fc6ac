"""The optimizer is what its sources say, on any backend."""

import gc

import keras
import numpy as np
import pytest

from model import build_unet
from training.optimizer import Muon, WarmupCosine, make_optimizer


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_learning_rate_is_that_of_keras_own_schedule(warmup):
    peak, ours = 4e-3, WarmupCosine(4e-3, warmup, 90)
    start = (
        {"initial_learning_rate": 0.0, "warmup_target": peak}
        if warmup
        else {"initial_learning_rate": peak}
    )
    theirs = keras.optimizers.schedules.CosineDecay(decay_steps=90, warmup_steps=warmup, **start)
    steps = [0, 1, 5, 9, 10, 50, 99, 100, 120]
    np.testing.assert_allclose(
        [float(ours(step)) for step in steps], [float(theirs(step)) for step in steps], atol=1e-8
    )


def test_a_convolutions_step_is_orthogonal_and_as_large_as_adams():
    kernel = keras.Variable(np.zeros((3, 3, 4, 8)), dtype="float32")
    gradient = (
        np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32) ** 3
    )  # directions of unlike size
    optimizer = Muon(1.0, weight_decay=0.0)
    optimizer.build([kernel])
    optimizer.apply([keras.ops.convert_to_tensor(gradient)])
    step = -keras.ops.convert_to_numpy(kernel).reshape(36, 8)
    sizes = np.linalg.svd(step, compute_uv=False) / (0.2 * 36**0.5)
    assert (
        sizes.min() > 0.6 and sizes.max() < 1.3
    )  # Newton and Schulz's five rounds leave that much
    assert np.sum(step * gradient.reshape(36, 8)) > 0


def test_its_steps_are_keras_own_on_the_matrix():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 3, 4, 8)), rng.normal(size=(4, 3, 3, 4, 8))
    results = []
    for shape, make in ((start.shape, Muon), ((36, 8), keras.optimizers.Muon)):
        kernel = keras.Variable(start.reshape(shape), dtype="float32")
        more = {"adam_weight_decay": 0.1} if make is keras.optimizers.Muon else {}
        optimizer = make(0.02, weight_decay=0.1, **more)
        optimizer.build([kernel])
        for gradient in gradients:
            optimizer.apply(
                [keras.ops.convert_to_tensor(gradient.reshape(shape).astype(np.float32))]
            )
        results.append(keras.ops.convert_to_numpy(kernel).reshape(36, 8))
    assert np.abs(results[0] - start.reshape(36, 8)).max() > 0.03
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (8, 16, 16)])
def test_only_convolutions_inside_the_network_are_matrices(size):
    optimizer = make_optimizer(1e-3, 100)
    weights = build_unet((*size, 1), classes=3, filters=4, depth=1).trainable_variables
    by_adamw = {
        weight.path.partition("/")[0] for weight in weights if optimizer._should_use_adamw(weight)
    }
    kernels = {weight.path for weight in weights if not optimizer._should_use_adamw(weight)}
    assert "probabilities" in by_adamw and "encoder0_norm1" in by_adamw
    assert len(kernels) == 7 and all("conv" in path or "_up" in path for path in kernels)
    depthwise = keras.layers.DepthwiseConv2D(3)
    depthwise.build((None, 8, 8, 4))
    assert optimizer._should_use_adamw(depthwise.kernel)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's graphs")
def test_a_finished_training_leaves_no_graph():
    """Keras's own optimizer on TensorFlow keeps the graph of each training in memory."""

    def count_graphs() -> int:
        gc.collect()
        return sum(type(one).__name__ == "FuncGraph" for one in gc.get_objects())

    before = count_graphs()
    model = build_unet((16, 16, 1), filters=2, depth=1)
    model.compile(make_optimizer(0.01, 10), "binary_crossentropy")
    model.train_on_batch(np.zeros((2, 16, 16, 1)), np.zeros((2, 16, 16, 1)))
    assert count_graphs() > before
    del model
    keras.utils.clear_session()
    assert count_graphs() == before
