"""Errors as problem details (RFC 9457). They quote nothing that a client sent."""

import json
from http import HTTPStatus
from typing import Any


class Problem(Exception):
    """An answer other than 200: its status, what was found, what was expected, what to do."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        # A worker's Problem crosses a pipe: it is made again from these two arguments.
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self, request_id: str) -> bytes:
        """Write application/problem+json. Clients of v2 and TensorFlow Serving read `error`."""
        problem = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "error": self.detail,
            "request_id": request_id,
        }
        return json.dumps(problem).encode()


def to_json_line(value: Any) -> str:
    """Write JSON in ASCII without spaces, so that it fits a header or a line of a log."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
