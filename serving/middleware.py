"""The guard in front of all routes: API key, limits, deadline, headers, errors, log and metrics."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from serving.api_keys import ADMIN, METRICS, SEGMENT, Keys
from serving.config import is_loopback
from serving.errors import Problem
from serving.monitoring import Metrics, log_fault, log_request

SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# Memory for the bodies of all requests and the large answers, in largest bodies.
MAX_LARGEST_BODIES = 4
LARGE_ANSWER = 2**20  # bytes; smaller ones are not counted
ADMIN_PATHS = "/v2/repository/models/"  # load and unload
KEY_PATH = "/v1/model"  # a proxy asks it whether a key is good; it counts towards no limit
CLIENT_CLOSED_REQUEST = 499  # as nginx counts clients that hang up


class Exchange:
    """One request and its answer: adds headers to the answer and remembers its status."""

    def __init__(self, send: Any, body: "Body") -> None:
        self.body = body
        self.start = time.monotonic()
        self.request_id = uuid.uuid4().hex
        self.status = 0  # 0 until the answer begins
        self.key = ""  # name of the client's key
        self.sent_bytes = 0
        self.held_bytes = 0  # of the answer, while it is sent
        self._send = send

    async def send(self, message: dict) -> None:
        """Send a part of the answer (ASGI)."""
        if message["type"] == "http.response.start":
            self._hold(Headers(raw=message.get("headers", ())))
            self.status = message["status"]
            added = SECURITY_HEADERS | {"X-Request-ID": self.request_id}
            if not self.body.is_whole:
                added["Connection"] = "close"  # what still comes is not read
            message["headers"] = [*message.get("headers", ()), *encode_headers(added)]
        self.sent_bytes += len(message.get("body", b""))
        await self._send(message)

    def _hold(self, headers: Headers) -> None:
        """Count a large answer with the bodies. Raises Problem 503 if there is no room for it."""
        size, guard = int(headers.get("content-length", 0)), self.body.guard
        if size <= LARGE_ANSWER:
            return
        most = MAX_LARGEST_BODIES * guard.max_body
        # The largest one has room beside others that take half of it.
        if guard.held_bytes - self.body.received > most - min(size, most // 2):
            raise Problem(503, "too many large answers at a time; try again", Retry_After="5")
        self.held_bytes = size
        guard.held_bytes += size

    async def send_problem(self, problem: Problem) -> None:
        """Answer with a problem, unless an answer has begun."""
        if self.status:
            return
        headers = {"Content-Type": "application/problem+json", **problem.headers}
        await self.send(
            {
                "type": "http.response.start",
                "status": problem.status,
                "headers": encode_headers(headers),
            }
        )
        body = problem.body(self.request_id)
        await self.send({"type": "http.response.body", "body": body})


def encode_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Encode headers as ASGI wants them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]


class Guard:
    """ASGI middleware around the application."""

    def __init__(
        self,
        app: Any,
        metrics: Metrics,
        keys: Keys | None,
        public_paths: Collection[str],
        page_origins: Collection[str] | None,
        max_body: int,
        max_concurrent_requests: int,
        timeout_s: float,
    ) -> None:
        """Keep the settings.

        keys: None asks for no key.
        public_paths: are answered without key and limits.
        page_origins: web pages that may call besides the service's own; None does not ask.
        max_body: bytes of the largest body.
        """
        self.app = app
        self.metrics = metrics
        self.keys = keys
        self.public_paths = public_paths
        self.page_origins = page_origins
        self.max_body = max_body
        self.max_concurrent_requests = max_concurrent_requests
        self.timeout_s = timeout_s
        # A quarter is left to the other clients.
        self.most_of_one_client = max_concurrent_requests - max_concurrent_requests // 4
        self.running = Counter[str]()  # requests by client
        self.held_bytes = 0  # of their bodies

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Answer one request (ASGI). Every error becomes a problem."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(send, Body(self, scope, receive))
        method = scope["method"]
        if method == "HEAD":
            # As GET: the server leaves out the body.
            scope = scope | {"method": "GET"}
        self.metrics.in_flight.inc()
        try:
            await self._answer(scope, exchange)
        except Problem as problem:
            await exchange.send_problem(problem)
        except ClientDisconnect:
            exchange.status = exchange.status or CLIENT_CLOSED_REQUEST
        except Exception as error:
            log_fault(exchange.request_id, error)
            await exchange.send_problem(Problem(500, "an internal error of the service"))
        finally:
            self.metrics.in_flight.dec()
            self.held_bytes -= exchange.body.received + exchange.held_bytes
            self._record(scope, method, exchange)

    async def _answer(self, scope: dict, exchange: Exchange) -> None:
        """Check a request and pass it on to the application. Raises Problem."""
        headers, body = Headers(scope=scope), exchange.body
        if scope["path"] in self.public_paths:
            await self.app(scope, body.receive, exchange.send)
            return
        if self.page_origins is not None:
            check_page(headers, self.page_origins)
        scope["caller"] = scope["client"][0] if scope.get("client") else ""
        if self.keys:
            key = self.keys.check(headers, needed_right(scope["path"]))
            scope["owner"] = scope["caller"] = key.name or key.digest.hex()  # of jobs
            exchange.key = key.name
            if scope["path"] != KEY_PATH:
                self.keys.count(key)
        self._check_headers(headers)
        caller = scope["caller"]
        is_full = self.running.total() >= self.max_concurrent_requests
        is_full |= self.running[caller] >= self.most_of_one_client
        if is_full and scope["path"] != "/metrics":
            raise Problem(503, "too many requests at a time; try again", Retry_After="1")
        self.running[caller] += 1
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_s) as deadline:
                # A route whose work may take longer moves it.
                scope["deadline"] = deadline
                await self.app(scope, body.receive, exchange.send)
        except TimeoutError:
            raise Problem(504, f"not done within {time.monotonic() - start:.0f} s") from None
        finally:
            self.running[caller] -= 1
            self.running += Counter()  # forgets clients that have none

    def _check_headers(self, headers: Mapping[str, str]) -> None:
        """Refuse a body by its headers, before it is read. Raises Problem."""
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:18]) > self.max_body:
            raise Problem(413, f"the body is larger than {self.max_body} bytes")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Problem(415, "the body is compressed; send it without Content-Encoding")

    def _record(self, scope: dict, method: str, exchange: Exchange) -> None:
        """Count the request and log it; requests for health and metrics are not logged."""
        # The route's pattern, never the path, as a client chooses the path.
        route = getattr(scope.get("route"), "path", "other")
        seconds = time.monotonic() - exchange.start
        self.metrics.record_request(route, exchange.status, seconds)
        if route not in self.public_paths and route != "/metrics":
            received = exchange.body.received
            sizes = {"bytes_in": received, "bytes_out": exchange.sent_bytes}
            asked = {"key": exchange.key, "model": scope.get("model", ""), "method": method}
            asked["route"] = route
            log_request(exchange.request_id, asked, exchange.status, seconds, sizes)


def needed_right(path: str) -> str:
    """Name the right that a request needs."""
    if path == "/metrics":
        return METRICS
    return ADMIN if path.startswith(ADMIN_PATHS) else SEGMENT


def check_page(headers: Mapping[str, str], allowed: Collection[str]) -> None:
    """Refuse what the page of another site sends to a service on loopback. Raises Problem 403.

    Such a page runs in the browser of somebody who can reach the service. It may also have given
    loopback a name of its own (DNS rebinding).
    """
    if "*" in allowed:
        return
    host, origin = headers.get("host", ""), headers.get("origin", "")
    hosts = [one.partition("//")[2] for one in allowed]
    name = host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host
    if host and not is_loopback(name.strip("[]")) and host not in hosts:
        raise Problem(403, "the header Host names another machine; expected 127.0.0.1, localhost")
    if origin and origin.partition("//")[2] != host and origin not in allowed:
        raise Problem(403, "a web page of another origin; --cors-origin lists those that may call")


class Body:
    """A request's body, whose bytes are counted while it is received."""

    def __init__(self, guard: Guard, scope: dict, receive: Any) -> None:
        self.guard = guard
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self.is_whole = not has_body
        self.received = 0  # bytes
        self._receive = receive

    async def receive(self) -> dict:
        """Receive the next part (ASGI). Raises Problem if there are too many bytes."""
        message = await self._receive()
        self.is_whole |= not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.received += size
        self.guard.held_bytes += size
        max_body = self.guard.max_body
        if self.received > max_body:
            raise Problem(413, f"the body is larger than {max_body} bytes")
        if self.guard.held_bytes > MAX_LARGEST_BODIES * max_body:
            raise Problem(503, "too many large bodies at a time; try again", Retry_After="1")
        return message
