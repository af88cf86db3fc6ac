"""Grey or colour: how many channels the network gets."""

import json

import cv2
import numpy as np
import pytest
from conftest import prepare_to_fit
from PIL import Image

import data
from dataset.augmentation import STRENGTHS, Augmentation
from dataset.channels import detect_channels
from dataset.layouts import Pair
from imaging import formats
from imaging.grid import fit_grid
from imaging.labels import Classes
from imaging.plots import draw_panel
from imaging.preprocess import prepare_scan, to_channels, to_picture, to_rgb
from imaging.scan import Scan
from inference.segment import prepare
from utils import UserError


def write_pictures(folder, kinds):
    for i, kind in enumerate(kinds):
        picture = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        if kind != "colour":
            picture[..., 1:] = picture[..., :1]
        if kind == "grey":
            picture = picture[..., :1]
        if kind == "alpha":
            picture = np.concatenate([picture, 255 - picture[..., :1]], axis=-1)
        path = folder / f"{i}.png"
        if kind == "text":
            path.write_text("no picture")
        else:
            cv2.imwrite(str(path), picture)
    return [Pair(folder / f"{i}.png", ()) for i in range(len(kinds))]


@pytest.mark.parametrize(
    ("kinds", "channels"),
    [
        (["grey"] * 3, 1),
        (["equal channels"] * 3, 1),
        (["alpha"] * 3, 1),
        (["colour"] * 3, 3),
        (["colour", "grey", "colour"], 3),
        (["colour", "grey", "grey"], 1),
        (["text", "colour", "text"], 3),
        (["text"], 1),
        ([], 1),
    ],
)
def test_channels_follow_from_what_most_images_show(tmp_path, kinds, channels):
    assert detect_channels(write_pictures(tmp_path, kinds)) == channels


def test_a_grey_jpeg_is_grey_and_few_images_are_read(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(picture).convert("RGB").save(tmp_path / "0.jpg", quality=70)
    reads = []
    decode = formats.decode_scan
    monkeypatch.setattr(formats, "decode_scan", lambda *args: reads.append(1) or decode(*args))
    assert detect_channels([Pair(tmp_path / "0.jpg", ())] * 1000) == 1 and len(reads) == 5


def test_check_reports_the_channels(discs, tmp_path, capsys):
    for path in (discs / "images").iterdir():
        picture = np.repeat(formats.read_image(path), 3, axis=-1)
        picture[..., 0] //= 2
        cv2.imwrite(str(path), picture)
    data.check(discs, output=tmp_path / "page")
    count = len(list((discs / "images").iterdir()))
    assert f"colour     in {count} of {count} images" in capsys.readouterr().out
    assert json.loads((tmp_path / "page" / "report.json").read_text())["channels"] == 3


def write_stacks(folder, counts):
    for i, count in enumerate(counts):
        stack = np.random.default_rng(i).integers(0, 256, (20, 20, count), dtype=np.uint8)
        np.save(folder / f"{i}.npy", stack)
    return [Pair(folder / f"{i}.npy", ()) for i in range(len(counts))]


@pytest.mark.parametrize(
    ("counts", "channels"), [([2, 2, 2], 2), ([5, 5, 1], 5), ([4, 4], 4), ([1, 4], 1)]
)
def test_the_common_number_of_channels_is_found(tmp_path, counts, channels):
    assert detect_channels(write_stacks(tmp_path, counts)) == channels


def test_channels_in_files_of_their_own_count(tmp_path):
    path = write_stacks(tmp_path, [1])[0].image
    assert detect_channels([Pair(path, (), more_channels=(path, path, path))] * 2) == 4


def test_objects_that_differ_in_colour_only_need_three_channels(tmp_path):
    picture = np.full((96, 96, 3), (60, 120, 60), np.uint8)
    picture[20:40, 20:40] = 120, 97, 82  # the same luminance
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    assert detect_channels([Pair(tmp_path / "a.png", ())]) == 3


def test_channels_are_taken_as_they_are_or_refused():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 5), dtype=np.uint8)
    np.testing.assert_array_equal(to_channels(image, 5), image)
    assert (to_channels(image[..., :1], 3) == image[..., :1]).all()
    for found, wanted in ((5, 1), (5, 3), (2, 1), (1, 4), (4, 3)):
        said = f"an image of {found} channels?; the network takes {wanted} channel"
        with pytest.raises(UserError, match=said):
            to_channels(image[..., :found], wanted)


@pytest.mark.parametrize("channels", [2, 4, 5, 9])
def test_each_channel_has_grey_levels_of_its_own(channels):
    rng = np.random.default_rng(0)
    levels = 10.0 ** np.arange(channels)
    pixels = (rng.uniform(0, 1, (2, 40, 50, channels)) * levels).astype(np.float32)
    prepared = prepare_to_fit(Scan(pixels, separate=True), (32, 40), channels)
    assert prepared.shape == (2, 32, 40, channels)
    for i in range(channels):
        alone = prepare_to_fit(Scan(pixels[..., i : i + 1]), (32, 40), 1)
        np.testing.assert_allclose(prepared[..., i], alone[..., 0], atol=1)
    assert not prepare_to_fit(Scan(np.ones_like(pixels)), (32, 40), channels).any()


def test_three_stains_have_levels_of_their_own_and_three_colours_share_them():
    pixels = np.random.default_rng(0).uniform(0, 1, (1, 40, 40, 3)).astype(np.float32)
    pixels *= 1, 10, 100
    assert prepare_to_fit(Scan(pixels), (40, 40), 3)[..., 0].max() < 10
    assert prepare_to_fit(Scan(pixels, separate=True), (40, 40), 3)[..., 0].max() == 255


def test_padding_has_no_say_in_grey_levels():
    pixels = np.random.default_rng(0).uniform(0, 100, (1, 40, 40, 1)).astype(np.float32)
    padding = np.zeros((1, 40, 40), bool)
    padding[:, :10] = True
    padded = np.where(padding[..., None], -2000, pixels)
    prepared = prepare_to_fit(Scan(padded, padding=padding), (40, 40), 1)
    expected = prepare_to_fit(Scan(pixels[:, 10:]), (30, 40), 1)
    np.testing.assert_array_equal(prepared[:, 10:], expected)
    assert not prepared[:, :10].any()


def test_slices_of_a_scan_take_their_padding_along():
    padding = np.arange(5)[:, None, None] > np.zeros((5, 20, 20))
    scan = Scan(np.arange(5)[:, None, None, None] + np.zeros((5, 20, 20, 1)), padding=padding)
    assert scan.slice(0).pixels.max() == 0 and not scan.slice(0).padding.any()
    some = scan.slices(1, 3)
    assert some.pixels.shape == (2, 20, 20, 1) and some.padding.all()
    assert prepare_to_fit(some, (20, 20), 1).shape == (2, 20, 20, 1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_panels_show_the_first_three_channels(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 40, 50, channels), dtype=np.uint8)
    picture = to_picture(Scan(pixels), (40, 50))
    assert picture.shape == (1, 40, 50, 3)
    assert picture[..., 2].any() == (channels != 2)
    np.testing.assert_array_equal(to_rgb(pixels)[..., 0], pixels[..., 0])
    draw_panel(tmp_path / "a.png", Scan(pixels), np.ones((1, 40, 50), np.uint8), ["x"], "a")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_images_of_any_channels_are_augmented(channels, strength):
    augment = Augmentation(Classes("x"), strength)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, channels), dtype=np.uint8)
    for seed in range(20):
        changed, _ = augment(image, np.full((64, 64, 1), 255, np.uint8), seed)
        assert changed.shape == image.shape and changed.dtype == np.uint8


def test_measurements_are_not_turned_into_others():
    """Three sequences are no colours, and one sequence is not three."""
    pixels = np.random.default_rng(0).integers(0, 255, (1, 20, 24, 3), dtype=np.uint8)
    grid = fit_grid((1, 20, 24), (32, 32))
    assert prepare_scan(Scan(pixels), grid, 1).shape[-1] == 1
    with pytest.raises(UserError, match="an image of 3 channels; the network takes 1 channel"):
        prepare_scan(Scan(pixels, separate=True, affine=np.eye(4)), grid, 1)
    assert prepare_scan(Scan(pixels, separate=True), grid, 1).shape[-1] == 1  # stains
    metadata = {"image_size": [32, 32], "channels": 3, "channel_endings": ["_a", "_b", "_c"]}
    with pytest.raises(UserError, match="an image of 1 channel; the network takes 3 channels"):
        prepare(Scan(pixels[..., :1]), metadata)
    assert prepare(Scan(pixels[..., :1]), metadata | {"channel_endings": []})[1][0].shape[-1] == 3
