"""The service's further doors: HEAD, volumes, TensorFlow Serving's routes, CORS, notes."""

import gzip
import io
import json
import pickle
import threading
import time

import cv2
import httpx
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from conftest import HEIGHT, ROOT, WIDTH
from test_pacs import write_xray
from test_serve import Running, decode_rle, write_keys

import metrics
from dataset.phantoms import draw_phantom
from imaging import formats
from imaging.grid import fit_grid
from imaging.scan import Scan
from inference.exported_model import Prepared, load_exported
from inference.sampler import Sampler
from inference.segment import segment_scans
from inference.windows import Windows
from serving import media_types, responses
from serving.config import Config, check_config
from serving.errors import Problem
from utils import UserError

LUNGS = ROOT / "files" / "lungs"
VIEWER = "https://viewer.example"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    running = Running(LUNGS, tmp_path_factory.mktemp("doors"), "--max-slices", "40")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def volume():
    """Phantoms as slices of a volume, uint8 (6, 224, 256), and the lungs."""
    drawn = [draw_phantom(np.random.default_rng(seed)) for seed in range(6)]
    images = np.stack([image[16:240] for image, _ in drawn])
    return images, np.stack([mask[16:240].max(-1) for _, mask in drawn]) > 0


def to_nifti(slices: np.ndarray) -> nibabel.Nifti1Image:
    affine = np.array([[-0.8, 0, 0, 60], [0, -0.8, 0, 50], [0, 0, 5, -20], [0, 0, 0, 1.0]])
    return nibabel.Nifti1Image(slices.transpose(2, 1, 0).astype(np.int16), affine)


def post(service, content: bytes, accept: str = "*/*") -> httpx.Response:
    return service.client.post("/v1/segment", content=content, headers={"Accept": accept})


# ------------------------------------------------------------------------------------------- HEAD


@pytest.mark.parametrize(
    "path",
    ["/livez", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready", "/", "/v2/models/unet"],
)
def test_head_is_answered_as_get_without_the_body(service, path):
    get, head = service.client.get(path), service.client.head(path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == str(len(get.content))
    # The connection can be used again.
    assert service.client.get(path).content == get.content


def test_head_of_what_does_not_exist_or_is_no_get(service):
    assert service.client.head("/nothing").status_code == 404
    assert service.client.head("/v1/segment").status_code == 405


# ---------------------------------------------------------------------------------------- volumes


def test_a_nifti_volume_gets_a_mask_of_its_shape_and_place(service, volume):
    images, lungs = volume
    sent = to_nifti(images)
    answer = post(service, gzip.compress(sent.to_bytes()))
    assert answer.headers["content-type"] == "application/x-nifti"
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    assert mask.shape == sent.shape
    np.testing.assert_allclose(mask.affine, sent.affine)
    found = np.asarray(mask.dataobj).transpose(2, 1, 0)
    assert set(np.unique(found)) == {0, 1} and metrics.score_mask(lungs, found)["dice"] > 0.9
    measured = json.loads(answer.headers["x-volumes"])[0]
    assert measured["voxels"] == found.sum()
    assert measured["volume_ml"] == pytest.approx(found.sum() * 0.8 * 0.8 * 5 / 1000)


def test_the_mask_is_that_of_predict(service, volume):
    sent = to_nifti(volume[0]).to_bytes()
    model, run = load_exported(LUNGS / "unet.onnx", engine="onnxruntime")

    class Network:
        predict_on_batch = staticmethod(run)

    scan = formats.decode_scan(sent)
    expected = segment_scans([(Network, model.metadata | {"mirror": False})], [scan])[0].ids
    answer = post(service, sent, "image/tiff")
    assert answer.headers["content-type"] == "image/tiff"
    found = tifffile.imread(io.BytesIO(answer.content))
    assert found.shape == expected.shape and (found == 255 * expected).mean() > 0.9999


def test_a_tiff_of_many_pages_gets_one_and_json_has_every_slice(service, volume):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, volume[0], photometric="minisblack")
    answer = post(service, buffer.getvalue())
    assert answer.headers["content-type"] == "image/tiff"
    pages = tifffile.imread(io.BytesIO(answer.content))
    assert metrics.score_mask(volume[1], pages)["dice"] > 0.9
    described = post(service, buffer.getvalue(), "application/json").json()
    assert described["size"] == list(pages.shape) and described["notes"] == []
    lungs = described["classes"][0]
    assert lungs["class"] == "lungs" and lungs["volume_ml"] is None
    np.testing.assert_array_equal(np.stack([decode_rle(one) for one in lungs["rle"]]) * 255, pages)


def test_where_frames_of_dicom_allow_no_segmentation_the_mask_is_a_tiff(service, volume, tmp_path):
    write_xray(tmp_path / "cine.dcm", np.concatenate(volume[0]))
    header = pydicom.dcmread(tmp_path / "cine.dcm")
    header.NumberOfFrames, header.Rows = len(volume[0]), volume[0].shape[1]
    # Ultrasound, whose frames have no place in the patient.
    header.SOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
    buffer = io.BytesIO()
    header.save_as(buffer)
    answer = post(service, buffer.getvalue())
    if answer.headers["content-type"] == "application/dicom":
        made = pydicom.dcmread(io.BytesIO(answer.content))
        assert made.Modality == "SEG" and made.NumberOfFrames == len(volume[0])
        found = made.pixel_array
    else:
        assert "application/dicom" in json.loads(answer.headers["x-notes"])[-1]
        found = tifffile.imread(io.BytesIO(answer.content))
    assert metrics.score_mask(volume[1], found)["dice"] > 0.9


def test_what_a_volume_cannot_be_answered_as_is_refused(service, volume):
    content = to_nifti(volume[0]).to_bytes()
    for accept in ("image/png", "application/geo+json", "application/dicom"):
        refused = post(service, content, accept)
        assert refused.status_code == 406 and "6 slices" in refused.json()["detail"]
        assert "application/x-nifti" in refused.json()["detail"]
    assert post(service, content, "image/png, */*;q=0.1").status_code == 200


@pytest.mark.parametrize(
    ("ending", "media_type"), [("nrrd", "application/x-nrrd"), ("mha", "application/x-metaimage")]
)
def test_volumes_of_itk_come_back_in_kind_and_place(service, volume, tmp_path, ending, media_type):
    itk = pytest.importorskip("SimpleITK")
    sent = itk.GetImageFromArray(volume[0].astype(np.int16))
    sent.SetSpacing((0.8, 0.9, 5.0))
    sent.SetOrigin((10.0, -20.0, 30.0))
    itk.WriteImage(sent, str(tmp_path / f"sent.{ending}"))
    answer = post(service, (tmp_path / f"sent.{ending}").read_bytes())
    assert answer.headers["content-type"] == media_type, answer.text
    (tmp_path / f"mask.{ending}").write_bytes(answer.content)
    mask = itk.ReadImage(str(tmp_path / f"mask.{ending}"))
    np.testing.assert_allclose(mask.GetOrigin(), sent.GetOrigin())
    np.testing.assert_allclose(mask.GetSpacing(), sent.GetSpacing())
    assert metrics.score_mask(volume[1], itk.GetArrayFromImage(mask))["dice"] > 0.9


def test_a_picture_can_be_answered_as_nifti(service, volume):
    png = cv2.imencode(".png", volume[0][0])[1].tobytes()
    answer = post(service, png, "application/x-nifti")
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    assert mask.shape[:2] == volume[0][0].T.shape


def test_too_many_slices_are_refused(service):
    refused = post(service, to_nifti(np.zeros((41, 20, 20))).to_bytes())
    assert refused.status_code == 413 and "--max-slices" in refused.json()["detail"]


@pytest.mark.slow
def test_a_volume_does_not_make_others_wait(tmp_path, volume):
    running = Running(LUNGS, tmp_path)
    large = gzip.compress(to_nifti(np.tile(volume[0], (16, 2, 2))).to_bytes(), 1)
    small = cv2.imencode(".png", volume[0][0])[1].tobytes()
    answers = []
    try:
        post(running, small)
        thread = threading.Thread(target=lambda: answers.append(post(running, large)))
        thread.start()
        seconds = []
        while thread.is_alive():
            start = time.monotonic()
            with httpx.Client(timeout=60) as client:
                url = f"http://127.0.0.1:{running.port}/v1/segment"
                assert client.post(url, content=small).status_code == 200
            seconds.append(time.monotonic() - start)
        thread.join()
        assert answers[0].status_code == 200, answers[0].text
        assert len(seconds) > 5 and np.median(seconds) < 1.5, seconds
    finally:
        running.stop()


# ----------------------------------------------------------------------------- TensorFlow Serving


def test_tensorflow_servings_routes_name_signature_and_version(service):
    for route in ("/v1/models/unet", "/v1/models/unet/versions/1"):
        state = service.client.get(route).json()["model_version_status"]
        assert [(one["version"], one["state"]) for one in state] == [("1", "AVAILABLE")]
    for route in ("/v1/models/unet/metadata", "/v1/models/unet/versions/1/metadata"):
        shown = service.client.get(route).json()
        assert shown["model_spec"] == {"name": "unet", "signature_name": "", "version": "1"}
        signature = shown["metadata"]["signature_def"]["signature_def"]["serving_default"]
        (entry,) = signature["inputs"].values()
        sizes = [int(side["size"]) for side in entry["tensor_shape"]["dim"]]
        assert sizes == [-1, HEIGHT, WIDTH, 1] and entry["dtype"] == "DT_FLOAT"
        assert list(signature["outputs"]) == ["probabilities"]
    body = {"inputs": {next(iter(signature["inputs"])): np.zeros((1, HEIGHT, WIDTH, 1)).tolist()}}
    for route in ("/v1/models/unet:predict", "/v1/models/unet/versions/1:predict"):
        outputs = service.client.post(route, json=body).json()["outputs"]
        assert np.shape(outputs) == (1, HEIGHT, WIDTH, 1)
    assert service.client.get("/v1/models/unet/versions/2").status_code == 404


# ------------------------------------------------------------------------------------------- CORS


def preflight(service, origin: str) -> httpx.Response:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-api-key",
    }
    return service.client.options("/v1/segment", headers=asked)


def test_without_the_option_no_origin_is_allowed(service):
    assert preflight(service, VIEWER).status_code == 403
    answer = service.client.get("/v1/model", headers={"Origin": VIEWER})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A service with a key that two origins may call."""
    folder = tmp_path_factory.mktemp("cors")
    keys = write_keys(folder / "keys", foo="viewer")
    origins = f"{VIEWER}, http://[::1]:3000"
    flags = ("--cors-origin", origins, "--keys", keys)
    running = Running(LUNGS, folder, *flags)
    yield running
    running.stop()


def test_a_page_of_an_allowed_origin_may_call_the_service(shared, volume):
    for origin in (VIEWER, "http://[::1]:3000"):
        answer = preflight(shared, origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert "x-api-key" in allowed and "content-type" in allowed
    png = cv2.imencode(".png", volume[0][0])[1].tobytes()
    headers = {"Origin": VIEWER, "X-API-Key": "foo"}
    answer = shared.client.post("/v1/segment", content=png, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == VIEWER
    assert "X-Areas" in answer.headers["access-control-expose-headers"]
    # Without the header the page could not read why it was refused.
    refused = shared.client.post("/v1/segment", content=png, headers={"Origin": VIEWER})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == VIEWER


def test_a_page_of_another_origin_may_not(shared):
    for origin in ("https://evil.example", f"{VIEWER}.evil.example", "null"):
        assert preflight(shared, origin).status_code == 400
        answer = shared.client.get("/livez", headers={"Origin": origin})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origins", ["viewer.example", "https://viewer.example/", "https://a b", "file://x", "null"]
)
def test_what_is_no_origin_is_refused_at_the_start(origins):
    with pytest.raises(UserError, match="cors_origin.*expected a scheme and a host"):
        check_config(Config(cors_origin=origins))


# ------------------------------------------------------------------------------ notes and answers


@pytest.fixture(scope="module")
def model():
    return load_exported(LUNGS / "unet.onnx", engine="onnxruntime")[0]


def prepared(count: int, notes: tuple[str, ...] = (), kind: str = "PNG", place=False) -> Prepared:
    empty = Scan(np.zeros((0, 20, 20, 1)), format=kind, header=(pydicom.Dataset(),))
    grid = fit_grid((count, 20, 20), (HEIGHT, WIDTH))
    windows = Windows(np.zeros((count, HEIGHT, WIDTH, 1), np.uint8), Sampler((HEIGHT, WIDTH)))
    return Prepared(windows, grid, None, kind, place, notes, pickle.dumps(empty))


@pytest.mark.parametrize("count", [1, 3])
def test_notes_stand_in_json_and_in_a_header(model, count):
    notes = ("padding of -2000 was kept out (µ)",)
    ids = np.zeros((count, 20, 20), np.uint8)
    for media_type in ("application/json", "application/geo+json")[: 3 - count]:
        answer = responses.respond(model, ids, None, prepared(count, notes), [media_type])
        assert json.loads(answer.body)["notes"] == list(notes)
    answer = responses.respond(model, ids, None, prepared(count, notes), ["image/tiff"])
    header = answer.headers["X-Notes"]
    assert header.isascii() and json.loads(header) == list(notes)
    many = responses.respond(model, ids, None, prepared(count, ("x" * 900,) * 90), ["image/tiff"])
    assert len(many.headers["X-Notes"]) < 2100


def test_a_json_answer_that_is_too_long_is_refused(model, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 2, (3, 20, 20), dtype=np.uint8)
    monkeypatch.setattr("serving.volumes.MAX_NUMBERS", 100)
    with pytest.raises(Problem, match="too long as JSON"):
        responses.respond(model, noise, None, prepared(3, ()), ["application/json"])


def test_a_type_that_cannot_be_written_is_followed_by_the_next(model):
    ids = np.zeros((3, 20, 20), np.uint8)
    source = prepared(3, (), "DICOM")
    answer = responses.respond(model, ids, None, source, ["application/dicom", "image/tiff"])
    assert answer.media_type == "image/tiff" and "application/dicom" in answer.headers["X-Notes"]
    with pytest.raises(UserError):
        responses.respond(model, ids, None, source, ["application/dicom"])


@pytest.mark.parametrize(
    ("accept", "kind", "slices", "chosen"),
    [
        ("", "PNG", 1, "image/png"),
        ("*/*", "NIfTI", 1, "image/png"),
        ("*/*", "NIfTI", 9, "application/x-nifti"),
        ("*/*", "DICOM", 9, "application/dicom"),
        ("image/*", "NIfTI", 9, "image/tiff"),
        ("text/html, application/json", "PNG", 1, "application/json"),
        ("image/png, */*", "TIFF", 9, "image/tiff"),
        ("application/gzip", "PNG", 1, "application/x-nifti"),
        ("*/*", "NRRD", 9, "application/x-nrrd"),
        ("*/*", "GIF", 9, "image/tiff"),
        ("APPLICATION/JSON;q=1", "TIFF", 9, "application/json"),
    ],
)
def test_the_answers_type_follows_accept_and_the_image(accept, kind, slices, chosen):
    offered = media_types.choose(media_types.read_accept(accept), prepared(slices, kind=kind))
    assert offered[0] == chosen


@pytest.mark.parametrize(
    ("accept", "kind", "slices"),
    [("text/html", "PNG", 1), ("application/dicom", "PNG", 1), ("image/png", "TIFF", 2)],
)
def test_an_answer_that_is_not_offered_is_refused(accept, kind, slices):
    with pytest.raises(Problem) as refused:
        media_types.choose(media_types.read_accept(accept), prepared(slices, kind=kind))
    assert refused.value.status == 406


# -------------------------------------------------------------------------------------- smoke test


def smoke(script, folder, *flags) -> tuple[int, str]:
    done = script(folder, "-m", "serving.smoke", *flags)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_running_service_is_compared_with_known_masks(service, tmp_path, script):
    url = f"http://127.0.0.1:{service.port}"
    code, text = smoke(script, tmp_path, url)
    assert code == 0 and "3 of 3 masks are as expected" in text, text
    assert "by onnxruntime in float32" in text and "Dice 1.0000" in text
    for path in (LUNGS / "reference").glob("phantom0*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    mask = cv2.imread(str(tmp_path / "phantom0_mask.png"), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(tmp_path / "phantom0_mask.png"), np.roll(mask, 9, axis=0))
    code, text = smoke(script, tmp_path, url, "--reference", str(tmp_path))
    assert code == 1 and "expected at least 0.99" in text and "0 of 1 masks" in text


def test_the_smoke_test_says_what_is_wrong(shared, tmp_path, script):
    url = f"http://127.0.0.1:{shared.port}"
    code, text = smoke(script, tmp_path, url)
    assert code == 2 and "answered 401: no known API key" in text
    (tmp_path / "key").write_text("foo\n")
    assert smoke(script, tmp_path, url, "--key", "key")[0] == 0
    code, text = smoke(script, tmp_path, "http://127.0.0.1:9")
    assert code == 2 and "does not answer" in text
    code, text = smoke(script, tmp_path, url, "--key", "key", "--reference", str(tmp_path))
    assert code == 2 and "has no image with its mask" in text
