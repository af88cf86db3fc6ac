"""Serve a model: `python serve.py` offers export/unet.onnx over HTTP on this machine (run `python export.py` first).

    POST /v1/segment                 an image file → its mask: PNG, or by Accept JSON (COCO RLE), GeoJSON, DICOM SEG
    GET  /v1/model                   what is served
    POST /v2/models/unet/infer       Open Inference Protocol v2, JSON and binary tensors (clients of Triton, KServe)
    POST /v1/models/unet:predict     TensorFlow Serving's REST
    POST /invocations, GET /ping     SageMaker; Vertex AI's routes follow its variables AIP_PREDICT_ROUTE and so on
    GET  /                           a page to drop an image on
    GET  /livez, /readyz, /metrics   for orchestrators and Prometheus

Needs `pip install -r requirements-serve.txt`. Nothing is stored, and nothing of an image or its name is logged.
"""

import asyncio
import ipaddress
import signal
import socket
import ssl
from dataclasses import dataclass
from typing import Any

import uvicorn

import utils
from serving.app import Service, make_app
from utils import UserError

if __name__ == "__main__":
    utils.require("fastapi", "requirements-serve.txt")


@dataclass(frozen=True)
class Config:
    """How the service runs."""

    model: str = "export/unet.onnx"  # beside its manifest.json
    host: str = "127.0.0.1"  # another address needs keys and TLS
    port: int = 8080
    keys: str = ""  # file with a line per API key: its SHA-256 in hex
    tls_cert: str = ""  # PEM files for HTTPS
    tls_key: str = ""
    client_ca: str = ""  # PEM file: only clients with a certificate of this authority are let in
    insecure: bool = (
        False  # serve other addresses without keys or TLS: behind a proxy that has both
    )
    max_body_mb: float = 64  # of a request, in 2**20 bytes
    max_megapixels: float = 32  # of an image, in 2**20; fewer where a model has more than one class
    workers: int = 2  # processes that decode images and write masks; each may take 32 bytes a pixel of the largest
    max_batch: int = 8  # images that are computed together, and at most in one tensor request
    room: int = 64  # requests at a time; more are answered 503
    timeout_s: float = 30  # for a request, then 504
    engine: str = (
        "auto"  # onnxruntime or openvino; auto is openvino where the next line gives bfloat16
    )
    precision: str = "auto"  # float32, bfloat16, int8; auto is bfloat16 where OpenVINO is and manifest and CPU allow
    threads: int = 0  # of an inference; 0 takes every core
    drain_s: float = 5  # after SIGTERM /readyz says 503 for so long before connections are refused


def check_config(config: Config) -> None:
    """Raise UserError for what would be unsafe or cannot work."""
    if config.threads < 0 or config.drain_s < 0:
        raise UserError(
            f"threads is {config.threads}, drain_s {config.drain_s}; expected 0 or more"
        )
    for name in ("max_body_mb", "max_megapixels", "workers", "max_batch", "room", "timeout_s"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} is {getattr(config, name)}; expected above 0")
    if bool(config.tls_cert) != bool(config.tls_key) or (config.client_ca and not config.tls_cert):
        raise UserError("--tls-cert and --tls-key belong together, and --client-ca needs both")
    try:
        local = config.host == "localhost" or ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        local = False
    if not local and not config.insecure and not (config.keys and config.tls_cert):
        raise UserError(
            f"host {config.host} is open to others; expected --keys and --tls-cert, or --insecure behind a proxy"
        )


class Server(uvicorn.Server):
    """Uvicorn that says "not ready" for a while before it refuses connections."""

    def __init__(self, settings: uvicorn.Config, service: Service) -> None:
        super().__init__(settings)
        self.service, self.by_hand = service, False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Note whether a person ends it."""
        self.by_hand = sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Drain: load balancers notice /readyz first."""
        print("stopping; what has begun is finished", flush=True)
        self.service.ready = False
        if not self.by_hand:
            await asyncio.sleep(self.service.config.drain_s)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address. Raises UserError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        told = f"{host} port {port} cannot be listened on ({error})"
        raise UserError(f"{told}; stop what listens there, or give another --port") from None
    # Its connections take this over; else an answer's body would wait for the header's receipt, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises UserError."""
    check_config(config)
    app = make_app(config)
    tls = (
        {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key} if config.tls_cert else {}
    )
    if config.client_ca:
        tls |= {"ssl_ca_certs": config.client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    settings = uvicorn.Config(
        app,
        config.host,
        config.port,
        access_log=False,
        server_header=False,
        log_level="warning",
        timeout_keep_alive=75,  # longer than a proxy's, or it would ask on a connection that is just closed
        **tls,
    )
    try:
        settings.load()
    except OSError as error:  # an SSLError is one
        raise UserError(
            f"--tls-cert, --tls-key or --client-ca cannot be read as PEM ({error})"
        ) from None
    listener = listen(config.host, config.port)
    kind = f"{app.state.service.network.engine}, {app.state.service.network.precision}"
    host, port = (
        f"[{config.host}]" if ":" in config.host else config.host,
        listener.getsockname()[1],
    )
    print(
        f"http{'s' if tls else ''}://{host}:{port} serves {config.model} ({kind}); Ctrl-C ends it",
        flush=True,
    )
    Server(settings, app.state.service).run([listener])


if __name__ == "__main__":
    utils.run_script(serve, Config)
