import keras
import numpy as np
import pytest
from keras import ops

from benchmarks import figures
from model import build_unet
from utils import UserError


def test_the_papers_size_has_the_papers_parameters():
    """31 million: Ronneberger's network, its convolutions' biases replaced by batch
    normalization's two vectors.
    """
    model = build_unet((512, 512, 1), 1, filters=64, depth=4)
    trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert trained == 31_036_481
    assert model.get_layer("bottleneck_relu2").output.shape == (None, 32, 32, 1024)


@pytest.mark.parametrize(("classes", "activation"), [(1, "sigmoid"), (3, "softmax")])
def test_output_is_a_probability_per_pixel_and_class(classes, activation):
    model = build_unet((32, 48, 3), classes, filters=4, depth=3)
    probs = np.asarray(model(np.random.default_rng(0).random((2, 32, 48, 3), np.float32)))
    assert probs.shape == (2, 32, 48, classes)
    assert model.layers[-1].activation.__name__ == activation
    assert probs.min() >= 0 and probs.max() <= 1
    if classes > 1:
        np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("side", [100, 8])
def test_a_size_that_cannot_be_halved_is_a_clear_error(side):
    with pytest.raises(
        ValueError, match=rf"image size {side} is not a multiple of 16 \(2\*\*depth\); take \d+"
    ):
        build_unet((side, 128, 1))


def test_any_size_may_be_left_open():
    model = build_unet((None, None, 1), filters=2, depth=2)
    assert model(np.zeros((1, 20, 36, 1), np.float32)).shape == (1, 20, 36, 1)


@pytest.mark.parametrize(
    ("shape", "depth", "spacing", "bottom"),
    [
        ((16, 32, 32, 1), 4, None, (4, 2, 2)),
        ((40, 56, 40, 2), 3, None, (5, 7, 5)),
        ((24, 128, 128, 1), 4, (5, 1, 1), (6, 8, 8)),
    ],
)
def test_volumes_are_halved_as_their_sizes_and_spacing_allow(shape, depth, spacing, bottom):
    model = build_unet(shape, 3, filters=2, depth=depth, spacing=spacing)
    assert model.get_layer("bottleneck_relu2").output.shape == (None, *bottom, 2 * 2**depth)
    assert model.output.shape == (None, *shape[:-1], 3)
    with pytest.raises(UserError, match="image size 24 is not a multiple of 16"):
        build_unet((16, 24, 32, 1))


def test_a_volume_of_equal_slices_is_segmented_like_its_slice():
    """The 2-D network's kernels in the middle slice of the 3-D ones, thick slices: no slice sees
    another one, and both give the same probabilities.
    """
    plane = build_unet((16, 16, 1), 2, filters=4, depth=2)
    volume = build_unet((3, 16, 16, 1), 2, filters=4, depth=2, spacing=(99, 1, 1))
    for one, other in zip(plane.layers, volume.layers, strict=True):
        assert one.name == other.name
        fitting = zip(one.get_weights(), other.get_weights(), strict=True)
        other.set_weights([small.reshape(large.shape) for small, large in fitting])
    x = np.random.default_rng(0).random((2, 3, 16, 16, 1), np.float32)
    slices = plane.predict_on_batch(x.reshape(6, 16, 16, 1)).reshape(2, 3, 16, 16, 2)
    np.testing.assert_allclose(volume.predict_on_batch(x), slices, atol=1e-5)


def test_output_is_float32_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_unet((16, 16, 1), filters=2, depth=1)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.layers[1].compute_dtype == "bfloat16"
    assert model.output.dtype == "float32"


def test_the_picture_is_drawn_from_the_built_graph(tmp_path):
    model = build_unet((32, 32, 1), filters=2, depth=3)
    assert figures.skip_connections(model) == [
        (f"encoder{i}_relu2", f"decoder{i}_skip") for i in (2, 1, 0)
    ]
    assert len(figures.feature_maps(model)) == 1 + 2 * 3 + 2 + 3 * 3 + 1
    figures.draw_network(model, tmp_path / "deep" / "u.png")
    assert (tmp_path / "deep" / "u.png").stat().st_size > 10_000


def test_every_pixel_sees_far_and_every_weight_learns():
    """The gradient reaches all weights, and a corner's output depends on the far side of the
    image.
    """
    keras.utils.set_random_seed(0)
    model = build_unet((32, 32, 1), filters=4, depth=3)
    model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy")
    before = [ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    x = np.random.default_rng(0).random((4, 32, 32, 1), np.float32)
    model.train_on_batch(x, (x > 0.5).astype(np.float32))
    moved = [
        not np.allclose(old, weight)
        for old, weight in zip(before, model.trainable_weights, strict=True)
    ]
    assert all(moved)
    far = x.copy()
    far[:, 20:, 20:] = 1 - far[:, 20:, 20:]
    corner, moved_corner = (model.predict_on_batch(one)[:, 0, 0] for one in (x, far))
    assert np.abs(corner - moved_corner).max() > 1e-6
