"""TensorFlow Serving's REST: describe the model, read and write predict requests.

Specification: https://www.tensorflow.org/tfx/serving/api_rest
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from inference.exported_model import ExportedModel
from serving.errors import Problem
from serving.tensors import check_finite, check_json_answer, check_shape, read_json, to_array

SIGNATURE = "serving_default"
INPUT = "images"  # the name of the input


def status(versions: Sequence[str], is_ready: bool) -> dict[str, Any]:
    """Describe the state of a model's versions."""
    state = "AVAILABLE" if is_ready else "LOADING"
    no_error = {"error_code": "OK", "error_message": ""}
    states = [{"version": one, "state": state, "status": no_error} for one in versions]
    return {"model_version_status": states}


def metadata(name: str, version: str, network: ExportedModel) -> dict[str, Any]:
    """Describe the tensors of the only signature."""

    def tensor(name: str, sides: tuple[int, ...]) -> dict[str, Any]:
        dims = [{"size": str(side), "name": ""} for side in (-1, *sides)]
        shape = {"dim": dims, "unknown_rank": False}
        return {name: {"dtype": "DT_FLOAT", "tensor_shape": shape, "name": f"{name}:0"}}

    signature = {
        "inputs": tensor(INPUT, network.input_shape),
        "outputs": tensor(network.output_name, network.output_shape),
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": name, "signature_name": "", "version": version},
        "metadata": {"signature_def": {"signature_def": {SIGNATURE: signature}}},
    }


def read_instances(
    content: bytes, network: ExportedModel, max_images: int
) -> tuple[np.ndarray, bool]:
    """Read a predict request.

    Returns the images (N, …, C), and whether they came by rows, as `instances`.
    Raises Problem 400, 413.
    """
    request = read_json(content, network, max_images)
    if request.get("signature_name", SIGNATURE) != SIGNATURE:
        raise Problem(400, f"there is no such signature; expected {SIGNATURE}")
    by_row = "instances" in request
    if by_row == ("inputs" in request):
        raise Problem(400, "expected either instances or inputs")
    data = unwrap(request["instances" if by_row else "inputs"], by_row)
    if not isinstance(data, list):
        raise Problem(
            400, "the images are not a list; expected numbers nested as the model's shape"
        )
    shape = check_shape([len(data), *network.input_shape], network, max_images)
    check_json_answer(len(data), network)
    return check_finite(to_array(data, shape)), by_row


def unwrap(data: Any, by_row: bool) -> Any:
    """Return the images, which may stand under the name of the input, also in each row."""
    if isinstance(data, dict):
        data = data.get(INPUT)
    if by_row and isinstance(data, list) and data and isinstance(data[0], dict):
        return [row.get(INPUT) if isinstance(row, dict) else None for row in data]
    return data


def write_predictions(probs: np.ndarray, by_row: bool) -> bytes:
    """Write the answer to a predict request."""
    return json.dumps({"predictions" if by_row else "outputs": probs.tolist()}).encode()
