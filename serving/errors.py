"""Errors as RFC 9457 problem details, which quote nothing that a client sent."""

import json
from http import HTTPStatus
from typing import Any


class Problem(Exception):
    """An answer that is not 200: the status, and what was found, expected, and to do."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(status, detail)  # by which it is made again after it left a worker
        self.status, self.detail = status, detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def to_json_line(value: Any) -> str:
    """Write JSON in ASCII without blanks, fit for a header."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def body_of(status: int, detail: str, request_id: str = "") -> bytes:
    """Write application/problem+json; `error` is where the clients of v2 and TensorFlow Serving look."""
    title = HTTPStatus(status).phrase
    problem = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "error": detail,
    }
    return json.dumps(problem | ({"request_id": request_id} if request_id else {})).encode()
