"""Images and volumes are augmented from one description."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from scipy import ndimage

from dataset.augmentation import (
    AMOUNTS,
    STEPS,
    Augmentation,
    Kind,
    basic_steps,
    own_transforms,
    strong_steps,
)
from imaging.labels import Classes
from utils import UserError

A = pytest.importorskip("albumentations")

SIZE = (24, 40, 32)


def ball(centre, radius, size=SIZE):
    """A ball with a soft border: float (D, H, W) in [0, 1]."""
    place = np.stack(np.mgrid[tuple(slice(side) for side in size)], axis=-1)
    return 1 / (1 + np.exp(2 * (np.linalg.norm(place - centre, axis=-1) - radius)))


def phantom(count):
    """Balls in a volume: image (D, H, W, count), a ball bright in each channel, and its masks."""
    centres = np.random.default_rng(0).uniform(0.4, 0.6, (count, 3)) * SIZE
    balls = np.stack([ball(centre, 7) for centre in centres], axis=-1)
    return np.uint8(40 + 160 * balls), np.uint8(255 * balls)


# Mean grey levels of the first seeds, as they were before volumes were augmented.
EARLIER = {
    ("mild", "lung"): [28.1, 10.4, 32.4, 53.0, 3.3, 18.2],
    ("mild", "left,right"): [35.6, 12.0, 41.3, 64.0, 4.1, 26.8],
    ("mild", "left"): [49.0, 28.8, 87.4, 24.4, 71.2, 39.6],
}


@pytest.mark.parametrize(("strength", "names"), EARLIER)
def test_images_are_augmented_as_before(strength, names):
    y, x = np.mgrid[:64, :96].astype(np.float32)
    classes = Classes(names)
    channels = {1: 1, 2: 3}[len(classes.names)]
    discs = [255 / (1 + np.exp(np.hypot(x - 30 - 8 * i, y - 28) - 14)) for i in range(2)]
    grey = 40 + 0.4 * discs[0] + 20 * np.sin(x / 9) * np.cos(y / 7)
    image = np.uint8(np.stack([grey + 10 * i for i in range(channels)], axis=-1))
    masks = np.uint8(np.stack(discs[: len(classes.names)], axis=-1))
    augment = Augmentation(classes, strength)
    found = [augment(image, masks, seed)[0].mean() for seed in range(6)]
    np.testing.assert_allclose(found, EARLIER[strength, names], atol=0.3)


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("strength", AMOUNTS)
def test_masks_follow_a_volume_of_many_channels(strength, isotropic, patches):
    image, masks = phantom(6)
    augment = Augmentation(Classes("a,b,c,d,e,f"), strength, Kind(3, isotropic, patches))
    moved = 0
    for seed in range(12):
        found, where = augment(image, masks, seed)
        assert found.shape == image.shape and where.shape == masks.shape
        assert found.dtype == where.dtype == np.uint8
        for channel in range(6):
            bright = ndimage.uniform_filter(found[..., channel].astype(float), 3)
            inside, outside = where[..., channel] > 200, where[..., channel] < 50
            middle = (bright[inside].mean() + bright[outside].mean()) / 2
            right = np.mean(bright[inside] > middle), np.mean(bright[outside] < middle)
            assert min(right) > 0.9, (seed, channel, right)
        moved += np.mean(np.abs(where.astype(int) - masks) > 99) > 0.003
    assert moved > 5


@pytest.mark.parametrize("isotropic", [False, True])
def test_a_mirrored_left_side_becomes_a_right_one(isotropic):
    left, right = (ball((12, 20, x), 6) for x in (23, 8))
    image = np.uint8(30 + 60 * left + 180 * right)[..., None]
    masks = np.uint8(255 * np.stack([left, right], axis=-1))
    augment = Augmentation(Classes("left,right"), "mild", Kind(3, isotropic))
    mirrored = 0
    for seed in range(24):
        found, where = augment(image, masks, seed)
        places = [np.argwhere(where[..., k] > 127)[:, 2].mean() for k in range(2)]
        assert places[0] > places[1]
        mirrored += found[..., 16:, 0].mean() > found[..., :16, 0].mean()
    assert 6 < mirrored < 18


def edges_seen(classes, axes):
    """Say along which axes (depth, height, width) a volume gets mirrored."""
    gradient = np.stack(np.mgrid[tuple(slice(side) for side in SIZE)], axis=-1) * 5
    volume = np.uint8(gradient)
    augment = Augmentation(Classes(classes), "mild", Kind(3, patches=True, mirrored_axes=axes))
    seen = set()
    for seed in range(24):
        changed, _ = augment(volume, np.zeros((*SIZE, len(Classes(classes).names)), np.uint8), seed)
        for axis, side in enumerate(SIZE):
            first, last = (np.take(changed[..., axis], i, axis).mean() for i in (0, side - 1))
            if last < first:
                seen.add(axis)
    return seen


def test_volumes_are_mirrored_along_the_axes_that_are_named():
    for axes in ((), (0,), (1, 2), (0, 1, 2)):
        assert edges_seen("tumour", axes) == set(axes)
    assert edges_seen("left", (0, 2)) == {0}


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_result_follows_from_the_seed_alone(dimensions):
    image, masks = (array[12] if dimensions == 2 else array for array in phantom(2))
    augment = Augmentation(Classes("a,b"), "free", Kind(dimensions, isotropic=True))
    before = image.copy()
    first = [augment(image, masks, seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda seed: augment(image, masks, seed), reversed(range(6))))
    for one, other in zip(first, reversed(again), strict=True):
        for part, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, same)
    assert len({found.tobytes() for found, _ in first}) == 6
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("number", range(7))
def test_every_step_changes_images_and_volumes(number):
    _, noise, _, _ = own_transforms(Classes("a"))
    step = list(basic_steps(AMOUNTS["free"], 180, noise, cv2.BORDER_CONSTANT).values())[number]
    image, masks = phantom(1)
    pipeline = A.Compose([step], seed=1, mask_interpolation=cv2.INTER_LINEAR)
    changed = pipeline(images=image, masks=masks)
    while np.array_equal(changed["images"], image):  # each step has its probability
        changed = pipeline(images=image, masks=masks)
    same = np.array_equal(changed["masks"], masks)
    assert same == (number > 1), "the first two steps move things"
    step.p, found = 1, image[12]
    while np.array_equal(found, image[12]):
        found = pipeline(image=image[12], mask=masks[12])["image"]


def test_each_slice_has_noise_of_its_own():
    _, noise, _, _ = own_transforms(Classes("a"))
    flat = np.full((*SIZE, 2), 128, np.uint8)
    found = A.Compose([noise((0.05, 0.05), p=1)])(images=flat)["images"].astype(float) - 128
    assert 11 < found.std() < 14
    assert abs(np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("strength", ["mild", "free", "strong"])
def test_a_reflection_comes_into_patches_and_black_into_whole_images(strength, dimensions):
    if (strength, dimensions) == ("strong", 3):
        return
    full = np.full((*SIZE, 1), 255, np.uint8)
    full = full[0] if dimensions == 2 else full
    least = {}
    for patches in (False, True):
        augment = Augmentation(Classes("a"), strength, Kind(dimensions, patches=patches))
        least[patches] = min(augment(full, full, seed)[1].min() for seed in range(12))
    assert least == {False: 0, True: 255}


def test_cubes_are_turned_about_every_axis():
    top = np.zeros((*SIZE, 1), np.uint8)
    top[:12] = 255
    changed = {}
    for isotropic in (False, True):
        augment = Augmentation(Classes("left"), "free", Kind(3, isotropic, patches=True))
        found = [augment(top, top, seed)[1] for seed in range(12)]
        changed[isotropic] = [np.abs(one.astype(int) - top).mean() > 5 for one in found]
    assert not any(changed[False])
    assert 4 <= sum(changed[True]) <= 11


@pytest.mark.parametrize(
    ("names", "dimensions", "isotropic", "axes", "degrees"),
    [
        ("a", 2, False, (1, 2), 180),
        ("a", 2, False, (2,), 30),
        ("a", 3, False, (1, 2), 180),
        ("a", 3, True, (1, 2), 30),
        ("a", 3, True, (0, 1, 2), 180),
        # Half a turn would put the left lung to the right under its own name.
        ("left lung,right lung", 2, False, (0, 1, 2), 30),
    ],
)
def test_only_what_may_be_mirrored_is_turned_over(names, dimensions, isotropic, axes, degrees):
    classes = Classes(names)
    augment = Augmentation(classes, "free", Kind(dimensions, isotropic, mirrored_axes=axes))
    (affine,) = [step for step in augment.pipeline if isinstance(step, A.Affine)]
    assert affine.rotate == (-degrees, degrees)


def test_a_volume_of_one_slice_is_augmented():
    image = np.full((1, 32, 32, 1), 99, np.uint8)
    augment = Augmentation(Classes("a"), "free", Kind(3, True, mirrored_axes=(0, 1, 2)))
    for seed in range(60):
        assert augment(image, image, seed)[0].shape == image.shape


def test_images_are_inverted_only_where_objects_are_bright_in_some_and_dark_in_others():
    image, masks = (array[12] for array in phantom(1))
    for inverted in (False, True):
        augment = Augmentation(Classes("a"), "mild", Kind(inverted=inverted))
        found = [augment(image, masks, seed) for seed in range(30)]
        dark = sum(one[where > 200].mean() < one[where < 50].mean() for one, where in found)
        assert 3 < dark < 20 if inverted else dark == 0


def test_strengths_that_are_not_for_volumes_or_change_nothing():
    with pytest.raises(UserError, match="expected none, mild or free for volumes"):
        Augmentation(Classes("a"), "strong", Kind(3))
    image, masks = phantom(1)
    for augment in (
        Augmentation(Classes("a"), "none", Kind(3)),
        Augmentation(Classes("a"), "none"),
    ):
        for part, same in zip(augment(image, masks, 1), (image, masks), strict=True):
            np.testing.assert_array_equal(part, same)


def test_a_step_can_be_left_out():
    _, noise, texture, curve = own_transforms(Classes("a"))
    names = {*strong_steps(noise, texture, curve, cv2.BORDER_CONSTANT)}
    names |= {*basic_steps(AMOUNTS["free"], 180, noise, cv2.BORDER_CONSTANT)}
    assert names == STEPS
    image = np.full((32, 32, 1), 20, np.uint8)
    for strength, is_changed in (("mild", True), ("mild-invert", False)):
        rest = "-".join(sorted(STEPS - {"invert"}))
        augment = Augmentation(Classes("a"), f"{strength}-{rest}", Kind(inverted=True))
        found = [augment(image, image, seed)[0].mean() for seed in range(20)]
        assert (max(found) > 200) == is_changed
    assert Augmentation(Classes("a"), "none-noise")(image, image, 0)[0] is image
    with pytest.raises(UserError, match="leaves out typo; expected some of affine"):
        Augmentation(Classes("a"), "strong-typo")
