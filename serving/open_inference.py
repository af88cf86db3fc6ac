"""The Open Inference Protocol v2: describe the model, read and write inference requests.

Specification: https://github.com/kserve/open-inference-protocol, with the extension for binary
tensor data. A request is JSON, or JSON followed by the raw bytes of the tensor.
"""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from inference.exported_model import ExportedModel
from serving.errors import Problem
from serving.network import Statistics
from serving.tensors import check_finite, check_json_answer, check_shape, read_json, to_array

PLATFORM = "onnxruntime_onnx"
LENGTH_HEADER = "Inference-Header-Content-Length"


class InferenceRequest(NamedTuple):
    """What a client sends."""

    batch: np.ndarray  # (N, …, C) float32
    id: str
    binary: bool  # whether the answer's tensor is sent as raw bytes


# ---------------------------------------------------------------------------- describing the model


def metadata(name: str, versions: list[str], network: ExportedModel) -> dict[str, Any]:
    """Describe a model as the protocol does."""

    def tensor(name: str, sides: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": "FP32", "shape": [-1, *sides]}]

    return {
        "name": name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": tensor(network.input_name, network.input_shape),
        "outputs": tensor(network.output_name, network.output_shape),
    }


def triton_config(name: str, network: ExportedModel, max_batch: int) -> dict[str, Any]:
    """Describe a model as Triton does to its own tools."""

    def tensor(name: str, sides: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"name": name, "data_type": "TYPE_FP32", "dims": list(sides)}]

    return {
        "name": name,
        "platform": PLATFORM,
        "max_batch_size": max_batch,
        "input": tensor(network.input_name, network.input_shape),
        "output": tensor(network.output_name, network.output_shape),
    }


def statistics(name: str, version: str, counted: Statistics) -> dict[str, Any]:
    """Tell how often and how long a model was asked, as Triton's extension "statistics" does."""

    def spent(count: int, nanoseconds: int) -> dict[str, int]:
        return {"count": count, "ns": nanoseconds}

    whole = counted.waiting_ns + counted.computing_ns
    stats = {
        "success": spent(counted.requests, whole),
        "fail": spent(counted.failed, 0),
        "queue": spent(counted.requests, counted.waiting_ns),
        "compute_input": spent(counted.requests, 0),
        "compute_infer": spent(counted.requests, counted.computing_ns),
        "compute_output": spent(counted.requests, 0),
    }
    return {
        "name": name,
        "version": version,
        "last_inference": counted.last_ms,
        "inference_count": counted.images,
        "execution_count": counted.requests,
        "inference_stats": stats,
        "batch_stats": [],
    }


# -------------------------------------------------------------------------------- reading requests


def read_request(
    content: bytes, json_length: str | None, network: ExportedModel, max_images: int
) -> InferenceRequest:
    """Read an inference request of at most `max_images` images.

    json_length: the header LENGTH_HEADER; without it the whole body is JSON.
    Raises Problem 400, 413.
    """
    length = read_length(json_length, len(content))
    request = read_json(content[:length], network, max_images)
    request_id = request.get("id") or ""
    if not isinstance(request_id, str):
        raise Problem(400, "the id is not a string")
    batch = read_input(request.get("inputs"), content[length:], network, max_images)
    binary = wants_binary(request, network)
    if not binary:
        check_json_answer(len(batch), network)
    return InferenceRequest(batch, request_id, binary)


def read_length(header: str | None, body_length: int) -> int:
    """Return the length of the body's JSON. Raises Problem 400."""
    if header is None:
        return body_length
    # Twelve digits are enough for any body; a longer number is not parsed whole.
    if not (header.isascii() and header.isdecimal() and int(header[:12]) <= body_length):
        raise Problem(400, f"{LENGTH_HEADER} is not the length of the body's JSON")
    return int(header[:12])


def read_input(inputs: Any, raw: bytes, network: ExportedModel, max_images: int) -> np.ndarray:
    """Read the only input: from its data in the JSON, or from the raw bytes after it.

    Returns (N, …, C) float32. Raises Problem 400.
    """
    expected = f"expected one input, {network.input_name}, of datatype FP32"
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Problem(400, expected)
    entry = inputs[0]
    if entry.get("name") != network.input_name or entry.get("datatype") != "FP32":
        raise Problem(400, expected)
    shape = check_shape(entry.get("shape"), network, max_images)
    size = get_object(entry, "parameters").get("binary_data_size")
    if size is None:
        if raw or "data" not in entry:
            found = "the input has no data, or bytes follow the JSON"
            raise Problem(400, f"{found}; expected data, or bytes and binary_data_size")
        return check_finite(to_array(entry["data"], shape))
    num_bytes = 4 * math.prod(shape)
    if "data" in entry or type(size) is not int or not size == len(raw) == num_bytes:
        wanted = f"expected {num_bytes}, the same binary_data_size and no data"
        raise Problem(400, f"{len(raw)} bytes follow the JSON; {wanted}")
    return check_finite(np.frombuffer(raw, "<f4").reshape(shape))


def wants_binary(request: dict[str, Any], network: ExportedModel) -> bool:
    """Say whether the output is to be sent as raw bytes.

    Raises Problem 400 for outputs that the model does not have.
    """
    binary = get_object(request, "parameters").get("binary_data_output") is True
    outputs = request.get("outputs") or []
    if not isinstance(outputs, list):
        raise Problem(400, "outputs is not a list")
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != network.output_name:
            raise Problem(400, f"there is no such output; expected {network.output_name}")
        parameters = get_object(output, "parameters")
        if "classification" in parameters:
            raise Problem(400, "classification is not offered; ask for the tensor")
        binary = parameters.get("binary_data", binary) is True
    return binary


def get_object(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object of an object, empty where there is none. Raises Problem 400."""
    value = parent.get(name) or {}
    if not isinstance(value, dict):
        raise Problem(400, f"{name} is not an object")
    return value


# --------------------------------------------------------------------------------- writing answers


def write_answer(
    probs: np.ndarray, request: InferenceRequest, names: tuple[str, str], network: ExportedModel
) -> tuple[bytes, dict[str, str]]:
    """Write the answer to an inference request: its body and headers.

    names: of the model and its version.
    """
    output = {"name": network.output_name, "datatype": "FP32", "shape": list(probs.shape)}
    answer = {"model_name": names[0], "model_version": names[1], "outputs": [output]}
    if request.id:
        answer["id"] = request.id
    if not request.binary:
        output["data"] = probs.ravel().tolist()
        return json.dumps(answer).encode(), {"Content-Type": "application/json"}
    raw = np.ascontiguousarray(probs, "<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    header = json.dumps(answer).encode()
    return header + raw, {
        "Content-Type": "application/octet-stream",
        LENGTH_HEADER: str(len(header)),
    }
