"""All routes of the service, one router per protocol. `serving/service.py` does the work."""

import os
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse

from serving import media_types, open_inference, openapi, tf_serving
from serving.config import MODEL, VERSION
from serving.errors import Problem
from serving.service import Service
from utils import ROOT

# These need no API key and are never refused.
PUBLIC_PATHS = (
    "/",
    "/app.js",
    "/style.css",
    "/livez",
    "/readyz",
    "/ping",
    "/v2/health/live",
    "/v2/health/ready",
)
V2_MODEL = f"/v2/models/{MODEL}"
V2_VERSION = f"{V2_MODEL}/versions/{VERSION}"
TF_MODEL = f"/v1/models/{MODEL}"
TF_VERSION = f"{TF_MODEL}/versions/{VERSION}"
# What GET /v1/model shows of the model's metadata.
SHOWN_METADATA = (
    "classes",
    "image_size",
    "sampler",
    "channels",
    "preparation",
    "threshold",
    "window",
    "mirror",
)


def public_paths() -> set[str]:
    """Collect the paths that need no API key, Vertex AI's health route among them."""
    paths = set(PUBLIC_PATHS)
    if os.environ.get("AIP_HEALTH_ROUTE"):
        paths.add(os.environ["AIP_HEALTH_ROUTE"])
    return paths


def get_service(request: Request) -> Service:
    """Return the service that `make_app` put into the application."""
    return request.app.state.service


# --------------------------------------------------------------------------- health and web page

health = APIRouter()
page = APIRouter(include_in_schema=False)


@health.get("/livez", **openapi.OBJECT)
@health.get("/v2/health/live", **openapi.OBJECT)
def live() -> dict[str, bool]:
    """Say that the process answers."""
    return {"live": True}


@health.get("/readyz", **openapi.OBJECT)
@health.get("/v2/health/ready", **openapi.OBJECT)
@health.get(f"{V2_MODEL}/ready", **openapi.OBJECT)
@health.get(f"{V2_VERSION}/ready", **openapi.OBJECT)
@health.get("/ping", **openapi.OBJECT)  # SageMaker
def ready(request: Request) -> dict[str, bool]:
    """Say whether the service takes requests."""
    if not get_service(request).ready:
        raise Problem(503, "not ready", Retry_After="1")
    return {"ready": True}


@health.get("/metrics", **openapi.METRICS)
def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    service = get_service(request)
    text = service.metrics.exposition(service.computing.pending)
    return Response(text, media_type="text/plain; version=0.0.4")


@page.get("/")
def index() -> Response:
    """Return the web page."""
    return FileResponse(ROOT / "web" / "index.html")


@page.get("/app.js")
def script() -> Response:
    """Return the page's script."""
    return FileResponse(ROOT / "web" / "app.js")


@page.get("/style.css")
def style() -> Response:
    """Return the page's style sheet."""
    return FileResponse(ROOT / "web" / "style.css")


# ------------------------------------------------------------------- segmentation of image files

segmentation = APIRouter()


@segmentation.post("/v1/segment", **openapi.SEGMENT)
@segmentation.post("/invocations", **openapi.SEGMENT)  # SageMaker
async def segment(request: Request) -> Response:
    """Return the mask of an image file, of a volume the masks of all slices."""
    accepted = media_types.read_accept(request.headers.get("accept", ""))
    content = await read_image(request)
    answer = await get_service(request).segment(content, accepted, request.scope["deadline"])
    return Response(answer.body, media_type=answer.media_type, headers=answer.headers)


@segmentation.get("/v1/model", **openapi.OBJECT)
def model(request: Request) -> dict[str, Any]:
    """Return which model is served."""
    network = get_service(request).network
    shown = {"name": MODEL, "version": VERSION, "sha256": network.sha256}
    shown |= {"engine": network.engine, "precision": network.precision}
    for name in SHOWN_METADATA:
        if name in network.metadata:
            shown[name] = network.metadata[name]
    return shown


async def read_image(request: Request) -> bytes:
    """Read the image file from the body, or from a form with one file. Raises Problem 400."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        return await request.body()
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=0)
    parser.spool_max_size = 2**62  # files stay in memory, none is written to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError):
        raise Problem(400, "the form is malformed; expected one file") from None
    files = [value for value in form.values() if not isinstance(value, str)]
    if len(files) != 1:
        raise Problem(400, f"{len(files)} files in the form; expected one")
    return await files[0].read()


# ------------------------------------------------------------------- Open Inference Protocol (v2)

v2 = APIRouter()


@v2.get("/v2", **openapi.OBJECT)
def server() -> dict[str, Any]:
    """Return the name and the extensions of the server."""
    extensions = ["binary_tensor_data", "model_repository", "statistics"]
    return {"name": "unet", "version": VERSION, "extensions": extensions}


@v2.post("/v2/repository/index", **openapi.LIST)
def repository_index(request: Request) -> list[dict[str, str]]:
    """List the models that are served."""
    return open_inference.repository_index(get_service(request).ready)


@v2.get(V2_MODEL, **openapi.OBJECT)
@v2.get(V2_VERSION, **openapi.OBJECT)
def metadata(request: Request) -> dict[str, Any]:
    """Return the names and shapes of the model's tensors."""
    return open_inference.metadata(get_service(request).network)


@v2.get(f"{V2_MODEL}/config", **openapi.OBJECT)
def configuration(request: Request) -> dict[str, Any]:
    """Return the model's configuration as Triton does."""
    service = get_service(request)
    return open_inference.triton_config(service.network, service.config.max_batch)


@v2.get(f"{V2_MODEL}/stats", **openapi.OBJECT)
@v2.get(f"{V2_VERSION}/stats", **openapi.OBJECT)
def statistics(request: Request) -> dict[str, Any]:
    """Return how often and how long the model was asked."""
    return open_inference.statistics(get_service(request).computing.statistics)


@v2.post(f"{V2_MODEL}/infer", **openapi.INFER)
@v2.post(f"{V2_VERSION}/infer", **openapi.INFER)
async def infer(request: Request) -> Response:
    """Return the probabilities of prepared images."""
    json_length = request.headers.get(open_inference.LENGTH_HEADER)
    body, headers = await get_service(request).infer(await request.body(), json_length)
    return Response(body, headers=headers)


# --------------------------------------------------------------- TensorFlow Serving and Vertex AI

tensorflow_serving = APIRouter()


@tensorflow_serving.get(TF_MODEL, **openapi.OBJECT)
@tensorflow_serving.get(TF_VERSION, **openapi.OBJECT)
def status(request: Request) -> dict[str, Any]:
    """Return the state of the model."""
    return tf_serving.status(get_service(request).ready)


@tensorflow_serving.get(f"{TF_MODEL}/metadata", **openapi.OBJECT)
@tensorflow_serving.get(f"{TF_VERSION}/metadata", **openapi.OBJECT)
def signatures(request: Request) -> dict[str, Any]:
    """Return the names and shapes of the model's tensors."""
    return tf_serving.metadata(get_service(request).network)


@tensorflow_serving.post(f"{TF_MODEL}:predict", **openapi.PREDICT)
@tensorflow_serving.post(f"{TF_VERSION}:predict", **openapi.PREDICT)
async def predict(request: Request) -> Response:
    """Return the probabilities of prepared images."""
    body = await get_service(request).predict(await request.body())
    return Response(body, media_type="application/json")


def vertex_router() -> APIRouter:
    """Make the routes that Vertex AI names in environment variables; none of them elsewhere."""
    router = APIRouter()
    health_route = os.environ.get("AIP_HEALTH_ROUTE")
    predict_route = os.environ.get("AIP_PREDICT_ROUTE")
    if health_route:
        router.add_api_route(health_route, ready, methods=["GET"], **openapi.OBJECT)
    if predict_route:
        router.add_api_route(predict_route, predict, methods=["POST"], **openapi.PREDICT)
    return router
