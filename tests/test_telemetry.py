"""OpenTelemetry: traces and metrics come when they are asked for, and tell nothing of a patient."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
from conftest import ROOT
from test_serve import Running

pytestmark = pytest.mark.slow


@pytest.fixture
def collector():
    """A server that takes what is exported: its URL, and path → bodies."""
    taken: dict[str, list[bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.setdefault(self.path, []).append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", taken
    server.shutdown()


def test_requests_are_traced_and_counted_without_what_a_client_wrote(
    collector, tmp_path, monkeypatch
):
    url, taken = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
    service = Running(ROOT / "files" / "lungs", tmp_path)
    png = cv2.imencode(".png", np.zeros((64, 64), np.uint8))[1].tobytes()
    try:
        answer = service.client.post("/v1/segment?patient=Meier", content=png)
        assert answer.status_code == 200
        assert service.client.get("/Meier").status_code == 404
        assert service.client.post("/v1/segment", content=b"Meier").status_code == 400
        end = time.monotonic() + 30
        while not {"/v1/traces", "/v1/metrics"} <= set(taken):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        service.stop()  # what is left is exported
    traces, metrics = (b"".join(taken[path]) for path in ("/v1/traces", "/v1/metrics"))
    assert b"/v1/segment" in traces and b"http.server.request.duration" in metrics
    assert b"Meier" not in traces + metrics and b"url.query" not in traces
    assert set(taken) == {"/v1/traces", "/v1/metrics"}


def test_nothing_is_exported_unasked(collector, tmp_path):
    service = Running(ROOT / "files" / "lungs", tmp_path)
    try:
        assert service.client.get("/v1/model").status_code == 200
    finally:
        service.stop()
    assert not collector[1]
