"""Batches and augmentation."""

import numpy as np
import pandas as pd
import pytest
from conftest import images_of, masks_of

from dataset.batches import Batches
from dataset.cache import Case, Dataset, find_places
from dataset.kind import count_mixed, find_kind, mirrored_axes
from imaging.labels import Classes, mirrored_channels
from inference.sampler import Sampler


def make_dataset(pictures, ids):
    ids = np.asarray(ids)
    return join(
        pictures, np.stack([255 * (ids == i) for i in range(1, max(1, ids.max()) + 1)], axis=-1)
    )


NAMES = ["left lung", "right lung"]


def join(pictures, masks):
    pictures, masks = np.asarray(pictures, np.uint8), np.asarray(masks, np.uint8)
    classes = Classes(",".join(NAMES) if masks.shape[-1] > 1 else "disc")
    cases = [
        Case(picture[None], mask[None], find_places(mask[None]))
        for picture, mask in zip(pictures, masks, strict=True)
    ]
    sampler = Sampler(pictures.shape[1:3])
    return Dataset(cases, sampler, pictures.shape[-1], classes, pd.DataFrame())


def test_image_and_mask_are_augmented_alike():
    """The image shows its own mask: wherever both went, they still agree."""
    y, x = np.mgrid[:64, :64]
    disc = ((y - 40) ** 2 + (x - 24) ** 2 < 14**2).astype(np.uint8)
    dataset = make_dataset([30 + 180 * disc[..., None]] * 24, [disc] * 24)
    batch = Batches(dataset, dataset.cover(np.arange(24)), 24, "mild", seed=0)
    pictures, masks = batch[0]
    assert pictures.dtype == masks.dtype == np.float32 and pictures.shape == masks.shape == (
        24,
        64,
        64,
        1,
    )
    assert masks.min() == pictures.min() == 0 and masks.max() == 1 and pictures.max() <= 1
    moved = 0
    for picture, mask in zip(pictures[..., 0], np.round(masks[..., 0]), strict=True):
        middle = (picture[mask == 1].mean() + picture[mask == 0].mean()) / 2
        overlap = (
            2 * ((picture > middle) & (mask == 1)).sum() / ((picture > middle).sum() + mask.sum())
        )
        assert overlap > 0.9
        moved += np.mean(mask != disc) > 0.01
    assert moved > 20


def test_a_mirrored_left_lung_becomes_a_right_one():
    picture = np.full((32, 32, 1), 10, np.uint8)
    picture[:, 4:14], picture[:, 18:28] = 100, 220
    ids = np.zeros((32, 32), np.uint8)
    ids[:, 4:14], ids[:, 18:28] = 2, 1  # the patient's right lung on the image's left
    batch = Batches(
        make_dataset([picture] * 40, [ids] * 40),
        [(number, 0, 0, 0) for number in range(40)],
        40,
        "mild",
    )
    pictures, masks = batch[0]
    columns = np.arange(32)
    mirrored = 0
    for image, mask in zip(pictures[..., 0], masks, strict=True):
        left, right = ((mask[..., k].sum(0) * columns).sum() / mask[..., k].sum() for k in (1, 2))
        assert left > right, "the left lung must stay on the image's right"
        mirrored += image[:, :16].mean() > image[:, 16:].mean()
    assert 8 < mirrored < 32


def test_only_what_lies_alike_on_both_sides_is_mirrored():
    """Objects above the middle, on either side of it: images are mirrored left to right alone."""
    ids = []
    for x in (8, 16, 24, 16):
        y, columns = np.mgrid[:32, :32]
        ids.append(((y - 8) ** 2 + (columns - x + 0.5) ** 2 < 25).astype(np.uint8))
    dataset = make_dataset(np.zeros((4, 32, 32, 1)), ids)
    assert mirrored_axes(dataset, range(4)) == (0, 2)  # a slice has no sides
    assert mirrored_axes(dataset, [0]) == (0,)
    assert mirrored_axes(dataset, []) == (0, 1, 2)
    lungs = np.zeros((2, 32, 32), np.uint8)
    lungs[:, 4:28, 3:12], lungs[:, 4:28, 20:29] = 1, 2
    assert mirrored_axes(make_dataset(np.zeros((2, 32, 32, 1)), lungs), [0, 1]) == (0, 1, 2)


def test_objects_that_are_bright_in_some_images_and_dark_in_others_are_found():
    disc = np.zeros((32, 32), np.uint8)
    disc[8:20, 8:20] = 1
    bright = np.uint8(60 + 120 * disc)[..., None]
    for dark, faint, expected in ((0, 0, False), (1, 0, False), (2, 0, True), (0, 9, False)):
        images = [bright] * 30 + [255 - bright] * dark + [bright * 0 + 7] * faint
        dataset = make_dataset(np.array(images), [disc] * len(images))
        assert find_kind(dataset, range(len(images))).inverted == expected
    assert not find_kind(dataset, []).inverted


def test_a_dark_class_beside_a_bright_one_inverts_nothing():
    """Lung is dark and bone is bright; some slices show one of them only."""
    disc = np.zeros((32, 32), np.uint8)
    disc[8:20, 8:20] = 1
    images = [np.uint8(100 + sign * 80.0 * disc)[..., None] for sign in (-1, 1)] * 10
    dataset = make_dataset(np.array(images), [disc, 2 * disc] * 10)
    assert not find_kind(dataset, range(20)).inverted
    assert count_mixed(dataset, range(20)) == ("", 0, 0)


def test_what_a_mirror_makes_of_class_names():
    assert mirrored_channels(["lung"]).tolist() == [0, 1]
    assert mirrored_channels(["left lung", "heart", "Right lung"]).tolist() == [0, 3, 2, 1]
    for names in (
        ["leftlung", "rightlung"],
        ["LeftLung", "RightLung"],
        ["lung_left", "lung_right"],
    ):
        assert mirrored_channels(names).tolist() == [0, 2, 1]
    for names in (["left lung", "heart"], ["leftlung"], ["heart", "lungLeft"]):
        assert mirrored_channels(names) is None
    assert mirrored_channels(["bright spot"]).tolist() == [0, 1]


def test_batches_follow_from_seed_and_epoch_alone():
    rng = np.random.default_rng(0)
    dataset = make_dataset(rng.integers(0, 256, (10, 32, 32, 1)), rng.integers(0, 2, (10, 32, 32)))
    one, two = (Batches(dataset, dataset.cover(np.arange(10)), 4, "mild", seed=5) for _ in range(2))
    assert len(one) == 3 and len(one[2][0]) == 2
    np.testing.assert_array_equal(two[1][0], one[1][0])
    first = one[0][0]
    one.on_epoch_end()
    two.epoch = 1
    assert not np.array_equal(first, one[0][0])
    np.testing.assert_array_equal(two[2][0], one[2][0])


def test_validation_is_neither_shuffled_nor_augmented():
    rng = np.random.default_rng(0)
    dataset = make_dataset(rng.integers(0, 256, (5, 32, 32, 1)), rng.integers(0, 3, (5, 32, 32)))
    pictures, masks = Batches(dataset, dataset.cover(np.array([4, 2])), 4)[0]
    np.testing.assert_allclose(pictures, images_of(dataset)[[4, 2]] / 255, rtol=1e-6)
    assert masks.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(masks[..., 1:], masks_of(dataset)[[4, 2]] / 255)
    np.testing.assert_allclose(masks.sum(-1), 1)


def test_a_border_pixel_has_shares_of_several_classes():
    masks = np.zeros((1, 8, 8, 2), np.uint8)
    masks[0, 0, 0] = 51, 102
    dataset = join(np.zeros((1, 8, 8, 1)), masks)
    batch = Batches(dataset, dataset.cover(np.arange(1)), 1)[0][1]
    np.testing.assert_allclose(batch[0, 0, 0], [0.4, 0.2, 0.4], atol=1e-6)


@pytest.mark.parametrize("strength", ["mild", "strong", "free"])
def test_augmented_masks_keep_borders_within_pixels(strength):
    y, x = np.mgrid[:64, :64]
    disc = (y - 30) ** 2 + (x - 30) ** 2 < 14**2
    dataset = make_dataset(np.full((8, 64, 64, 1), 99), [disc] * 8)
    masks = Batches(dataset, dataset.cover(np.arange(8)), 8, strength)[0][1]
    assert ((masks > 0.05) & (masks < 0.95)).sum() > 8 * 30


def test_few_images_are_shown_again_in_an_epoch():
    dataset = make_dataset(
        [np.full((8, 8, 1), i, np.uint8) for i in range(3)], [np.zeros((8, 8), np.uint8)] * 3
    )
    batches = Batches(dataset, dataset.cover(np.arange(3)), 4, "none", at_least=10)
    shown = np.concatenate([np.round(255 * batches[i][0][:, 0, 0, 0]) for i in range(len(batches))])
    assert len(batches) == 3 and len(shown) == 10
    assert sorted(np.bincount(shown.astype(int)).tolist()) == [3, 3, 4]


def test_strong_augmentation_changes_image_and_mask_together():
    """A bright square stays under its mask. Sometimes the picture is inverted."""
    picture, ids = np.full((64, 64, 1), 40, np.uint8), np.zeros((64, 64), np.uint8)
    picture[20:44, 20:44], ids[20:44, 20:44] = 220, 1
    dataset = make_dataset([picture] * 60, [ids] * 60)
    pictures, masks = Batches(dataset, dataset.cover(np.arange(60)), 60, "strong", seed=3)[0]
    apart = [x[m > 0].mean() - np.median(x[m == 0]) for x, m in zip(pictures, masks, strict=True)]
    assert 40 < sum(value > 0 for value in apart) < 60
    assert len({int(mask.sum()) for mask in masks}) > 20


def test_the_steps_of_an_augmentation_are_drawn_apart(tmp_path):
    """A flip says nothing about the exposure. With one seed all steps would draw the same."""
    picture = np.tile(np.arange(64, 128, dtype=np.uint8), (64, 1))
    dataset = make_dataset([picture[..., None]] * 256, [np.zeros((64, 64), np.uint8)] * 256)
    batches = Batches(dataset, dataset.cover(np.arange(256)), 256, "mild")
    pictures = batches[0][0][..., 0]
    mirrored = pictures[:, :, :32].mean((1, 2)) > pictures[:, :, 32:].mean((1, 2))
    brightness = pictures[:, 16:48, 16:48].mean((1, 2))
    assert 90 < mirrored.sum() < 166
    assert abs(np.corrcoef(mirrored, np.abs(brightness - np.median(brightness)))[0, 1]) < 0.25
