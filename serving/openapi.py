"""What GET /openapi.json shows of the routes' requests and answers.

The constants at the end are keyword arguments for FastAPI's route decorators.
"""

from typing import Any

from starlette.responses import JSONResponse, Response

from serving import media_types

BYTES = {"type": "string", "format": "binary"}
ANY_OBJECT = {"type": "object"}
NUMBERS = {"type": "array", "items": {}}

FORM = {"type": "object", "required": ["image"], "properties": {"image": BYTES}}
TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": NUMBERS,
        "parameters": {"type": "object"},
    },
}
INFER_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {"id": {"type": "string"}, "inputs": {"type": "array", "items": TENSOR}},
}
INFER_ANSWER = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {"outputs": {"type": "array", "items": TENSOR}},
}
PREDICT_REQUEST = {"type": "object", "properties": {"instances": NUMBERS, "inputs": NUMBERS}}
PREDICT_ANSWER = {"type": "object", "properties": {"predictions": NUMBERS, "outputs": NUMBERS}}
PROBLEM = {
    "type": "object",
    "required": ["title", "status", "detail"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}


def describe(
    answer: dict[str, Any],
    request: dict[str, Any] | None = None,
    response_class: type = Response,
    status: int = 200,
) -> dict[str, Any]:
    """Make the arguments of a route decorator.

    answer, request: the schema of the body, by media type. A route without a request has no body.
    """
    problem = {
        "description": "A problem, RFC 9457",
        "content": by_media_type({"application/problem+json": PROBLEM}),
    }
    done = {"description": "Done", "content": by_media_type(answer)}
    body = {}
    if request is not None:
        body["requestBody"] = {"required": True, "content": by_media_type(request)}
    return {
        "response_model": None,
        "response_class": response_class,
        "status_code": status,
        "responses": {status: done, "4XX": problem, "5XX": problem},
        "openapi_extra": body,
    }


def path_parameter(name: str) -> dict[str, Any]:
    """Describe a part of a path: the name of a model, or a version."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def by_media_type(schemas: dict[str, Any]) -> dict[str, Any]:
    """Write schemas as OpenAPI's `content`."""
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


OBJECT = describe({"application/json": ANY_OBJECT}, response_class=JSONResponse)
LIST = describe({"application/json": {"type": "array"}}, response_class=JSONResponse)
METRICS = describe({"text/plain": {"type": "string"}})
SEGMENT = describe(
    answer={
        "application/json": ANY_OBJECT,
        "application/geo+json": ANY_OBJECT,
        "image/png": BYTES,
        **dict.fromkeys((*media_types.FORMATS.values(), *media_types.WITH_IMAGE), BYTES),
    },
    request={"application/octet-stream": BYTES, "multipart/form-data": FORM},
)
IMAGE_FILE = {"application/octet-stream": BYTES, "multipart/form-data": FORM}
SUBMIT = describe({"application/json": ANY_OBJECT}, IMAGE_FILE, JSONResponse, status=202)
RESULT = describe({"*/*": BYTES})
REMOVED = describe({}, status=204)
INFER = describe(
    answer={"application/json": INFER_ANSWER, "application/octet-stream": BYTES},
    request={"application/json": INFER_REQUEST, "application/octet-stream": BYTES},
)
PREDICT = describe(
    answer={"application/json": PREDICT_ANSWER},
    request={"application/json": PREDICT_REQUEST},
)
