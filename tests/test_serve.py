"""The service as its clients see it: a real process on loopback, simple and real clients."""

import asyncio
import contextlib
import copy
import gzip
import hashlib
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pydicom
import pytest
from conftest import HEIGHT, ROOT, WIDTH
from test_pacs import write_xray

import metrics
from imaging import formats
from inference import engines
from serving import server
from serving.errors import Problem
from serving.network import NetworkThreads
from serving.tensors import to_array

BUNDLED = ROOT / "files" / "lungs.h5"
V2_MODEL = "/v2/models/unet"
INPUT = (HEIGHT, WIDTH, 1)  # of the bundled model


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def write_keys(path: Path, **keys: str) -> str:
    """Write a file of API keys: key → name and rights."""
    lines = [f"{hashlib.sha256(key.encode()).hexdigest()} {more}\n" for key, more in keys.items()]
    path.write_text("".join(lines))
    path.chmod(0o600)
    return str(path)


class Running:
    """A service in a process of its own."""

    def __init__(
        self, exported: Path, folder: Path, *flags: str, scheme="http", port=0, **client
    ) -> None:
        self.port, self.log = port or free_port(), folder / "log"
        command = [
            sys.executable,
            ROOT / "serve.py",
            "--model",
            exported / "unet.onnx",
            "--port",
            str(self.port),
        ]
        environment = os.environ | {"TMPDIR": str(folder), "HOME": str(folder)}
        environment.pop("CI", None)  # ONNX Runtime sends no telemetry in CI
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--drain-s", "0", "--engine", "onnxruntime", *flags],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=folder,
            )
        self.client = httpx.Client(
            base_url=f"{scheme}://127.0.0.1:{self.port}", timeout=60, **client
        )
        for _ in range(300):
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def stop(self) -> int:
        self.client.close()
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture(scope="module")
def service(exported, tmp_path_factory):
    running = Running(exported, tmp_path_factory.mktemp("service"))
    yield running
    running.stop()


def decode_rle(rle: dict) -> np.ndarray:
    values = np.repeat(np.arange(len(rle["counts"])) % 2, rle["counts"])
    return values.reshape(rle["size"], order="F").astype(np.uint8)


def fill(feature: dict, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for part in feature["geometry"]["coordinates"]:
        one = np.zeros(shape, np.uint8)
        cv2.drawContours(one, [np.array(part[0])], -1, 1, cv2.FILLED)
        for hole in part[1:]:
            inner = np.zeros(shape, np.uint8)
            cv2.drawContours(inner, [np.array(hole)], -1, 1, cv2.FILLED)
            cv2.drawContours(inner, [np.array(hole)], -1, 0, 1)  # its ring is mask
            one[inner > 0] = 0
        mask |= one
    return mask


def test_a_mask_comes_in_every_format_and_equals_that_of_predict(service, xray, script, tmp_path):
    path, truth = xray
    script(
        tmp_path, "predict.py", "--model", BUNDLED, "--input", path, "--output", tmp_path / "out"
    )
    expected = formats.read_image(tmp_path / "out" / f"{path.stem}.png")[..., 0] > 0
    content = path.read_bytes()
    png = service.client.post("/v1/segment", content=content)
    assert png.status_code == 200 and png.headers["content-type"] == "image/png"
    mask = formats.decode_image(png.content)[..., 0] > 0
    assert (mask == expected).mean() > 0.9999 and metrics.score_mask(truth, mask)["dice"] > 0.9
    assert json.loads(png.headers["x-areas"])[0]["area_pixels"] == mask.sum()
    form = service.client.post(
        "/v1/segment", files={"image": ("a.png", content)}, headers={"Accept": "application/json"}
    )
    answer = form.json()
    np.testing.assert_array_equal(decode_rle(answer["classes"][0]["rle"]), mask)
    assert answer["classes"][0]["class"] == "lungs" and answer["classes"][0]["area_mm2"] is None
    geo = service.client.post(
        "/v1/segment", content=content, headers={"Accept": "application/geo+json"}
    ).json()
    np.testing.assert_array_equal(fill(geo["features"][0], mask.shape), mask)
    # Outer rings run counterclockwise, holes clockwise (RFC 7946).
    for outer, *holes in geo["features"][0]["geometry"]["coordinates"]:
        assert cv2.contourArea(np.float32(outer), oriented=True) > 0 or len(outer) < 6
        assert all(cv2.contourArea(np.float32(hole), oriented=True) < 0 for hole in holes)
    assert service.client.post("/invocations", content=content).content == png.content  # SageMaker
    assert service.client.get("/ping").status_code == 200


def test_dicom_comes_back_as_a_segmentation_with_its_area(service, xray, tmp_path):
    path, truth = xray
    write_xray(tmp_path / "a.dcm", formats.read_image(path)[..., 0])
    content = (tmp_path / "a.dcm").read_bytes()
    answer = service.client.post(
        "/v1/segment", content=content, headers={"Accept": "application/dicom"}
    )
    made = pydicom.dcmread(io.BytesIO(answer.content))
    assert (
        made.SoftwareVersions
        == service.client.get("/v1/model").json()["sha256"]
        == answer.headers["x-model-sha256"]
    )
    assert (
        made.Modality == "SEG"
        and metrics.score_mask(truth, made.pixel_array.squeeze())["dice"] > 0.9
    )
    described = service.client.post(
        "/v1/segment", content=content, headers={"Accept": "application/json"}
    ).json()
    area = described["classes"][0]
    assert area["area_mm2"] == pytest.approx(area["area_pixels"] * 0.7**2)
    refused = service.client.post(
        "/v1/segment", content=path.read_bytes(), headers={"Accept": "application/dicom"}
    )
    assert (
        refused.status_code == 406 and refused.headers["content-type"] == "application/problem+json"
    )


def run_exported(folder, batch):
    """Give the probabilities of ONNX Runtime; what follows them is the spread of the votes."""
    engine = engines.open_onnxruntime((folder / "unet.onnx").read_bytes())
    return engine.run(batch)[..., : engine.output_channels]


def test_tritons_own_client_gets_what_onnx_runtime_gives(service, exported):
    from tritonclient import http as triton

    batch = np.random.default_rng(0).uniform(size=(3, *INPUT)).astype(np.float32)
    expected = run_exported(exported, batch)
    client = triton.InferenceServerClient(f"127.0.0.1:{service.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("unet")
    shown = client.get_model_metadata("unet")
    assert (
        shown["inputs"][0]["shape"] == [-1, *INPUT]
        and shown["outputs"][0]["name"] == "probabilities"
    )
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    for binary_in in (True, False):
        for outputs in (
            None,
            [triton.InferRequestedOutput("probabilities", binary_data=not binary_in)],
        ):
            tensor = triton.InferInput(shown["inputs"][0]["name"], list(batch.shape), "FP32")
            tensor.set_data_from_numpy(batch, binary_data=binary_in)
            found = client.infer("unet", [tensor], outputs=outputs, request_id="7")
            np.testing.assert_allclose(found.as_numpy("probabilities"), expected, atol=1e-6)
            assert found.get_response()["id"] == "7"
    assert client.get_model_repository_index() == [
        {"name": "unet", "version": "1", "state": "READY", "reason": ""}
    ]
    (counted,) = client.get_inference_statistics("unet")["model_stats"]
    assert counted["execution_count"] >= 4 and counted["inference_count"] >= 12
    assert abs(counted["last_inference"] / 1000 - time.time()) < 100
    spent = counted["inference_stats"]
    assert spent["success"]["count"] == counted["execution_count"] and spent["fail"]["count"] == 0
    assert spent["success"]["ns"] == spent["queue"]["ns"] + spent["compute_infer"]["ns"] > 0


def test_transposed_images_are_refused():
    batch = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    for data in (batch, batch[0], batch.ravel(), batch.reshape(1, -1)):
        np.testing.assert_array_equal(to_array(data.tolist(), batch.shape), batch)
    for axes in ((0, 3, 1, 2), (0, 2, 1, 3)):
        turned = batch.transpose(axes).tolist()
        with pytest.raises(Problem, match=r"the input is nested as \[1, .*expected \[1, 2, 3, 4\]"):
            to_array(turned, batch.shape)


def test_tensorflow_servings_clients_are_answered(service, exported):
    batch = np.random.default_rng(0).uniform(size=(2, *INPUT)).astype(np.float32)
    expected = run_exported(exported, batch)
    route = "/v1/models/unet:predict"
    for body, key in (
        ({"instances": batch.tolist()}, "predictions"),
        ({"inputs": batch.tolist()}, "outputs"),
    ):
        answer = service.client.post(route, json=body)
        np.testing.assert_allclose(answer.json()[key], expected, atol=1e-6)
    assert (
        service.client.get("/v1/models/unet").json()["model_version_status"][0]["state"]
        == "AVAILABLE"
    )
    assert "error" in service.client.post(route, json={"instances": [[1]]}).json()
    flat = {"instances": batch.reshape(len(batch), -1).tolist()}
    assert service.client.post(route, json=flat).status_code == 200


@pytest.mark.parametrize(
    ("route", "content", "status"),
    [
        ("/v1/segment", b"", 400),
        ("/v1/segment", b"no image", 400),
        ("/v1/segment", cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes(), 400),
        (f"{V2_MODEL}/infer", b"", 400),
        (f"{V2_MODEL}/infer", b"[" * 100_000, 400),
        (
            f"{V2_MODEL}/infer",
            b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1,2],"data":[1]}]}',
            400,
        ),
        (
            f"{V2_MODEL}/infer",
            b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1,16,16,1],"data":[1]}]}',
            400,
        ),
        (
            f"{V2_MODEL}/infer",
            b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1e9,16,16,1],"data":[]}]}',
            400,
        ),
        (f"{V2_MODEL}/infer", b'{"inputs":{}}', 400),
        (f"{V2_MODEL}/infer", b'{"inputs":[' + b"[]," * 10**6 + b"[]]}", 413),
        ("/v1/models/unet:predict", b'{"instances":[NaN]}', 400),
        ("/v1/models/unet:predict", b'{"instances":[' + b"0," * 10**7 + b"0]}", 413),
        ("/v1/models/unet:predict", b'{"instances":[],"inputs":[]}', 400),
        ("/v1/nothing", b"", 404),
        ("/livez", b"", 405),
    ],
)
def test_bad_requests_get_a_problem_and_no_traceback(service, route, content, status):
    answer = service.client.post(route, content=content)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status and problem["detail"]
    assert "Traceback" not in answer.text


def test_a_body_that_is_too_large_is_refused_before_it_is_read(exported, tmp_path):
    running = Running(exported, tmp_path, "--max-body-mb", "1")
    try:
        assert running.client.post("/v1/segment", content=bytes(2**20 + 1)).status_code == 413
        chunks = (bytes(2**18) for _ in range(6))  # no Content-Length
        assert running.client.post("/v1/segment", content=chunks).status_code == 413
        assert running.client.get("/readyz").status_code == 200
    finally:
        running.stop()


def test_a_compressed_body_is_refused(service):
    answer = service.client.post(
        "/v1/segment", content=gzip.compress(b"x"), headers={"Content-Encoding": "gzip"}
    )
    assert answer.status_code == 415 and "Content-Encoding" in answer.json()["detail"]


@pytest.mark.slow
def test_memory_for_concurrent_large_bodies_is_limited(exported, tmp_path):
    running = Running(exported, tmp_path, "--max-body-mb", "1")
    head = (
        b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n"
        + bytes(2**20 - 1)
    )
    try:
        with contextlib.ExitStack() as stack:
            raws = [
                stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 10))
                for _ in range(5)
            ]
            for raw in raws[:4]:  # each lacks its last byte
                raw.sendall(head)
            time.sleep(0.5)
            raws[4].sendall(head)
            assert raws[4].recv(100).startswith(b"HTTP/1.1 503")
            for raw in raws[:4]:
                raw.sendall(b"\0")
                assert raw.recv(100).startswith(b"HTTP/1.1 400")
        # All memory was given back.
        assert running.client.post("/v1/segment", content=bytes(2**20)).status_code == 400
    finally:
        running.stop()


@pytest.mark.slow
def test_keys_are_checked_before_the_body_is_read(exported, tmp_path):
    keys = write_keys(tmp_path / "keys", sesame="viewer", numbers="prometheus metrics")
    running = Running(exported, tmp_path, "--keys", keys)
    try:
        # The body never comes.
        with socket.create_connection(("127.0.0.1", running.port), 10) as raw:
            raw.sendall(
                b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 1000000\r\nX-API-Key: wrong\r\n\r\n"
            )
            assert raw.recv(100).startswith(b"HTTP/1.1 401")
            while raw.recv(1000):  # the service closes the connection
                pass
        for headers in ({}, {"X-API-Key": ""}, {"Authorization": "Bearer no"}):
            assert running.client.get("/v1/model", headers=headers).status_code == 401
        assert running.client.get("/metrics").status_code == 401
        assert running.client.get("/livez").status_code == 200
        for headers in ({"X-API-Key": "sesame"}, {"Authorization": "Bearer sesame"}):
            assert running.client.get("/v1/model", headers=headers).status_code == 200
            assert running.client.get("/metrics", headers=headers).status_code == 403
        headers = {"X-API-Key": "numbers"}
        assert running.client.get("/metrics", headers=headers).status_code == 200
        assert running.client.get("/v1/model", headers=headers).status_code == 403
        lines = [json.loads(line) for line in running.log.read_text().splitlines()[1:]]
        assert [line["key"] for line in lines if line["status"] == 200] == ["viewer"] * 2
    finally:
        running.stop()


@pytest.mark.slow
def test_no_patient_data_is_stored_or_logged(exported, tmp_path, tmp_path_factory, xray):
    running = Running(exported, tmp_path)
    sent = tmp_path_factory.mktemp("sent") / "sent.dcm"
    # A larger temporary file would fail.
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))
    write_xray(sent, formats.read_image(xray[0])[..., 0])
    header = pydicom.dcmread(sent)
    header.PatientName = header.PatientID = "Zebedee^Quux"
    # More than the form's parser would keep in memory.
    contents = [b"Zebedee^Quux is no image" + bytes(2**21)]
    # A wrong value in these makes libraries warn or fail, and their message may quote it.
    damaged_fields = [
        ("PatientComments", "LT"),
        ("PatientBirthDate", "DA"),
        ("Modality", "CS"),
        ("StudyInstanceUID", "UI"),
        ("Rows", "LO"),
        ("PixelSpacing", "LO"),
        ("PhotometricInterpretation", "LO"),
        ("RescaleSlope", "LO"),
        ("StudyDate", "DT"),
    ]
    for name, kind in damaged_fields:
        damaged, buffer = copy.deepcopy(header), io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            damaged[name] = pydicom.DataElement(
                name,
                kind,
                "Zebedee^Quux",
                validation_mode=pydicom.config.IGNORE,
                already_converted=True,
            )
            damaged.save_as(buffer)
        contents += [buffer.getvalue(), buffer.getvalue()[:3000]]
    refused = 0
    try:
        for content in contents:
            for accept in ("application/json", "application/dicom"):
                answer = running.client.post(
                    "/v1/segment?name=Zebedee^Quux",
                    files={"image": ("Zebedee^Quux.dcm", content)},
                    headers={"Accept": accept, "X-Patient": "Zebedee^Quux"},
                )
                refused += answer.status_code == 400
                if answer.headers["content-type"] != "application/dicom":
                    assert b"Zebedee" not in answer.content and b"Quux" not in answer.content
                assert answer.status_code in (200, 400, 406), answer.text
                assert not [path for path in tmp_path.rglob("*") if path != running.log]
        assert 10 < refused < 2 * len(contents)
        assert "Zebedee" not in running.client.get("/metrics").text
    finally:
        running.stop()
    assert running.log.read_text() and "Zebedee" not in running.log.read_text()


def test_requests_are_computed_side_by_side_and_none_is_lost():
    running, most, sizes = [], [], []

    def run(images: np.ndarray) -> np.ndarray:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return images * 2

    async def ask() -> list[Any]:
        network = NetworkThreads(run, threads=2, max_pending=17, on_computed=record)
        requests = [
            network.predict(np.full((count, 1), number, np.float32))
            for number, count in enumerate([3, 2, 1, 4, 1, 3, 3, 1])
        ]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        await network.stop()
        return answers

    def record(size: int, seconds: float) -> None:
        sizes.append(size)

    *answers, refused = asyncio.run(ask())
    assert [(len(answer), answer[0, 0]) for answer in answers] == [
        (count, 2 * number) for number, count in enumerate([3, 2, 1, 4, 1, 3, 3])
    ]
    assert max(most) == 2 and sorted(sizes) == [1, 1, 2, 3, 3, 3, 4]
    assert isinstance(refused, Problem) and refused.status == 503


def test_a_request_that_is_given_up_while_it_waits_is_not_computed():
    computed = []

    def run(images: np.ndarray) -> np.ndarray:
        time.sleep(0.2)
        computed.append(images[0, 0])
        return images

    async def ask() -> None:
        network = NetworkThreads(run, threads=1)
        first, second = (
            asyncio.ensure_future(network.predict(np.full((1, 1), number))) for number in range(2)
        )
        await asyncio.sleep(0.05)
        second.cancel()
        await first
        await network.stop()
        assert network.pending == 0

    asyncio.run(ask())
    assert computed == [0]


def test_concurrent_requests_get_the_same_answers_as_single_ones(service, phantoms):
    contents = [path.read_bytes() for path in sorted((phantoms / "CXR_png").iterdir())[:6]]
    alone = [service.client.post("/v1/segment", content=content).content for content in contents]
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(
                lambda content: service.client.post("/v1/segment", content=content), contents * 3
            )
        )
    for answer, expected in zip(answers, alone * 3, strict=True):
        assert (
            formats.decode_image(answer.content) == formats.decode_image(expected)
        ).mean() > 0.9999
    shown = dict(
        re.findall(r"^unet_batch_size_(sum|count) (.+)$", service.client.get("/metrics").text, re.M)
    )
    assert float(shown["sum"]) > float(shown["count"])  # some were computed together


@pytest.mark.slow
def test_too_many_requests_get_503_but_health_is_answered(exported, tmp_path, xray):
    running = Running(exported, tmp_path, "--max-concurrent-requests", "2")
    content = xray[0].read_bytes()
    try:
        with ThreadPoolExecutor(16) as pool:
            jobs = [
                pool.submit(running.client.post, "/v1/segment", content=content) for _ in range(40)
            ]
            assert running.client.get("/livez").status_code == 200
            answers = [job.result() for job in jobs]
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 503}
        assert all(
            answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 503
        )
        assert running.client.post("/v1/segment", content=content).status_code == 200
    finally:
        running.stop()


@pytest.mark.slow
def test_running_requests_are_finished_after_sigterm(exported, tmp_path):
    running = Running(exported, tmp_path, "--drain-s", "5", "--threads", "1")
    route = "/v1/models/unet:predict"
    body = json.dumps({"inputs": np.zeros((8, *INPUT)).tolist()})  # takes a while
    expected, answers = running.client.post(route, content=body), []

    def ask() -> None:
        with httpx.Client(base_url=running.client.base_url, timeout=60) as client:
            answers.append(client.post(route, content=body))

    senders = [threading.Thread(target=ask) for _ in range(6)]
    for sender in senders:
        sender.start()
    for _ in range(500):
        shown = running.client.get("/metrics").text
        # The request for the metrics is one of them.
        if float(re.search("^unet_in_flight (.*)$", shown, re.M)[1]) > 3:
            break
    else:
        pytest.fail("no requests in flight")
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert running.client.get("/readyz").status_code == 503
    for sender in senders:
        sender.join()
    assert [answer.status_code for answer in answers] == [200] * 6
    assert all(answer.json() == expected.json() for answer in answers)
    assert running.process.wait(30) in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_a_changed_model_and_an_unprotected_host_are_refused(exported, tmp_path, script):
    for name in ("unet.onnx", "manifest.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    content = bytearray((tmp_path / "unet.onnx").read_bytes())
    content[-100] ^= 1
    (tmp_path / "unet.onnx").write_bytes(content)
    done = script(tmp_path, "serve.py", "--model", "unet.onnx")
    assert done.returncode == 2 and "One of them was changed: export it again" in done.stderr
    done = script(tmp_path, "serve.py", "--model", exported / "unet.onnx", "--host", "0.0.0.0")
    assert done.returncode == 2 and "host 0.0.0.0 is open to other machines" in done.stderr
    done = script(tmp_path, "serve.py", "--model", "nothing.onnx")
    assert done.returncode == 2 and "run `python export.py --model" in done.stderr
    done = script(
        tmp_path,
        "serve.py",
        "--model",
        exported / "unet.onnx",
        "--tls-cert",
        "no.pem",
        "--tls-key",
        "no.pem",
    )
    assert done.returncode == 2 and "cannot be read as PEM" in done.stderr


def test_a_body_does_not_wait_for_the_receipt_of_its_header():
    """Without TCP_NODELAY each answer on a kept connection takes 40 ms more."""

    async def accept() -> int:
        with (
            server.open_socket("127.0.0.1", 0) as listener,
            socket.create_connection(listener.getsockname()),
            listener.accept()[0] as connection,
        ):
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert asyncio.run(accept())


def test_a_service_that_cannot_start_says_why(exported, tmp_path, script):
    model = ("--model", exported / "unet.onnx")
    write_keys(tmp_path / "keys", **{"": ""})
    done = script(tmp_path, "serve.py", *model, "--keys", "keys")
    assert done.returncode == 2 and "the hash of an empty key" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99_999):
            done = script(tmp_path, "serve.py", *model, "--port", port)
            assert done.returncode == 2 and f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_old_flag_room_still_works(script, tmp_path):
    done = script(tmp_path, "serve.py", "--room", "0")
    assert done.returncode == 2
    assert "max_concurrent_requests is 0; expected above 0" in done.stderr


def test_a_missing_package_is_named(tmp_path):
    code = "import sys; sys.modules['fastapi'] = None; import serve; serve.serve(serve.Config())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "pip install -r requirements-serve.txt" in done.stderr


def test_ctrl_c_ends_it_without_a_traceback(exported, tmp_path):
    running = Running(exported, tmp_path, "--drain-s", "60")
    running.process.send_signal(signal.SIGINT)
    running.process.wait(20)
    assert "stopping" in running.log.read_text() and "Traceback" not in running.log.read_text()


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(service, xray):
    for child in (
        Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    ):
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    time.sleep(0.5)
    for _ in range(4):
        assert service.client.post("/v1/segment", content=xray[0].read_bytes()).status_code == 200


def test_the_service_loads_no_keras():
    code = """import sys, serve, serving.app, serving.server
sys.exit(any(name in sys.modules for name in ('keras', 'tensorflow', 'jax', 'torch')))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_tls_and_client_certificates(exported, tmp_path):
    import ssl

    import trustme

    authority, stranger = trustme.CA(), trustme.CA()
    cert, folder = authority.issue_cert("127.0.0.1"), tmp_path
    cert.private_key_pem.write_to_path(folder / "key.pem")
    cert.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")

    def context(who: trustme.CA | None) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        if who:
            who.issue_cert("client@here").configure_cert(made)
        return made

    flags = ["--tls-cert", "cert.pem", "--tls-key", "key.pem", "--client-ca", "ca.pem"]
    running = Running(exported, folder, *flags, scheme="https", verify=context(authority))
    try:
        for who in (None, stranger):
            with pytest.raises(httpx.TransportError):
                httpx.get(f"https://127.0.0.1:{running.port}/livez", verify=context(who))
        old = context(authority)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.TransportError):
            httpx.get(f"https://127.0.0.1:{running.port}/livez", verify=old)
        assert running.client.get("/livez").status_code == 200
    finally:
        running.stop()


@pytest.mark.slow
def test_openvino_serves_too_and_writes_no_file(exported, xray, tmp_path):
    """Its telemetry would write one to $HOME."""
    pytest.importorskip("openvino")
    path, truth = xray
    running = Running(exported, tmp_path, "--engine", "openvino", "--precision", "auto")
    try:
        answer = running.client.post("/v1/segment", content=path.read_bytes())
        assert (
            metrics.score_mask(truth, formats.decode_image(answer.content)[..., 0] > 0)["dice"]
            > 0.9
        )
        assert not [path for path in tmp_path.rglob("*") if path != running.log]
    finally:
        running.stop()
