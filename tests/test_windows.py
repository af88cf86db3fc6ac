"""Grids, samplers and windows: what the network sees of a scan, and the way back."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.grid import fit_grid, orientation_of, resample_planes, turns_between
from imaging.scan import Scan
from inference import segment
from inference.sampler import Sampler
from inference.windows import Windows, read_window, window_starts
from model import build_unet
from utils import UserError

RNG = np.random.default_rng(0)


def random_scan(*shape, **more):
    return Scan(np.random.default_rng(1).integers(0, 256, (*shape, 1), dtype=np.uint8), **more)


def pixel_network(dimensions):
    """A network that looks at one pixel: windows and the whole give the same."""
    inputs = keras.Input((*[None] * dimensions, 1))
    convolution = keras.layers.Conv3D if dimensions == 3 else keras.layers.Conv2D
    bias = keras.initializers.Constant(-0.3)  # so that no pixel is at 0.5
    layer = convolution(
        1, 1, activation="sigmoid", kernel_initializer="ones", bias_initializer=bias
    )
    outputs = layer(inputs)
    return keras.Model(inputs, outputs)


def metadata_of(sampler, **more):
    return {
        "classes": ["x"],
        "channels": 1,
        "threshold": 0.5,
        "image_size": sampler.size[-2:],
        **sampler.metadata,
        **more,
    }


# ----------------------------------------------------------------------------------------- grids


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_resampled_slices_keep_a_ramp_and_the_mean(count, wanted):
    """A ramp stays one, between the middles of its first and last slices; so does the mean."""
    ramp = (np.full((2, 3), i + 0.5) / count for i in range(count))
    found = np.stack(list(resample_planes(ramp, count, wanted)))[:, 0, 0]
    places = (np.arange(wanted) + 0.5) / wanted
    inside = (places >= 0.5 / count) & (places <= 1 - 0.5 / count)
    if wanted >= count or count % wanted == 0:
        np.testing.assert_allclose(found[inside], places[inside], atol=1e-6)
    assert found.mean() == pytest.approx(0.5, abs=1e-6)


def test_only_the_slices_that_are_needed_are_read():
    read = []

    def planes():
        for i in range(10):
            read.append(i)
            yield np.full((1, 1), float(i))

    resampled = resample_planes(planes(), 10, 20)
    next(resampled)
    assert read == [0, 1]


def test_orientations_are_named_and_undone():
    affine = np.array([[0, 0, -1, 5], [0, 2, 0, 7], [3, 0, 0, 9], [0, 0, 0, 1.0]])
    assert orientation_of(affine) == "SAL"
    names = ["".join(letters) for letters in itertools.product("LR", "AP", "IS")]
    names = {"".join(order) for name in names for order in itertools.permutations(name)}
    assert len(names) == 48
    array = RNG.random((2, 3, 4, 1))
    sampler = Sampler((4, 4, 4), patches=True, orientation="SPL")
    for name in names:
        axes, flips = turns_between("SPL", name)
        stored = array.transpose(*axes, 3)[
            tuple(slice(None, None, -1 if flip else None) for flip in flips)
        ]
        grid = sampler.grid(Scan(stored, affine=affine_of(name)))
        np.testing.assert_array_equal(grid.orient(stored), array)
        np.testing.assert_array_equal(grid.restore_orientation(array), stored)


def affine_of(name):
    """An affine whose slices, rows and columns run to the directions of a name."""
    directions = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(name):
        affine[directions[letter], axis] = 1 if letter in "RAS" else -1
    return affine


def test_a_volume_in_any_of_48_orientations_gives_the_same_mask():
    keras.utils.set_random_seed(0)
    network = build_unet_3d()
    sampler = Sampler((8, 16, 16), patches=True, orientation="SPL")
    array = np.random.default_rng(2).integers(0, 256, (12, 20, 18, 1), dtype=np.uint8)
    member = network, metadata_of(sampler)
    expected = None
    for letters in itertools.product("IS", "AP", "LR"):
        for name in map("".join, itertools.permutations(letters)):
            axes, flips = turns_between("SPL", name)
            turn = tuple(slice(None, None, -1 if flip else None) for flip in flips)
            stored = array.transpose(*axes, 3)[turn]
            found = segment.segment_scans([member], [Scan(stored, affine=affine_of(name))])[0].ids
            back = found[turn].transpose(*np.argsort(axes))
            expected = back if expected is None else expected
            np.testing.assert_array_equal(back, expected)
    assert 0 < expected.mean() < 1


def build_unet_3d():
    """A small network of volumes that decides about half of the voxels each way."""
    inputs = keras.Input((8, 16, 16, 1))
    x = keras.layers.Conv3D(4, 3, padding="same", activation="relu")(inputs)
    x = keras.layers.Conv3D(1, 3, padding="same")(x)
    outputs = keras.layers.Activation("sigmoid")(x)
    network = keras.Model(inputs, outputs)
    network.layers[-2].set_weights([10 * one for one in network.layers[-2].get_weights()])
    return network


def test_working_resolution_is_that_of_the_spacing():
    scan = random_scan(10, 30, 40, spacing_mm=(3.0, 1.0, 1.01))
    sampler = Sampler((8, 16, 16), patches=True, spacing=(1.5, 2.0, 1.0))
    grid = sampler.grid(scan)
    assert grid.canvas == (20, 15, 40) and not grid.is_native  # 1 % is the same
    flat = Sampler((16, 16), patches=True, spacing=(1.5, 2.0, 1.0)).grid(scan)
    assert flat.canvas == (10, 15, 40)
    with pytest.raises(
        UserError, match="does not say how large its pixels are; the network works at 1.5"
    ):
        sampler.grid(random_scan(10, 30, 40))


# --------------------------------------------------------------------------------------- windows


@given(st.integers(1, 200), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_windows_cover_every_pixel_and_overlap_by_half(length, side):
    starts = window_starts(length, side)
    if length <= side:
        assert starts == [-((side - length) // 2)]
        return
    assert starts[0] == 0 and starts[-1] == length - side
    assert all(0 < step <= max(1, np.ceil(side / 2)) for step in np.diff(starts))


def test_a_window_that_is_larger_than_the_case_holds_it_in_its_middle():
    case = np.ones((1, 3, 4, 1), np.uint8)
    window = Windows(case, Sampler((8, 8), patches=True))[0]
    assert window.sum() == 12 and window[2:5, 2:6].all()


def test_the_slices_before_and_after_are_channels():
    case = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 4, 4, 1), np.uint8)
    sampler = Sampler((4, 4), neighbours=1)
    found = [read_window(case, (z, 0, 0), sampler)[0, 0].tolist() for z in range(3)]
    assert found == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler((32, 48)),
        Sampler((32, 48), patches=True),
        Sampler((64, 128), patches=True),
        Sampler((8, 16, 32), patches=True),
        Sampler((3, 32, 16), patches=True),
        Sampler((16, 80, 80), patches=True),
    ],
    ids=str,
)
def test_windows_of_a_network_that_looks_at_one_pixel_are_exact(sampler):
    """Nothing counts twice and nothing is lost, whatever the windows are."""
    network, scan = pixel_network(sampler.dimensions), random_scan(11, 70, 61)
    options = segment.Options(batch_size=3, probabilities=True)
    found = segment.segment_scans([(network, metadata_of(sampler))], [scan], options)[0]
    whole = Sampler((70, 61))
    expected = segment.segment_scans([(pixel_network(2), metadata_of(whole))], [scan], options)[0]
    assert found.probs.shape == (11, 70, 61, 1)
    if sampler.patches:
        np.testing.assert_allclose(found.probs, expected.probs, atol=1e-5)
        np.testing.assert_array_equal(found.ids, expected.ids)
    else:  # scaled to fit and back: the same but for what averages lose
        assert np.abs(found.probs - expected.probs).mean() < 0.1


def test_one_window_is_the_whole_image():
    """A network of patches on an image of a patch's size gives what a network of whole images
    gives, to the last digit.
    """
    network = build_unet((32, 32, 1), filters=2, depth=2)
    scan = random_scan(2, 32, 32)
    options = segment.Options(probabilities=True)
    results = []
    for patches in (False, True):
        sampler = Sampler((32, 32), patches)
        member = network, metadata_of(sampler)
        results.append(segment.segment_scans([member], [scan], options)[0].probs)
    np.testing.assert_array_equal(*results)


def test_bands_are_those_of_the_whole_and_hold_one_window_s_height():
    """What is finished is given away: the image is never held as probabilities."""
    case = RNG.integers(0, 256, (1, 300, 40, 1), dtype=np.uint8)
    windows = Windows(case, Sampler((32, 32), patches=True))
    bands = list(windows.blend(np.float32(windows[i]) for i in range(len(windows))))
    assert max(len(band.probs) for band in bands) <= 32
    np.testing.assert_allclose(np.concatenate([band.probs for band in bands]), case[0], atol=1e-3)
    assert [band.row for band in bands] == np.cumsum([0, *(len(b.probs) for b in bands)])[
        :-1
    ].tolist()


def test_mirrored_windows_are_averaged_in_3d():
    sampler = Sampler((8, 16, 16), patches=True)
    network, scan = build_unet_3d(), random_scan(8, 20, 30)
    options = segment.Options(uncertainty=True, probabilities=True)
    plain = segment.segment_scans([(network, metadata_of(sampler))], [scan], options)[0]
    both = segment.segment_scans([(network, metadata_of(sampler, mirror=True))], [scan], options)[0]
    assert plain.uncertainty.shape == (8, 20, 30) and 0 < plain.disagreement < 1
    np.testing.assert_allclose(
        np.abs(plain.probs - both.probs)[..., 0], both.uncertainty, atol=1e-5
    )


def test_a_volume_is_cleaned_as_a_whole():
    sampler = Sampler((8, 16, 16), patches=True)
    network = pixel_network(3)
    network.layers[-1].set_weights([np.full((1, 1, 1, 1, 1), 100.0), np.full(1, -50.0)])
    pixels = np.zeros((8, 16, 16, 1), np.uint8)
    pixels[1:7, 2:8, 2:8] = 255  # an object in several slices, with a hole
    pixels[3, 5, 5] = 0
    pixels[5, 12:14, 12:14] = 255  # a small part
    member = network, metadata_of(sampler, clean=[1])
    found = segment.segment_scans([member], [Scan(pixels)])[0].ids
    expected = np.zeros((8, 16, 16), np.uint8)
    expected[1:7, 2:8, 2:8] = 1
    np.testing.assert_array_equal(found, expected)


def test_old_models_are_read():
    assert Sampler.from_metadata({"image_size": [32, 48]}) == Sampler((32, 48))
    old = {"image_size": [32, 48], "neighbours": 1}
    assert Sampler.from_metadata(old) == Sampler((32, 48), neighbours=1)
    sampler = Sampler((8, 16, 16), True, 0, (1.0, 2.0, 2.0), "SPL")
    assert Sampler.from_metadata(metadata_of(sampler)) == sampler
    assert fit_grid((1, 10, 20), (32, 48)).inner == (1, 24, 48)


def test_a_thin_volume_of_another_plane_is_not_refused():
    """Seven sagittal slices at the network's own spacing, turned to axial ones."""
    affine = np.eye(4)[[2, 1, 0, 3]]
    scan = Scan(np.zeros((7, 64, 64, 1), np.uint8), (1.0, 1.0, 1.0), affine=affine)
    sampler = Sampler((16, 16, 16), True, spacing=(1.0, 1.0, 1.0), orientation="SPL")
    assert sorted(sampler.grid(scan).inner) == [7, 64, 64]
