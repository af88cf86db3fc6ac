"""The service beside NVIDIA's Triton: the same requests get answers of the same form.

TRITON_PYTHON names the Python that runs Triton.
"""

import json
import os
import subprocess

import httpx
import numpy as np
import pytest
from conftest import HEIGHT, ROOT, WIDTH
from test_serve import V2_MODEL, free_port, service  # noqa: F401 (a fixture)
from tritonclient.http import (
    InferenceServerClient,
    InferenceServerException,
    InferInput,
    InferRequestedOutput,
)

pytestmark = pytest.mark.slow

ask = InferenceServerClient.generate_request_body
LENGTH = "Inference-Header-Content-Length"
SHAPE = (1, HEIGHT, WIDTH, 1)


@pytest.fixture(scope="session")  # before the export, which has that scope
def python():
    """The Python that has Triton."""
    if not os.environ.get("TRITON_PYTHON"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "TRITON_PYTHON names no Python with nvidia-pytriton"
        )
    return os.environ["TRITON_PYTHON"]


@pytest.fixture(scope="module")
def servers(python, exported, service, tmp_path_factory):  # noqa: F811
    """The addresses of our service and of Triton, the same model behind both."""
    folder = tmp_path_factory.mktemp("triton")
    command = [
        python,
        ROOT / "tests" / "real_triton.py",
        exported / "unet.onnx",
        port := str(free_port()),
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, stderr=log, **pipes) as real,
    ):
        assert real.stdout.readline() == b"ready\n", (folder / "log").read_text()
        yield f"127.0.0.1:{service.port}", f"127.0.0.1:{port}"


def tensor(
    shape: tuple[int, ...] = SHAPE, binary: bool = True, name: str = "image", bits: int = 32
) -> InferInput:
    """Make what a client sends."""
    values = np.random.default_rng(0).uniform(size=shape).astype(f"f{bits // 8}")
    return InferInput(name, list(shape), f"FP{bits}").set_data_from_numpy(
        values, binary_data=binary
    )


def post(server: str, body: bytes, length: int | None) -> httpx.Response:
    """Send it without the client, which hides headers."""
    headers = {} if length is None else {LENGTH: str(length)}
    return httpx.post(f"http://{server}{V2_MODEL}/infer", content=body, headers=headers, timeout=60)


def split(answer: httpx.Response) -> tuple[dict, np.ndarray]:
    """Split an answer into its description and its numbers."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(LENGTH, len(answer.content)))
    described, raw = json.loads(answer.content[:length]), answer.content[length:]
    data = described["outputs"][0].pop("data", [])
    assert all(type(number) is float for number in data) and bool(data) != bool(raw)
    described |= {
        "headers": (LENGTH in answer.headers, answer.headers["content-type"]),
        "raw": len(raw),
    }
    return described, np.frombuffer(raw, "<f4") if raw else np.float32(data)


def test_real_triton_describes_itself_in_the_same_form(servers):
    for route in (
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        V2_MODEL,
        f"{V2_MODEL}/ready",
        f"{V2_MODEL}/versions/1",
    ):
        ours, real = (httpx.get(f"http://{server}{route}") for server in servers)
        assert ours.status_code == real.status_code == 200, route
        if route == "/v2":
            assert ours.json().keys() == real.json().keys()
            assert set(ours.json()["extensions"]) <= set(real.json()["extensions"])
        elif real.content:  # health has only a status
            assert ours.json() == real.json() | {"platform": "onnxruntime_onnx"}
    ours, real = (InferenceServerClient(server).get_model_config("unet") for server in servers)
    assert ours["max_batch_size"] == real["max_batch_size"]
    for side in ("input", "output"):
        assert all(ours[side][0][key] == real[side][0][key] for key in ("name", "data_type")), (
            ours,
            real,
        )
        assert ours[side][0]["dims"] == list(map(int, real[side][0]["dims"]))


@pytest.mark.parametrize("out", [None, True, False])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("images", "name"), [(1, ""), (3, "a-7")])
def test_real_triton_answers_in_the_same_form(servers, images, name, binary, out):
    sent = tensor((images, *SHAPE[1:]), binary)
    outputs = None if out is None else [InferRequestedOutput("probabilities", binary_data=out)]
    request = ask([sent], outputs=outputs, request_id=name)
    (ours, probs), (real, expected) = (split(post(server, *request)) for server in servers)
    assert ours == real and real.get("id", "") == name
    assert real["raw"] == real["outputs"][0].get("parameters", {}).get("binary_data_size", 0)
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    for server in servers:
        with InferenceServerClient(server) as client:
            found = client.infer("unet", [sent], "1", outputs, name).as_numpy("probabilities")
        np.testing.assert_allclose(found, expected.reshape(sent.shape()), atol=1e-5)


def test_real_triton_refuses_the_same_requests(servers):
    body, length = ask([tensor()])
    small, twice = tensor((1, 64, 64, 1)), [2, *SHAPE[1:]]
    wrong = [
        small,
        tensor((9, *SHAPE[1:])),
        tensor(name="other"),
        tensor(bits=64),
        InferInput("image", SHAPE, "FP32"),
    ]
    wrong += [tensor(binary=binary).set_shape(twice) for binary in (True, False)]
    raw = [
        (body[:-4], length),
        (body + bytes(4), length),
        (body, len(body) + 1),
        (body, None),
        (b"no JSON", None),
    ]
    raw.append(ask([tensor()], outputs=[InferRequestedOutput("other")]))
    for number, request in enumerate([ask([one]) for one in wrong] + raw):
        ours, real = (post(server, *request) for server in servers)
        assert ours.status_code == 400 and real.status_code in (400, 500), (
            number,
            ours.text,
            real.text,
        )
        assert ours.json()["error"] and real.json()["error"]
    for server in servers:
        with InferenceServerClient(server) as client:
            assert client.is_model_ready("unet", "1")
            assert not client.is_model_ready("other") and not client.is_model_ready("unet", "2")
            for model, status in (("unet", "400"), ("other", "404")):
                with pytest.raises(InferenceServerException) as error:
                    client.infer(model, [small])
                assert error.value.status() == status and error.value.message()
