"""What clients without a key, slow ones and operators may do to the service: it goes on."""

import asyncio
import functools
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import trustme
import uvicorn
from conftest import ROOT
from test_serve import Running, write_keys
from worker_tries import try_all

from serving import server
from serving.api_keys import Keys, read_keys
from serving.connections import MAX_HEADER_BYTES, MAX_HEADERS, MAX_PIPELINED, Protocol
from serving.errors import Problem
from serving.sandbox import drop_rights
from serving.workers import AnswerUnpickler, Workers
from utils import UserError

LUNGS = ROOT / "files" / "lungs"
HALF = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nX-Half: "


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service with keys."""
    folder = tmp_path_factory.mktemp("withstands")
    running = Running(LUNGS, folder, "--keys", write_keys(folder / "keys", sesame="viewer"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def keyless(tmp_path_factory):
    """A service on loopback without keys."""
    folder = tmp_path_factory.mktemp("keyless")
    running = Running(LUNGS, folder, "--cors-origin", "https://viewer.example")
    yield running
    running.stop()


def connect(service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), 20)


def read_all(raw: socket.socket) -> bytes:
    """Read until the service closes the connection; what it resets has ended too."""
    read = b""
    try:
        while part := raw.recv(2**16):
            read += part
    except ConnectionError:
        pass
    return read


# ------------------------------------------------------------------------------------ connections


def test_the_connection_that_waited_longest_makes_room_for_a_new_one(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (230, hard))
    try:
        running = Running(LUNGS, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        held = [connect(running) for _ in range(60)]
        for raw in held:
            raw.sendall(HALF)
        for _ in range(20):
            start = time.monotonic()
            answer = httpx.get(f"http://127.0.0.1:{running.port}/readyz", timeout=5)
            assert answer.status_code == 200 and time.monotonic() - start < 5
        assert read_all(held[0]) == b""  # ended
        held[-1].sendall(b"x\r\n\r\n")
        assert held[-1].recv(100).startswith(b"HTTP/1.1 200")  # not ended
        metrics = running.client.get("/metrics").text
        found = re.findall(r"^unet_connections(?:_dropped_total)? (\d+)", metrics, re.M)
        assert 20 <= int(found[0]) <= 30 and int(found[1]) >= 30, found
        for raw in held:
            raw.close()
        assert len(running.log.read_text()) < 10_000
    finally:
        running.stop()


@pytest.mark.slow
def test_half_a_header_is_waited_for_ten_seconds_also_after_another_request(service):
    with connect(service) as fresh, connect(service) as used:
        used.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"live":true}'):
            answer += used.recv(1000)
        fresh.sendall(HALF)
        used.sendall(HALF)
        start = time.monotonic()
        assert read_all(fresh) == read_all(used) == b""
        assert 5 < time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"POST /v1/segment", b"401"), (b"POST /livez", b"405"), (b"GET /livez", b"200")],
)
def test_who_goes_on_sending_after_the_answer_is_cut_off(service, request_line, status):
    with connect(service) as raw:
        raw.sendall(
            request_line + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        answer = raw.recv(2**16)
        assert answer.split()[1] == status
        assert b"connection: close" in answer.lower()
        start, chunks = time.monotonic(), b"1\r\nx\r\n" * 10_000
        with pytest.raises(OSError):
            while time.monotonic() - start < 15:
                raw.sendall(chunks)
    assert service.client.get("/readyz").status_code == 200


def test_a_client_that_sends_its_whole_body_first_can_read_why_it_is_refused(service):
    answer = service.client.post("/v1/segment", content=bytes(2**24))
    assert answer.status_code == 401 and answer.headers["connection"] == "close"
    answer = service.client.post(
        "/v1/segment", content=bytes(2**26 + 2**20), headers={"X-API-Key": "sesame"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "request_bytes",
    [
        HALF + b"x" * (MAX_HEADER_BYTES + 2**18),
        b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"POST /livez HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        + b"a: b\r\n" * (MAX_HEADERS + 1)
        + b"\r\n",
        b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n"
        b"\r\n0\r\n\r\n",
        b"not HTTP at all\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" * (2 * MAX_PIPELINED + 4),
    ],
    ids=["long header", "many headers", "many trailers", "two lengths", "no HTTP", "pipelined"],
)
def test_what_is_no_request_is_refused_and_the_connection_closed(service, request_bytes):
    with connect(service) as raw:
        try:
            raw.sendall(request_bytes)
        except OSError:
            return  # it was cut off before the end
        answer = read_all(raw)
        assert b"Traceback" not in answer
        if answer.startswith(b"HTTP/1.1 400"):
            problem = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert problem["status"] == 400 and "expected plain HTTP/1.1" in problem["detail"]
    assert service.client.get("/readyz").status_code == 200


# --------------------------------------------------------------------------------- keys and pages


def test_a_file_of_keys_says_names_and_rights(tmp_path):
    path = tmp_path / "keys"
    write_keys(path, one="", two="viewer", three="prometheus metrics", four="- segment,metrics")
    digest = "a" * 64
    path.write_text(f"{path.read_text()}\n# a comment\nrouter:{digest} 600/min # another\n")
    found = [(key.name, key.rights, key.limit) for key in read_keys(path)]
    assert found == [
        ("", ("segment",), 0),
        ("viewer", ("segment",), 0),
        ("prometheus", ("metrics",), 0),
        ("", ("segment", "metrics"), 0),
        ("router", ("segment",), 600),
    ]
    keys = Keys(path)
    assert keys.check({"authorization": "Bearer three"}, "metrics").name == "prometheus"
    for given, right, status in (("two", "metrics", 403), ("", "segment", 401), ("x", "x", 401)):
        with pytest.raises(Problem) as refused:
            keys.check({"x-api-key": given}, right)
        assert refused.value.status == status


def test_a_key_has_a_limit_of_its_own(tmp_path, monkeypatch):
    now = [600.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = tmp_path / "keys"
    write_keys(path, few="one segment 3/min", many="two")
    keys = Keys(path)
    few, many = (keys.check({"x-api-key": name}, "segment") for name in ("few", "many"))
    for second in (0, 20, 50):
        now[0] = 600.0 + second
        keys.count(few)
    keys.known = read_keys(path)  # forgets no request
    with pytest.raises(Problem) as refused:
        keys.count(few)
    assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "10"
    keys.count(many)
    now[0] = 660.0
    keys.count(few)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("a" * 64 + " viewer segment 0/min", "a limit other than"),
        ("a" * 64 + " viewer segment 5/s", "a limit other than"),
        ("abc viewer", "not a SHA-256"),
        ("a" * 64 + " viewer all", "rights other than segment, metrics"),
        ("a" * 64 + " viewer segment more", "rights other than"),
        ("a" * 64 + ' "quoted"', "a name with other characters"),
        ("# nothing", "has no key"),
    ],
)
def test_a_bad_file_of_keys_is_refused(tmp_path, line, match):
    (tmp_path / "keys").write_text(line)
    (tmp_path / "keys").chmod(0o600)
    with pytest.raises(UserError, match=match):
        read_keys(tmp_path / "keys")


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o666])
def test_a_file_of_keys_that_others_can_read_or_write_is_refused(tmp_path, mode):
    path = write_keys(tmp_path / "keys", one="")
    (tmp_path / "keys").chmod(mode)
    with pytest.raises(UserError, match=f"open to all users.*mode {mode:o}.*chmod o="):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").chmod(0o640)  # as a secret of Kubernetes
    assert read_keys(tmp_path / "keys") and path


def wait_for(holds, seconds: float = 20) -> bool:
    """Ask again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("signal_is_sent", [True, False])
def test_keys_and_certificate_are_read_again(tmp_path, signal_is_sent):
    def write(key: str) -> trustme.CA:
        """Write one new key and a new certificate."""
        authority = trustme.CA()
        cert = authority.issue_cert("127.0.0.1")
        cert.private_key_pem.write_to_path(tmp_path / "key.pem")
        cert.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        write_keys(tmp_path / "keys", **{key: "viewer"})
        return authority

    def ask(authority: trustme.CA, key: str) -> int:
        import ssl

        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        with httpx.Client(base_url=f"https://127.0.0.1:{running.port}", verify=trust) as client:
            try:
                return client.get("/v1/model", headers={"X-API-Key": key}).status_code
            except httpx.ConnectError:  # another certificate
                return 0

    first = write("one")
    files = [("--keys", "keys"), ("--tls-cert", "cert.pem"), ("--tls-key", "key.pem")]
    flags = [word for name, file in files for word in (name, str(tmp_path / file))]
    running = Running(LUNGS, tmp_path, *flags, scheme="https", verify=False)
    try:
        assert ask(first, "one") == 200
        second = write("two")
        if signal_is_sent:
            running.process.send_signal(signal.SIGHUP)
        assert wait_for(lambda: ask(second, "two") == 200)
        assert ask(second, "one") == 401 and ask(first, "two") == 0
        (tmp_path / "keys").write_text("no keys")
        running.process.send_signal(signal.SIGHUP)
        assert wait_for(lambda: "stay as they were" in running.log.read_text())
        assert ask(second, "two") == 200
    finally:
        running.stop()


def test_a_page_of_another_site_cannot_use_a_service_without_keys(keyless):
    address = f"127.0.0.1:{keyless.port}"
    for headers, status in (
        ({}, 400),  # it is no image
        ({"Origin": f"http://{address}"}, 400),
        ({"Origin": "https://viewer.example"}, 400),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": f"localhost:{keyless.port}"}, 400),
        ({"Host": "[::1]"}, 400),
    ):
        answer = keyless.client.post("/v1/segment", content=b"no image", headers=headers)
        assert answer.status_code == status, headers
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_redirect_never_names_the_host_that_a_client_claims(keyless):
    for path in ("/v1/model/", "/readyz/", "/livez//"):
        answer = keyless.client.get(path, headers={"Host": "evil.example"})
        assert answer.status_code in (403, 404) and "location" not in answer.headers


# ---------------------------------------------------------------------------------------- workers


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Landlock and seccomp are Linux's")
def test_workers_have_no_network_no_programs_and_no_files(tmp_path):
    (tmp_path / "image").write_bytes(b"of a patient")
    done = multiprocessing.get_context("spawn").Pool(1).apply(drop_rights)
    if done != ["landlock", "seccomp"]:
        pytest.skip(f"this kernel allows only {done}")

    async def work() -> dict[str, str]:
        workers = Workers(1, max_pixels=2**20)
        workers.start()
        try:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
                return await workers.run(try_all, tmp_path / "image", ROOT / "README.md", port)
        finally:
            workers.stop()

    found = asyncio.run(work())
    assert found.pop("import") == ""
    assert set(found.values()) == {"PermissionError"}, found


async def pids_of(workers: Workers) -> set[int]:
    """Ask two workers at a time."""
    return set(await asyncio.gather(workers.run(os.getpid), workers.run(os.getpid)))


def test_a_worker_that_takes_too_long_is_replaced_and_nobody_waits_for_it():
    async def work() -> tuple[float, list[int]]:
        workers = Workers(2, max_pixels=2**20)
        workers.start()
        await workers.ready()
        try:
            first = await workers.run(os.getpid)
            with pytest.raises(Problem) as refused:
                await workers.run(time.sleep, 60, seconds=0.3)
            assert refused.value.status == 413 and "0.3 s" in refused.value.detail
            start = time.monotonic()
            after = [await workers.run(os.getpid) for _ in range(3)]  # the new one is not ready yet
            seconds = time.monotonic() - start
            await workers.ready()
            both = await pids_of(workers)
            with pytest.raises(pickle.UnpicklingError):  # an answer that is none of ours
                await workers.run(Path, "x")
            await workers.ready()
            others = await pids_of(workers)
            assert len(others) == 2 and others != both
            with pytest.raises(Problem):  # an error of the function costs no worker
                await workers.run(Keys, ROOT / "no_such_file")
            assert await pids_of(workers) == others and len(both) == 2
            return seconds, [first, *after]
        finally:
            workers.stop()

    seconds, pids = asyncio.run(work())
    assert seconds < 1 and len(set(pids[1:])) == 1


def test_an_answer_of_a_worker_that_calls_something_is_refused():
    class Taken:
        def __reduce__(self):
            return os.system, ("touch taken",)

    good = Problem(400, "x"), np.arange(3, dtype="<f4"), np.float32(2), {"a": [b"b", None]}
    for answer in good:
        assert repr(AnswerUnpickler(io.BytesIO(pickle.dumps(answer))).load()) == repr(answer)
    with pytest.raises(pickle.UnpicklingError, match=r"posix.system|nt.system"):
        AnswerUnpickler(io.BytesIO(pickle.dumps(Taken()))).load()


# ------------------------------------------------------------------------- clients that read slowly


def test_a_body_of_many_kib_may_be_followed_by_a_request_in_two_parts(service):
    with connect(service) as raw:
        head = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nX-API-Key: sesame\r\n"
        raw.sendall(head + b"Content-Length: 300000\r\n\r\n" + bytes(300_000))
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            answer += raw.recv(2**16)
        assert answer.startswith(b"HTTP/1.1 400") and b"unreadable" in answer  # it is no image
        raw.sendall(b"GET /livez HTTP/1.1\r\nHost:")
        time.sleep(0.2)
        raw.sendall(b" localhost\r\n\r\n")
        assert raw.recv(2**16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("part", [b"ZZZ\r\n", b"0\r\na: " + b"x" * 2**20])
def test_a_malformed_body_is_answered_and_told_in_no_traceback(service, part):
    with connect(service) as raw:
        raw.sendall(b"POST /livez HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.sendall(part)
        assert read_all(raw)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 405", b"")
    assert service.client.get("/readyz").status_code == 200
    assert "Traceback" not in service.log.read_text()


def test_a_connection_that_is_reset_and_opened_from_the_same_port_is_still_known(service):
    address = ("127.0.0.1", service.port)
    for _ in range(20):
        raw = socket.create_connection(address)
        port = raw.getsockname()[1]
        raw.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()  # resets
        with socket.create_connection(address, 20, source_address=("", port)) as again:
            again.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            assert again.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_that_does_not_read_its_answer_is_cut_off(monkeypatch, reads):
    monkeypatch.setattr("serving.connections.WRITE_S", 0.3)
    answer = bytes(2**23)

    async def app(scope, receive, send):
        length = str(len(answer)).encode()
        head = {"type": "http.response.start", "status": 200}
        await send(head | {"headers": [(b"content-length", length), (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": answer})

    async def run() -> int:
        listener = server.open_socket("127.0.0.1", 0)
        settings = uvicorn.Config(
            app, http=functools.partial(Protocol, listener), lifespan="off", log_level="critical"
        )
        serving = uvicorn.Server(settings)
        task = asyncio.create_task(serving.serve([listener]))
        while not serving.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=2**16)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        received = 0
        if reads:  # slower than the deadline, but it goes on
            while part := await reader.read(2**18):
                received += len(part)
                await asyncio.sleep(0.05)
        else:
            for _ in range(100):
                await asyncio.sleep(0.05)
                if not listener.connections:
                    break
            assert not listener.connections
        writer.close()
        serving.should_exit = True
        await task
        return received

    received = asyncio.run(run())
    assert (received > len(answer)) == reads
