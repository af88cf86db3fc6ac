"""What `data.py check` measures on masks, and the hyperparameters that follow."""

import re
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pandas as pd
import pytest
from test_volumes import ct

import data
import train
from dataset import copies, loading, report
from dataset.channels import detect_channels
from dataset.loading import Preprocessing
from dataset.report import consequences, fingerprint, plan
from imaging import pictures
from imaging.grid import fit_grid
from imaging.labels import Classes
from inference.sampler import Sampler
from training import checks

GB = 2**30
COMPUTER = plan.Computer(16 * GB, 2)


def measured(folder: Path, classes: str = "foreground"):
    """Read a data set: its pairs, their cases, the fingerprint, the channels."""
    pairs, problems = data.find_pairs(folder)
    channels, parsed = detect_channels(pairs), Classes(classes)
    dataset, unreadable = loading.load_pairs(
        pairs, Preprocessing(parsed, Sampler((128, 128)), channels)
    )
    assert problems + unreadable == []
    readable = copies.read_pairs(pairs, dataset)
    taken = fingerprint.take_fingerprint(readable, dataset.info, parsed)
    return readable, dataset, taken, channels


def proposed(folder: Path, classes: str = "foreground", computer=COMPUTER) -> dict:
    _, dataset, taken, channels = measured(folder, classes)
    proposals = plan.suggest(dataset.info, taken, channels, computer)
    assert all(reason for _, _, reason in proposals)
    found = {name: value for name, value, _ in proposals}
    checks.check_values(train.Config(**found))
    checks.check_image_size(train.Config(**found), [])
    return found


def write_masks(folder: Path, masks, colour=lambda i: (1, 1, 1)) -> Path:
    """Write pictures that show their masks; colour: brightness of each channel, by number."""
    for i, mask in enumerate(masks):
        image = np.uint8(mask[..., None] // 2 * np.array(colour(i)) + 40 + i)
        pictures.write_picture(folder / "images" / f"{i}.png", image)
        pictures.write_picture(folder / "masks" / f"{i}.png", mask)
    return folder


def draw_discs(side: int, radius: int, count: int = 10):
    for i in range(count):
        mask = np.zeros((side, side), np.uint8)
        cv2.circle(mask, (side // 2 + i % 10, side // 2), radius, 255, cv2.FILLED)
        yield mask


def draw_vessels(side: int, width: int, count: int = 4):
    """Draw a connected tree of vessels that reaches over the whole image."""
    for i in range(count):
        rng = np.random.default_rng(i)
        mask = np.zeros((side, side), np.uint8)
        root = (side // 2, side // 2)
        for _ in range(25):
            end = tuple(int(one) for one in rng.integers(0, side, 2))
            cv2.line(mask, root, end, 255, width)
            root = end
        yield mask


def draw_cells(sides, radius: int):
    """Draw many small discs of one size in images of several sizes."""
    for i, side in enumerate(sides):
        rng = np.random.default_rng(i)
        mask = np.zeros((side, side), np.uint8)
        for _ in range(max(20, side**2 // 2500)):
            centre = tuple(int(one) for one in rng.integers(0, side, 2))
            cv2.circle(mask, centre, radius, 255, cv2.FILLED)
        yield mask


def write_volumes(folder: Path, shape, spacing_mm, count: int = 3) -> Path:
    """Write volumes (slices, rows, columns) with a ball in the middle."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    places = np.indices(shape) - (np.array(shape)[:, None, None, None] - 1) / 2
    extent = np.multiply(shape, spacing_mm).min()
    distance = np.sqrt(((places.T * spacing_mm) ** 2).sum(-1).T)
    ball = (distance < 0.3 * extent).astype(np.uint8)
    for i in range(count):
        noise = np.random.default_rng(i).normal(100, 5, shape)
        for name, voxels in (("images", np.float32(noise + 50 * ball)), ("masks", ball)):
            affine = np.diag((*spacing_mm[::-1], 1))
            nibabel.save(nibabel.Nifti1Image(voxels.T, affine), folder / name / f"{i}.nii.gz")
    return folder


# ------------------------------------------------------------------------------------ measurements


def halved_and_doubled(mask: np.ndarray) -> np.ndarray:
    """Average blocks of 2x2, interpolate linearly between their centres, cut at half: (H, W)."""
    height, width = mask.shape
    small = mask.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    places = np.clip((np.arange(height) + 0.5) / 2 - 0.5, 0, height // 2 - 1)
    low = np.minimum(np.floor(places).astype(int), height // 2 - 2)
    part = (places - low)[:, None]
    rows = small[low] * (1 - part) + small[low + 1] * part
    columns = rows.T[low] * (1 - part) + rows.T[low + 1] * part
    return columns.T >= 0.5


def test_the_ceiling_is_what_scaling_leaves(tmp_path):
    masks = list(draw_vessels(256, 3))
    *_, taken, _ = measured(write_masks(tmp_path, masks))
    expected = []
    for mask in masks:
        truth, back = mask > 0, halved_and_doubled(mask > 0)
        expected.append(2 * (truth & back).sum() / (truth.sum() + back.sum()))
    assert 0.9 < np.mean(expected) < 0.99
    np.testing.assert_allclose(taken.ceiling(128), [np.mean(expected)], atol=0.002)
    assert taken.ceiling(256) == taken.ceiling(512) == 1
    pairs, dataset, *_ = measured(tmp_path)
    chosen = [plan.Proposal("image_size", 128, "")]
    ceilings = report.measure_ceilings(pairs, dataset.info, taken, chosen, Classes())
    lines = report.describe_objects(taken, ceilings)
    told = f"foreground: Dice {taken.ceiling(128)[0] - 5e-5:.4f} at 128 pixels"
    assert any(line.startswith("ceiling") and told in line for line in lines)


def test_of_several_classes_the_largest_share_wins(tmp_path):
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 30:90] = 1
    mask[:, 60:61] = 2  # a line that half the resolution loses
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(3):
        pictures.write_picture(tmp_path / "images" / f"{i}.png", mask * 40 + np.uint8(i))
        cv2.imwrite(str(tmp_path / "masks" / f"{i}.png"), mask)
    *_, taken, _ = measured(tmp_path, "organ,line")
    organ, line = taken.ceiling(64)
    assert organ > 0.98 and line < 0.7 and taken.least_ceiling(64) == line


@pytest.mark.parametrize("width", [2, 3, 4, 6, 8])
def test_thickness_is_that_of_a_line_however_long(width):
    mask = np.zeros((300, 300), bool)
    mask[100 : 100 + width] = True
    mask[:, 200 : 200 + width] = True
    thinner = fingerprint.thin_areas(mask) / mask.sum()
    narrower = np.array(fingerprint.WIDTHS) <= width
    assert (thinner[narrower] < 0.01).all() and (thinner[~narrower] > 0.95).all()


def test_an_object_at_the_border_is_not_thin():
    mask = np.zeros((100, 100), bool)
    mask[:, :5] = True
    assert fingerprint.thin_areas(mask)[fingerprint.WIDTHS.index(8)] == 0
    assert fingerprint.thin_areas(np.zeros((9, 9), bool)).max() == 0
    assert fingerprint.thin_areas(np.ones((50, 50), bool)).max() == 0


def test_what_is_measured_is_bounded(monkeypatch):
    monkeypatch.setattr(fingerprint, "MAX_SIDE", 256)
    mask = np.zeros((40, 1000, 600), np.uint8)
    mask[5:35, 700:760, 300:360] = 1
    found = fingerprint.measure(mask, Classes())
    assert found.slices == [1] and found.diameters[0].round().tolist() == [68]
    # The part is scaled as the whole slice would be.
    grid = fit_grid((1, 1000, 600), (128, 128))
    whole = fingerprint.compare_with_scaled(mask[20:21], grid, 1)
    dice = found.ceilings[fingerprint.SIZES.index(128)]
    np.testing.assert_allclose(dice[1], whole[0][1] / whole[1][1], atol=0.02)


def test_masks_without_any_object_have_a_plan_too(tmp_path):
    folder = write_masks(tmp_path, [0 * mask for mask in draw_discs(600, 9, 6)])
    assert proposed(folder)["image_size"] == 128
    pairs, dataset, taken, _ = measured(folder)
    assert report.measure_ceilings(pairs, dataset.info, taken, [], Classes()) == {}
    assert report.describe_objects(taken, {}) == [] and said_of(folder)


def test_few_of_many_pairs_are_read(tmp_path):
    masks = [mask if i % 2 else 0 * mask for i, mask in enumerate(draw_discs(64, 10, 120))]
    _, dataset, taken, _ = measured(write_masks(tmp_path, masks))
    assert len(taken.pairs) == fingerprint.MAX_PAIRS and len(dataset.info) == 120
    assert all(one.slices == [1] for one in taken.pairs)
    assert len(fingerprint.choose_rows(dataset.info.assign(slices=2**22), ["foreground"])) == 1


# --------------------------------------------------------------------------------------- proposals


def test_one_large_disc_needs_a_small_image(tmp_path):
    found = proposed(write_masks(tmp_path, draw_discs(1024, 200)))
    assert 128 <= found["image_size"] <= 192
    assert found["batch_size"] == 8 and found["channels"] == 1
    assert found["augmentation"] == "free"  # a disc has no upper side
    assert not {"patch_size", "dimensions", "loss", "window", "depth"} & set(found)


def test_thin_vessels_are_trained_at_their_own_resolution(tmp_path):
    folder = write_masks(tmp_path, draw_vessels(960, 3), lambda i: (1, 0.5, 0.2))
    found = proposed(folder)
    size = int(found["patch_size"])
    assert 128 <= size <= 256 and size % 32 == 0 and "image_size" not in found
    assert found["channels"] == 3 and found["augmentation"] == "free"
    pairs, dataset, taken, _ = measured(folder)
    said = consequences.name_consequences(pairs, dataset, taken)
    # A slanted line of 3 pixels is one of 4 in places.
    assert said[0].startswith("foreground is thin: half of it is narrower than")
    assert 3 < taken.width(1, 0.5) <= 6


def test_lines_between_cells_count_though_the_cells_are_the_class(tmp_path):
    folder = write_masks(tmp_path, [255 - mask for mask in draw_vessels(512, 3)])
    assert "patch_size" in proposed(folder)


def test_tiny_objects_get_patches_and_a_loss_for_rare_classes(tmp_path):
    found = proposed(write_masks(tmp_path, draw_discs(1024, 5)))
    assert found["patch_size"] == "128" and found["loss"] == "tversky"


def test_many_cells_in_images_of_different_sizes_keep_their_size(tmp_path):
    found = proposed(write_masks(tmp_path, draw_cells((256, 256, 256, 512, 768, 1024), 9)))
    assert found["patch_size"] == "128"
    same = proposed(write_masks(tmp_path / "same", draw_cells([256] * 6, 9)))
    assert same["image_size"] <= 256


def draw_triangles(count):
    """Triangles that stand on their side, at nearly the same place."""
    for i in range(count):
        corners = np.array([[63 + i % 3, 16], [32, 100], [96 - i % 3, 100]])
        yield cv2.fillPoly(np.zeros((128, 128), np.uint8), [corners.astype(np.int32)], 1)


def test_objects_that_lie_alike_are_not_turned(tmp_path):
    folder = write_masks(tmp_path, list(draw_triangles(12)))
    assert proposed(folder)["augmentation"] == "mild"
    *_, taken, _ = measured(folder)
    assert taken.symmetry(2) > plan.SYMMETRIC > taken.symmetry(1)
    mask = np.zeros((32, 32, 32), np.uint8)
    mask[:, :10] = 1
    sided = fingerprint.Fingerprint(["a"], [fingerprint.measure(mask, Classes())] * 3)
    assert [sided.symmetry(axis) > 0.99 for axis in range(3)] == [True, False, True]
    assert plan._augmentation(sided, "2").value == "mild"


def test_the_mirrored_image_has_a_say_where_left_and_right_look_alike(phantoms, tmp_path):
    assert proposed(phantoms)["mirror"] is True
    assert proposed(phantoms, "left lung,right lung")["mirror"] is True
    left = [np.pad(disc[:, 40:], ((0, 0), (0, 40))) for disc in draw_discs(128, 20)]
    assert "mirror" not in proposed(write_masks(tmp_path, left))


def test_a_network_of_volumes_gets_larger_changes_and_fewer_epochs(tmp_path):
    found = proposed(write_volumes(tmp_path, (32, 32, 32), (1, 1, 1)))
    assert found["dimensions"] == "3" and found["augmentation"] == "free"
    assert found["epochs"] == plan.VOLUME_EPOCHS


def test_a_few_coloured_images_are_enough_for_colour(tmp_path):
    folder = write_masks(tmp_path, draw_discs(64, 10, 12), lambda i: (1, 1, 0.2) if i == 7 else 1)
    assert detect_channels(data.find_pairs(folder)[0]) == 1
    assert proposed(folder)["channels"] == 3


@pytest.mark.parametrize(("side", "batch"), [(32, 64), (64, 64), (90, 18), (128, 8)])
def test_small_images_get_large_batches(tmp_path, side, batch):
    found = proposed(write_masks(tmp_path, draw_discs(side, side // 4)))
    assert found["image_size"] == {90: 96}.get(side, side) and found["batch_size"] == batch
    assert found.get("epoch_images", 96) == 12 * batch
    assert (found.get("depth", 4) == 3) == (side == 32)


def test_little_memory_gives_small_steps(tmp_path):
    folder = write_masks(tmp_path, draw_vessels(960, 3))
    large, small = (proposed(folder, computer=plan.Computer(gb * GB, 2)) for gb in (16, 0.2))
    pixels = [int(one["patch_size"]) ** 2 * one["batch_size"] for one in (large, small)]
    assert pixels[1] <= 0.2 * GB / 4 / plan.BYTES_PER_PIXEL < pixels[0]


def test_of_ct_a_window_is_proposed_that_holds_the_organs(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        for name, voxels in zip(("images", "masks"), ct(i), strict=True):
            nibabel.save(
                nibabel.Nifti1Image(voxels, np.diag((1.6, 1.6, 5, 1))),
                tmp_path / name / f"{i}.nii.gz",
            )
    found = proposed(tmp_path, "liver,kidney,spine")
    centre, width = map(float, found["window"].split(","))
    # organs have 110 to 500 HU
    assert -200 < centre - width / 2 < 110 - 45 and 500 < centre + width / 2 < 900
    assert found["dimensions"] == "2.5"


def test_several_channels_get_no_window():
    """A PET beside the CT has no Hounsfield units."""
    info = pd.DataFrame({"object": [[-50.0, 60.0]], "quantiles": [[-1000.0, 400.0]]})
    assert [one.name for one in plan._window(info, 1)] == ["window"]
    assert plan._window(info, 2) == plan._window(info, 3) == []


def test_patches_of_slices_keep_the_distance_of_slices():
    info = pd.DataFrame({"size": ["64x64"] * 3, "slices": 9})
    info["spacing_mm"] = [[5.0, 1, 1], [5.0, 1, 1], [2.0, 0.5, 1]]
    chosen = [plan.Proposal("dimensions", "2.5", ""), plan.Proposal("patch_size", "64", "")]
    assert plan.working_spacing(info, chosen) == (0.0, 1.0, 1.0)
    info["spacing_mm"] = [[5.0, 1, 1], [2.0, 1, 1], [3.0, 1, 1]]
    assert plan.working_spacing(info, chosen) is None
    chosen[0] = plan.Proposal("dimensions", "3", "")
    assert plan.working_spacing(info, chosen) == (3.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((36, 50, 35), (1, 1, 1), {"dimensions": "3", "patch_size": "40,56,40", "depth": 3}),
        ((20, 96, 96), (5, 1, 1), {"dimensions": "2.5", "image_size": 96}),
        ((8, 96, 96), (1, 1, 1), {"dimensions": "2.5", "image_size": 96}),
        ((60, 96, 96), (2, 1, 1), {"dimensions": "3"}),
    ],
)
def test_volumes_are_volumes_where_voxels_are_nearly_cubes(tmp_path, shape, spacing, expected):
    found = proposed(write_volumes(tmp_path, shape, spacing))
    assert expected.items() <= found.items()
    if found["dimensions"] == "3":
        patch = [int(side) for side in found["patch_size"].split(",")]
        depth = found.get("depth", 4)
        assert np.prod(patch) <= plan.PATCH_VOXELS and all(side % 2**depth == 0 for side in patch)
        assert 2 <= found["batch_size"] <= 4 and "image_size" not in found


def test_a_patch_of_a_large_volume_is_coarser_or_there_are_slices():
    many = fingerprint.Fingerprint(["a"], [])
    geometry = plan.Geometry((200, 512, 512), (1.5, 0.8, 0.8), 1.0)
    # Without objects nothing is lost by coarse voxels.
    found = {one.name: one.value for one in plan._input(geometry, many, COMPUTER)}
    spacing = [float(one) for one in found["spacing"].split(",")]
    patch = [int(one) for one in found["patch_size"].split(",")]
    covered = np.multiply(patch, spacing) / np.multiply(geometry.shape, geometry.spacing_mm)
    assert found["dimensions"] == "3" and 0.15 < np.prod(np.minimum(covered, 1)) < 0.5
    mask = np.zeros((4, 512, 512), np.uint8)
    mask[:, 100:400, 200:203] = 1
    thin = fingerprint.Fingerprint(["a"], [fingerprint.measure(mask, Classes("a"))])
    assert plan._dimensions(geometry, thin, COMPUTER)[0] == "2.5"


def test_volumes_of_other_spacings_have_the_ceiling_of_their_resampling(tmp_path):
    for i, spacing in enumerate(((1, 1, 1), (1, 1, 1), (2, 1, 1))):
        volumes = write_volumes(tmp_path / str(i), (32, 40, 40), spacing, count=1)
        for name in ("images", "masks"):
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            (volumes / name / "0.nii.gz").rename(tmp_path / "set" / name / f"{i}.nii.gz")
    pairs, dataset, taken, channels = measured(tmp_path / "set")
    info = dataset.info
    proposals = plan.suggest(info, taken, channels, COMPUTER)
    ceilings = report.measure_ceilings(pairs, info, taken, proposals, Classes())
    assert list(ceilings) == ["1 x 1 x 1 mm"] and 0.98 < ceilings["1 x 1 x 1 mm"][0] <= 1
    coarse = fingerprint.resampled_ceiling(pairs, info, Classes(), (8, 8, 8))
    assert 0.5 < coarse[0] < 0.95


def test_many_images_get_fewer_epochs(tmp_path):
    _, dataset, taken, _ = measured(write_masks(tmp_path, draw_discs(128, 30)))
    many = pd.concat([dataset.info] * 2000, ignore_index=True)
    proposals = plan.suggest(many, taken, 1, COMPUTER)
    found = {one.name: one.value for one in proposals}
    said = plan.describe_time(many, proposals, COMPUTER)
    assert re.fullmatch(r"about (4[5-9]|50) minutes of training on 2 cores without a GPU", said)
    assert plan.MIN_EPOCHS <= found["epochs"] < 20
    assert "epochs" not in proposed(tmp_path)


# ------------------------------------------------------------------------------------ consequences


def said_of(folder: Path, classes: str = "foreground") -> str:
    pairs, dataset, taken, _ = measured(folder, classes)
    return "\n".join(consequences.name_consequences(pairs, dataset, taken))


def test_objects_that_are_bright_in_some_images_and_dark_in_others_are_told(tmp_path):
    write_masks(tmp_path, draw_discs(128, 30), lambda i: 3 * (1 if i % 3 else -0.3,))
    assert "foreground is brighter than the rest in 6 images and darker in 4" in said_of(tmp_path)


def test_a_white_background_with_dark_lines_is_told(tmp_path):
    said = said_of(write_masks(tmp_path, [255 - mask for mask in draw_vessels(256, 3)]))
    assert "foreground covers" in said and '--classes "lines=0,background=1+"' in said


def test_a_labelled_background_is_told(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i, mask in enumerate(draw_discs(64, 10, 6)):
        pictures.write_picture(tmp_path / "images" / f"{i}.png", mask // 2 + np.uint8(i))
        cv2.imwrite(str(tmp_path / "masks" / f"{i}.png"), 1 + mask // 255)
    assert "class rest covers 92% of the pixels" in said_of(tmp_path, "rest,disc")


def test_few_patients_are_told(tmp_path):
    assert "3 images are too few" in said_of(write_masks(tmp_path / "a", draw_discs(64, 9, 3)))
    said = said_of(write_masks(tmp_path / "b", draw_discs(64, 9, 10)))
    assert "10 images, so 2 are tested" in said and "--folds 5" in said


def test_rare_classes_and_different_sizes_are_told(tmp_path):
    masks = [mask if i == 3 else 0 * mask for i, mask in enumerate(draw_discs(64, 9, 40))]
    assert "is in 1 of 40 masks" in said_of(write_masks(tmp_path / "a", masks))
    masks = [*draw_discs(64, 9, 3), *draw_discs(256, 9, 3)]
    assert "sides differ 4.0-fold" in said_of(write_masks(tmp_path / "b", masks))
    tiny = list(draw_discs(512, 5, 40))
    assert "class foreground is rare: 0.03%" in said_of(write_masks(tmp_path / "c", tiny))
    volumes = write_volumes(tmp_path / "d", (20, 64, 64), (5, 1, 1))
    assert "slices are 5.0 times as far apart" in said_of(volumes)
