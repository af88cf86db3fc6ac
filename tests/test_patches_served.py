"""Networks of patches, in 2-D, 2.5-D and 3-D: exported, served, and run over an archive."""

import gzip
import itertools
import json
import pickle
import re
import shutil
from pathlib import Path

import cv2
import httpx
import keras
import nibabel
import numpy as np
import onnx
import pytest
from conftest import HAS_EXACT_INT8
from nibabel import orientations
from test_dicom_series import write_series
from test_serve import Running

import export
import utils
from imaging import formats, pictures
from inference import archive, engines, models
from inference.exported_model import ImageTooLargeError, load_exported
from inference.sampler import Sampler
from inference.segment import segment_scans
from inference.storage import Folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="TensorFlow writes SavedModels"
    ),
]
SAMPLERS = {
    "2": Sampler((32, 48), patches=True),
    "2.5": Sampler((32, 32), patches=True, neighbours=1),
    "3": Sampler((8, 16, 24), patches=True, spacing=(2.0, 1.0, 1.0), orientation="SAR"),
}
SPACING = (1.0, 1.0, 2.0)  # of the volumes' voxels x, y, z


def make_network(sampler: Sampler) -> keras.Model:
    """Find what is bright around a pixel; to its right it counts more than to its left."""
    shape = sampler.input_shape(1)
    convolution = keras.layers.Conv3D if sampler.dimensions == 3 else keras.layers.Conv2D
    inputs = keras.Input(shape)
    layer = convolution(1, 3, padding="same", activation="sigmoid")
    model = keras.Model(inputs, layer(inputs))
    kernel = np.ones(layer.kernel.shape, np.float32)
    kernel[..., 2, :, :] = 1.5
    layer.set_weights([40 * kernel / kernel.sum(), np.float32([-20])])
    return model


def draw_volume(seed: int = 0) -> nibabel.Nifti1Image:
    """Draw a volume whose corners tell which is which: bright boxes of eight sizes, and noise."""
    rng = np.random.default_rng(seed)
    shape = (30, 40, 22)
    voxels = rng.normal(100, 5, shape)
    corners = itertools.product(*[(0, 1)] * 3)
    for size, corner in enumerate(corners, 3):
        starts = [side - size if end else 0 for side, end in zip(shape, corner, strict=True)]
        voxels[tuple(slice(start, start + size) for start in starts)] += 200
    affine = np.diag((*SPACING, 1.0))
    affine[:3, 3] = -10, 20, 5
    return nibabel.Nifti1Image(voxels.astype(np.float32), affine)


def reorient(image: nibabel.Nifti1Image, codes: str) -> nibabel.Nifti1Image:
    turn = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(codes))
    )
    return image.as_reoriented(turn)


@pytest.fixture(scope="module", params=SAMPLERS)
def exported(request, tmp_path_factory) -> Path:
    """A folder with a model file, volumes to check it on, and its export."""
    folder, sampler = tmp_path_factory.mktemp("patches"), SAMPLERS[request.param]
    facts = utils.make_metadata(["box"], sampler.size[-2:], 1, **sampler.metadata, mirror=True)
    utils.save_model(make_network(sampler), folder / "model.h5", facts)
    (folder / "volumes").mkdir()
    for seed in range(3):
        nibabel.save(draw_volume(seed), folder / "volumes" / f"{seed}.nii.gz")
    export.export(
        export.Config(
            model=str(folder / "model.h5"),
            out_dir=str(folder / "export"),
            images=str(folder / "volumes"),
            checked=2,
        )
    )
    return folder


@pytest.fixture(scope="module")
def service(exported, tmp_path_factory):
    running = Running(exported / "export", tmp_path_factory.mktemp("running"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def sampler(exported) -> Sampler:
    return Sampler.from_metadata(utils.load_metadata(exported / "model.h5"))


def expected_mask(folder: Path, image: nibabel.Nifti1Image) -> np.ndarray:
    """Return what the model file finds, (S, H, W)."""
    members = [utils.load_model(folder / "model.h5")]
    return segment_scans(members, [formats.decode_scan(image.to_bytes())])[0].ids


# ----------------------------------------------------------------------------------------- export


def test_every_format_gives_the_masks_of_the_model_file(exported, sampler):
    manifest = json.loads((exported / "export" / "manifest.json").read_text())
    assert manifest["agreement"] == {"images": 2, "saved_model": 1.0, "onnx": 1.0}
    assert "patches" in manifest["signatures"]["encoded"]
    (dice,) = manifest["precisions"].values()
    assert (0.9 if HAS_EXACT_INT8 else 0.5) < dice["onnxruntime int8"] <= 1
    network = onnx.load(exported / "export" / "unet.onnx")
    onnx.checker.check_model(network, full_check=True)
    sides = [side.dim_value for side in network.graph.input[0].type.tensor_type.shape.dim]
    assert sides == [0, *sampler.input_shape(1)]  # 0 is a batch of any size


def test_triton_gets_all_sides(exported, sampler):
    text = (exported / "export" / "unet" / "config.pbtxt").read_text()
    dims = re.findall(r"dims: \[ (.*) \]", text)
    assert dims[0] == ", ".join(map(str, sampler.input_shape(1)))
    assert dims[1] == ", ".join(map(str, (*sampler.size, 1)))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_find_what_keras_finds(exported, engine):
    if engine == "openvino" and not engines.has_openvino():
        pytest.skip("no OpenVINO")
    image = draw_volume(7)
    expected = expected_mask(exported, image)
    model, run = load_exported(exported / "export" / "unet.onnx", 1, engine, "float32")
    prepared = model.read(image.to_bytes(), max_slices=99)
    assert len(prepared.windows) > prepared.num_slices or model.metadata["sampler"]["spacing"]
    for batch_size in (1, 5):
        assert np.array_equal(model.predict(prepared, run, batch_size).ids, expected)
    members = models.load_members([str(exported / "export" / "unet.onnx")], engine)
    found = segment_scans(members, [formats.decode_scan(image.to_bytes())])[0].ids
    assert np.array_equal(found, expected) and 0 < expected.mean() < 0.5


def test_integers_find_nearly_the_same(exported):
    image = draw_volume(7)
    expected = expected_mask(exported, image)
    content = (exported / "export" / "unet-int8.onnx").read_bytes()
    facts = utils.load_metadata(exported / "model.h5") | {"mirror": False}
    network = engines.open_onnxruntime(content)
    found = segment_scans([(network, facts)], [formats.decode_scan(image.to_bytes())])[0].ids
    assert (found == expected).mean() > (0.99 if HAS_EXACT_INT8 else 0.9)


# ---------------------------------------------------------------------------------------- service


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAL", "IRP"])
def test_a_volume_comes_back_in_its_place(service, exported, sampler, codes):
    image = reorient(draw_volume(5), codes)
    content = gzip.compress(image.to_bytes())
    answer = service.client.post("/v1/segment", content=content)
    assert answer.headers["content-type"] == "application/x-nifti", answer.text
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.shape == image.shape
    scan = formats.decode_scan(mask.to_bytes())
    assert np.array_equal(scan.pixels[..., 0], expected_mask(exported, image))
    if sampler.orientation:  # then the mask in the patient is the same however it is stored
        first = reorient(draw_volume(5), "RAS")
        same = service.client.post("/v1/segment", content=first.to_bytes())
        same = nibabel.Nifti1Image.from_bytes(gzip.decompress(same.content))
        voxels = np.asarray(reorient(mask, "RAS").dataobj)
        assert np.array_equal(voxels, np.asarray(same.dataobj))


def test_a_large_picture_is_answered_like_any_other(service, exported, sampler):
    picture = np.zeros((150, 170), np.uint8)
    picture[20:60, 30:80] = picture[100:140, 90:160] = 200
    png = cv2.imencode(".png", picture)[1].tobytes()
    answer = service.client.post("/v1/segment", content=png)
    if sampler.dimensions == 3:
        assert answer.status_code == 400 and "this network takes volumes" in answer.text
        return
    mask = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_UNCHANGED)
    members = [utils.load_model(exported / "model.h5")]
    expected = segment_scans(members, [formats.decode_scan(png)])[0].ids[0]
    assert np.array_equal(mask, 255 * expected) and 0 < expected.mean() < 0.5
    shown = service.client.post(
        "/v1/segment", content=png, headers={"Accept": "application/json"}
    ).json()
    assert shown["classes"][0]["area_pixels"] == expected.sum() and "quality" in shown


def test_a_picture_that_is_prepared_in_parts_can_be_sent_to_a_worker(exported, monkeypatch):
    model, run = load_exported(exported / "export" / "unet.onnx", 1, "onnxruntime", "float32")
    content = draw_volume(2).to_bytes()
    prepared = model.read(content, max_slices=99)
    monkeypatch.setattr("imaging.lazy.LARGE_SLICE", 100)
    in_parts = pickle.loads(pickle.dumps(model.read(content, max_slices=99)))
    assert np.array_equal(in_parts.windows.case, prepared.windows.case)
    assert np.array_equal(model.predict(in_parts, run).ids, model.predict(prepared, run).ids)


def test_tensors_have_the_networks_dimensions(service, exported, sampler):
    sides = sampler.input_shape(1)
    batch = np.random.default_rng(0).random((2, *sides)).astype(np.float32)
    engine = engines.open_onnxruntime((exported / "export" / "unet.onnx").read_bytes())
    expected = engine.run(batch)[..., :1]  # the spread of the votes may follow
    shown = service.client.get("/v2/models/unet").json()
    assert shown["inputs"][0]["shape"] == [-1, *sides]
    assert shown["outputs"][0]["shape"] == [-1, *sampler.size, 1]
    entry = {"name": shown["inputs"][0]["name"], "datatype": "FP32", "shape": list(batch.shape)}
    body = {"inputs": [entry | {"data": batch.ravel().tolist()}]}
    output = service.client.post("/v2/models/unet/infer", json=body).json()["outputs"][0]
    found = np.reshape(output["data"], output["shape"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    answer = service.client.post("/v1/models/unet:predict", json={"instances": batch.tolist()})
    np.testing.assert_allclose(answer.json()["predictions"], expected, atol=1e-5)
    flat = {"inputs": [entry | {"shape": [2, int(np.prod(sides))]}]}
    refused = service.client.post("/v2/models/unet/infer", json=flat)
    assert refused.status_code == 400 and str(sides[0]) in refused.json()["detail"]
    assert service.client.get("/v1/model").json()["sampler"]["size"] == list(sampler.size)


def test_several_requests_share_the_network(service):
    """A volume of many windows and pictures at a time: each gets its own answer."""
    from concurrent.futures import ThreadPoolExecutor

    contents = [gzip.compress(draw_volume(seed).to_bytes()) for seed in range(4)]

    def ask(content: bytes) -> bytes:
        with httpx.Client(timeout=60) as client:
            url = f"http://127.0.0.1:{service.port}/v1/segment"
            return client.post(url, content=content).content

    alone = [ask(content) for content in contents]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, contents)) == alone


def test_what_would_fill_the_memory_is_refused(exported, sampler):
    """A layer of windows, and a file whose spacing asks for more voxels than it has."""
    if sampler.dimensions == 2:
        pytest.skip("a slice at a time")
    model, _ = load_exported(exported / "export" / "unet.onnx", 1, "onnxruntime", "float32")
    zoomed = nibabel.Nifti1Image(draw_volume().get_fdata(), np.diag((900, 900, 900, 1)))
    decoded = 4 * 30 * 40 * 22  # bytes
    for image, max_bytes in ((draw_volume(), decoded), (zoomed, 2**29)):
        with pytest.raises(ImageTooLargeError, match=r"expected fewer \(--max-megapixels\)"):
            model.read(image.to_bytes(), max_bytes, max_slices=99)


# ---------------------------------------------------------------------------------------- archive


def run_archive(exported: Path, folder: Path) -> list[str]:
    """Segment folder/in into folder/out without a cluster; return the images' problems."""
    pytest.importorskip("ray")
    metadata = utils.load_metadata(exported / "model.h5")
    source, target = Folder(str(folder / "in")), Folder(str(folder / "out"))
    plan = archive.plan_masks(list(source.list_files()), metadata, source.name)
    assert not plan.problems
    names = ("unet.onnx", "manifest.json")
    files = {name: (exported / "export" / name).read_bytes() for name in names}
    worker = archive.Worker(source, target, files, 1, "onnxruntime", "float32")
    items = plan.images.values()
    batch = {"image": [item.name for item in items], "files": [item.files for item in items]}
    return worker(batch | {"mask": list(plan.images)})["problem"]


def test_the_archive_writes_volumes_in_kind(exported, sampler, tmp_path):
    image = draw_volume(3)
    (tmp_path / "in").mkdir()
    nibabel.save(image, tmp_path / "in" / "a.nii.gz")
    pictures.write_picture(tmp_path / "in" / "b.png", np.zeros((64, 64), np.uint8))
    problems = run_archive(exported, tmp_path)
    wrong = "one slice; this network takes volumes" if sampler.dimensions == 3 else ""
    assert problems == ["", wrong]
    mask = nibabel.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_array_equal(mask.affine, image.affine)
    scan = formats.decode_scan(mask.to_bytes())
    assert np.array_equal(scan.pixels[..., 0], expected_mask(exported, image))
    assert (tmp_path / "out" / "b.png").is_file() == (not wrong)


def test_the_archive_takes_a_folder_of_dicom_files_as_a_volume(exported, sampler, tmp_path):
    if sampler.dimensions == 2 and not sampler.neighbours:
        pytest.skip("this network takes each slice by itself")
    voxels = np.asarray(draw_volume(4).dataobj).transpose(2, 1, 0)
    for place in ("in/ward", "broken"):
        write_series(
            tmp_path / place,
            positions=2 * np.arange(len(voxels)),
            Rows=voxels.shape[1],
            Columns=voxels.shape[2],
            PixelSpacing=[1.0, 1.0],
            PixelData=lambda i: np.uint16(voxels[i]).tobytes(),
        )
        for path in (tmp_path / place).iterdir():
            path.rename(path.with_name(f"{path.name}.dcm"))
    # Slices of two volumes.
    shutil.copytree(tmp_path / "in" / "ward", tmp_path / "in" / "two")
    for path in (tmp_path / "broken").iterdir():
        path.rename(tmp_path / "in" / "two" / f"b{path.name}")
    two, ward = run_archive(exported, tmp_path)
    assert ward == "" and two.startswith("2 volumes, of 22, 22 files; expected one volume")
    image = formats.read_scan(tmp_path / "in" / "ward")
    mask = formats.read_mask_scan(tmp_path / "out" / "ward.dcm", image, ["box"])
    expected = segment_scans([utils.load_model(exported / "model.h5")], [image])[0].ids
    assert expected.any() and np.array_equal(mask.pixels[..., 0], expected)
