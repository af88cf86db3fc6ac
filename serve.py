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
import contextlib
import ipaddress
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli

if __name__ == "__main__":
    cli.require("fastapi", "requirements-serve.txt")

import fastapi
import numpy as np
import uvicorn
from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse

from images import UserError
from serving import engine, guard, masks, schema, tensors
from serving.problems import Problem
from serving.workers import Workers

VERSION = "1"
ANSWERS = ("image/png", "application/json", "application/geo+json", "application/dicom")
OPEN = (
    "/",
    "/app.js",
    "/style.css",
    "/livez",
    "/readyz",
    "/ping",
    "/v2/health/live",
    "/v2/health/ready",
)  # no key, never refused


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
    insecure: bool = False  # serve other addresses without keys or TLS: behind a proxy that has both
    max_body_mb: float = 64  # of a request, in 2**20 bytes
    max_megapixels: float = 32  # of an image, in 2**20; fewer where a model has more than one class
    workers: int = 2  # processes that decode images and write masks; each may take 32 bytes a pixel of the largest
    max_batch: int = 8  # images that are computed together, and at most in one tensor request
    room: int = 64  # requests at a time; more are answered 503
    timeout_s: float = 30  # for a request, then 504
    engine: str = "auto"  # onnxruntime or openvino; auto is openvino where the next line gives bfloat16
    precision: str = "auto"  # float32, bfloat16, int8; auto is bfloat16 where OpenVINO is and manifest and CPU allow
    threads: int = 0  # of an inference; 0 takes every core
    drain_s: float = 5  # after SIGTERM /readyz says 503 for so long before connections are refused


def check_config(config: Config) -> None:
    """Raise UserError for what would be unsafe or cannot work."""
    if config.threads < 0 or config.drain_s < 0:
        raise UserError(f"threads is {config.threads}, drain_s {config.drain_s}; expected 0 or more")
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


class Service:
    """A loaded network, its batcher, and whether it takes requests."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.network, run = engine.load(Path(config.model), config.threads, config.engine, config.precision)
        self.metrics = guard.Metrics(self.network.sha256)
        self.batcher = engine.Batcher(run, config.max_batch, config.room, self.metrics.batch)
        self.workers = Workers(config.workers, int(config.max_megapixels * 2**20))
        self.ready = False

    async def start(self) -> None:
        """Start the workers and run the network once; from then on the service is ready."""
        self.batcher.start()
        self.workers.start()
        await asyncio.gather(*(self.workers(os.getpid) for _ in range(self.config.workers)))  # until they answer
        await self.batcher(np.zeros((1, *self.network.input_shape), np.float32))
        self.ready = True

    async def stop(self) -> None:
        """Finish what has begun."""
        self.ready = False
        await self.batcher.stop()
        self.workers.stop()

    async def segment(self, content: bytes, kind: str) -> Response:
        """Find the mask of an image file."""
        prepared = await self.workers(self.network.read, content)
        probs = await self.batcher(prepared.batch)
        source = content if kind == "application/dicom" else b""
        body, headers, share, sure = await self.workers(masks.answer, self.network, probs, prepared, kind, source)
        self.metrics.seen(float(prepared.batch.mean()), share, sure)
        return Response(body, media_type=kind, headers=headers)


def choose_answer(accept: str) -> str:
    """Choose the answer's kind by the header Accept, in its order. Raises Problem 406."""
    for part in accept.split(","):
        kind = part.partition(";")[0].strip().lower()
        if kind in ANSWERS:
            return kind
        if kind in ("*/*", "image/*", ""):
            return ANSWERS[0]
    raise Problem(406, f"expected Accept to be one of {', '.join(ANSWERS)}")


async def read_image(request: Request) -> bytes:
    """Read the image file from a raw body, or from the only file of a form. Raises Problem."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return await request.body()
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=0)
    parser.spool_max_size = 2**62  # keeps files in memory: none on the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError):
        raise Problem(400, "a malformed form; expected one file") from None
    files = [value for value in form.values() if not isinstance(value, str)]
    if len(files) != 1:
        raise Problem(400, f"{len(files)} files in the form; expected one")
    return await files[0].read()


def page(name: str) -> Callable[[], Response]:
    """Make the route of a file in web/."""

    def get() -> Response:
        return FileResponse(Path(__file__).with_name("web") / name)

    return get


def make_app(config: Config) -> fastapi.FastAPI:
    """Build the application. Raises UserError if the model cannot be loaded."""
    service = Service(config)
    network = service.network

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = fastapi.FastAPI(title="U-Net segmentation", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        told = "no such route, or not with this method; GET /openapi.json lists them"
        raise Problem(error.status_code, told, **(error.headers or {}))

    async def segment(request: Request) -> Response:
        kind = choose_answer(request.headers.get("accept", ""))
        return await service.segment(await read_image(request), kind)

    async def infer(request: Request) -> Response:
        length = request.headers.get("inference-header-content-length")
        content = await request.body()
        asked = await service.workers(tensors.read_request, content, length, network, config.max_batch)
        probs = await service.batcher(asked.batch)
        body, headers = await service.workers(tensors.write_answer, probs, asked, network, VERSION)
        return Response(body, headers=headers)

    async def predict(request: Request) -> Response:
        content = await request.body()
        batch, by_row = await service.workers(tensors.read_instances, content, network, config.max_batch)
        probs = await service.batcher(batch)
        return Response(await service.workers(tensors.write_predictions, probs, by_row), media_type="application/json")

    def model() -> dict[str, Any]:
        shown = ("classes", "image_size", "channels", "preparation", "threshold", "window", "mirror")
        return {"name": tensors.MODEL, "version": VERSION, "sha256": network.sha256} | {
            name: network.facts[name] for name in shown if name in network.facts
        }

    def live() -> dict[str, bool]:
        return {"live": True}

    def ready() -> dict[str, bool]:
        if not service.ready:
            raise Problem(503, "not ready", Retry_After="1")
        return {"ready": True}

    def server() -> dict[str, Any]:
        return {"name": "unet", "version": VERSION, "extensions": ["binary_tensor_data"]}

    def metadata() -> dict[str, Any]:
        return tensors.metadata(network, VERSION)

    def configuration() -> dict[str, Any]:
        return tensors.config(network, config.max_batch)

    def status() -> dict[str, Any]:
        state = {"version": VERSION, "state": "AVAILABLE" if service.ready else "LOADING"}
        return {"model_version_status": [state | {"status": {"error_code": "OK", "error_message": ""}}]}

    def metrics() -> Response:
        return Response(service.metrics.exposition(service.batcher.pending), media_type="text/plain; version=0.0.4")

    here = f"/v2/models/{tensors.MODEL}"
    for path, method, call in (
        ("/v1/segment", "POST", segment),
        ("/invocations", "POST", segment),
        ("/v1/model", "GET", model),
        ("/livez", "GET", live),
        ("/readyz", "GET", ready),
        ("/ping", "GET", ready),
        ("/metrics", "GET", metrics),
        ("/v2", "GET", server),
        ("/v2/health/live", "GET", live),
        ("/v2/health/ready", "GET", ready),
        (here, "GET", metadata),
        (f"{here}/config", "GET", configuration),
        (f"{here}/ready", "GET", ready),
        (f"{here}/infer", "POST", infer),
        (f"{here}/versions/{VERSION}", "GET", metadata),
        (f"{here}/versions/{VERSION}/ready", "GET", ready),
        (f"{here}/versions/{VERSION}/infer", "POST", infer),
        (f"/v1/models/{tensors.MODEL}", "GET", status),
        (f"/v1/models/{tensors.MODEL}:predict", "POST", predict),
        (os.environ.get("AIP_HEALTH_ROUTE", ""), "GET", ready),
        (os.environ.get("AIP_PREDICT_ROUTE", ""), "POST", predict),
    ):
        if path:
            app.add_api_route(path, call, methods=[method], response_model=None, **schema.describe(call.__name__))
    for name in ("index.html", "app.js", "style.css"):
        route = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(route, page(name), methods=["GET"], response_model=None, include_in_schema=False)
    open_paths = (*OPEN, os.environ.get("AIP_HEALTH_ROUTE") or "/livez")
    keys = guard.read_keys(Path(config.keys)) if config.keys else None
    app.add_middleware(
        guard.Guard,
        metrics=service.metrics,
        keys=keys,
        open_paths=open_paths,
        max_body=int(config.max_body_mb * 2**20),
        room=config.room,
        timeout_s=config.timeout_s,
    )
    return app


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
    tls = {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key} if config.tls_cert else {}
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
        raise UserError(f"--tls-cert, --tls-key or --client-ca cannot be read as PEM ({error})") from None
    listener = listen(config.host, config.port)
    kind = f"{app.state.service.network.engine}, {app.state.service.network.precision}"
    host, port = f"[{config.host}]" if ":" in config.host else config.host, listener.getsockname()[1]
    print(f"http{'s' if tls else ''}://{host}:{port} serves {config.model} ({kind}); Ctrl-C ends it", flush=True)
    Server(settings, app.state.service).run([listener])


if __name__ == "__main__":
    cli.run(serve, Config)
