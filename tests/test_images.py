import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging import formats, pictures, plots, preprocess
from imaging.grid import fit_grid
from imaging.scan import Scan
from inference import postprocess
from utils import UserError, atomic


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_lossless_round_trip_in_colour(tmp_path, suffix):
    image = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    pictures.write_picture(tmp_path / f"a{suffix}", image)
    np.testing.assert_array_equal(formats.read_image(tmp_path / f"a{suffix}"), image)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_kept(tmp_path, suffix):
    image = np.random.default_rng(0).integers(0, 65536, (20, 31, 1), dtype=np.uint16)
    pictures.write_picture(tmp_path / f"a{suffix}", image)
    np.testing.assert_array_equal(formats.read_image(tmp_path / f"a{suffix}"), image)


def test_channel_order_is_rgb_with_alpha_last(tmp_path):
    blue_green_red_alpha = np.full((16, 16, 4), (10, 20, 30, 40), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), blue_green_red_alpha)
    assert formats.read_image(tmp_path / "a.png")[0, 0].tolist() == [30, 20, 10, 40]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_truncated_files_are_refused(suffix):
    image = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    whole = cv2.imencode(suffix, image)[1].tobytes()
    assert formats.decode_image(whole).shape == (64, 64, 1)
    for share in (0.0, 0.01, 0.5, 0.9):
        with pytest.raises(UserError, match="unreadable"):
            formats.decode_image(whole[: int(share * len(whole))])


def test_text_and_tiny_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="another kind.; expected one of DICOM, TIFF, NIfTI, NRRD"):
        formats.decode_image(b"I am a text file")
    with pytest.raises(UserError, match="1x1 pixels; expected at least 16x16"):
        formats.decode_image(cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes())
    with pytest.raises(UserError, match="No such file"):
        formats.read_image(tmp_path / "none.png")


def test_several_pages_are_refused():
    pages = [np.zeros((20, 20), np.uint8), np.ones((20, 20), np.uint8)]
    with pytest.raises(UserError, match="2 pages or slices; expected one image"):
        formats.decode_image(cv2.imencodemulti(".tiff", pages)[1].tobytes())


def test_a_mask_drawn_in_the_alpha_channel_is_read(tmp_path):
    mask = np.full((20, 20, 4), 255, np.uint8)
    mask[5:, :, 3] = 0
    cv2.imwrite(str(tmp_path / "a.png"), mask)
    np.testing.assert_array_equal(formats.read_mask(tmp_path / "a.png"), mask[..., 3])


def test_a_flat_image_with_a_few_bright_pixels_keeps_them():
    image = np.zeros((64, 64, 1), np.uint8)
    image[10, 10:13] = 200
    assert preprocess.prepare_image(image, (64, 64), 1)[10, 11] == 255


def test_a_colour_picture_is_not_a_mask_but_equal_channels_are(tmp_path):
    grey = np.random.default_rng(0).integers(0, 2, (20, 20, 1), dtype=np.uint8) * 255
    pictures.write_picture(tmp_path / "a.png", np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(formats.read_mask(tmp_path / "a.png"), grey[..., 0])
    pictures.write_picture(tmp_path / "b.png", np.full((20, 20, 3), (0, 255, 0), np.uint8))
    with pytest.raises(UserError, match="colour picture"):
        formats.read_mask(tmp_path / "b.png")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("shape", [(64, 64), (100, 50), (33, 91), (20, 400)])
def test_prepare_keeps_the_aspect_ratio(shape):
    image = np.random.default_rng(0).integers(1, 256, (*shape, 1), dtype=np.uint8)
    grid = fit_grid((1, *shape), (64, 48))
    rows, columns = grid.rows, grid.columns
    ratio = (rows.stop - rows.start) / (columns.stop - columns.start)
    assert ratio == pytest.approx(
        shape[0] / shape[1], rel=0.25
    )  # a side is a whole number of pixels
    prepared = preprocess.prepare_image(image, (64, 48), 1)
    assert prepared.shape == (64, 48, 1)
    outside = np.ones((64, 48), bool)
    outside[rows, columns] = False
    assert not prepared[outside].any()


def test_prepare_ignores_exposure_and_bit_depth():
    grey = np.random.default_rng(0).integers(0, 200, (50, 40, 1), dtype=np.uint8)
    expected = preprocess.prepare_image(grey, (32, 32), 1).astype(int)
    assert expected.min() == 0 and expected.max() == 255
    for other in (
        grey.astype(np.uint16) * 257,
        grey.astype(np.uint16) * 16 + 300,
        grey.astype(np.int32) - 1000,
    ):
        assert np.abs(preprocess.prepare_image(other, (32, 32), 1) - expected).max() <= 1


def test_prepare_of_a_constant_image_is_zero_and_finite():
    assert not preprocess.prepare_image(np.full((20, 20, 1), 7, np.uint8), (32, 32), 1).any()


def test_prepare_drops_alpha_and_makes_grey():
    grey = np.random.default_rng(0).integers(0, 256, (32, 32, 1), dtype=np.uint8)
    alpha = np.random.default_rng(1).integers(0, 256, (32, 32, 1), dtype=np.uint8)
    rgba = np.concatenate([grey, grey, grey, alpha], axis=-1)
    np.testing.assert_array_equal(
        preprocess.prepare_scan(
            Scan(rgba[None], has_alpha=True), fit_grid((1, 32, 32), (32, 32)), 1
        ),
        preprocess.prepare_scan(Scan(grey[None]), fit_grid((1, 32, 32), (32, 32)), 1),
    )
    assert preprocess.prepare_image(grey, (32, 32), 3).shape == (32, 32, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 150), st.integers(16, 150), st.integers(1, 3))
def test_restore_undoes_prepare_mask(height, width, classes):
    """A block of each class, prepared and restored, comes back where it was, up to its border."""
    ids = np.zeros((height, width), np.uint8)
    for i in range(classes):
        ids[:, i * width // (classes + 1) : (i + 1) * width // (classes + 1)] = i + 1
    grid = fit_grid((1, height, width), (64, 64))
    (shares,) = preprocess.prepare_mask(ids[None], grid, classes)
    assert shares.shape == (64, 64, classes) and shares.dtype == np.uint8
    back = preprocess.shares_to_ids(
        np.round(next(grid.restore([shares.astype(np.float32)]))).astype(np.uint8)
    )
    assert back.shape == ids.shape
    wrong_columns = np.unique(np.nonzero(back != ids)[1])
    borders = np.array([(i + 1) * width // (classes + 1) for i in range(classes)])
    reach = 1.5 * max(1, height / 64, width / 64)
    assert all(np.abs(borders - column).min() <= reach for column in wrong_columns)


def test_a_border_within_a_pixel_survives_the_network_s_size():
    """A disc shrunk to an eighth comes back almost the same: its pixels keep their shares."""
    y, x = np.mgrid[:512, :512]
    disc = ((y - 250) ** 2 + (x - 261) ** 2 < 100**2).astype(np.uint8)
    grid = fit_grid((1, 512, 512), (64, 64))
    (shares,) = preprocess.prepare_mask(disc[None], grid, 1)
    ids = preprocess.shares_to_ids(shares)[..., None]
    restored = grid.restore([shares.astype(np.float32) / 255, ids.astype(np.float32)])
    back, rounded = (plane[..., 0] >= 0.5 for plane in restored)
    assert (back != disc).mean() < 0.3 * (rounded != disc).mean()


def test_to_ids_decides_by_threshold_or_by_the_largest():
    np.testing.assert_array_equal(postprocess.to_ids(np.array([[[0.4], [0.6]]]), 0.5), [[0, 1]])
    np.testing.assert_array_equal(
        postprocess.to_ids(np.array([[[0.5, 0.3, 0.2], [0.1, 0.4, 0.5]]]), 0.5), [[0, 2]]
    )


def test_contours_are_drawn_on_the_border_only():
    ids = np.zeros((40, 40), np.uint8)
    ids[10:30, 10:30] = 1
    drawn = plots.draw_contours(np.zeros((40, 40, 3), np.uint8), ids)
    assert tuple(drawn[10, 20]) == plots.COLOURS[0]
    assert not drawn[20, 20].any() and not drawn[5, 5].any()


def test_small_parts_are_dropped_and_holes_filled():
    ids = np.zeros((40, 40), np.uint8)
    ids[2:12, 2:12] = 1
    ids[5:8, 5:8] = 0  # a hole
    ids[20:28, 20:28] = 1
    ids[35, 35] = 1  # a speck
    ids[15:18, 2:30] = 2
    ids[30:33, 2:5] = 2
    expected = ids.copy()
    expected[5:8, 5:8] = 1
    expected[35, 35] = 0
    expected[30:33, 2:5] = 0
    np.testing.assert_array_equal(postprocess.clean_mask(ids, [2, 1]), expected)
    np.testing.assert_array_equal(postprocess.clean_mask(np.zeros_like(ids), [2, 1]), 0)


def test_one_class_in_anothers_hole_stays():
    ids = np.ones((20, 20), np.uint8)
    ids[5:9, 5:9] = 2
    np.testing.assert_array_equal(postprocess.clean_mask(ids, [1, 1]), ids)


def test_usual_parts_leave_out_the_odd_mask():
    two, three = np.zeros((2, 30, 30), bool)
    two[2:8, 2:8] = two[12:20, 12:20] = True
    three[:] = two
    three[25, 25] = True
    counts = [postprocess.count_components(mask) for mask in (two, three, 0 * two)]
    assert counts == [2, 3, 0] and postprocess.count_components(np.stack([two, three])) == 3
    assert postprocess.usual_count([2] * 20 + [3]) == 2
    assert postprocess.usual_count([2, 3]) == 3
    assert postprocess.usual_count([0, 0]) == 1


def test_a_dropped_island_in_another_class_leaves_no_hole():
    ids = np.ones((30, 30), np.uint8)
    ids[3:12, 3:12] = 2
    ids[20:22, 20:22] = 2
    expected = ids.copy()
    expected[20:22, 20:22] = 1
    np.testing.assert_array_equal(postprocess.clean_mask(ids, [1, 1]), expected)
