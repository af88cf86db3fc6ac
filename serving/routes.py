"""All routes of the service, one router per protocol. `serving/service.py` does the work."""

import asyncio
import os
import re
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse, JSONResponse

from serving import media_types, open_inference, openapi, tf_serving
from serving.config import VERSION
from serving.errors import Problem
from serving.jobs import Jobs
from serving.repository import Served
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
V2_MODEL, TF_MODEL = "/v2/models/{model}", "/v1/models/{model}"
V2_VERSION, TF_VERSION = f"{V2_MODEL}/versions/{{version}}", f"{TF_MODEL}/versions/{{version}}"
V2_REPOSITORY = "/v2/repository/models/{model}"
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


def find_model(request: Request) -> Served:
    """Return the model that the path names, or the default. Raises Problem 404."""
    names = request.path_params
    repository = get_service(request).repository
    model = repository.find(names.get("model", ""), names.get("version", ""))
    request.scope["model"] = f"{model.title} {model.network.sha256[:12]}"  # for the log
    return model


def describe_paths(router: APIRouter) -> APIRouter:
    """Tell OpenAPI what stands in a router's paths: names of models, versions."""
    for route in router.routes:
        names = re.findall(r"{(\w+)}", route.path)
        parameters = [openapi.path_parameter(name) for name in names]
        if parameters:
            route.openapi_extra = {**(route.openapi_extra or {}), "parameters": parameters}
    return router


# --------------------------------------------------------------------------- health and web page

health = APIRouter()
page = APIRouter(include_in_schema=False)


@health.get("/livez", **openapi.OBJECT)
@health.get("/v2/health/live", **openapi.OBJECT)
async def live() -> dict[str, bool]:
    """Say that the process answers. Not in a thread: those may be busy."""
    return {"live": True}


@health.get("/readyz", **openapi.OBJECT)
@health.get("/v2/health/ready", **openapi.OBJECT)
@health.get("/ping", **openapi.OBJECT)  # SageMaker
async def ready(request: Request) -> dict[str, bool]:
    """Say whether the service takes requests."""
    if not get_service(request).ready:
        raise Problem(503, "not ready", Retry_After="1")
    return {"ready": True}


@health.get("/metrics", **openapi.METRICS)
def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    service = get_service(request)
    text = service.metrics.exposition(service.queue_length, service.job_counts)
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
@segmentation.post(f"{TF_MODEL}:segment", **openapi.SEGMENT)
@segmentation.post(f"{TF_VERSION}:segment", **openapi.SEGMENT)
async def segment(request: Request) -> Response:
    """Return the mask of an image file, of a volume the masks of all slices."""
    model = find_model(request)
    accepted = media_types.read_accept(request.headers.get("accept", ""))
    content = await read_image(request)
    deadline, caller = request.scope["deadline"], request.scope["caller"]
    answer = await get_service(request).segment(model, content, accepted, deadline, caller)
    return Response(answer.body, media_type=answer.media_type, headers=answer.headers)


@segmentation.get("/v1/model", **openapi.OBJECT)
def model(request: Request) -> dict[str, Any]:
    """Return which model answers by default."""
    return describe(find_model(request))


@segmentation.get("/v1/models", **openapi.OBJECT)
def models(request: Request) -> dict[str, Any]:
    """Return all models that are served, and the aliases."""
    repository = get_service(request).repository
    served = [describe(one) for one in repository.served.values()]
    return {"models": served, "aliases": repository.aliases, "default": repository.find().title}


def describe(model: Served) -> dict[str, Any]:
    """Describe a model for its users."""
    network = model.network
    shown = {"name": model.name, "version": model.version, "sha256": network.sha256}
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


# ------------------------------------------------------------------------------------------ jobs

jobs = APIRouter()


def find_jobs(request: Request) -> tuple[Jobs, str]:
    """Return the jobs, and whose this request's are. Raises Problem 404 if there are none."""
    kept = get_service(request).jobs
    if kept is None:
        raise Problem(404, "this service keeps no jobs; start it with --jobs FILE")
    return kept, request.scope.get("owner", "")


@jobs.post("/v1/jobs", **openapi.SUBMIT)
@jobs.post(f"{TF_MODEL}/jobs", **openapi.SUBMIT)
@jobs.post(f"{TF_VERSION}/jobs", **openapi.SUBMIT)
async def submit(request: Request) -> Response:
    """Keep an image file as a job, to be segmented when there is time."""
    kept, owner = find_jobs(request)
    model = find_model(request)
    accepted = media_types.read_accept(request.headers.get("accept", ""))
    content = await read_image(request)
    names = model.name, model.version
    job = await asyncio.to_thread(kept.submit, owner, *names, accepted, content)
    get_service(request).job_came.set()
    shown = await asyncio.to_thread(kept.describe, job, owner)
    return JSONResponse(shown, 202, {"Location": f"/v1/jobs/{job}"})


@jobs.get("/v1/jobs/{job}", **openapi.OBJECT)
def job(request: Request) -> dict[str, Any]:
    """Return a job's state: queued, running, done or failed."""
    kept, owner = find_jobs(request)
    return kept.describe(request.path_params["job"], owner)


@jobs.get("/v1/jobs/{job}/result", **openapi.RESULT)
def job_result(request: Request) -> Response:
    """Return what /v1/segment would have answered."""
    kept, owner = find_jobs(request)
    status, body, media_type, headers = kept.result(request.path_params["job"], owner)
    return Response(body, status, headers, media_type)


@jobs.delete("/v1/jobs/{job}", **openapi.REMOVED)
async def remove_job(request: Request) -> Response:
    """Remove a job and its result; a running one is stopped."""
    kept, owner = find_jobs(request)
    name = request.path_params["job"]
    await asyncio.to_thread(kept.remove, name, owner)
    return Response(status_code=204)


# ------------------------------------------------------------------- Open Inference Protocol (v2)

v2 = APIRouter()


@v2.get("/v2", **openapi.OBJECT)
def server() -> dict[str, Any]:
    """Return the name and the extensions of the server."""
    extensions = ["binary_tensor_data", "model_repository", "statistics"]
    return {"name": "unet", "version": VERSION, "extensions": extensions}


@v2.post("/v2/repository/index", **openapi.LIST)
def repository_index(request: Request) -> list[dict[str, str]]:
    """List the models, also those that cannot be served."""
    return get_service(request).repository.index()


@v2.post(f"{V2_REPOSITORY}/load", **openapi.OBJECT)
async def load(request: Request) -> dict[str, Any]:
    """Load a model's versions from the folder; what was changed or removed there is noticed."""
    service = get_service(request)
    # From a bucket it takes as long as a volume.
    now = asyncio.get_running_loop().time()
    request.scope["deadline"].reschedule(now + service.config.volume_timeout_s)
    await run_in_threadpool(service.repository.load, request.path_params["model"])
    return {}


@v2.post(f"{V2_REPOSITORY}/unload", **openapi.OBJECT)
def unload(request: Request) -> dict[str, Any]:
    """Stop serving a model until it is loaded again."""
    get_service(request).repository.unload(request.path_params["model"])
    return {}


@v2.get(f"{V2_MODEL}/ready", **openapi.OBJECT)
@v2.get(f"{V2_VERSION}/ready", **openapi.OBJECT)
async def model_ready(request: Request) -> dict[str, bool]:
    """Say whether a model takes requests."""
    find_model(request)
    return await ready(request)


@v2.get(V2_MODEL, **openapi.OBJECT)
@v2.get(V2_VERSION, **openapi.OBJECT)
def metadata(request: Request) -> dict[str, Any]:
    """Return the names and shapes of the model's tensors."""
    model = find_model(request)
    versions = [one.version for one in get_service(request).repository.versions(model.name)]
    return open_inference.metadata(model.name, versions, model.network)


@v2.get(f"{V2_MODEL}/config", **openapi.OBJECT)
def configuration(request: Request) -> dict[str, Any]:
    """Return the model's configuration as Triton does."""
    model, config = find_model(request), get_service(request).config
    return open_inference.triton_config(model.name, model.network, config.max_batch)


@v2.get(f"{V2_MODEL}/stats", **openapi.OBJECT)
@v2.get(f"{V2_VERSION}/stats", **openapi.OBJECT)
def statistics(request: Request) -> dict[str, Any]:
    """Return how often and how long a model, or one of its versions, was asked."""
    chosen = [find_model(request)]
    if "version" not in request.path_params:
        chosen = get_service(request).repository.versions(chosen[0].name)
    stats = [
        open_inference.statistics(one.name, one.version, one.computing.statistics) for one in chosen
    ]
    return {"model_stats": stats}


@v2.post(f"{V2_MODEL}/infer", **openapi.INFER)
@v2.post(f"{V2_VERSION}/infer", **openapi.INFER)
async def infer(request: Request) -> Response:
    """Return the probabilities of prepared images."""
    model = find_model(request)
    json_length = request.headers.get(open_inference.LENGTH_HEADER)
    service, content = get_service(request), await request.body()
    async with service.turns.take(request.scope["caller"]):
        body, headers = await service.infer(model, content, json_length)
    return Response(body, headers=headers)


# --------------------------------------------------------------- TensorFlow Serving and Vertex AI

tensorflow_serving = APIRouter()


# Before the routes whose {model} would take in what follows the colon.
@tensorflow_serving.post(f"{TF_MODEL}:predict", **openapi.PREDICT)
@tensorflow_serving.post(f"{TF_VERSION}:predict", **openapi.PREDICT)
async def predict(request: Request) -> Response:
    """Return the probabilities of prepared images."""
    model = find_model(request)
    service, content = get_service(request), await request.body()
    async with service.turns.take(request.scope["caller"]):
        body = await service.predict(model, content)
    return Response(body, media_type="application/json")


@tensorflow_serving.get(TF_MODEL, **openapi.OBJECT)
@tensorflow_serving.get(TF_VERSION, **openapi.OBJECT)
def status(request: Request) -> dict[str, Any]:
    """Return the state of a model's versions, or of one."""
    service, versions = get_service(request), [find_model(request).version]
    if "version" not in request.path_params:
        found = service.repository.versions(request.path_params["model"])
        versions = [one.version for one in found]
    return tf_serving.status(versions, service.ready)


@tensorflow_serving.get(f"{TF_MODEL}/metadata", **openapi.OBJECT)
@tensorflow_serving.get(f"{TF_VERSION}/metadata", **openapi.OBJECT)
def signatures(request: Request) -> dict[str, Any]:
    """Return the names and shapes of the model's tensors."""
    model = find_model(request)
    return tf_serving.metadata(model.name, model.version, model.network)


ROUTERS = (health, page, segmentation, jobs, v2, tensorflow_serving)


def methods_of(path: str) -> list[str]:
    """List the methods of all routes that have this path."""
    methods = set()
    for router in ROUTERS:
        for route in router.routes:
            methods |= route.methods if route.path == path else set()
    return sorted(methods)


def is_known(path: str) -> bool:
    """Say whether a request's path is that of a route."""
    return any(route.path_regex.match(path) for router in ROUTERS for route in router.routes)


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
