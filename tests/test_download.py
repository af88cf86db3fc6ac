"""The download, against a local server that misbehaves as real ones do."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

import data
from dataset import download
from utils import UserError


def archive(extra=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("MontgomerySet/Thumbs.db", b"x")
        file.writestr("__MACOSX/MontgomerySet/._CXR_png", b"x")
        for i in range(3):
            picture = np.random.default_rng(i).integers(0, 256, (64, 64), dtype=np.uint8)
            mask = cv2.imencode(".png", 255 * (picture > 127).astype(np.uint8))[1].tobytes()
            file.writestr(
                f"MontgomerySet/CXR_png/MCUCXR_{i:04d}_0.png",
                cv2.imencode(".png", picture)[1].tobytes(),
            )
            for side in ("left", "right"):
                file.writestr(f"MontgomerySet/ManualMask/{side}Mask/MCUCXR_{i:04d}_0.png", mask)
        for name, content in extra:
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    """A server on loopback. Each test sets `behave(handler, content, first byte asked for)`."""
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            made.asked.append(asked)
            made.behave(self, made.content, int(asked[6:-1]) if asked else 0)

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.content, made.behave = [], archive(), answer
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def answer(handler, content, first, send=None):
    """Answer well, or (`send`) stop after so many bytes."""
    if first >= len(content):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(content)}")
        handler.end_headers()
        return
    handler.send_response(206 if first else 200)
    handler.send_header("Content-Length", str(len(content) - first))
    handler.end_headers()
    handler.wfile.write(content[first:][:send])


def source_of(server, content=None):
    url = f"http://127.0.0.1:{server.server_address[1]}/set.zip"
    return download.Source(url, hashlib.sha256(content or server.content).hexdigest(), "terms")


def test_what_is_downloaded_is_ready_to_train_on(server, tmp_path, capsys):
    folder = download.download_source(source_of(server), tmp_path / "files" / "set")
    pairs, problems = data.find_pairs(folder)
    assert len(pairs) == 3 and problems == [] and "terms" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["set"]
    with pytest.raises(UserError, match="exists already"):
        download.download_source(source_of(server), folder)


def test_it_goes_on_where_the_connection_broke_off(server, tmp_path):
    server.behave = lambda handler, content, first: answer(handler, content, first, send=5000)
    download.download_source(source_of(server), tmp_path / "set")
    assert server.asked[:3] == [None, "bytes=5000-", "bytes=10000-"]


def test_a_server_that_knows_no_ranges_starts_again(server, tmp_path):
    broken = [True]

    def behave(handler, content, first):
        answer(handler, content, 0, send=5000 if broken else None)
        broken.clear()

    server.behave = behave
    download.download_source(source_of(server), tmp_path / "set")
    assert server.asked == [None, "bytes=5000-"]


def test_a_server_that_dies_leaves_what_came(server, tmp_path):
    server.behave = lambda handler, content, first: answer(
        handler, content, first, send=0 if first else 5000
    )
    with pytest.raises(
        UserError, match=r"the connection broke off; the same command goes on with .*set.zip.part"
    ):
        download.download_source(source_of(server), tmp_path / "set")
    assert (tmp_path / "set.zip.part").stat().st_size == 5000
    server.behave = answer
    download.download_source(source_of(server), tmp_path / "set")
    assert server.asked[-1] == "bytes=5000-"


def test_an_interrupted_command_finds_a_complete_file(server, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(server.content)
    download.download_source(source_of(server), tmp_path / "set")


def test_a_file_of_another_length_is_fetched_anew(server, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(server.content + b"more")
    download.download_source(source_of(server), tmp_path / "set")
    assert server.asked[-1] is None


@pytest.mark.parametrize("length", ["99999999", "10", "many"])
def test_a_server_that_lies_about_the_length(server, tmp_path, length):
    def behave(handler, content, first):
        handler.send_response(206 if first else 200)
        handler.send_header("Content-Length", length)
        handler.end_headers()
        handler.wfile.write(content[first:])

    server.behave = behave
    if length == "many":
        download.download_source(source_of(server), tmp_path / "set")
        return
    with pytest.raises(UserError, match="broke off|checksum"):
        download.download_source(source_of(server), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_corrupt_archive_is_removed(server, tmp_path):
    good = server.content
    server.content = good[:3000] + b"\0" * 50 + good[3050:]
    with pytest.raises(UserError, match="checksum .*; expected .* The file was removed: try again"):
        download.download_source(source_of(server, good), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        UserError, match="cannot be unpacked"
    ):  # should the checksum be of the corrupt one
        download.download_source(source_of(server), tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "name", ["MontgomerySet/../../outside.png", "/etc/outside.png", "C:\\outside.png"]
)
def test_a_path_outside_is_refused(server, tmp_path, name):
    server.content = archive([(name, b"x")])
    with pytest.raises(UserError, match="outside"):
        download.download_source(source_of(server), tmp_path / "inner" / "set")
    assert not list(tmp_path.rglob("outside.png")) and not (tmp_path / "inner" / "set").exists()


def test_an_archive_that_swells_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNPACKED_BYTES", 2**20)
    server.content = archive([("MontgomerySet/bomb.png", bytes(2**21))])
    with pytest.raises(UserError, match="unpacks to"):
        download.download_source(source_of(server), tmp_path / "set")


def test_a_full_disk_is_noticed_before(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(UserError, match="GiB free; expected"):
        download.download_source(source_of(server), tmp_path / "set")


def test_a_moved_address_is_reported(server, tmp_path):
    server.behave = lambda handler, content, first: handler.send_error(404)
    with pytest.raises(UserError, match="answers 404 Not Found; has it moved"):
        download.download_source(source_of(server), tmp_path / "set")
