"""Tensors over HTTP: the Open Inference Protocol v2 (JSON and binary) and TensorFlow Serving's REST.

Specifications: kserve/open-inference-protocol, its binary tensor data extension, tensorflow.org/tfx/serving/api_rest.
"""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from inference.exported_model import ExportedModel
from serving.errors import Problem

MAX_NUMBERS = 2**20  # of an answer as JSON
MODEL = "unet"  # the name under which the network is served


class Request(NamedTuple):
    """What an inference request asks."""

    batch: np.ndarray  # (N, H, W, C) float32
    id: str
    binary: bool  # whether the answer's tensor comes as raw bytes


def read_json(content: bytes, network: ExportedModel, most: int) -> dict[str, Any]:
    """Parse a JSON object of finite numbers, of no more and in no more lists than `most` images have.

    Raises Problem 400, 413.
    """
    height, width, channels = network.input_shape
    longest, lists = 64 * most * height * width * channels, most * (height * width + height + 1)
    if len(content) > longest + 4096 or content.count(b"[") + content.count(b"{") > lists + 256:
        raise Problem(
            413,
            f"the body's JSON is larger than {most} images need; send binary tensors, or fewer images",
        )

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        parsed = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        kind = "nested too deeply" if isinstance(error, RecursionError) else "malformed"
        raise Problem(400, f"the body's JSON is {kind}; expected an object") from None
    if not isinstance(parsed, dict):
        raise Problem(400, "the body's JSON is no object; expected one")
    return parsed


def metadata(network: ExportedModel, version: str) -> dict[str, Any]:
    """Describe the network as v2 does."""
    tensors = {
        "inputs": (network.input_name, network.input_shape),
        "outputs": (network.output_name, (*network.input_shape[:2], network.output_channels)),
    }
    shown = {
        key: [{"name": name, "datatype": "FP32", "shape": [-1, *shape]}]
        for key, (name, shape) in tensors.items()
    }
    return {"name": MODEL, "versions": [version], "platform": "onnxruntime_onnx", **shown}


def config(network: ExportedModel, most: int) -> dict[str, Any]:
    """Describe the network as Triton does to its own tools."""

    def side(name: str, channels: int) -> list[dict[str, Any]]:
        return [
            {"name": name, "data_type": "TYPE_FP32", "dims": [*network.input_shape[:2], channels]}
        ]

    tensors = {
        "input": side(network.input_name, network.input_shape[2]),
        "output": side(network.output_name, network.output_channels),
    }
    return {"name": MODEL, "platform": "onnxruntime_onnx", "max_batch_size": most, **tensors}


def _shape(value: Any, network: ExportedModel, most: int) -> tuple[int, ...]:
    """Check a shape (N, H, W, C). Raises Problem 400."""
    expected = list(network.input_shape)
    fine = isinstance(value, list) and len(value) == 4 and all(type(side) is int for side in value)
    if not fine or value[1:] != expected or not 1 <= value[0] <= most:
        raise Problem(
            400,
            f"the input's shape is not [N, {', '.join(map(str, expected))}] with N from 1 to {most}",
        )
    return tuple(value)


def _numbers(data: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Make a tensor of nested or flat lists of numbers. Raises Problem 400."""
    try:
        tensor = np.array(data, np.float32)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise Problem(400, "the input's data are not numbers in rows of equal length") from None
    if tensor.size != math.prod(shape):
        raise Problem(
            400,
            f"the input's data hold {tensor.size} numbers; its shape asks for {math.prod(shape)}",
        )
    return tensor.reshape(shape)


def _finite(tensor: np.ndarray) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise Problem(400, "the input holds NaN or infinity; expected prepared pixels in [0, 1]")
    return tensor


def _wants_binary(asked: dict[str, Any], network: ExportedModel) -> bool:
    """Tell how the output is to come. Raises Problem 400 for outputs that are not there."""
    parameters, outputs = asked.get("parameters") or {}, asked.get("outputs") or []
    if not isinstance(parameters, dict) or not isinstance(outputs, list):
        raise Problem(400, "parameters is no object, or outputs no list")
    binary = parameters.get("binary_data_output") is True
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != network.output_name:
            raise Problem(400, f"an output that is not there; expected {network.output_name}")
        own = output.get("parameters") or {}
        if not isinstance(own, dict):
            raise Problem(400, "an output's parameters are no object")
        if "classification" in own:
            raise Problem(400, "classification is not offered; ask for the tensor")
        binary = own.get("binary_data", binary) is True
    return binary


def _check_json_answer(count: int, network: ExportedModel) -> None:
    """Raise Problem 413 if the answer to `count` images would be too long as JSON."""
    if count * math.prod(network.input_shape[:2]) * network.output_channels > MAX_NUMBERS:
        raise Problem(
            413,
            "the answer would be too long as JSON; ask for binary tensors, or send fewer images",
        )


def read_request(
    content: bytes, json_length: str | None, network: ExportedModel, most: int
) -> Request:
    """Read a v2 inference request of at most `most` images. Raises Problem 400.

    json_length: the header Inference-Header-Content-Length: so long is the JSON, before raw tensors.
    """
    length = len(content)
    if json_length is not None:
        if (
            not json_length.isascii()
            or not json_length.isdecimal()
            or int(json_length[:12]) > len(content)
        ):
            raise Problem(
                400, "Inference-Header-Content-Length is not the length of the body's JSON"
            )
        length = int(json_length[:12])
    asked, raw = read_json(content[:length], network, most), content[length:]
    inputs, name = asked.get("inputs"), asked.get("id") or ""
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Problem(400, f"expected one input, {network.input_name}")
    entry = inputs[0]
    if (
        entry.get("name") != network.input_name
        or entry.get("datatype") != "FP32"
        or not isinstance(name, str)
    ):
        raise Problem(
            400,
            f"expected one input, {network.input_name}, of datatype FP32, and an id that is a string",
        )
    shape, parameters = _shape(entry.get("shape"), network, most), entry.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Problem(400, "the input's parameters are no object")
    size = parameters.get("binary_data_size")
    if size is None:
        if raw or "data" not in entry:
            raise Problem(
                400, "the input has no data, or bytes follow the JSON without binary_data_size"
            )
        tensor = _numbers(entry["data"], shape)
    else:
        if (
            "data" in entry
            or type(size) is not int
            or size != len(raw)
            or size != 4 * math.prod(shape)
        ):
            raise Problem(
                400,
                f"{len(raw)} raw bytes; expected {4 * math.prod(shape)}, binary_data_size, no data",
            )
        tensor = np.frombuffer(raw, "<f4").reshape(shape)
    binary = _wants_binary(asked, network)
    if not binary:
        _check_json_answer(shape[0], network)
    return Request(_finite(tensor), name, binary)


def write_answer(
    probs: np.ndarray, request: Request, network: ExportedModel, version: str
) -> tuple[bytes, dict[str, str]]:
    """Write a v2 answer: the body and its headers."""
    output = {"name": network.output_name, "datatype": "FP32", "shape": list(probs.shape)}
    answer = {"model_name": MODEL, "model_version": version, "outputs": [output]}
    if request.id:
        answer["id"] = request.id
    if not request.binary:
        output["data"] = probs.ravel().tolist()
        return json.dumps(answer).encode(), {"Content-Type": "application/json"}
    raw = np.ascontiguousarray(probs, "<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps(answer).encode()
    kind = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return head + raw, kind


def read_instances(content: bytes, network: ExportedModel, most: int) -> tuple[np.ndarray, bool]:
    """Read TensorFlow Serving's predict request: the batch, and whether it came by rows. Raises Problem 400."""
    asked = read_json(content, network, most)
    if asked.get("signature_name", "serving_default") != "serving_default":
        raise Problem(400, "that signature is not here; expected serving_default")
    by_row = "instances" in asked
    if by_row == ("inputs" in asked):
        raise Problem(400, "expected either instances or inputs")
    data = asked["instances" if by_row else "inputs"]
    if isinstance(data, dict):
        data = data.get("images")
    if by_row and isinstance(data, list) and data and isinstance(data[0], dict):
        data = [one.get("images") if isinstance(one, dict) else None for one in data]
    if not isinstance(data, list):
        raise Problem(400, "the images are no list; expected numbers nested as N, H, W, C")
    shape = _shape([len(data), *network.input_shape], network, most)
    _check_json_answer(shape[0], network)
    return _finite(_numbers(data, shape)), by_row


def write_predictions(probs: np.ndarray, by_row: bool) -> bytes:
    """Write TensorFlow Serving's answer."""
    return json.dumps({"predictions" if by_row else "outputs": probs.tolist()}).encode()
