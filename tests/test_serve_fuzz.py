"""Malformed requests: no answer of 500, no traceback, memory bounded, right answers afterwards."""

import io
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from conftest import HEIGHT, WIDTH
from test_fuzz import (
    FILES,
    WHOLE,
    animated_png,
    damaged_jpeg,
    dicom_bomb,
    nifti_bomb,
    png_bomb,
    tiff_bomb,
)
from test_serve import V2_MODEL, Running

from serving.config import Config
from serving.tensors import CHARACTERS_PER_NUMBER

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(exported, tmp_path_factory):
    running = Running(
        exported, tmp_path_factory.mktemp("fuzzed"), "--max-body-mb", "4", "--timeout-s", "20"
    )
    yield running
    running.stop()


def memory(pid: int) -> float:
    """The peak memory of a process and its workers, in GiB."""
    family = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    lines = [
        line for one in family for line in Path(f"/proc/{one}/status").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


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


def binary_request(
    shape=(1, HEIGHT, WIDTH, 1), size=None, length=None, name="image"
) -> tuple[bytes, dict[str, str]]:
    raw = bytes(4 * HEIGHT * WIDTH)
    tensor = {
        "name": name,
        "datatype": "FP32",
        "shape": shape,
        "parameters": {"binary_data_size": size or len(raw)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + raw, {
        "Inference-Header-Content-Length": str(len(head) if length is None else length)
    }


def test_memory_for_concurrent_large_images_is_limited(exported, tmp_path):
    # Large pictures take turns: the last one waits for all others.
    running = Running(exported, tmp_path, "--timeout-s", "200")
    running.client.timeout = 200
    colours = np.zeros((5600, 5600, 3), np.uint8)  # a little less than --max-megapixels
    cv2.circle(colours, (2000, 2000), 1500, (200, 90, 10), cv2.FILLED)
    grey16, tiff = colours[..., 0].astype(np.uint16) * 200, io.BytesIO()
    tifffile.imwrite(tiff, grey16, compression="zlib")
    contents = [
        cv2.imencode(".png", colours)[1].tobytes(),
        cv2.imencode(".png", grey16)[1].tobytes(),
        tiff.getvalue(),
    ]
    longest = CHARACTERS_PER_NUMBER * Config.max_batch * HEIGHT * WIDTH  # that is parsed at all
    numbers = b'{"inputs":[' + b"0," * (longest // 2) + b"0]}"
    try:
        with ThreadPoolExecutor(12) as pool:
            jobs = [
                pool.submit(running.client.post, "/v1/segment", content=content)
                for content in contents * 4
            ]
            jobs += [
                pool.submit(running.client.post, "/v1/models/unet:predict", content=numbers)
                for _ in range(4)
            ]
            assert [job.result().status_code for job in jobs] == [200] * 12 + [400] * 4
        assert memory(running.process.pid) < 2.5
    finally:
        running.stop()


def deflated_dicom() -> bytes:
    """A DICOM file of 1.5 MB that becomes 1.5 GB when it is opened."""
    header = pydicom.dcmread(FILES / "CT_small.dcm")
    header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    whole = io.BytesIO()
    header.save_as(whole)
    start = 144 + int.from_bytes(
        whole.getvalue()[140:144], "little"
    )  # behind the file meta information
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    parts = [squeeze.compress(struct.pack("<HH2sHI", 0x0009, 0x1010, b"OB", 0, 1_500_000_000))]
    parts += [squeeze.compress(bytes(10_000_000)) for _ in range(150)]
    return whole.getvalue()[:start] + b"".join(parts) + squeeze.flush()


def large_nifti() -> bytes:
    """Half a megabyte of NIfTI with a slice of 8191x8191 voxels of eight bytes each."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float64)
    header.set_data_shape((8191, 8191, 1))
    header["magic"], header["vox_offset"], header["sform_code"] = b"n+1", 352, 1
    for i, row in enumerate(("srow_x", "srow_y", "srow_z")):
        header[row] = np.eye(4)[i]
    squeeze = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = [squeeze.compress(header.binaryblock + bytes(4))]
    parts += [squeeze.compress(bytes(2**20)) for _ in range(8191 * 8191 * 8 // 2**20 + 1)]
    return b"".join(parts) + squeeze.flush()


def many_frames() -> bytes:
    """A DICOM file of 65,000 frames of one pixel, which takes long to decode."""
    header = pydicom.dcmread(FILES / "CT_small.dcm")
    header.Rows, header.Columns, header.NumberOfFrames, header.PixelData = (
        1,
        1,
        65_000,
        bytes(2 * 65_000),
    )
    buffer = io.BytesIO()
    header.save_as(buffer)
    return buffer.getvalue()


def test_files_that_grow_or_take_too_long_end_with_their_request(exported, tmp_path, xray):
    running = Running(exported, tmp_path, "--timeout-s", "4")
    try:
        with ThreadPoolExecutor(8) as pool:
            contents = [deflated_dicom(), large_nifti(), many_frames(), deflated_dicom()]
            answers = list(
                pool.map(
                    lambda content: running.client.post("/v1/segment", content=content), contents
                )
            )
        codes = [answer.status_code for answer in answers]
        assert set(codes) <= {400, 413, 504} and 504 in codes, codes
        assert memory(running.process.pid) < 2.5
        assert running.client.post("/v1/segment", content=xray[0].read_bytes()).status_code == 200
    finally:
        running.stop()
    assert "Traceback" not in running.log.read_text()


def test_workers_end_with_the_service(exported, tmp_path):
    running = Running(exported, tmp_path)
    pid = running.process.pid
    family = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(family) >= 2
    running.process.kill()
    running.process.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{one}").exists() for one in family):
            break
        time.sleep(0.1)
    else:
        pytest.fail("workers outlive the service")


def test_schemathesis_finds_no_fault(service, tmp_path):
    schema = f"http://127.0.0.1:{service.port}/openapi.json"
    command = [
        Path(sys.executable).with_name("schemathesis"),
        "run",
        schema,
        "--phases",
        "coverage,fuzzing",
        "--seed",
        "1",
    ]
    rules = [
        "--checks",
        "all",
        "--exclude-checks",
        "positive_data_acceptance,negative_data_rejection",
    ]  # any bytes fit
    done = subprocess.run(
        [*command, *rules, "-n", "200"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    generated, passed = map(int, re.search(r"(\d+) generated, (\d+) passed", done.stdout).groups())
    assert generated == passed > 1000


def test_damaged_requests(service, xray):
    expected = service.client.post("/v1/segment", content=xray[0].read_bytes()).content
    rng, before, sent = np.random.default_rng(3), memory(service.process.pid), 0
    accepts = [
        "image/png",
        "application/json",
        "application/geo+json",
        "application/dicom",
        "application/x-nifti",
        "image/tiff",
        "text/html",
        ";;,",
    ]
    for whole in WHOLE.values():
        for content in damaged(whole, rng, 70):
            headers = {
                "Accept": str(rng.choice(accepts)),
                "Content-Type": str(rng.choice(["image/png", "x", ""])),
            }
            check(service.client.post("/v1/segment", content=content, headers=headers))
            sent += 1
    body, headers = binary_request()
    head = int(headers["Inference-Header-Content-Length"])
    for content in damaged(body[:head], rng, 500):
        length = str(rng.choice([len(content), 0, 10**9, -1, "x", "١"])).encode()
        check(
            service.client.post(
                f"{V2_MODEL}/infer",
                content=content + body[head:],
                headers={b"Inference-Header-Content-Length": length},
            )
        )
        sent += 1
    for content in damaged(
        json.dumps({"instances": [[[[0.5]] * WIDTH] * HEIGHT]}).encode()[:4000], rng, 300
    ):
        check(service.client.post("/v1/models/unet:predict", content=content))
        sent += 1
    form = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    )
    for content in damaged(form, rng, 300):
        check(
            service.client.post(
                "/v1/segment",
                content=content,
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            )
        )
        sent += 1
    for bomb in (png_bomb, animated_png, damaged_jpeg, nifti_bomb, dicom_bomb, tiff_bomb):
        answer = service.client.post("/v1/segment", content=bomb())
        assert answer.status_code in (400, 413), bomb
    large = np.zeros((9000, 9000), np.uint8)  # more than --max-megapixels
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, large, compression="zlib")
    for content in (cv2.imencode(".png", large)[1].tobytes(), tiff.getvalue()):
        assert len(content) < 2**20 and service.client.post(
            "/v1/segment", content=content
        ).status_code in (400, 413)
    for text in (
        b"[" * 10**6,
        b'{"inputs":' * 10**5,
        b'{"inputs":[{"data":' + b"[" * 10**5,
        b"\xff\xfe",
        b"null",
    ):
        for route in (f"{V2_MODEL}/infer", "/v1/models/unet:predict"):
            assert service.client.post(route, content=text).status_code in (400, 413)
    assert sent >= 2000
    assert service.process.poll() is None and memory(service.process.pid) - before < 0.5
    assert "Traceback" not in service.log.read_text()
    assert service.client.post("/v1/segment", content=xray[0].read_bytes()).content == expected
