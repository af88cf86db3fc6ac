"""Malformed requests: no answer of 500, no traceback, memory bounded, right answers afterwards."""

import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from test_fuzz import WHOLE, animated_png, dicom_bomb, nifti_bomb, png_bomb, spoilt_jpeg, tiff_bomb
from test_serve import HERE, Running, exported, xray  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def service(exported, tmp_path_factory):  # noqa: F811
    running = Running(exported, tmp_path_factory.mktemp("fuzzed"), "--max-body-mb", "4", "--timeout-s", "20")
    yield running
    running.stop()


def memory(pid: int) -> float:
    """The most memory that a process has had, in GiB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def check(answer) -> None:
    assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text
    assert "Traceback" not in answer.text


def damaged(whole: bytes, rng: np.random.Generator, times: int):
    for i in range(times):
        content = bytearray(whole)
        if i % 4 == 0:
            content = content[: rng.integers(len(content))]
        for _ in range(rng.integers(1, 9) if len(content) else 0):
            content[int(rng.integers(len(content)))] = rng.integers(256)
        yield bytes(content)


def binary_request(shape=(1, 192, 192, 1), size=None, length=None, name="image") -> tuple[bytes, dict[str, str]]:
    raw = bytes(4 * 192 * 192)
    tensor = {"name": name, "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size or len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head) if length is None else length)}


def test_the_largest_images_at_a_time_take_a_bounded_memory(exported, tmp_path):  # noqa: F811
    running = Running(exported, tmp_path, "--timeout-s", "200")
    colours = np.zeros((5600, 5600, 3), np.uint8)  # a little less than --max-megapixels
    cv2.circle(colours, (2000, 2000), 1500, (200, 90, 10), cv2.FILLED)
    grey16, tiff = colours[..., 0].astype(np.uint16) * 200, io.BytesIO()
    tifffile.imwrite(tiff, grey16, compression="zlib")
    contents = [cv2.imencode(".png", colours)[1].tobytes(), cv2.imencode(".png", grey16)[1].tobytes(), tiff.getvalue()]
    numbers = b'{"inputs":[' + b"0," * 9 * 10**6 + b"0]}"
    before = memory(running.process.pid)
    try:
        with ThreadPoolExecutor(12) as pool:
            jobs = [pool.submit(running.client.post, "/v1/segment", content=content) for content in contents * 4]
            jobs += [pool.submit(running.client.post, "/v1/models/unet:predict", content=numbers) for _ in range(4)]
            assert [job.result().status_code for job in jobs] == [200] * 12 + [400] * 4
        assert memory(running.process.pid) - before < 1.8
    finally:
        running.stop()


def test_schemathesis_finds_no_fault(service, tmp_path):
    place = f"http://127.0.0.1:{service.port}/openapi.json"
    command = [
        Path(sys.executable).with_name("schemathesis"),
        "run",
        place,
        "--phases",
        "coverage,fuzzing",
        "--seed",
        "1",
    ]
    rules = ["--checks", "all", "--exclude-checks", "positive_data_acceptance,negative_data_rejection"]  # any bytes fit
    done = subprocess.run([*command, *rules, "-n", "200"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    generated, passed = map(int, re.search(r"(\d+) generated, (\d+) passed", done.stdout).groups())
    assert generated == passed > 1000


def test_damaged_requests(service, xray):  # noqa: F811
    expected = service.client.post("/v1/segment", content=xray[0].read_bytes()).content
    rng, before, sent = np.random.default_rng(3), memory(service.process.pid), 0
    accepts = ["image/png", "application/json", "application/geo+json", "application/dicom", "text/html", ";;,"]
    for whole in WHOLE.values():
        for content in damaged(whole, rng, 70):
            headers = {"Accept": str(rng.choice(accepts)), "Content-Type": str(rng.choice(["image/png", "x", ""]))}
            check(service.client.post("/v1/segment", content=content, headers=headers))
            sent += 1
    body, headers = binary_request()
    head = int(headers["Inference-Header-Content-Length"])
    for content in damaged(body[:head], rng, 500):
        length = str(rng.choice([len(content), 0, 10**9, -1, "x", "١"])).encode()
        check(
            service.client.post(
                f"{HERE}/infer", content=content + body[head:], headers={b"Inference-Header-Content-Length": length}
            )
        )
        sent += 1
    for content in damaged(json.dumps({"instances": [[[[0.5]] * 192] * 192]}).encode()[:4000], rng, 300):
        check(service.client.post("/v1/models/unet:predict", content=content))
        sent += 1
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    for content in damaged(form, rng, 300):
        check(
            service.client.post(
                "/v1/segment", content=content, headers={"Content-Type": "multipart/form-data; boundary=x"}
            )
        )
        sent += 1
    for bomb in (png_bomb, animated_png, spoilt_jpeg, nifti_bomb, dicom_bomb, tiff_bomb):
        answer = service.client.post("/v1/segment", content=bomb())
        assert answer.status_code == 400, bomb
    large = np.zeros((9000, 9000), np.uint8)  # more than --max-megapixels
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, large, compression="zlib")
    for content in (cv2.imencode(".png", large)[1].tobytes(), tiff.getvalue()):
        assert len(content) < 2**20 and service.client.post("/v1/segment", content=content).status_code == 400
    for text in (b"[" * 10**6, b'{"inputs":' * 10**5, b'{"inputs":[{"data":' + b"[" * 10**5, b"\xff\xfe", b"null"):
        for route in (f"{HERE}/infer", "/v1/models/unet:predict"):
            assert service.client.post(route, content=text).status_code in (400, 413)
    assert sent >= 2000
    assert service.process.poll() is None and memory(service.process.pid) - before < 0.5
    assert "Traceback" not in service.log.read_text()
    assert service.client.post("/v1/segment", content=xray[0].read_bytes()).content == expected
