"""Volumes end to end: synthetic CT in NIfTI, three classes in HU, trained and predicted."""

import dataclasses

import nibabel
import numpy as np
import pandas as pd
import pytest
from conftest import images_of, masks_of, prepare_to_fit
from nibabel import orientations
from test_train import small  # noqa: F401 (a fixture)

import data
import metrics
import predict
import train
from dataset import loading
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from dataset.reading import read_pair
from imaging import formats, pictures
from imaging.alignment import check_alignment
from imaging.labels import Classes
from inference import segment
from inference.sampler import Sampler
from utils import UserError

CLASSES = "liver,kidney,spine"
SPACING = (1.6, 1.6, 5.0)  # mm, x y z


def ct(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a trunk whose organs are ellipsoids: HU and class ids (left, posterior, up)."""
    rng = np.random.default_rng(seed)
    shape = np.array((96, 80, 14))
    x, y, z = np.mgrid[tuple(map(slice, shape))] / shape[:, None, None, None]

    def ellipsoid(centre, radii):
        centre, radii = rng.normal(centre, 0.02), np.multiply(radii, rng.uniform(0.85, 1.15))
        places = zip((x, y, z), centre, radii, strict=True)
        return sum(((axis - middle) / radius) ** 2 for axis, middle, radius in places) < 1

    hu, ids = np.full(shape, -1000.0), np.zeros(shape, np.uint8)
    hu[ellipsoid((0.5, 0.5, 0.5), (0.46, 0.42, 9))] = rng.normal(30, 5)  # soft tissue
    for number, level, centre, radii in (
        (1, 110, (0.3, 0.4, 0.6), (0.17, 0.22, 0.4)),
        (2, 190, (0.68, 0.6, 0.45), (0.08, 0.12, 0.35)),
        (3, 500, (0.5, 0.78, 0.5), (0.09, 0.09, 9)),
    ):
        inside = ellipsoid(centre, radii)
        hu[inside], ids[inside] = level, number
    return np.round(hu + rng.normal(0, 15, shape)).astype(np.int16), ids


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Twelve volumes as a scanner stores them (to the left, posterior, up); read only."""
    folder = tmp_path_factory.mktemp("ct")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for i in range(12):
        hu, ids = ct(i)
        affine = np.diag((-SPACING[0], -SPACING[1], SPACING[2], 1.0))
        affine[:3, 3] = 70, 60, -30 + i
        nibabel.save(nibabel.Nifti1Image(hu, affine), folder / "images" / f"case{i:02d}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(ids, affine), folder / "masks" / f"case{i:02d}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def trained(volumes, tmp_path_factory):
    """A run on them."""
    folder = tmp_path_factory.mktemp("ct_run")
    config = train.Config(
        data_dir=str(volumes),
        classes=CLASSES,
        window="100,700",
        dimensions="2.5",
        image_size=64,
        depth=3,
        epochs=40,  # at 25 one seed in twelve has not found the kidney yet, whichever normalization
        out_dir=str(folder / "run"),
    )
    train.train(config)
    return folder / "run"


@pytest.mark.slow
def test_a_volume_is_in_one_subset_and_trains_slice_by_slice(trained):
    split = pd.read_csv(trained / "split.csv")
    assert len(split) == 12 and split.image.is_unique


@pytest.mark.slow
def test_volumes_are_found_and_scored_in_millimetres(trained, tmp_path):
    config = predict.Config(model=str(trained / "model.h5"))
    pairs, _ = predict.pairs_to_score(config)
    members = predict.load_members(config)
    table, problems = predict.score_pairs(members, pairs, config.options, tmp_path)
    assert problems == [] and len(table) == len(pairs) >= 2
    assert table.dice.min() >= 0.9
    for name in Classes(CLASSES).names:
        assert table[f"dice: {name}"].mean() >= 0.85, name
    assert (tmp_path / f"{pairs[0].stem}.png").is_file()
    assert set(table.unit) == {"mm"}


def test_distances_are_in_millimetres():
    box = np.zeros((8, 20, 20), np.uint8)
    box[2:5, 5:15, 5:15] = 1
    spacing = SPACING[::-1]  # slices, rows, columns
    for axis, step in enumerate(spacing):
        scores = metrics.score_classes(box, np.roll(box, 1, axis), ["box"], spacing)
        assert scores["hd95"] == pytest.approx(step) and 0 < scores["assd"] < step
        assert metrics.score_classes(box[3:4], np.roll(box[3:4], 1, 2), ["box"], spacing)[
            "hd95"
        ] == pytest.approx(1.6)


@pytest.mark.slow
def test_masks_lie_in_the_world_where_the_object_lies_however_it_is_stored(
    trained, volumes, tmp_path
):
    """One volume in several orientations: one mask in the world, each with its own affine."""
    source = nibabel.load(volumes / "images" / "case00.nii.gz")
    (tmp_path / "in").mkdir()
    for codes in ("RAS", "LPS", "SAR", "PIL", "ASL"):
        turn = orientations.ornt_transform(
            orientations.io_orientation(source.affine), orientations.axcodes2ornt(tuple(codes))
        )
        nibabel.save(source.as_reoriented(turn), tmp_path / "in" / f"{codes}.nii.gz")
    config = predict.Config(
        model=str(trained / "model.h5"), input=str(tmp_path / "in"), output=str(tmp_path / "out")
    )
    predict.main(config)
    world = []
    for path in sorted((tmp_path / "in").iterdir()):
        mask, image = nibabel.load(tmp_path / "out" / path.name), nibabel.load(path)
        assert mask.shape == image.shape
        np.testing.assert_array_equal(mask.affine, image.affine)
        world.append(np.asarray(nibabel.as_closest_canonical(mask).dataobj))
    for other in world[1:]:
        np.testing.assert_array_equal(other, world[0])
    truth = nibabel.as_closest_canonical(nibabel.load(volumes / "masks" / "case00.nii.gz"))
    assert (
        metrics.score_classes(np.asarray(truth.dataobj), world[0], Classes(CLASSES).names)["dice"]
        > 0.9
    )


def test_a_mask_that_lies_elsewhere_is_refused_however_it_is_stored(volumes, tmp_path):
    image, path = volumes / "images" / "case00.nii.gz", tmp_path / "masks" / "mask.nii.gz"
    path.parent.mkdir()
    mask = nibabel.load(volumes / "masks" / "case00.nii.gz")
    nibabel.save(nibabel.as_closest_canonical(mask), path)
    check_alignment(formats.read_scan(image), formats.read_scan(path))
    pair = Pair(image, (path,))
    for change in (
        np.diag((-1, 1, 1, 1)),
        np.array([[1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ):
        nibabel.save(nibabel.Nifti1Image(np.asarray(mask.dataobj), change @ mask.affine), path)
        with pytest.raises(
            UserError, match=r"mask\.nii\.gz: its affine places it up to .* mm away"
        ):
            read_pair(pair, Classes(CLASSES))


def test_neighbours_are_the_slices_before_and_after(volumes):
    pairs, _ = data.find_pairs(volumes)
    dataset, _ = loading.load_pairs(
        pairs[:2], Preprocessing(Classes(CLASSES), Sampler((32, 32)), window="100,700")
    )
    sampler = dataclasses.replace(dataset.sampler, neighbours=1)
    near = dataclasses.replace(dataset, sampler=sampler)
    slices = near.cover([0, 1])
    plain = images_of(dataset)
    assert len(plain) == 28
    pictures, masks = near.take(slices[[0, 5, 13, 14]])
    np.testing.assert_array_equal(
        pictures[1], np.concatenate([plain[4], plain[5], plain[6]], axis=-1)
    )
    np.testing.assert_array_equal(
        pictures[0], np.concatenate([plain[0], plain[0], plain[1]], axis=-1)
    )
    np.testing.assert_array_equal(
        pictures[2], np.concatenate([plain[12], plain[13], plain[13]], axis=-1)
    )
    np.testing.assert_array_equal(
        pictures[3], np.concatenate([plain[14], plain[14], plain[15]], axis=-1)
    )
    np.testing.assert_array_equal(masks, masks_of(dataset)[[0, 5, 13, 14]])
    facts = {"channels": 1, "window": "100,700", "neighbours": 1}
    scan = formats.read_scan(pairs[0].image)
    np.testing.assert_array_equal(
        segment.prepare_inputs(scan, facts | {"image_size": [32, 32]}), near.take(slices[:14])[0]
    )


@pytest.mark.parametrize(
    ("window", "inside"), [("100,700", True), ("", False), ("3000,100", False)]
)
def test_the_window_decides_what_is_distinguished(volumes, window, inside):
    scan = formats.read_scan(sorted((volumes / "images").iterdir())[0])
    prepared = prepare_to_fit(scan, (80, 96), 1, window)
    liver, tissue = (
        prepared[7][..., 0][np.abs(scan.pixels[7][..., 0] - level) < 10].mean()
        for level in (110, 30)
    )
    assert (liver - tissue > 25) == inside


@pytest.mark.slow
@pytest.mark.compiled
def test_sixteen_bits_find_what_eight_bits_lose(tmp_path):
    """The object is 100 grey levels of 65536 brighter than its surroundings: below one of 256."""
    y, x = np.mgrid[:64, :64]
    rng = np.random.default_rng(0)
    for i in range(30):
        centre, radius = rng.uniform(22, 42, 2), rng.uniform(10, 16)
        disc = np.hypot(y - centre[0], x - centre[1]) < radius
        deep = np.uint16(30_010 + 100 * disc + rng.normal(0, 12, disc.shape))
        for bits, pixels in ((16, deep), (8, np.uint8(deep >> 8))):
            pictures.write_picture(tmp_path / f"{bits}" / "images" / f"{i}.png", pixels)
            pictures.write_picture(
                tmp_path / f"{bits}" / "masks" / f"{i}.png", np.uint8(255 * disc)
            )
    dice = {}
    for bits in (16, 8):
        out = tmp_path / f"run{bits}"
        sizes = {"image_size": 64, "depth": 3, "epochs": 8}
        train.train(train.Config(data_dir=str(tmp_path / f"{bits}"), out_dir=str(out), **sizes))
        pairs, _ = predict.pairs_to_score(predict.Config(model=str(out / "model.h5")))
        dice[bits] = predict.score_pairs(
            predict.load_members(predict.Config(str(out / "model.h5"))), pairs
        )[0].dice.mean()
    assert dice[16] >= 0.95 and dice[8] < 0.85, dice  # a guess has 0.76
