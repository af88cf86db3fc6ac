"""The web page in a real browser: the mask lies over the image, nothing is sent elsewhere."""

import os
import shutil

import numpy as np
import pytest
from test_serve import Running
from test_serve_doors import to_nifti

from dataset.phantoms import draw_phantom
from imaging import formats, plots

pytestmark = pytest.mark.slow

sync = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def page(exported, tmp_path_factory):
    """The page in Chromium. page.requested has the URLs, page.messages what the console shows."""
    chromium = shutil.which("chromium")
    if not chromium:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium: apt-get install chromium"
        )
    running = Running(exported, tmp_path_factory.mktemp("page"))
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        page.requested, page.messages = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.home = f"http://127.0.0.1:{running.port}/"
        page.goto(page.home)
        yield page
        browser.close()
    running.stop()


def pixels(page) -> np.ndarray:
    """Read the canvas: (H, W, 4)."""
    flat, width = page.evaluate(
        "() => { const c = document.getElementById('view'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height); return [Array.from(d.data), c.width]; }"
    )
    return np.array(flat, np.uint8).reshape(-1, width, 4)


def test_the_mask_lies_over_the_image(page, xray, tmp_path):
    path, truth = xray
    page.set_input_files("#file", path)
    page.wait_for_selector("#result:not([hidden])")
    assert page.inner_text("#status").startswith("Done.")
    picture = formats.read_image(path)[..., 0].astype(float)
    page.fill("#opacity", "0")
    page.dispatch_event("#opacity", "input")
    np.testing.assert_allclose(pixels(page)[..., 0], picture, atol=2)
    page.fill("#opacity", "100")
    page.dispatch_event("#opacity", "input")
    red = (np.abs(pixels(page)[..., :3].astype(int) - plots.COLOURS[0]) < 3).all(-1)
    assert 2 * (red & (truth > 0)).sum() / (red.sum() + (truth > 0).sum()) > 0.9
    assert f"{red.sum()} pixels" in page.inner_text("#figures")
    with page.expect_download() as download:
        page.click("#download")
    mask = formats.decode_image(download.value.path().read_bytes())[..., 0] > 0
    np.testing.assert_array_equal(mask, red)
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    assert formats.read_image(shot).std() > 10


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_an_orientation_tag_turns_image_and_mask(page, xray, tmp_path, ending):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = Image.open(xray[0]).convert("L")
    picture.save(tmp_path / f"turned.{ending}", exif=exif, quality=95)
    page.set_input_files("#file", tmp_path / f"turned.{ending}")
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Done')")
    assert "EXIF orientation 3 applied" in page.inner_text("#status")
    page.fill("#opacity", "0")
    upright = np.asarray(picture, float)[::-1, ::-1]
    assert np.abs(pixels(page)[..., 0] - upright).mean() < 3
    page.fill("#opacity", "100")
    red = (np.abs(pixels(page)[..., :3].astype(int) - plots.COLOURS[0]) < 3).all(-1)
    with page.expect_download() as download:
        page.click("#download")
    mask = formats.decode_image(download.value.path().read_bytes())[..., 0] > 0
    np.testing.assert_array_equal(mask, red)


def test_a_file_that_is_not_an_image_shows_an_error(page, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "notes.png")
    page.wait_for_selector("#status.error")
    assert "Failed: unreadable" in page.inner_text("#status")
    assert page.locator("#result").is_hidden()


def test_the_page_requests_nothing_elsewhere_and_breaks_no_rule(page):
    assert page.requested and all(
        url.startswith((page.home, "blob:" + page.home)) for url in page.requested
    )
    assert not [
        line for line in page.messages if "Content Security Policy" in line or "Uncaught" in line
    ], page.messages


def test_the_page_works_by_keyboard_and_every_control_has_a_name(page, xray):
    names = page.evaluate(
        "() => Array.from(document.querySelectorAll('input'))"
        ".map(i => i.labels[0] && i.labels[0].textContent)"
    )
    assert all(names) and page.get_attribute("html", "lang") == "en"
    page.set_input_files("#file", xray[0])
    page.wait_for_selector("#result:not([hidden])")
    page.focus("#file")
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id"))
    assert reached == ["view", "opacity", "download"]
    page.fill("#opacity", "40")
    before = page.input_value("#opacity")
    page.focus("#opacity")
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#opacity") != before


def test_a_late_answer_is_not_drawn_over_another_image(page, xray, phantoms, tmp_path):
    first, second = sorted((phantoms / "CXR_png").iterdir())[:2]
    expected = []
    for path in (first, second):
        page.set_input_files("#file", path)
        page.wait_for_function(
            "() => document.getElementById('status').textContent.startsWith('Done')"
        )
        expected.append(page.inner_text("#figures"))
    assert expected[0] != expected[1]
    held = []
    page.route("**/v1/segment", lambda route: held.append(route) if not held else route.continue_())
    page.set_input_files("#file", first)  # its answer is held back
    page.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('Sending')"
    )
    with page.expect_event("requestfailed"):  # the page gives the first one up
        page.set_input_files("#file", second)
    page.wait_for_selector("#result:not([hidden])")
    held[0].abort()
    page.wait_for_timeout(500)
    assert page.inner_text("#figures") == expected[1]
    page.unroute("**/v1/segment")


@pytest.fixture
def volume(tmp_path) -> np.ndarray:
    """Six slices, a phantom in the middle two, of 16 bits; written to volume.nii.gz."""
    phantom = draw_phantom(np.random.default_rng(0))[0].astype(np.int16) * 8
    slices = np.zeros((6, *phantom.shape), np.int16)
    slices[2:4] = phantom
    to_nifti(slices).to_filename(tmp_path / "volume.nii.gz")
    return slices


def test_a_volume_is_scrolled_and_windowed(page, volume, tmp_path):
    page.set_input_files("#file", tmp_path / "volume.nii.gz")
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Done')")
    first_shown = page.inner_text("#shown")
    assert "voxels" in page.inner_text("#figures") and "ml" in page.inner_text("#figures")
    for name, value in (("slice", 3), ("opacity", 0), ("centre", 1000), ("width", 800)):
        page.fill(f"#{name}", str(value))
        page.dispatch_event(f"#{name}", "input")
    centre, width = (float(page.input_value(f"#{name}")) for name in ("centre", "width"))
    expected = np.clip((volume[2] - (centre - width / 2)) * 255 / width, 0, 255)
    np.testing.assert_allclose(pixels(page)[..., 0], expected, atol=1)
    page.focus("#view")
    for key, shown in (("Home", 1), ("ArrowDown", 2), ("End", 6), ("ArrowUp", 5), ("PageUp", 1)):
        page.keyboard.press(key)
        assert page.inner_text("#shown") == f"Slice {shown} of 6"
    assert not pixels(page)[..., 0].any()
    box = page.locator("#view").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.wheel(0, 100)
    page.wait_for_function("() => document.getElementById('shown').textContent === 'Slice 2 of 6'")
    before = page.input_value("#width")
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 50)
    page.mouse.up()
    assert page.input_value("#width") != before
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "mask.nii.gz"
    mask = formats.decode_mask_scan(download.value.path().read_bytes()).pixels[..., 0]
    most = np.count_nonzero(mask, axis=(1, 2)).argmax()
    assert mask.shape == volume.shape and first_shown == f"Slice {most + 1} of 6"


def test_an_image_after_a_volume_has_no_slices(page, xray, volume, tmp_path):
    for path, count in ((tmp_path / "volume.nii.gz", 6), (xray[0], 1)):
        page.set_input_files("#file", path)
        page.wait_for_function(
            "() => document.getElementById('status').textContent.startsWith('Done')"
        )
        assert page.locator("#volume").is_visible() == (count > 1)
    assert page.inner_text("#figures").count("pixels") == 1


def test_an_upload_shows_its_progress(page, xray, volume, tmp_path):
    page.route("**/v1/segment", lambda route: None)  # never answered
    page.set_input_files("#file", tmp_path / "volume.nii.gz")
    page.wait_for_selector("#progress:not([hidden])")
    page.unroute("**/v1/segment")
    page.set_input_files("#file", xray[0])
    page.wait_for_selector("#result:not([hidden])")
    assert page.locator("#progress").is_hidden()
