"""The OpenAPI document: what FastAPI knows of the routes, and what the guard and the error handlers add to them."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from .anthropic.errors import OVERLOADED, speaks_anthropic
from .auth import required_scope

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "For people: the value, the limit and the way out."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The parameter that is to blame, as a path."},
                "code": {"type": ["string", "null"], "description": "For programs."},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "details": {"type": "object", "properties": {"error_code": {"type": "string"}}},
            },
        },
        "request_id": {"type": ["string", "null"]},
    },
}
ERRORS = {
    400: "The request is not one that can be served: `param` names what is to blame.",
    401: "No key, or one that is unknown, revoked or expired.",
    403: "The key is good, but not for this: `insufficient_scope`, `model_not_allowed`.",
    404: "There is no such model or object, or it is somebody else's.",
    405: "The path takes other methods: the header Allow names them.",
    408: "The body was not whole in time.",
    413: "The body is too large.",
    415: "The body is of another content type.",
    422: "The Idempotency-Key was used for another request.",
    429: "`rate_limit_exceeded` or `queue_full`, with Retry-After; `insufficient_quota`, without.",
    500: "The server or the worker failed.",
    502: "The server that the model is forwarded to failed.",
    503: "No worker, or no Redis, at the moment; with Retry-After.",
    504: "The job was not done by its deadline.",
    529: "The queue is full of others' requests; with Retry-After.",
}
WITH_A_JOB = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 502, 503, 504)
WITH_A_KEY = (400, 401, 403, 404, 500, 503)
EXAMPLES: dict[str, Any] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Tell me a story."}]},
    "/v1/messages": {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello!"}]},
    "/v1/responses/input_tokens": {"model": "tiny", "input": "Hello!"},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}]},
    "/v1/embeddings": {"model": "my-embedder", "input": ["first text", "second text"]},
    "/v1/rerank": {"model": "my-ranker", "query": "what is a queue?", "documents": ["A line.", "A fruit."], "top_n": 1},
}
ERROR_EXAMPLE = {
    "error": {
        "message": "Invalid value for 'temperature': Input should be less than or equal to 2 (given: 3).",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_value",
    }
}
JSON, STREAM = "application/json", "text/event-stream"


def document(app: FastAPI, summary: str, keys: bool) -> dict[str, Any]:
    """The document of an application.

    Args:
        keys: bearer keys are asked for.
    """
    found = get_openapi(title=app.title, version=app.version, summary=summary, routes=app.routes)
    names = {route.path: route for route in app.routes if isinstance(route, APIRoute)}
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Error"], schemas["AnthropicError"] = ERROR, ANTHROPIC_ERROR
    if keys:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            _complete(path, operation, schemas)
            if len(operations) == 1 and path in names:
                operation["operationId"] = names[path].name
            if keys and required_scope(path) is not None:
                operation["security"] = [{"bearer": []}]
    return found


def _complete(path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Adds errors, an example, and what a stream is."""
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own: ours is a 400
    content = operation.get("requestBody", {}).get("content", {})
    statuses = WITH_A_JOB if content else WITH_A_KEY if required_scope(path) is not None else ()
    error: dict[str, Any] = {"schema": {"$ref": "#/components/schemas/Error"}, "example": ERROR_EXAMPLE}
    if speaks_anthropic({"type": "http", "path": path, "headers": []}):
        error, statuses = {"schema": {"$ref": "#/components/schemas/AnthropicError"}}, (*statuses, OVERLOADED)
    for status in statuses:
        responses.setdefault(str(status), {"description": ERRORS[status], "content": {JSON: error}})
    if JSON in content and path in EXAMPLES:
        content[JSON]["example"] = EXAMPLES[path]
    reference = content.get(JSON, {}).get("schema", {}).get("$ref", "")
    body = schemas.get(reference.rpartition("/")[2], {})
    if path.endswith("/events"):
        responses["200"]["content"] = {STREAM: {}}
    elif "stream" in body.get("properties", {}):
        responses["200"].setdefault("content", {})[STREAM] = {}
