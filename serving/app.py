"""The ASGI application: the routes, and the middleware that checks every request before them."""

import contextlib
from collections.abc import AsyncIterator

import fastapi
from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from serving import routes
from serving.config import VERSION, is_loopback, parse_origins
from serving.errors import Problem
from serving.middleware import Guard
from serving.open_inference import LENGTH_HEADER
from serving.service import Service

# Of requests and of answers, for the scripts of web pages that `--cors-origin` names.
ALLOWED_HEADERS = ("Accept", "Authorization", "Content-Type", "X-API-Key", LENGTH_HEADER)
EXPOSED_HEADERS = (
    "Location",
    "X-Areas",
    "X-Quality",
    "X-Model-SHA256",
    "X-Notes",
    "X-Request-ID",
    "X-Volumes",
    LENGTH_HEADER,
)


def make_app(service: Service) -> fastapi.FastAPI:
    """Build the application around a service."""
    app = fastapi.FastAPI(
        title="U-Net segmentation",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host that the client claims
        # Traces and metrics go to where OTEL_EXPORTER_OTLP_ENDPOINT says, if it is set. The message
        # of an error may quote a file, so errors do not.
        telemetry={"auto_configure": True, "logs": False, "exclude": is_unknown},
    )
    app.state.service = service
    for router in routes.ROUTERS:
        app.include_router(routes.describe_paths(router))
    app.include_router(routes.vertex_router())
    app.add_exception_handler(HTTPException, refuse_unknown_route)

    config, origins = service.config, parse_origins(service.config.cors_origin)
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        keys=service.keys,
        public_paths=routes.public_paths(),
        # Behind a proxy the host is the proxy's affair, and with keys no page has one.
        page_origins=origins if not service.keys and is_loopback(config.host) else None,
        max_body=int(config.max_body_mb * 2**20),
        max_concurrent_requests=config.max_concurrent_requests,
        timeout_s=config.timeout_s,
    )
    if origins:
        # Around the guard: a browser's preflight has no key, and errors need the header too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=ALLOWED_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )
    return app


def is_unknown(scope: dict) -> bool:
    """Say whether a request has no route: then nobody knows what its path tells."""
    return not routes.is_known(scope["path"])


@contextlib.asynccontextmanager
async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    """Start the service before the first request and stop it after the last."""
    await app.state.service.start()
    yield
    await app.state.service.stop()


async def refuse_unknown_route(request: Request, error: HTTPException) -> Response:
    """Answer a wrong path or method as every other error is answered."""
    detail = "no such route, or not with this method; GET /openapi.json lists them"
    headers = dict(error.headers or {})
    if "Allow" in headers:
        # Starlette names the methods of one route; a path may have several.
        path = getattr(request.scope.get("route"), "path", "")
        headers["Allow"] = ", ".join(routes.methods_of(path)) or headers["Allow"]
    raise Problem(error.status_code, detail, **headers)
