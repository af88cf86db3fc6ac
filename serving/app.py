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
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import fastapi
import numpy as np
from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse

from imaging import pictures
from inference.exported_model import load_exported
from serving import middleware, openapi, responses, tensor_protocols, workers
from serving.batching import Batcher
from serving.errors import Problem
from utils import ROOT

VERSION = "1"
ANSWERS = ("image/png", "application/json", "application/geo+json", "application/dicom")
PUBLIC_PATHS = (
    "/",
    "/app.js",
    "/style.css",
    "/livez",
    "/readyz",
    "/ping",
    "/v2/health/live",
    "/v2/health/ready",
)  # no key, never refused


class Service:
    """A loaded network, its batcher, and whether it takes requests."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.network, run = load_exported(
            Path(config.model), config.threads, config.engine, config.precision
        )
        self.metrics = middleware.Metrics(self.network.sha256)
        self.batcher = Batcher(run, config.max_batch, config.room, self.metrics.batch)
        max_pixels = int(config.max_megapixels * 2**20)
        self.max_bytes = pictures.BYTES_PER_PIXEL * max_pixels
        self.workers = workers.Workers(config.workers, max_pixels)
        self.ready = False

    async def start(self) -> None:
        """Start the workers and run the network once; from then on the service is ready."""
        self.batcher.start()
        self.workers.start()
        await asyncio.gather(
            *(self.workers(os.getpid) for _ in range(self.config.workers))
        )  # until they answer
        await self.batcher(np.zeros((1, *self.network.input_shape), np.float32))
        self.ready = True

    async def stop(self) -> None:
        """Finish what has begun."""
        self.ready = False
        await self.batcher.stop()
        self.workers.stop()

    async def segment(self, content: bytes, kind: str) -> Response:
        """Find the mask of an image file."""
        prepared = await self.workers(self.network.read, content, self.max_bytes)
        probs = await self.batcher(prepared.batch)
        source = content if kind == "application/dicom" else b""
        body, headers, share, sure = await self.workers(
            responses.make_response, self.network, probs, prepared, kind, source
        )
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
        return FileResponse(ROOT / "web" / name)

    return get


def make_app(config: Any) -> fastapi.FastAPI:
    """Build the application. Raises UserError if the model cannot be loaded."""
    service = Service(config)
    network = service.network

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = fastapi.FastAPI(
        title="U-Net segmentation",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
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
        asked = await service.workers(
            tensor_protocols.read_request, content, length, network, config.max_batch
        )
        probs = await service.batcher(asked.batch)
        body, headers = await service.workers(
            tensor_protocols.write_answer, probs, asked, network, VERSION
        )
        return Response(body, headers=headers)

    async def predict(request: Request) -> Response:
        content = await request.body()
        batch, by_row = await service.workers(
            tensor_protocols.read_instances, content, network, config.max_batch
        )
        probs = await service.batcher(batch)
        return Response(
            await service.workers(tensor_protocols.write_predictions, probs, by_row),
            media_type="application/json",
        )

    def model() -> dict[str, Any]:
        shown = (
            "classes",
            "image_size",
            "channels",
            "preparation",
            "threshold",
            "window",
            "mirror",
        )
        return {"name": tensor_protocols.MODEL, "version": VERSION, "sha256": network.sha256} | {
            name: network.metadata[name] for name in shown if name in network.metadata
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
        return tensor_protocols.metadata(network, VERSION)

    def configuration() -> dict[str, Any]:
        return tensor_protocols.config(network, config.max_batch)

    def status() -> dict[str, Any]:
        state = {"version": VERSION, "state": "AVAILABLE" if service.ready else "LOADING"}
        return {
            "model_version_status": [state | {"status": {"error_code": "OK", "error_message": ""}}]
        }

    def metrics() -> Response:
        return Response(
            service.metrics.exposition(service.batcher.pending),
            media_type="text/plain; version=0.0.4",
        )

    here = f"/v2/models/{tensor_protocols.MODEL}"
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
        (f"/v1/models/{tensor_protocols.MODEL}", "GET", status),
        (f"/v1/models/{tensor_protocols.MODEL}:predict", "POST", predict),
        (os.environ.get("AIP_HEALTH_ROUTE", ""), "GET", ready),
        (os.environ.get("AIP_PREDICT_ROUTE", ""), "POST", predict),
    ):
        if path:
            app.add_api_route(
                path, call, methods=[method], response_model=None, **openapi.describe(call.__name__)
            )
    for name in ("index.html", "app.js", "style.css"):
        route = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(
            route, page(name), methods=["GET"], response_model=None, include_in_schema=False
        )
    open_paths = (*PUBLIC_PATHS, os.environ.get("AIP_HEALTH_ROUTE") or "/livez")
    keys = middleware.read_keys(Path(config.keys)) if config.keys else None
    app.add_middleware(
        middleware.Guard,
        metrics=service.metrics,
        keys=keys,
        open_paths=open_paths,
        max_body=int(config.max_body_mb * 2**20),
        room=config.room,
        timeout_s=config.timeout_s,
    )
    return app
