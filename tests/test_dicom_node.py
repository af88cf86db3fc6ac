"""The DICOM node: takes images, has them segmented, sends on; nothing is lost on the way."""

import contextlib
import io
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pydicom
import pytest
import trustme
from conftest import ROOT
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    ComprehensiveSRStorage,
    ComputedRadiographyImageStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    Verification,
)
from test_dicom_series import write_capture, write_series
from test_pacs import write_xray
from test_serve import Running, free_port

import data
import metrics
from dataset.reading import read_truth
from dicom_node import ask, send, spool
from dicom_node.__main__ import Config, check_config, make_tls
from dicom_node.errors import AwayError, FaultError, RefusedError
from dicom_node.node import MAX_FAULTS, Node
from dicom_node.receive import parse_callers
from dicom_node.spool import Spool
from imaging import formats
from imaging.labels import Classes
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def made(tmp_path):
    return Spool(tmp_path / "spool")


class FakeService:
    """Answers each call as it is told: with bytes, or an error."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def segment(self, file, num_bytes):
        self.asked.append(file.read())
        assert len(self.asked[-1]) == num_bytes
        return [self.answer()]

    def answer(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeDestination(FakeService):
    def send(self, path):
        self.asked.append(path.name)
        self.answer()


def make_node(made: Spool, service=None, destination=None, retry_s=60) -> Node:
    return Node(made, service, destination, retry_s)


def make_seg(path: Path) -> bytes:
    """Some DICOM object."""
    write_xray(path, np.zeros((16, 16), np.uint8))
    return path.read_bytes()


def arrive(made: Spool, folder: Path, series="1.2.3") -> None:
    """Put files into the spool as if they had come."""
    for path in sorted(folder.iterdir()):
        copy = made.receiving / path.name
        shutil.copy(path, copy)
        made.keep(copy, series, str(pydicom.dcmread(path).SOPInstanceUID))


# ------------------------------------------------------------------------------------------ spool


def test_a_series_is_taken_when_no_image_has_come_for_a_while(made, tmp_path):
    write_series(tmp_path / "in")
    arrive(made, tmp_path / "in")
    assert made.take(60) is None and made.counts()["incoming"] == 1
    taken = made.take(0)
    assert taken.parent == made.working and len(list(taken.iterdir())) == 4
    # More of it comes while it is segmented: a series of its own.
    write_series(tmp_path / "late", positions=(20,))
    arrive(made, tmp_path / "late")
    assert made.take(60) == taken and made.counts()["incoming"] == 1


def test_a_killed_node_begins_again(made, tmp_path):
    write_series(tmp_path / "in")
    arrive(made, tmp_path / "in")
    made.take(0)
    write_series(tmp_path / "late", positions=(20,))
    arrive(made, tmp_path / "late")
    (made.receiving / "half.dcm").write_bytes(b"half of it")
    made.lock.close()  # as the end of a process does
    again = Spool(made.root)
    assert again.counts() == {"incoming": 1, "working": 0, "outgoing": 0, "quarantine": 0}
    assert len(list(again.take(0).iterdir())) == 5 and not list(again.receiving.iterdir())


@pytest.mark.parametrize("uid", ["../1", "", "1.2/3", "a.b", "1" * 65, "..", ".", "1."])
def test_names_that_are_no_uids_are_not_taken(made, uid):
    (made.receiving / "x").write_bytes(b"x")
    with pytest.raises(ValueError, match="no valid UID"):
        made.keep(made.receiving / "x", uid, "1.2.3")
    with pytest.raises(ValueError, match="no valid UID"):
        made.keep(made.receiving / "x", "1.2.3", uid)


def test_what_is_put_aside_twice_is_kept_twice(made, tmp_path):
    for text in ("one", "two"):
        (made.outgoing / "1.2.3.dcm").write_text(text)
        made.quarantine(made.outgoing / "1.2.3.dcm", f"because {text}")
    first, second = sorted(made.quarantined.iterdir())
    assert (first.name, second.name) == ("1.2.3", "1.2.3-1")
    assert (first / "1.2.3.dcm").read_text() == "one"
    assert (second / spool.REASON).read_text() == "because two\n"


def test_what_an_operator_leaves_in_the_spool_stops_nothing(made, tmp_path):
    (made.incoming / ".DS_Store").write_bytes(b"x")
    (made.working / "1.2.3.dcm").write_bytes(b"x")
    write_series(tmp_path / "in")
    arrive(made, tmp_path / "in")
    assert made.take(0).name == "1.2.3"
    made.lock.close()
    assert Spool(made.root).take(0).name == "1.2.3"


def test_two_nodes_never_share_a_spool(made):
    with pytest.raises(UserError, match="another node works with the spool"):
        Spool(made.root)


def test_half_a_file_of_a_sender_that_is_gone_is_removed(made):
    for name, age in (("old", spool.ABANDONED_S + 1), ("new", 0)):
        path = made.receiving / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    made.sweep()
    assert [path.name for path in made.receiving.iterdir()] == ["new"]


def test_a_kill_while_a_series_is_removed_leaves_no_part_of_it(made, tmp_path, monkeypatch):
    write_series(tmp_path / "in")
    arrive(made, tmp_path / "in")

    def killed(path):
        sorted(path.iterdir())[0].unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(spool.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        made.remove(made.take(0))
    monkeypatch.undo()
    made.lock.close()
    again = Spool(made.root)
    assert set(again.counts().values()) == {0} and not list(again.receiving.iterdir())


def test_nobody_else_may_look_into_the_spool(made):
    assert all(path.stat().st_mode & 0o077 == 0 for path in (made.root, *made.root.iterdir()))


def test_a_spool_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="spool .* cannot be made"):
        Spool(tmp_path / "file" / "spool")


# ------------------------------------------------------------------------------------- segmenting


def test_a_volume_goes_to_the_service_as_one_zip(made, tmp_path):
    write_series(tmp_path / "in")
    write_capture(tmp_path / "in" / "SC")
    arrive(made, tmp_path / "in")
    seg = make_seg(tmp_path / "seg")
    service = FakeService(seg)
    assert make_node(made, service).segment_next(0)
    assert len(formats.decode_scan(service.asked[0]).pixels) == 4
    uid = pydicom.dcmread(tmp_path / "seg").SOPInstanceUID
    assert (made.outgoing / f"{uid}.dcm").read_bytes() == seg
    assert made.counts() == {"incoming": 0, "working": 0, "outgoing": 1, "quarantine": 0}


def test_a_series_waits_while_the_service_is_away_and_others_go_on(made, tmp_path):
    for name in ("a", "b"):
        uids = write_series(tmp_path / name, positions=(0,))
        arrive(made, tmp_path / name, series=uids["SeriesInstanceUID"])
    seg = make_seg(tmp_path / "seg")
    service = FakeService(AwayError("gone"), seg, make_seg(tmp_path / "seg2"))
    node = make_node(made, service)
    assert node.segment_next(0) and made.counts()["working"] == 1
    assert node.segment_next(0) and made.counts()["outgoing"] == 1
    assert not node.segment_next(0)  # not yet
    node.retry_s = 0
    assert node.segment_next(0) and made.counts()["outgoing"] == 2
    assert made.counts()["working"] == 0 and not node.segment_next(0)


def test_an_answer_that_is_no_dicom_is_none(made, tmp_path):
    """A proxy's page, a wrong address."""
    write_series(tmp_path / "in", positions=(0,))
    arrive(made, tmp_path / "in")
    assert make_node(made, FakeService(b"<html>")).segment_next(0)
    assert made.counts() == {"incoming": 0, "working": 1, "outgoing": 0, "quarantine": 0}


def test_a_refused_image_is_put_aside_and_the_others_go_on(made, tmp_path):
    for name, positions in (("a", (0, 5)), ("b", (0, 5))):
        uids = write_series(tmp_path / name, positions)
        arrive(made, tmp_path / name, series=uids["SeriesInstanceUID"])
    service = FakeService(RefusedError("too large"), make_seg(tmp_path / "seg"))
    node = make_node(made, service)
    assert node.segment_next(0) and node.segment_next(0)
    assert made.counts() == {"incoming": 0, "working": 0, "outgoing": 1, "quarantine": 1}
    (aside,) = made.quarantined.iterdir()
    assert len(list(aside.glob("*.dcm"))) == 2
    assert "too large" in (aside / spool.REASON).read_text()
    # It can be tried again: the operator moves the folder back.
    aside.rename(made.incoming / aside.name)
    service.answers.append(make_seg(tmp_path / "seg2"))
    assert node.segment_next(0) and made.counts()["outgoing"] == 2


@pytest.mark.parametrize("content", [b"no DICOM", b"\0" * 128 + b"DICM" + b"\xff" * 99, b""])
def test_what_is_no_image_is_put_aside(made, content):
    (made.incoming / "1.2").mkdir()
    (made.incoming / "1.2" / "1.dcm").write_bytes(content)
    assert make_node(made, FakeService(RefusedError("unreadable"))).segment_next(0)
    assert made.counts() == {"incoming": 0, "working": 0, "outgoing": 0, "quarantine": 1}


def test_a_segmentation_is_not_segmented(made, tmp_path):
    header = pydicom.dcmread(io.BytesIO(make_seg(tmp_path / "seg")))
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    (made.incoming / "1.2").mkdir()
    header.save_as(made.incoming / "1.2" / "1.dcm", enforce_file_format=True)
    assert make_node(made, FakeService()).segment_next(0)
    (aside,) = made.quarantined.iterdir()
    assert "a DICOM segmentation, which is a mask" in (aside / spool.REASON).read_text()


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, RefusedError), (413, RefusedError), (500, FaultError), (401, AwayError)]
    + [(429, AwayError), (503, AwayError), (502, AwayError)],
)
def test_the_services_answers(status, error):
    with answering(status, b'{"detail": "too dark"}') as url, pytest.raises(error) as caught:
        ask.Service(url).segment(io.BytesIO(b"x"), 1)
    assert type(caught.value) is error
    assert str(caught.value) == (
        f"the service answers {status}" if error is AwayError else "too dark"
    )


def test_a_service_that_is_not_there(tmp_path):
    with pytest.raises(AwayError, match="does not answer"):
        ask.Service(f"http://127.0.0.1:{free_port()}").segment(io.BytesIO(b"x"), 1)
    for url in ("127.0.0.1:8080", "foo", "ftp://foo"):
        with pytest.raises(UserError, match="service is .*; expected a URL"):
            ask.Service(url)
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    (tmp_path / "two").write_text("a\nb")
    for name, why in (("key", "cannot be read"), ("none", "cannot be read"), ("two", "several")):
        with pytest.raises(UserError, match=why):
            ask.Service("http://127.0.0.1", str(tmp_path / name))


def test_a_fault_of_the_service_is_tried_again_a_few_times(made, tmp_path):
    write_series(tmp_path / "in", positions=(0,))
    arrive(made, tmp_path / "in")
    node = make_node(made, FakeService(*[FaultError("too slow")] * MAX_FAULTS), retry_s=0)
    for number in range(MAX_FAULTS):
        assert made.counts()["quarantine"] == 0, number
        assert node.segment_next(0)
    (aside,) = made.quarantined.iterdir()
    assert "too slow" in (aside / spool.REASON).read_text() and not node.segment_next(0)


def test_what_may_go_with_a_segmentation():
    assert ask.parse_also("") == () and ask.parse_also("report, overlay") == ("report", "overlay")
    with pytest.raises(UserError, match="also has pdf; expected report or overlay, or both"):
        ask.parse_also("report,pdf")


def test_of_a_zip_only_what_is_wanted_is_taken():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("segmentation", "report", "overlay-0001", "overlay-0002"):
            archive.writestr(f"{name}.dcm", name)
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(AwayError, match="without a segmentation"):
        ask.unpack(empty.getvalue(), ["report"])
    assert ask.unpack(buffer.getvalue(), ["report"]) == [b"segmentation", b"report"]
    assert len(ask.unpack(buffer.getvalue(), ["overlay"])) == 3
    with pytest.raises(AwayError, match="something else than a zip"):
        ask.unpack(b"DICM", ["report"])


def test_a_series_that_is_too_large_for_the_service_is_refused(service):
    """The service answers and closes while the body is still being sent."""
    large = io.BytesIO(bytes(200 * 2**20))
    with pytest.raises(RefusedError, match="the body is larger than"):
        ask.Service(address_of(service)).segment(large, 200 * 2**20)


# ---------------------------------------------------------------------------------------- sending


def test_a_segmentation_is_sent_until_it_is_taken_and_others_go_on(made):
    for uid in ("1.1", "1.2"):
        made.put_out(b"1", uid)
    node = make_node(made, None, FakeDestination(AwayError("gone"), None, None))
    assert node.send_next() and made.counts()["outgoing"] == 2
    assert node.send_next() and made.counts()["outgoing"] == 1
    assert not node.send_next()  # not yet
    node.retry_s = 0
    assert node.send_next() and made.counts()["outgoing"] == 0 and not node.send_next()


def test_a_file_that_cannot_be_read_does_not_stop_the_others(made):
    (made.outgoing / "1.1.dcm").mkdir()  # as an operator may have put it back
    made.put_out(b"1", "1.2")
    node = make_node(made, None, FakeDestination(IsADirectoryError(), None))
    with pytest.raises(IsADirectoryError):
        node.send_next()
    assert node.send_next() and not (made.outgoing / "1.2.dcm").exists()
    assert not node.send_next()  # not yet


def test_a_segmentation_that_is_not_wanted_is_put_aside(made):
    for uid in ("1.1", "1.2"):
        made.put_out(b"1", uid)
    node = make_node(made, None, FakeDestination(RefusedError("not wanted"), None))
    assert node.send_next() and node.send_next()
    assert (made.quarantined / "1.1" / spool.REASON).read_text() == "not wanted\n"
    assert (made.quarantined / "1.1" / "1.1.dcm").read_bytes() == b"1"
    assert made.counts()["outgoing"] == 0


def received(event) -> pydicom.Dataset:
    """A dataset that has come, whole."""
    dataset = event.dataset
    dataset.file_meta = event.file_meta
    return dataset


@contextlib.contextmanager
def storing(status=0x0000, contexts=(ComputedRadiographyImageStorage,), title="PACS"):
    """A peer that takes images: its port, and what it took."""
    taken = []

    def on_store(event):
        taken.append(received(event))
        return status

    entity = AE(title)
    for context in contexts:
        entity.add_supported_context(context, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    entity.require_called_aet = True
    handlers = [(evt.EVT_C_STORE, on_store)]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    try:
        yield server.socket.getsockname()[1], taken
    finally:
        server.shutdown()


def store_at(port, title="PACS"):
    return send.parse_destination(f"{title}@127.0.0.1:{port}", "UNET", None)


@pytest.mark.parametrize("status", [0x0000, 0x0111, 0xB000])
def test_it_is_sent_by_c_store(tmp_path, status):
    make_seg(tmp_path / "seg.dcm")
    with storing(status) as (port, taken):
        store_at(port).send(tmp_path / "seg.dcm")
    assert taken[0].SOPInstanceUID == pydicom.dcmread(tmp_path / "seg.dcm").SOPInstanceUID


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (0xA700, AwayError, "PACS answers with status 0xA700"),  # its disk is full
        (0x0124, AwayError, "status 0x0124"),  # its operator has not allowed this node yet
        (0xA900, RefusedError, "PACS refuses it with status 0xA900"),
        (0x0106, RefusedError, "refuses it with status 0x0106"),
        (0xC000, RefusedError, "refuses it with status 0xC000"),
    ],
)
def test_what_a_peer_answers(tmp_path, status, error, message):
    make_seg(tmp_path / "seg.dcm")
    with storing(status) as (port, _), pytest.raises(error, match=message):
        store_at(port).send(tmp_path / "seg.dcm")


def test_a_peer_that_is_not_there_or_does_not_want_us(tmp_path):
    make_seg(tmp_path / "seg.dcm")
    with pytest.raises(AwayError, match="PACS does not answer"):
        store_at(free_port()).send(tmp_path / "seg.dcm")
    with storing() as (port, _), pytest.raises(AwayError, match="OTHER rejects this node"):
        store_at(port, "OTHER").send(tmp_path / "seg.dcm")
    with (
        storing(contexts=[Verification]) as (port, _),
        pytest.raises(RefusedError, match="PACS takes no Computed Radiography Image Storage"),
    ):
        store_at(port).send(tmp_path / "seg.dcm")


@contextlib.contextmanager
def answering(status, body=b"", asked=None, headers=()):
    """A web server with one answer to a POST: its URL. A GET is well answered."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if asked is not None:
                asked.append((self.headers["Content-Type"], content))
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/studies"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_it_is_sent_by_stow(tmp_path):
    content, asked = make_seg(tmp_path / "seg.dcm"), []
    with answering(200, asked=asked) as url:
        send.parse_destination(url, "UNET", None).send(tmp_path / "seg.dcm")
    assert 'type="application/dicom"' in asked[0][0] and content in asked[0][1]
    for status, error in (
        (409, RefusedError),
        (413, RefusedError),
        (503, AwayError),
        (401, AwayError),
    ):
        with answering(status) as url, pytest.raises(error, match=f"answers {status}"):
            send.parse_destination(url, "UNET", None).send(tmp_path / "seg.dcm")
    for status in (301, 302, 303, 307, 308):
        moved = answering(status, headers=[("Location", "/login")])
        with moved as url, pytest.raises(AwayError, match=f"answers {status}"):
            send.Stow(url).send(tmp_path / "seg.dcm")
    with pytest.raises(AwayError, match="does not answer"):
        send.Stow(f"http://127.0.0.1:{free_port()}").send(tmp_path / "seg.dcm")


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "text", ["PACS", "PACS@host", "PACS@host:0", "a" * 17 + "@h:1", "", "ftp://x"]
)
def test_a_destination_that_is_none(text):
    with pytest.raises(UserError, match="send-to is .*; expected TITLE@HOST:PORT"):
        send.parse_destination(text, "UNET", None)


def test_callers():
    assert parse_callers("CT1@192.0.2.7, CT2") == [("CT1", "192.0.2.7"), ("CT2", "")]
    with pytest.raises(UserError, match="allow has '@192.0.2.7'; expected TITLE@ADDRESS"):
        parse_callers("@192.0.2.7")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "0.0.0.0"}, "expected --allow, or anybody there may send"),
        ({"host": "0.0.0.0", "allow": "CT1"}, "expected --tls-cert and --tls-key, or --insecure"),
        ({"tls_cert": "c.pem"}, "tls_cert and tls_key belong together"),
        ({"client_ca": "c.pem"}, "client_ca needs TLS"),
        ({"ae_title": "x" * 17}, "expected 1 to 16 characters"),
        ({"retry_s": 0}, "retry_s is 0; expected above 0"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        check_config(Config("PACS@127.0.0.1:104", **fields))
    check_config(Config("PACS@127.0.0.1:104", host="0.0.0.0", allow="CT1", insecure=True))
    with pytest.raises(UserError, match="certificates cannot be read"):
        make_tls(Config("PACS@127.0.0.1:104", tls_cert="/no", tls_key="/such"))


# ------------------------------------------------------------------------- the node as it is run


class RunningNode:
    """A node in a process of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "dicom_node", "--port", "0", "--complete-after-s", "0.5"]
        command += ["--retry-s", "0.5", "--spool", str(folder / "spool"), *flags]
        self.log = (folder / "node.log").open("ab")
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        line = self.process.stdout.readline()
        assert " sends to " in line, (folder / "node.log").read_text()
        self.port = int(line.split()[0].rpartition(":")[2])
        self.spool = folder / "spool"
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def store(self, path: Path, title="CT1", tls=None) -> int | None:
        """Send a file as a scanner does; the status, None if the node does not want it."""
        header = pydicom.dcmread(path)
        entity = AE(title)
        entity.add_requested_context(header.SOPClassUID, header.file_meta.TransferSyntaxUID)
        tls_args = (tls, "localhost") if tls else None
        found = entity.associate("127.0.0.1", self.port, ae_title="UNET", tls_args=tls_args)
        if not found.is_established:
            return None
        try:
            status = found.send_c_store(header)
        except RuntimeError:  # cut off
            return None
        found.release()
        return status.get("Status")

    def stop(self, number=signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.log.close()
        return code


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    running = Running(ROOT / "files" / "lungs", tmp_path_factory.mktemp("node-service"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def xray(phantoms, tmp_path_factory):
    pair = data.find_pairs(phantoms)[0][0]
    path = tmp_path_factory.mktemp("xray") / "xray.dcm"
    write_xray(path, formats.read_image(pair.image)[..., 0])
    return path, read_truth(pair, Classes("lungs")).mask[0]


def address_of(service) -> str:
    return str(service.client.base_url)


def test_an_xray_comes_and_its_segmentation_goes_on(service, xray, tmp_path):
    path, truth = xray
    with storing(contexts=[SegmentationStorage]) as (port, taken):
        destination = f"PACS@127.0.0.1:{port}"
        flags = ("--send-to", destination, "--service", address_of(service), "--allow", "CT1")
        node = RunningNode(tmp_path, *flags, "--metrics-port", str(metrics_port := free_port()))
        try:
            assert node.store(path, "STRANGER") is None
            assert node.store(path) == 0
            wait_for(lambda: taken)
            seg = taken[0]
            source = pydicom.dcmread(path)
            referred = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
            assert referred.ReferencedSOPInstanceUID == source.SOPInstanceUID
            assert seg.StudyInstanceUID == source.StudyInstanceUID and seg.PatientID == "7"
            assert metrics.score_mask(truth, seg.pixel_array.squeeze())["dice"] > 0.9
            # Sent once more, it is the same object.
            assert node.store(path) == 0
            wait_for(lambda: len(taken) == 2)
            assert taken[1].SOPInstanceUID == seg.SOPInstanceUID
            wait_for(lambda: not list(node.spool.glob("*/*")))
            url = f"http://127.0.0.1:{metrics_port}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                shown = answer.read().decode()
            assert 'unet_node_done_total{what="sent"} 2.0' in shown
            assert 'unet_node_spool{folder="quarantine"} 0.0' in shown
        finally:
            assert node.stop() == 0


def test_a_report_and_a_picture_go_with_it(service, xray, tmp_path):
    path, _ = xray
    contexts = [SegmentationStorage, ComprehensiveSRStorage, SecondaryCaptureImageStorage]
    with storing(contexts=contexts) as (port, taken):
        flags = ("--send-to", f"PACS@127.0.0.1:{port}", "--service", address_of(service))
        node = RunningNode(tmp_path, *flags, "--also", "report,overlay", "--allow", "CT1")
        try:
            assert node.store(path) == 0
            wait_for(lambda: len(taken) == 3)
        finally:
            node.stop()
    assert sorted(one.SOPClassUID for one in taken) == sorted(contexts)
    assert len({one.StudyInstanceUID for one in taken}) == 1
    (seg,) = [one for one in taken if one.Modality == "SEG"]
    (report,) = [one for one in taken if one.Modality == "SR"]
    assert seg.SOPInstanceUID in str(report)
    area_mm2 = seg.pixel_array.sum() * 0.7 * 0.7
    assert f"{area_mm2:.6g}"[:5] in str(report) and "Predicted Dice" in str(report)


def test_nothing_is_lost_by_kills_or_while_others_are_away(service, xray, tmp_path):
    path, _ = xray
    port, away = free_port(), f"http://127.0.0.1:{free_port()}"
    flags = ("--send-to", f"PACS@127.0.0.1:{port}", "--allow", "CT1@127.0.0.1")
    node = RunningNode(tmp_path, *flags, "--service", away)
    assert node.store(path) == 0
    node.stop(signal.SIGKILL)
    assert len(list(node.spool.glob("*/*/*.dcm"))) == 1
    # The service is there again, the destination is not.
    node = RunningNode(tmp_path, *flags, "--service", address_of(service))
    wait_for(lambda: list(node.spool.glob("outgoing/*.dcm")))
    node.stop(signal.SIGKILL)
    taken = []

    def on_store(event):
        taken.append(received(event))
        return 0

    entity = AE("PACS")
    entity.add_supported_context(SegmentationStorage, ExplicitVRLittleEndian)
    node = RunningNode(tmp_path, *flags, "--service", away)
    server = entity.start_server(
        ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, on_store)]
    )
    try:
        wait_for(lambda: taken)
        wait_for(lambda: not list(node.spool.glob("*/*")))
        assert len(taken) == 1
    finally:
        server.shutdown()
        assert node.stop() == 0


def test_a_caller_from_another_address_is_cut_off(xray, tmp_path):
    node = RunningNode(tmp_path, "--send-to", "PACS@127.0.0.1:104", "--allow", "CT1@192.0.2.7")
    try:
        assert node.store(xray[0]) is None
        assert not list(node.spool.glob("*/*"))
    finally:
        node.stop()


def test_it_takes_tls_only(xray, tmp_path):
    """Callers show a certificate of the authority that the node knows."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    node = RunningNode(
        tmp_path,
        *("--send-to", "PACS@127.0.0.1:104", "--allow", "CT1"),
        *("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")),
        *("--client-ca", str(tmp_path / "ca.pem")),
    )
    try:
        assert node.store(xray[0]) is None
        context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        assert node.store(xray[0], tls=context) is None
        authority.issue_cert("client").configure_cert(context)
        assert node.store(xray[0], tls=context) == 0
    finally:
        node.stop()


def dcmtk(name: str) -> str:
    """The path of one of dcmtk's tools. Required in CI, else the test is skipped."""
    if not shutil.which(name):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {name}: apt-get install dcmtk")
    return shutil.which(name)


@pytest.mark.slow
def test_dcmtks_tools_on_both_sides(service, xray, tmp_path):
    """A CT series of four slices and an X-ray go in; the X-ray's segmentation comes out."""
    port, taken = free_port(), tmp_path / "taken"
    taken.mkdir()
    storescp = subprocess.Popen([dcmtk("storescp"), "-aet", "PACS", "-od", taken, str(port)])
    flags = ("--send-to", f"PACS@127.0.0.1:{port}", "--service", address_of(service))
    node = RunningNode(tmp_path, *flags, "--allow", "CT1@127.0.0.1")
    peer = ["-aet", "CT1", "-aec", "UNET", "127.0.0.1", str(node.port)]
    try:
        subprocess.run([dcmtk("echoscu"), *peer], check=True)
        write_series(tmp_path / "series")
        files = [xray[0], *sorted((tmp_path / "series").iterdir())]
        subprocess.run([dcmtk("storescu"), *peer, *files], check=True)
        wait_for(lambda: len(list(taken.iterdir())) == 2)
        found = [pydicom.dcmread(path) for path in taken.iterdir()]
        counts = [len(one.ReferencedSeriesSequence[0].ReferencedInstanceSequence) for one in found]
        assert {one.Modality for one in found} == {"SEG"} and max(counts) > 1
        wait_for(lambda: not list(node.spool.glob("*/*")))
    finally:
        node.stop()
        storescp.terminate()
        storescp.wait(10)


@pytest.mark.slow
@pytest.mark.parametrize("by_stow", [False, True])
def test_an_orthanc_on_both_sides(service, xray, pacs, tmp_path, by_stow):
    """Orthanc sends an X-ray to the node and gets its segmentation back."""
    with ask_orthanc(pacs, "system") as answer:
        system = json.load(answer)
    title, port = system["DicomAet"], system["DicomPort"]
    stow = f"{pacs}/dicom-web/studies"
    destination = stow if by_stow else f"{title}@127.0.0.1:{port}"
    flags = ("--send-to", destination, "--service", address_of(service), "--allow", title)
    node = RunningNode(tmp_path, *flags, "--also", "report,overlay")
    try:
        unet = {"AET": "UNET", "Host": "127.0.0.1", "Port": node.port}
        ask_orthanc(pacs, "modalities/unet", json.dumps(unet).encode(), "PUT").close()
        ask_orthanc(pacs, "modalities/unet/echo", b"{}").close()
        header = pydicom.dcmread(xray[0])
        header.StudyInstanceUID = header.SeriesInstanceUID = pydicom.uid.generate_uid()
        header.SOPInstanceUID = pydicom.uid.generate_uid()
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        header.save_as(tmp_path / "own.dcm")
        with ask_orthanc(pacs, "instances", (tmp_path / "own.dcm").read_bytes()) as answer:
            stored = json.load(answer)
        ask_orthanc(pacs, "modalities/unet/store", stored["ID"].encode()).close()

        def modalities() -> list[str]:
            with ask_orthanc(pacs, f"studies/{stored['ParentStudy']}/series") as answer:
                return sorted(one["MainDicomTags"]["Modality"] for one in json.load(answer))

        wait_for(lambda: modalities() == ["CR", "OT", "SEG", "SR"])
        wait_for(lambda: not list(node.spool.glob("*/*")))
    finally:
        node.stop()


def ask_orthanc(address: str, path: str, content: bytes | None = None, method: str | None = None):
    request = urllib.request.Request(f"{address}/{path}", content, method=method)
    return urllib.request.urlopen(request, timeout=30)
