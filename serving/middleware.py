"""What stands before every request: keys, limits, deadlines, headers; what is logged and counted of it."""

import asyncio
import hashlib
import hmac
import sys
import time
import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from serving.batching import Busy
from serving.errors import Problem, body_of, to_json_line
from utils import UserError

SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
BODIES = 4  # largest bodies that may be held at a time; more small ones
SHARES = [i / 20 for i in range(1, 21)]


def read_keys(path: Path) -> list[bytes]:
    """Read the SHA-256 of each API key, a line each in hex. Raises UserError."""
    try:
        lines = [line.split("#")[0].split() for line in path.read_text("utf-8-sig").splitlines()]
        keys = [bytes.fromhex(line[0]) for line in lines if line]  # sha256sum puts a name behind
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as keys ({error}); expected a SHA-256 in hex per line"
        ) from None
    if not keys or any(len(key) != 32 for key in keys):
        raise UserError(
            f"{path} has no key, or one that is no SHA-256 in hex; try `printf KEY | sha256sum`"
        )
    if hashlib.sha256(b"").digest() in keys:
        raise UserError(
            f"{path} has the hash of an empty key; was the variable empty when it was made?"
        )
    return keys


class Metrics:
    """What Prometheus is told: traffic, speed, and proxies of drift, none of which tells anything of a patient."""

    def __init__(self, sha256: str) -> None:
        self.registry = CollectorRegistry()
        register = {"registry": self.registry}
        self.requests = Counter(
            "unet_requests", "Requests answered", ["route", "status"], **register
        )
        self.seconds = Histogram("unet_request_seconds", "Time to answer", ["route"], **register)
        self.network_seconds = Histogram(
            "unet_inference_seconds", "Time of the network, a batch", **register
        )
        self.batches = Histogram(
            "unet_batch_size", "Images in a batch", buckets=[1, 2, 4, 8, 16, 32], **register
        )
        self.queue = Gauge("unet_queue_length", "Images that wait or are computed", **register)
        self.flight = Gauge("unet_in_flight", "Requests being answered", **register)
        self.grey = Histogram(
            "unet_input_mean", "Mean of a prepared image", buckets=SHARES, **register
        )
        self.area = Histogram(
            "unet_foreground_share", "Share of the pixels in the mask", buckets=SHARES, **register
        )
        self.sure = Histogram(
            "unet_confidence", "Mean probability of what was decided", buckets=SHARES, **register
        )
        Gauge("unet_model_info", "The model served", ["sha256"], **register).labels(sha256).set(1)

    def batch(self, size: int, seconds: float) -> None:
        """Count a batch."""
        self.batches.observe(size)
        self.network_seconds.observe(seconds)

    def seen(self, grey: float, area: float, confidence: float) -> None:
        """Note an image."""
        self.grey.observe(grey)
        self.area.observe(area)
        self.sure.observe(confidence)

    def exposition(self, queue: int) -> bytes:
        """Write all for a scrape."""
        self.queue.set(queue)
        return generate_latest(self.registry)


class Guard:
    """ASGI middleware around the application."""

    def __init__(
        self,
        app: Any,
        metrics: Metrics,
        keys: list[bytes] | None,
        open_paths: Collection[str],
        max_body: int,
        room: int,
        timeout_s: float,
    ) -> None:
        self.app, self.metrics, self.keys, self.open_paths = app, metrics, keys, open_paths
        self.max_body, self.room, self.timeout_s = max_body, room, timeout_s
        self.inside = self.held = 0  # requests, and bytes of their bodies

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, request_id, status = time.monotonic(), uuid.uuid4().hex, [0]
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }

        async def answer(message: dict) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                more = SECURITY_HEADERS | {"X-Request-ID": request_id}
                message["headers"] = [
                    *message.get("headers", ()),
                    *((k.encode(), v.encode()) for k, v in more.items()),
                ]
            await send(message)

        self.metrics.flight.inc()
        try:
            await self._guarded(scope, receive, answer, headers)
        except Problem as problem:
            await self._refuse(answer, status, problem, request_id)
        except Busy:
            await self._refuse(
                answer,
                status,
                Problem(503, "too much to do; try again", Retry_After="1"),
                request_id,
            )
        except TimeoutError:
            await self._refuse(
                answer, status, Problem(504, f"not done in {self.timeout_s:g} s"), request_id
            )
        except ClientDisconnect:
            status[0] = status[0] or 499  # as nginx counts who hangs up
        except Exception as error:  # our fault: told without what it quotes
            print(
                to_json_line({"request_id": request_id, "error": type(error).__name__}),
                file=sys.stderr,
                flush=True,
            )
            await self._refuse(answer, status, Problem(500, "a fault of the service"), request_id)
        finally:
            self.metrics.flight.dec()
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - start
            self.metrics.requests.labels(route, str(status[0])).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            if route not in self.open_paths and route != "/metrics":
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "request_id": request_id,
                    "method": scope["method"],
                    "route": route,
                    "status": status[0],
                }
                print(to_json_line(line | {"ms": round(1000 * seconds)}), flush=True)

    async def _guarded(self, scope: dict, receive: Any, send: Any, headers: dict[str, str]) -> None:
        if scope["path"] in self.open_paths:
            await self.app(scope, receive, send)
            return
        self._check_key(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:18]) > self.max_body:
            raise Problem(413, f"the body is larger than {self.max_body} bytes")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Problem(415, "a compressed body; expected one without Content-Encoding")
        if self.inside >= self.room and scope["path"] != "/metrics":
            raise Problem(503, "too many requests at a time; try again", Retry_After="1")
        received = 0

        async def counted() -> dict:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            self.held += len(message.get("body", b""))
            if received > self.max_body:
                raise Problem(413, f"the body is larger than {self.max_body} bytes")
            if self.held > BODIES * self.max_body:
                raise Problem(503, "too many large bodies at a time; try again", Retry_After="1")
            return message

        self.inside += 1
        try:
            async with asyncio.timeout(self.timeout_s):
                await self.app(scope, counted, send)
        finally:
            self.inside -= 1
            self.held -= received

    def _check_key(self, headers: dict[str, str]) -> None:
        """Raise Problem 401 unless a key that is known comes with the request; every known one is compared."""
        if self.keys is None:
            return
        bearer = headers.get("authorization", "")
        given = headers.get("x-api-key") or (bearer[7:] if bearer[:7].lower() == "bearer " else "")
        digest = hashlib.sha256(given.encode("latin-1")).digest()  # the bytes that came
        if not given or sum([hmac.compare_digest(digest, key) for key in self.keys]) == 0:
            raise Problem(
                401,
                "no API key that is known; expected X-API-Key or Authorization: Bearer",
                WWW_Authenticate="Bearer",
            )

    async def _refuse(
        self, send: Any, status: list[int], problem: Problem, request_id: str
    ) -> None:
        if status[0]:  # the answer has begun; nothing else can be said
            return
        headers = {"Content-Type": "application/problem+json", **problem.headers}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": problem.status, "headers": encoded})
        await send(
            {
                "type": "http.response.body",
                "body": body_of(problem.status, problem.detail, request_id),
            }
        )
