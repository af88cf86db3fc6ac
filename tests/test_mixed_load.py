"""An hour of a hospital's traffic, compressed: good, bad, slow and huge requests, jobs and DICOM,
while the service is killed, the model swapped, a key rotated and the destination away.

UNET_LOAD_S says for how many seconds (60).
"""

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from pathlib import Path

import cv2
import httpx
import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import SegmentationStorage
from test_dicom_node import RunningNode, wait_for
from test_pacs import write_xray
from test_repository import add, write_aliases
from test_serve import Running, free_port, write_keys

from dataset.phantoms import draw_phantom

SECONDS = float(os.environ.get("UNET_LOAD_S", "60"))
MAX_GROWTH_KIB = 400 * 1024  # of the service's memory after the first quarter


def memory_kib(pid: int) -> int:
    """Memory of a process and its children, in KiB."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
            if int(path.parent.name) == pid or int(lines["PPid"]) == pid:
                total += int(lines.get("VmRSS", "0 kB").split()[0])
    return total


class Load:
    """The service with its flags, the clients' threads, and what they saw."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.port = folder, folder / "models", free_port()
        add(self.root, "lungs/1", "lungs/2")
        write_aliases(self.root, default="lungs")
        self.keys = write_keys(folder / "keys", old="viewer", boss="operator admin,metrics,segment")
        self.key, self.stop = "old", threading.Event()
        self.wrong, self.counts, self.jobs = [], {}, []
        self.start_service()
        picture, _ = draw_phantom(np.random.default_rng(0))
        self.picture = picture[..., 0] if picture.ndim == 3 else picture
        self.good = cv2.imencode(".png", self.picture)[1].tobytes()
        huge = cv2.resize(self.picture, (5600, 5600))
        self.huge = cv2.imencode(".png", huge)[1].tobytes()
        self.expected = self.ask("/v1/segment", self.good).content

    def start_service(self) -> None:
        flags = ("--model", str(self.root), "--keys", self.keys)
        flags += ("--jobs", str(self.folder / "jobs.db"), "--precision", "float32")
        self.service = Running(self.root, self.folder, *flags, port=self.port)

    def ask(self, path: str, content: bytes | None = None, **more) -> httpx.Response:
        method = "GET" if content is None else "POST"
        url = f"http://127.0.0.1:{self.port}{path}"
        headers = {"X-API-Key": self.key}
        return httpx.request(method, url, content=content, headers=headers, timeout=120, **more)

    def repeat(self, what: str, step) -> threading.Thread:
        """Do a step again and again; what it returns is counted, what it finds wrong is kept."""

        def run() -> None:
            while not self.stop.is_set():
                try:
                    seen = step()
                except httpx.TransportError:
                    # The service may be gone, or have gone while this request was under way.
                    seen = "no answer"
                    time.sleep(0.2)
                except AssertionError as error:
                    self.wrong.append(f"{what}: {error}")
                    return
                self.counts[what, seen] = self.counts.get((what, seen), 0) + 1

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def send_good(self) -> int:
        answer = self.ask("/v1/segment", self.good)
        assert answer.status_code in (200, 503), answer.text
        assert answer.status_code == 503 or answer.content == self.expected, "another mask"
        return answer.status_code

    def send_bad(self) -> int:
        answer = self.ask("/v1/segment", self.good[:-100] if time.time() % 2 < 1 else b"x" * 999)
        assert answer.status_code in (400, 413, 503), answer.text
        return answer.status_code

    def send_huge(self) -> int:
        answer = self.ask("/v1/segment", self.huge)
        assert answer.status_code in (200, 503), answer.text
        self.stop.wait(3)
        return answer.status_code

    def send_job(self) -> int:
        answer = self.ask("/v1/jobs", self.good)
        assert answer.status_code in (202, 503), answer.text
        if answer.status_code == 202:
            self.jobs.append(answer.json()["id"])
        self.stop.wait(1)
        return answer.status_code

    def dawdle(self) -> str:
        """Send half a header and wait."""
        with contextlib.suppress(OSError):
            one = socket.create_connection(("127.0.0.1", self.port), 5)
            with one:
                one.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
                one.settimeout(15)
                one.recv(100)
        return "cut off"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_mixed_load_loses_nothing(tmp_path):
    load, taken, sent = Load(tmp_path), [], []
    destination = free_port()
    (tmp_path / "node_key").write_text("old")
    node = RunningNode(
        tmp_path,
        *("--send-to", f"PACS@127.0.0.1:{destination}", "--allow", "CT1"),
        *("--service", f"http://127.0.0.1:{load.port}", "--key", str(tmp_path / "node_key")),
    )
    numbers = itertools.count()

    def send_dicom() -> int | None:
        path = tmp_path / f"{next(numbers)}.dcm"
        write_xray(path, load.picture)
        header = pydicom.dcmread(path)
        header.SeriesInstanceUID = generate_uid()
        header.save_as(path)
        status = node.store(path)
        assert status == 0, status
        sent.append(header.SOPInstanceUID)
        load.stop.wait(2)
        return status

    def on_store(event) -> int:
        found = event.dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
        taken.append(found.ReferencedSOPInstanceUID)
        return 0

    steps = {
        "good": load.send_good,
        "also good": load.send_good,
        "bad": load.send_bad,
        "huge": load.send_huge,
        "job": load.send_job,
        "slow": load.dawdle,
        "also slow": load.dawdle,
        "DICOM": send_dicom,
    }
    threads = [load.repeat(what, step) for what, step in steps.items()]
    server, quarter = None, SECONDS / 4
    try:
        time.sleep(quarter)
        # The model is swapped, and another key is known beside the old one.
        write_aliases(load.root, default="lungs", lungs="lungs/1")
        load.keys = write_keys(
            tmp_path / "keys", old="viewer", new="viewer", boss="operator admin,metrics,segment"
        )
        load.service.process.send_signal(signal.SIGHUP)
        wait_for(lambda: load.ask("/v1/model").json()["version"] == "1")
        load.key = "new"
        before = memory_kib(load.service.process.pid)
        time.sleep(quarter)
        after = memory_kib(load.service.process.pid)
        log = (tmp_path / "log").read_text()
        load.service.process.kill()
        load.service.process.wait()
        load.start_service()
        entity = AE("PACS")
        entity.add_supported_context(SegmentationStorage, ExplicitVRLittleEndian)
        time.sleep(quarter)
        server = entity.start_server(
            ("127.0.0.1", destination), block=False, evt_handlers=[(evt.EVT_C_STORE, on_store)]
        )
        time.sleep(quarter)
        load.stop.set()
        for thread in threads:
            thread.join(60)
        assert not load.wrong
        wait_for(lambda: set(taken) == set(sent), 120)
        wait_for(lambda: not list(node.spool.glob("*/*")))
        assert sorted(set(taken)) == sorted(sent) and len(sent) > 2
        states = {}
        for job in load.jobs:
            wait_for(lambda job=job: load.ask(f"/v1/jobs/{job}").json()["state"] == "done", 120)
            states[job] = load.ask(f"/v1/jobs/{job}/result").content == load.expected
        assert states and all(states.values())
        assert after - before < MAX_GROWTH_KIB, f"{before} KiB, later {after}"
    finally:
        load.stop.set()
        node.stop()
        if server:
            server.shutdown()
        load.service.stop()
    print(load.counts)
    assert load.counts["good", 200] > 10 and load.counts["bad", 400] > 0
    log += (tmp_path / "log").read_text()
    assert '"status":500' not in log and '"error"' not in log
