"""Numbers that clients send as JSON, checked before they become arrays."""

import json
import math
from typing import Any

import numpy as np

from inference.exported_model import ExportedModel
from serving.errors import Problem

MAX_NUMBERS = 2**20  # in an answer as JSON
CHARACTERS_PER_NUMBER = 64


def read_json(content: bytes, network: ExportedModel, max_images: int) -> dict[str, Any]:
    """Parse a JSON object of finite numbers.

    Refuses one that is longer or has more lists than `max_images` images need.
    Raises Problem 400, 413.
    """
    sides = network.input_shape
    max_length = CHARACTERS_PER_NUMBER * max_images * math.prod(sides) + 4096
    # An image is a list of lists of … numbers.
    max_lists = max_images * sum(math.prod(sides[:i]) for i in range(len(sides))) + 256
    if len(content) > max_length or content.count(b"[") + content.count(b"{") > max_lists:
        cure = "send binary tensors or fewer images"
        raise Problem(413, f"the JSON is larger than {max_images} images need; {cure}")
    try:
        parsed = json.loads(content, parse_constant=refuse_constant)
    except RecursionError:
        raise Problem(400, "the JSON is nested too deeply; expected an object") from None
    except ValueError:
        raise Problem(400, "the JSON is malformed; expected an object") from None
    if not isinstance(parsed, dict):
        raise Problem(400, "the JSON is not an object; expected one")
    return parsed


def refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which JSON does not have but Python reads."""
    raise ValueError(f"{name} is not a number")


def check_shape(shape: Any, network: ExportedModel, max_images: int) -> tuple[int, ...]:
    """Return a shape (N, …, C) that the model takes. Raises Problem 400."""
    expected = list(network.input_shape)
    is_shape = (
        isinstance(shape, list)
        and len(shape) == 1 + len(expected)
        and all(type(side) is int for side in shape)
        and shape[1:] == expected
        and 1 <= shape[0] <= max_images
    )
    if not is_shape:
        sides = ", ".join(map(str, expected))
        raise Problem(400, f"the input's shape is not [N, {sides}] with N from 1 to {max_images}")
    return tuple(shape)


def to_array(data: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Make an array of nested or flat lists of numbers. Raises Problem 400."""
    try:
        array = np.array(data, np.float32)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise Problem(400, "the input's data are not numbers in rows of equal length") from None
    expected = math.prod(shape)
    if array.size != expected:
        raise Problem(400, f"the input has {array.size} numbers; its shape needs {expected}")
    # Transposed images have as many numbers, and another mask.
    nested, wanted = ([side for side in one if side != 1] for one in (array.shape, shape))
    if array.ndim > 1 and nested != wanted and array.shape != (shape[0], expected // shape[0]):
        sides = ", ".join(map(str, array.shape))
        raise Problem(400, f"the input is nested as [{sides}]; expected {list(shape)}, or flat")
    return array.reshape(shape)


def check_finite(array: np.ndarray) -> np.ndarray:
    """Return the array if it has no NaN and no infinity. Raises Problem 400."""
    if not np.isfinite(array).all():
        raise Problem(400, "the input has NaN or infinity; expected prepared pixels in [0, 1]")
    return array


def check_json_answer(num_images: int, network: ExportedModel) -> None:
    """Raise Problem 413 if the answer to so many images would be too long as JSON."""
    if num_images * math.prod(network.output_shape) > MAX_NUMBERS:
        cure = "ask for binary tensors or send fewer images"
        raise Problem(413, f"the answer would be too long as JSON; {cure}")
