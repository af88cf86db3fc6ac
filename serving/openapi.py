"""What GET /openapi.json says of the routes' bodies and answers."""

from typing import Any

from starlette.responses import JSONResponse, Response

BYTES = {"type": "string", "format": "binary"}
IMAGE = {
    "application/octet-stream": {"schema": BYTES},
    "multipart/form-data": {
        "schema": {"type": "object", "required": ["image"], "properties": {"image": BYTES}},
    },
}
NUMBERS = {"type": "array", "items": {}}
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
PROBLEM = {
    "type": "object",
    "required": ["title", "status", "detail"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}
INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {"id": {"type": "string"}, "inputs": {"type": "array", "items": TENSOR}},
}
INFERRED = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {"outputs": {"type": "array", "items": TENSOR}},
}
PREDICT = {"type": "object", "properties": {"instances": NUMBERS, "inputs": NUMBERS}}
PREDICTED = {"type": "object", "properties": {"predictions": NUMBERS, "outputs": NUMBERS}}
ASKED = {  # by the names of the routes' functions
    "segment": IMAGE,
    "infer": {"application/json": {"schema": INFER}, "application/octet-stream": {"schema": BYTES}},
    "predict": {"application/json": {"schema": PREDICT}},
}
ANSWERED = {
    "segment": {
        "image/png": {"schema": BYTES},
        "application/json": {"schema": {"type": "object"}},
        "application/geo+json": {"schema": {"type": "object"}},
        "application/dicom": {"schema": BYTES},
    },
    "infer": {
        "application/json": {"schema": INFERRED},
        "application/octet-stream": {"schema": BYTES},
    },
    "predict": {"application/json": {"schema": PREDICTED}},
    "metrics": {"text/plain": {"schema": {"type": "string"}}},
}


def describe(name: str) -> dict[str, Any]:
    """Give what FastAPI is to say of the route that the function of this name answers."""
    answer = ANSWERED.get(name, {"application/json": {"schema": {"type": "object"}}})
    problem = {
        "description": "A problem, RFC 9457",
        "content": {"application/problem+json": {"schema": PROBLEM}},
    }
    body = {"requestBody": {"required": True, "content": ASKED[name]}} if name in ASKED else {}
    return {
        "response_class": Response if name in ANSWERED else JSONResponse,
        "responses": {
            200: {"description": "Done", "content": answer},
            "4XX": problem,
            "5XX": problem,
        },
        "openapi_extra": body,
    }
