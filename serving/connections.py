"""Connections: how many may be open, and how long each may keep the service waiting.

A client without a key can open connections, send half a header, or go on sending after it was
refused. So the limit and the deadlines are here, before anything is parsed.
"""

import asyncio
import contextlib
import errno
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import Problem

MAX_CONNECTIONS = 400  # with TLS each takes 256 KiB
RESERVED_FILES = 200  # of the limit of open files: for the model, the workers, the log
HEADER_S = 10  # from the first byte of a request, or the connection's begin, to its header's end
# Longer than a proxy keeps its connections; else a proxy may use one that was just closed.
KEEP_ALIVE_S = 75
# After an answer that comes before the end of a body: the client must read it before it is cut off.
LINGER_S, LINGER_BYTES = 2, 2**26
MAX_HEADER_BYTES, MAX_HEADERS = 2**16, 100  # of a request; trailers count
MAX_PIPELINED = 16  # requests that a client sends before it has read an answer
Peer = tuple[Any, ...]  # a connection's other end: address and port


@dataclass
class Connection:
    """An open connection. Without a timer it has a request that is being answered."""

    socket: socket.socket
    timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        """Let its protocol see the end of the connection, or TLS that it cannot be established."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class Listener(socket.socket):
    """A listening socket that knows its connections.

    Where a new one is too many, the address that keeps the most of them waiting loses the one that
    has waited longest. If all have requests that are being answered, the new one is closed.
    """

    def __init__(self, family: int, fileno: int) -> None:
        super().__init__(family, socket.SOCK_STREAM, fileno=fileno)
        self.most = max(16, min(MAX_CONNECTIONS, max_files() - RESERVED_FILES))
        self.connections: dict[Peer, Connection] = {}  # those that wait longest come first
        self.on_drop: Callable[[], None] = lambda: None

    def accept(self) -> tuple[socket.socket, Peer]:
        """Accept a connection. Raises ConnectionAbortedError for one that is closed at once."""
        try:
            connection, peer = super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._drop_waiting()
                raise BlockingIOError from None
            raise
        if len(self.connections) >= self.most and not self._drop_waiting():
            self.on_drop()
            connection.close()
            raise ConnectionAbortedError
        self.connections[peer] = Connection(connection)
        self.wait(peer, HEADER_S)
        return connection, peer

    def _drop_waiting(self) -> bool:
        """End a connection that waits. Returns whether there was one."""
        waiting = [peer for peer, one in self.connections.items() if one.timer]
        if not waiting:
            return False
        address = Counter(peer[0] for peer in waiting).most_common(1)[0][0]
        self._drop(next(peer for peer in waiting if peer[0] == address))
        return True

    def _drop(self, peer: Peer) -> None:
        self.on_drop()
        if connection := self.forget(peer):
            connection.end()

    def wait(self, peer: Peer, seconds: float) -> None:
        """Wait for a client: after `seconds` its connection ends."""
        if connection := self.forget(peer):
            loop = asyncio.get_running_loop()
            connection.timer = loop.call_later(seconds, self._drop, peer)
            self.connections[peer] = connection  # at the end of the row

    def answer(self, peer: Peer) -> None:
        """Note that a client waits for the service, not the service for the client."""
        connection = self.connections.get(peer)
        if connection and connection.timer:
            connection.timer.cancel()
            connection.timer = None

    def forget(self, peer: Peer) -> Connection | None:
        """Forget a connection that has ended."""
        self.answer(peer)
        return self.connections.pop(peer, None)


def max_files() -> int:
    """Return how many files this process may open."""
    try:
        import resource
    except ImportError:  # Windows
        return 2048
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Protocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 with deadlines; a client that goes on sending after its answer is cut off.

    Queries are left out: no route has one, and tracing would export what stands in it.
    """

    def __init__(self, listener: Listener, **more: Any) -> None:
        super().__init__(**more)
        self.listener = listener
        self.peer: Peer = ()
        self.is_idle = False  # between two requests
        self.is_in_body, self.header_bytes = False, 0  # bytes of a header that has not ended
        self.discarded = -1  # bytes that came after the last answer; -1 as long as they are read

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin a connection."""
        super().connection_made(LingeringTransport(transport, self))
        self.peer = transport.get_extra_info("peername")

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self.listener.forget(self.peer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, or count it if no more is read."""
        if self.discarded >= 0:
            self.discarded += len(data)
            if self.discarded > LINGER_BYTES:
                self.transport.abort()
            return
        if self.is_idle:
            self.is_idle = False
            self.listener.wait(self.peer, HEADER_S)
        self.header_bytes += len(data)
        super().data_received(data)
        if self.header_bytes > MAX_HEADER_BYTES and not self.is_in_body:
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.is_in_body = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header. Raises ValueError, which the parser makes an error of the request."""
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer a request. Raises ValueError if too many wait for their answer."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests")
        super().on_headers_complete()
        self.is_in_body, self.header_bytes = True, 0
        self.scope["query_string"] = b""
        self.listener.answer(self.peer)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, unless an answer is being written, and close."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            problem = Problem(400, "no request that this service reads; expected plain HTTP/1.1")
            body = problem.body(request_id="")
            lines = (
                STATUS_LINE[400],
                b"content-type: application/problem+json\r\n",
                b"content-length: %d\r\n" % len(body),
                b"connection: close\r\n\r\n",
            )
            self.transport.write(b"".join(lines) + body)
        self.transport.close()
        self.discarded = max(0, self.discarded)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        is_body_whole, others_wait = not self.cycle.more_body, bool(self.pipeline)
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if not is_body_whole and not others_wait:
            self.transport.close()
        elif not others_wait:
            self.is_idle = True
            self.listener.wait(self.peer, KEEP_ALIVE_S)

    def is_sending(self) -> bool:
        """Say whether the client may still be sending a request's body."""
        return self.cycle is not None and self.cycle.more_body


class LingeringTransport:
    """A transport that closes when the client has ended its body and read the answer, or is late.

    Closed at once, a connection with bytes that nobody read is reset, and the answer may be lost.
    """

    def __init__(self, transport: asyncio.Transport, protocol: Protocol) -> None:
        self.transport, self.protocol = transport, protocol
        self.has_closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def is_closing(self) -> bool:
        """Say whether `close` was called, or the connection ended."""
        return self.has_closed or self.transport.is_closing()

    def close(self) -> None:
        """Close now, or when the client has stopped sending."""
        if self.is_closing():
            return
        self.has_closed = True
        self.protocol.listener.wait(self.protocol.peer, LINGER_S)
        if not self.protocol.is_sending():
            self.transport.close()
            return
        self.protocol.discarded = 0
        self.protocol.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
