"""The pictures and charts of `data.py check`'s page."""

import base64
import os
import re
import shutil
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

import data
from dataset.layouts import Pair
from dataset.loading import Preprocessing
from dataset.report import charts, oddities, report_charts, report_page, thumbnails
from imaging import pictures
from imaging.labels import Classes
from imaging.scan import Scan
from inference.sampler import Sampler

ONE = Preprocessing(Classes("foreground"), Sampler((128, 128)))


def page_of(folder: Path, tmp_path: Path) -> str:
    data.check(folder, output=tmp_path / "page")
    return (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


def decoded(picture: thumbnails.Thumbnail) -> np.ndarray:
    content = np.frombuffer(base64.b64decode(picture.webp), np.uint8)
    return cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1].astype(int)


def points(path: str) -> np.ndarray:
    return np.array(re.findall(r"(\d+) (\d+)", path), int)


# --------------------------------------------------------------------------------------- pictures


def write_pair(folder: Path, image: np.ndarray, mask: np.ndarray, name: str = "a.png") -> Pair:
    pictures.write_picture(folder / "images" / name, image)
    pictures.write_picture(folder / "masks" / name, mask)
    return Pair(folder / "images" / name, (folder / "masks" / name,))


def test_a_picture_keeps_colour_and_the_outline_lies_where_the_mask_is(tmp_path):
    image = np.zeros((200, 400, 3), np.uint8)
    image[:, :, 1] = 40
    image[50:100, 100:300] = (250, 20, 30)
    mask = np.zeros((200, 400), np.uint8)
    mask[50:100, 100:300] = 255
    drawn = thumbnails.draw_thumbnail(write_pair(tmp_path, image, mask), "", ONE)
    assert drawn.size == (320, 640)
    red, green, _ = decoded(drawn)[120, 320]
    assert red > 200 > 100 > green
    corners = points(drawn.outlines[0])
    # The picture is 1.6 times as large as the file.
    np.testing.assert_allclose(corners.min(0), (160, 80), atol=2)
    np.testing.assert_allclose(corners.max(0), (480, 160), atol=2)


def test_alpha_and_further_channels_are_shown(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20] = 255
    image = np.random.default_rng(0).integers(0, 99, (40, 40, 4), dtype=np.uint8)
    image[..., 3] = 255
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    pictures.write_picture(tmp_path / "masks" / "a.png", mask)
    pair = Pair(tmp_path / "images" / "a.png", (tmp_path / "masks" / "a.png",))
    drawn = thumbnails.draw_thumbnail(pair, "", ONE)
    assert drawn.webp and drawn.note == "" and np.ptp(decoded(drawn)[..., :3], axis=-1).max() > 20
    stains = Scan(np.random.default_rng(0).random((1, 30, 30, 5)), separate=True)
    picture, note = thumbnails.visible_slice(stains, 0, "")
    assert picture.shape == (640, 640, 3) and note.startswith("channels 1 to 3 of 5")


def test_a_mask_smaller_than_a_pixel_of_the_picture_is_outlined(tmp_path):
    mask = np.zeros((2000, 2000), np.uint8)
    mask[1000:1002, 500:502] = 255
    path = thumbnails.outline_path(mask > 0, (640, 640))
    np.testing.assert_allclose(points(path)[0], (160, 320), atol=2)
    assert thumbnails.outline_path(np.zeros((50, 50), bool), (640, 640)) == ""


def test_a_picture_of_noise_stays_small():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (640, 640, 3), dtype=np.uint8)
    assert len(thumbnails.encode_webp(noise)) <= 4 * (thumbnails.MAX_IMAGE_BYTES + 2) / 3
    path = thumbnails.outline_path(noise[..., 0] > 128, (640, 640))
    assert 0 < len(path) <= thumbnails.MAX_OUTLINE_LENGTH


def test_of_a_volume_the_fullest_slice_is_shown_with_its_number(tmp_path):
    voxels = np.random.default_rng(0).normal(100, 5, (40, 50, 9)).astype(np.float32)
    labels = np.zeros((40, 50, 9), np.uint8)
    labels[5:8, 5:8, 2] = 1
    labels[10:30, 10:30, 6] = 1
    for name, one in (("images", voxels), ("masks", labels)):
        (tmp_path / name).mkdir()
        nibabel.save(nibabel.Nifti1Image(one, np.eye(4)), tmp_path / name / "a.nii.gz")
    pair = Pair(tmp_path / "images" / "a.nii.gz", (tmp_path / "masks" / "a.nii.gz",))
    drawn = thumbnails.draw_thumbnail(pair, "", ONE)
    assert drawn.note == "slice 7 of 9" and drawn.outlines[0].count("M") == 1


def test_where_the_mask_cannot_be_read_the_image_is_shown_and_named(discs, tmp_path):
    (discs / "masks" / "disc05_mask.png").write_bytes(b"broken")
    with pytest.raises(data.UserError):
        page_of(discs, tmp_path)
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    first = page[page.index("Look at these first") :]
    first = first[: first.index("</figure>")]
    assert ">disc05.png<" in first and "its mask: unreadable" in first and "<path" not in first


def test_many_problems_are_folded_and_bounded():
    listed = report_page._list("Problems", [f"{i}.png: bad" for i in range(5000)], "problem")
    assert "4980 more" in listed and listed.count("<li>") == 1001
    assert listed.index("19.png") < listed.index("<details>") < listed.index("20.png")


def test_a_large_data_set_is_sampled_and_the_page_says_so(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        mask = np.zeros((64, 64), np.uint8)
        cv2.circle(mask, (32, 32), 8 + i % 5, 255, cv2.FILLED)
        image = rng.integers(0, 100, mask.shape, dtype=np.uint8) + mask // 3
        write_pair(tmp_path / "set", image, mask if i != 17 else 0 * mask, f"{i:02d}.png")
    page = page_of(tmp_path / "set", tmp_path)
    assert "24 of 40 are shown" in page and page.count("data:image/webp") == 24
    assert page.index(">17.png<") < page.index(">00.png<")
    assert "no foreground: 1 of 40 masks" in page and len(page) < 5e6


# --------------------------------------------------------------------------------------- oddities


def table(count: int = 20, **changed) -> pd.DataFrame:
    """Describe images that are alike, but for the changes: column → (row, value)."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        levels = np.linspace(0, 200, 21) + rng.normal(0, 3)
        row = {"size": "100x120", "slices": 1, "bits": 8, "channels": 1, "constant": False}
        rows.append(row | {"quantiles": levels.tolist(), "share": 0.2 + rng.uniform(-0.05, 0.05)})
    for column, (number, value) in changed.items():
        rows[number][column] = value
    return pd.DataFrame(rows).rename(columns={"share": "share: lung"})


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("constant", True, "constant"),
        ("share", 0.97, "inverted?"),
        ("share", 0.0, "no foreground: 1 of 20"),
        ("size", "1000x1200", "larger than most: 1000x1200 pixels, usual 120"),
        ("size", "20x24", "smaller than most"),
        ("channels", 3, "other channels than most: 3, usual 1"),
        ("bits", 16, "other bits than most"),
        ("quantiles", np.linspace(900, 1100, 21).tolist(), "brighter than most"),
        ("quantiles", np.linspace(90, 100, 21).tolist(), "little contrast"),
    ],
)
def test_an_odd_image_is_found_and_the_reason_told(column, value, reason):
    found = oddities.find_oddities(table(**{column: (7, value)}), ["lung"])
    assert next(iter(found)) == 7 and reason in found[7]


def test_a_mask_around_the_border_may_be_inverted():
    info = table(share=(7, 0.7))
    info["border"] = [1.0 if row in (7, 8) else 0.0 for row in range(20)]
    found = oddities.find_oddities(info, ["lung"])
    assert found[7].startswith("foreground around the border: 70%; inverted?") and 8 not in found


def test_images_that_are_alike_are_not_odd_but_for_the_smallest_and_largest_mask():
    found = oddities.find_oddities(table(), ["lung"])
    assert sorted(reason.split()[0] for reason in found.values()) == ["largest", "smallest"]
    many_empty = table()
    many_empty["share: lung"] = [0.0] * 15 + [0.2] * 5
    assert oddities.find_oddities(many_empty, ["lung"]) == {}
    assert oddities.find_oddities(table(0), ["lung"]) == {}


# ----------------------------------------------------------------------------------------- charts


def test_a_histogram_has_round_numbers_on_its_axis():
    drawn = charts.histogram("t", {"a": ("#000", np.arange(0.0, 101))})
    numbers = [float(text) for text in re.findall(r">([\d.e+-]+)</text>", drawn)]
    assert numbers == [0, 20, 40, 60, 80, 100]
    drawn = charts.histogram("t", {"a": ("#000", np.geomspace(0.02, 50, 99))}, log=True, unit=" %")
    assert re.findall(r">([\d.]+ %)</text>", drawn) == ["0.1 %", "1 %", "10 %"]


def test_files_of_very_different_grey_levels_are_shown_by_powers_of_ten():
    info = table(10)
    info["object"] = [[] for _ in range(10)]
    assert "differ by file" not in report_charts._grey_levels(info, "#000")
    info["quantiles"] = [np.linspace(0, 400_000, 21).tolist()] * 4 + info["quantiles"].tolist()[4:]
    drawn = report_charts._grey_levels(info, "#000")
    assert "differ by file" in drawn and "380,000" in drawn and ">1,000</text>" in drawn


def test_a_class_that_is_in_no_mask_is_told():
    info = table(4)
    info["share: <b>"] = 0.0
    assert "&lt;b&gt; is in no mask" in report_charts._shares(info, "<b>", "#000")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (45.6, "45.6"), (137_912, "138,000"), (-1024, "-1,020")],
)
def test_numbers_have_three_digits_that_count(value, text):
    assert charts.number(value) == text


@pytest.mark.parametrize("values", [[], [5.0], [5.0, 5.0], [-3.0, 1e9], [0.0] * 1000 + [1.0]])
def test_a_histogram_of_any_values_can_be_drawn(values):
    drawn = charts.histogram("a & b", {"a": ("#000", np.array(values))})
    assert ("a &amp; b" in drawn) == bool(values) and "nan" not in drawn and "inf" not in drawn


# ---------------------------------------------------------------------------------------- browser


@pytest.mark.slow
def test_a_picture_opens_and_closes_by_keyboard_and_outlines_can_be_hidden(discs, tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if not chromium:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium")
    page_of(discs, tmp_path)
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        requested = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto((tmp_path / "page" / "report.html").as_uri())
        first = page.locator(".tile summary").first
        assert first.bounding_box()["width"] >= 240
        first.focus()
        page.keyboard.press("Enter")
        assert first.bounding_box()["width"] == 1000
        page.keyboard.press("Enter")
        assert first.bounding_box()["width"] < 300
        outline = page.locator(".outlines").first
        assert outline.is_visible()
        page.uncheck("#outlines")
        assert not outline.is_visible()
        assert page.get_attribute("html", "lang") == "en"
        page.click(".command")
        selected = page.evaluate("() => getSelection().toString()")
        assert selected.startswith("python train.py --")
        assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
        browser.close()


def test_the_style_names_no_address():
    assert "url(" not in (ROOT / "dataset" / "report" / "report.css").read_text()
