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
WRITE_S = 30  # in which a client that reads a large answer must have read some more of it


@dataclass(eq=False)
class Connection:
    """An open connection."""

    socket: socket.socket
    number: int  # of its file
    address: str
    waits: bool = True  # for the client: to send a request, or to read an answer
    timer: asyncio.TimerHandle | None = None

    def stop_timer(self) -> None:
        """Set no limit to the time."""
        if self.timer:
            self.timer.cancel()
            self.timer = None

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
        # By file number; those that wait longest come first.
        self.connections: dict[int, Connection] = {}
        self.on_drop: Callable[[], None] = lambda: None

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Raises ConnectionAbortedError for one that is closed at once."""
        try:
            accepted, peer = super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._drop_waiting()
                raise BlockingIOError from None
            raise
        # One whose TLS failed has ended without a word, and its number is used again.
        if ended := self.connections.get(accepted.fileno()):
            self.forget(ended)
        if len(self.connections) >= self.most and not self._drop_waiting():
            self.on_drop()
            accepted.close()
            raise ConnectionAbortedError
        connection = Connection(accepted, accepted.fileno(), peer[0])
        self.connections[connection.number] = connection
        self.wait(connection, HEADER_S)
        return accepted, peer

    def _drop_waiting(self) -> bool:
        """End a connection that waits. Returns whether there was one."""
        waiting = [one for one in self.connections.values() if one.waits]
        if not waiting:
            return False
        address = Counter(one.address for one in waiting).most_common(1)[0][0]
        self._drop(next(one for one in waiting if one.address == address))
        return True

    def _drop(self, connection: Connection) -> None:
        self.forget(connection)
        if connection.socket.fileno() >= 0:
            self.on_drop()
            connection.end()

    def wait(self, connection: Connection, seconds: float | None) -> None:
        """Wait for a client: after `seconds`, if there is such a limit, its connection ends."""
        connection.stop_timer()
        if self.connections.get(connection.number) is not connection:
            return  # it has ended
        self.connections[connection.number] = self.connections.pop(connection.number)  # the last
        connection.waits = True
        if seconds is not None:
            loop = asyncio.get_running_loop()
            connection.timer = loop.call_later(seconds, self._drop, connection)

    def answer(self, connection: Connection) -> None:
        """Note that a client waits for the service, not the service for the client."""
        connection.stop_timer()
        connection.waits = False

    def forget(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        connection.stop_timer()
        if self.connections.get(connection.number) is connection:
            del self.connections[connection.number]


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
        self.connection: Connection | None = None
        self.is_idle = False  # between two requests
        self.other_bytes = self.body_bytes = 0  # of the request that is read
        self.discarded = -1  # bytes that came after the last answer; -1 as long as they are read
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin a connection."""
        number = transport.get_extra_info("socket").fileno()
        self.connection = self.listener.connections.get(number)
        super().connection_made(LingeringTransport(transport, self))
        if self.connection is None:  # it was dropped meanwhile
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self._stop_write_timer()
        if self.connection:
            self.listener.forget(self.connection)
        super().connection_lost(exc)

    # ------------------------------------------------------------------------------------ reading

    def data_received(self, data: bytes) -> None:
        """Parse what came, or count it if no more is read."""
        if self.discarded >= 0:
            self.discarded += len(data)
            if self.discarded > LINGER_BYTES:
                self.transport.abort()
            return
        if self.is_idle:
            self.is_idle = False
            self.wait(HEADER_S)
        self.other_bytes += len(data)
        super().data_received(data)
        # Chunks have lines of their own, and a body may have trailers.
        if self.other_bytes > MAX_HEADER_BYTES + self.body_bytes:
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.other_bytes = self.body_bytes = 0

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
        self.scope["query_string"] = b""
        if self.connection and not self.write_timer:
            self.listener.answer(self.connection)

    def on_body(self, body: bytes) -> None:
        """Count a part of the body, and pass it on."""
        self.body_bytes += len(body)
        self.other_bytes -= len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, unless an answer is being written, and close."""
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering or not self.cycle.response_started:
            problem = Problem(400, "no request that this service reads; expected plain HTTP/1.1")
            body = problem.body(request_id="")
            lines = (
                STATUS_LINE[400],
                b"content-type: application/problem+json\r\n",
                b"content-length: %d\r\n" % len(body),
                b"connection: close\r\n\r\n",
            )
            self.transport.write(b"".join(lines) + body)
        if is_answering:  # its answer would come to nobody
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self.discarded = max(0, self.discarded)

    # ------------------------------------------------------------------------------------ writing

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        is_body_whole, others_wait = not self.cycle.more_body, bool(self.pipeline)
        super().on_response_complete()
        if self.transport.is_closing() or others_wait:
            return
        if not is_body_whole:
            self.transport.close()
            return
        self.is_idle = True
        if not self.write_timer:
            self.wait(KEEP_ALIVE_S)

    def pause_writing(self) -> None:
        """Wait for a client that reads slowly; one that reads nothing is cut off."""
        super().pause_writing()
        self.wait(None)
        self._check_reading(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop_write_timer()
        super().resume_writing()
        if self.transport.is_closing():
            self.wait(LINGER_S)
        elif self.is_idle:
            self.wait(KEEP_ALIVE_S)
        elif self.connection:
            self.listener.answer(self.connection)

    def _check_reading(self, before: int) -> None:
        """Cut the client off if it has read nothing since `before` bytes waited for it."""
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
            return
        self.write_timer = self.loop.call_later(WRITE_S, self._check_reading, left)

    def _stop_write_timer(self) -> None:
        if self.write_timer:
            self.write_timer.cancel()
            self.write_timer = None

    def wait(self, seconds: float | None) -> None:
        """Wait for the client, see `Listener.wait`."""
        if self.connection:
            self.listener.wait(self.connection, seconds)

    def is_receiving(self) -> bool:
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

    def write(self, data: bytes) -> None:
        """Write, unless the connection is closed."""
        if not self.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close now, or when the client has stopped sending."""
        if self.is_closing():
            return
        self.has_closed = True
        if not self.protocol.write_timer:  # else `_check_reading` ends it
            is_read = not self.transport.get_write_buffer_size()
            self.protocol.wait(LINGER_S if is_read else WRITE_S)
        if not self.protocol.is_receiving():
            self.transport.close()
            return
        self.protocol.discarded = 0
        self.protocol.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
