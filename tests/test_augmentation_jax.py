"""Batches made on the device are those of albumentations: each step beside its own, and all
together by their mean.
"""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from dataset import augmentation_jax
from dataset.augmentation import AMOUNTS
from dataset.batches import Batches, Shard
from dataset.cache import Dataset
from imaging.labels import Classes

jax = pytest.importorskip("jax")
A = pytest.importorskip("albumentations")


@pytest.fixture(scope="module")
def scene():
    """A picture (64, 96, 1) and a mask (64, 96, 2) of two discs, smooth enough to be resampled
    alike, uint8.
    """
    y, x = np.mgrid[:64, :96].astype(np.float32)
    masks = [
        1 / (1 + np.exp(np.hypot(x - cx, y - cy) - r)) for cx, cy, r in ((30, 28, 14), (64, 36, 18))
    ]
    picture = 40 + 60 * masks[0] + 120 * masks[1] + 20 * np.sin(x / 9) * np.cos(y / 7)
    return np.uint8(picture)[..., None], np.uint8(255 * np.stack(masks, -1))


def close(found, expected, inside=0, mean=1.5, most=8):
    """Compare in grey levels of 255, without `inside` pixels at the border."""
    cut = np.s_[inside : -inside or None, inside : -inside or None]
    apart = np.abs(255 * np.asarray(found)[cut] - expected[cut].astype(np.float32))
    assert apart.mean() < mean and apart.max() < most, (apart.mean(), apart.max())


@pytest.mark.parametrize("flips", [False, True])
def test_geometry_is_albumentations(scene, flips):
    steps = A.Affine(
        scale={"x": (1.2, 1.2), "y": (0.9, 0.9)},
        translate_px={"x": (7, 7), "y": (-4, -4)},
        rotate=(25, 25),
        p=1,
    )
    start = scene[0][:, ::-1] if flips else scene[0]
    expected = A.Compose([steps])(image=np.ascontiguousarray(start))["image"]
    moved = np.array([1.2, 0.9]), np.deg2rad(25), np.array([7, -4])
    found = augmentation_jax.warp(scene[0] / 255.0, flips, *moved, np.zeros((2, 64, 96)))
    close(found, expected, inside=2)


def test_displacements_are_albumentations(scene):
    from albumentations.augmentations.geometric.functional import generate_displacement_fields

    noise = np.float32(np.random.default_rng(3).uniform(-1, 1, (2, 64, 96)))
    again = SimpleNamespace(uniform=lambda *_, size: noise)
    shape = (64, 96)
    theirs = generate_displacement_fields(shape, 60, 6, False, (0, 0), again, "uniform")
    # Theirs blurs both planes as one tall one, so that they touch.
    ours = 60 * np.asarray(augmentation_jax.smooth_noise(noise))
    np.testing.assert_allclose(ours[0][:40], theirs[0][:40], atol=1e-3)
    np.testing.assert_allclose(ours[1][24:], theirs[1][24:], atol=1e-3)
    assert np.abs(ours).max() > 1


@pytest.mark.parametrize(("radius", "sigma"), [(1, 0.7), (1, 2.5), (2, 0.7), (2, 2.5)])
def test_blur_is_albumentations(scene, radius, sigma):
    taps = 2 * radius + 1
    step = A.GaussianBlur(blur_limit=(taps, taps), sigma_limit=(sigma, sigma), p=1)
    close(
        augmentation_jax.blur(scene[0] / 255.0, radius, sigma),
        A.Compose([step])(image=scene[0])["image"],
        mean=0.8,
        most=2,
    )


@pytest.mark.parametrize("scale", [0.4, 0.55, 0.8])
def test_coarseness_is_albumentations(scene, scale):
    expected = A.Compose([A.Downscale(scale_range=(scale, scale), p=1)])(image=scene[0])["image"]
    found = 255 * np.asarray(augmentation_jax.downscale(scene[0] / 255.0, scale))
    assert np.mean(np.abs(found - expected) < 1) > 0.97


@pytest.fixture
def dataset(scene):
    rows = np.concatenate([part.reshape(1, -1) for part in scene], axis=1)
    rows = np.concatenate([rows, 255 - rows, rows // 2])
    return Dataset(rows, np.arange(3), np.arange(3), (64, 96), 1, Classes("a,b"), pd.DataFrame())


@pytest.mark.slow
@pytest.mark.parametrize("strength", list(AMOUNTS))
def test_on_average_both_do_the_same(dataset, strength):
    """Over many draws: grey levels and area, their mean and spread, and where the mask lies."""
    found = {}
    dataset = replace(dataset, classes=Classes("left,right"))
    for place in (Batches, augmentation_jax.DeviceBatches):
        batches = place(dataset, np.arange(1), 400, strength, at_least=400)
        pictures, masks = map(np.asarray, batches[0])
        levels, areas = pictures.mean((1, 2, 3)), masks[..., 1].mean((1, 2))
        x = (masks[..., 1] * np.arange(96)).mean((1, 2)) / areas
        rough = np.abs(np.diff(pictures, axis=1)).mean((1, 2, 3))
        found[place] = np.array(
            [[f(one) for f in (np.mean, np.std)] for one in (levels, areas, x, rough)]
        )
    ours, theirs = found[augmentation_jax.DeviceBatches], found[Batches]
    error = 4 * theirs[:, 1:] * (2 / 400) ** 0.5  # of a difference of means, and roughly of spreads
    assert (np.abs(ours - theirs) < error).all(), (ours, theirs)


@pytest.mark.parametrize("names", [["a", "b"], ["left", "right"]])
def test_without_augmentation_they_are_equal(dataset, names):
    dataset = replace(dataset, classes=Classes(",".join(names)))
    for strength, epoch in (("none", 0), ("none", 3), ("", 0)):
        rows, more = np.array([2, 0]), {"at_least": 3 if strength else 0}
        pair = [
            place(dataset, rows, 2, strength, **more)
            for place in (Batches, augmentation_jax.DeviceBatches)
        ]
        for batches in pair:
            batches.epoch = epoch
        assert len(pair[0]) == len(pair[1]) == (2 if strength else 1)
        for i in range(len(pair[0])):
            for one, other in zip(pair[0][i], pair[1][i], strict=True):
                assert isinstance(other, jax.Array)
                np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_sees_the_same_images(dataset):
    first, again, other = (
        augmentation_jax.DeviceBatches(dataset, np.arange(3), 3, "mild", seed=seed)
        for seed in (0, 0, 1)
    )
    for batches in (first, again, other):
        batches.epoch = 4
    pictures = [np.asarray(batches[0][0]) for batches in (first, again, other)]
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()
    first.on_epoch_end()
    assert (np.asarray(first[0][0]) != pictures[0]).any()


def test_it_is_for_one_process_with_jax_and_a_gpu_that_holds_the_images(dataset, monkeypatch):
    gpu = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 8 * dataset.rows.nbytes})
    small = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2 * dataset.rows.nbytes})
    monkeypatch.setattr(augmentation_jax.keras.backend, "backend", lambda: "jax")
    assert not augmentation_jax.fits_on_device(dataset, "mild", Shard())  # as there is no GPU here
    for devices, strength, share, expected in (
        ([gpu], "mild", Shard(), True),
        ([gpu], "none", Shard(), True),
        ([gpu], "strong", Shard(), False),
        ([gpu], "mild", Shard(0, 2, 2), False),
        ([small], "mild", Shard(), False),
    ):
        monkeypatch.setattr(jax, "devices", lambda devices=devices: devices)
        assert augmentation_jax.fits_on_device(dataset, strength, share) == expected
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert not augmentation_jax.fits_on_device(
        replace(dataset, neighbours=1), "mild", Shard()
    )  # three times as large
    monkeypatch.setattr(augmentation_jax.keras.backend, "backend", lambda: "tensorflow")
    assert not augmentation_jax.fits_on_device(dataset, "mild", Shard())


@pytest.mark.slow
@pytest.mark.compiled
def test_a_network_learns_from_them(tmp_path, monkeypatch):
    """As on a GPU, but for what computes."""
    code = f"""
import train
from dataset.batches import Batches
train.PHANTOMS = 40
train.fits_on_device = lambda *_: True
Batches.make = None  # the threads' work
small = dict(image_size=64, filters=4, depth=3, epochs=12)
log = train.train(train.Config(**small, out_dir={str(tmp_path)!r}))
print("validation Dice", log.val_dice.max())
"""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.85, done.stdout


@pytest.mark.slow
@pytest.mark.compiled
def test_nan_stops_where_the_loss_is_read_beside_the_steps(discs, tmp_path, script, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    small = "--image-size 32 --filters 2 --depth 2 --epochs 2 --learning-rate 1e30"
    done = script(tmp_path, "train.py", "--data-dir", discs, *small.split())
    assert done.returncode == 2 and "the loss became nan in epoch 1" in done.stderr, done.stderr
    assert not (tmp_path / "files" / "model.h5").exists()
