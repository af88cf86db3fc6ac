"""What the web page gets: a form with the mask, its file and the image."""

import json
from email.parser import BytesParser
from email.policy import HTTP

import cv2
import nibabel
import numpy as np
import pytest
from conftest import ROOT
from test_dicom_series import write_series
from test_pacs import write_xray
from test_serve_doors import to_nifti

from dataset.phantoms import draw_phantom
from imaging import formats
from imaging.labels import BITS
from imaging.scan import Scan
from inference.exported_model import load_exported
from serving import media_types, responses, view
from serving.errors import Problem

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lungs():
    return load_exported(ROOT / "files" / "lungs" / "unet.onnx")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return draw_phantom(np.random.default_rng(0))[0]


def take_apart(body: bytes) -> dict[str, tuple[bytes, str]]:
    """Read a form as a browser does: part → content and file name."""
    boundary = view.read_boundary(body)
    head = f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n".encode()
    parts = BytesParser(policy=HTTP).parsebytes(head + body).iter_parts()
    found = {}
    for part in parts:
        name = part.get_param("name", header="content-disposition")
        found[name] = part.get_payload(decode=True), part.get_filename()
    return found


def show(lungs, content: bytes) -> dict[str, tuple[bytes, str]]:
    """Segment a file and write all that the page gets."""
    network, run = lungs
    prepared = network.read(content, max_slices=64)
    found = network.predict(prepared, run)
    answer = responses.respond(network, found.ids, found.quality, prepared, [media_types.VIEW])
    assert answer.media_type == media_types.VIEW and "X-Areas" not in answer.headers
    boundary = view.read_boundary(answer.body)
    return take_apart(answer.body + view.encode_image(content, 2**31, "", boundary))


def test_an_image_is_shown_with_its_mask(lungs, picture):
    parts = show(lungs, cv2.imencode(".png", picture)[1].tobytes())
    description = json.loads(parts["description"][0])
    assert description["shape"] == [1, 256, 256]
    mask = np.frombuffer(parts["mask"][0], np.uint8).reshape(256, 256)
    (lung,) = description["classes"]
    assert lung["class"] == "lungs" and lung["area_pixels"] == mask.sum() > 1000
    assert 0 < description["quality"]["predicted_dice"] <= 1
    content, name = parts["file"]
    assert name == "mask.png"
    np.testing.assert_array_equal(formats.decode_image(content)[..., 0] > 0, mask > 0)
    shown = cv2.imdecode(np.frombuffer(parts["image"][0], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert np.corrcoef(shown.ravel(), picture.ravel())[0, 1] > 0.99
    assert json.loads(parts["view"][0]) == {"flip": [False, False]}


def test_a_large_image_is_shown_smaller_and_measured_whole(lungs, picture):
    large = cv2.resize(picture, (3000, 2500))
    parts = show(lungs, cv2.imencode(".png", large)[1].tobytes())
    description = json.loads(parts["description"][0])
    shape = description["shape"]
    assert shape == [1, round(2500 * 2048 / 3000), 2048]
    mask = np.frombuffer(parts["mask"][0], np.uint8)
    share = description["classes"][0]["area_pixels"] / large.size
    assert mask.mean() == pytest.approx(share, rel=0.01)
    assert formats.decode_image(parts["file"][0]).shape[:2] == (2500, 3000)


def test_a_volume_is_shown_in_its_own_grey_levels(lungs, picture):
    volume = np.stack([picture.astype(np.int16) * k for k in (1, 2, 3)])
    content = to_nifti(volume).to_bytes()
    parts = show(lungs, content)
    description, shown = (json.loads(parts[name][0]) for name in ("description", "view"))
    levels = np.frombuffer(parts["image"][0], "<i2").reshape(description["shape"])
    scan = formats.decode_scan(content)
    np.testing.assert_array_equal(levels, scan.pixels[..., 0])
    low, high = np.percentile(scan.pixels, (0.5, 99.5))
    assert shown["window"] == pytest.approx([(low + high) / 2, high - low])
    assert parts["file"][1] == "mask.nii.gz"
    mask = formats.decode_mask_scan(parts["file"][0], scan).pixels[..., 0]
    np.testing.assert_array_equal(mask.ravel(), np.frombuffer(parts["mask"][0], np.uint8))
    assert description["classes"][0]["voxels"] == (mask > 0).sum()


def test_levels_that_16_bits_do_not_hold_are_spread_over_them():
    volume = np.linspace(0, 1, 2 * 32 * 32, dtype=np.float32).reshape(32, 32, 2)
    content = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
    parts = take_apart(view.encode_image(content, 2**31, "0.5,0.5", "mark"))
    levels = np.frombuffer(parts["image"][0], "<i2")
    assert levels.min() == 0 and levels.max() == 32767
    shown = json.loads(parts["view"][0])
    assert shown["window"] == pytest.approx([32767 / 2, 32767 / 2])


@pytest.mark.parametrize(("channels", "separate"), [(3, False), (3, True), (2, True), (4, True)])
def test_a_volume_of_several_channels_is_shown_in_grey(channels, separate):
    """Colours as their brightness, sequences by the first one."""
    pixels = np.random.default_rng(0).integers(0, 200, (3, 16, 16, channels), np.uint8)
    levels, (centre, width) = view.to_levels(Scan(pixels, separate=separate), "100,50")
    assert levels.shape == (3, 16, 16) and (centre, width) == (100, 50)
    expected = pixels[..., 0]
    if not separate:
        expected = pixels @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(levels, expected, atol=1.5)


def test_nobody_knows_what_separates_the_parts():
    assert view.make_boundary() != view.make_boundary()


def test_the_file_of_a_dicom_image_is_a_segmentation(lungs, picture, tmp_path):
    write_xray(tmp_path / "xray.dcm", picture)
    content, name = show(lungs, (tmp_path / "xray.dcm").read_bytes())["file"]
    assert name == "mask.dcm" and content[128:132] == b"DICM"


def test_a_patient_is_shown_as_radiologists_look(tmp_path):
    """Right side on the left, front or head at the top."""
    write_series(tmp_path)  # DICOM's axial slices lie so already
    assert view.flips(formats.read_scan(tmp_path)) == [False, False]
    pixels = np.zeros((2, 4, 4, 1))
    towards_head_and_right = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert view.flips(Scan(pixels, affine=towards_head_and_right)) == [True, True]
    assert view.flips(Scan(pixels)) == [False, False]


def test_classes_that_overlap_are_painted_one_over_the_other():
    ids = np.array([[[0, 1, 2, 3]]], BITS)
    parts = take_apart(view.encode_mask("mark", ids, {}) + b"--mark--\r\n")
    assert list(parts["mask"][0]) == [0, 1, 2, 2]


def test_a_volume_that_no_browser_holds_is_refused(monkeypatch):
    monkeypatch.setattr(view, "MAX_VOXELS", 7)
    with pytest.raises(Problem, match="the page shows at most") as caught:
        view.encode_mask("mark", np.zeros((2, 2, 2), np.uint8), {})
    assert caught.value.status == 413
