"""Every failure becomes OpenAI's error object with its HTTP status, whoever raised it; Anthropic's on its paths."""

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from redis.exceptions import OutOfMemoryError, RedisError
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Scope

from fastchat_q.errors import FastchatQError, InvalidRequestError, QueueUnavailableError

from .anthropic import errors as anthropic

log = structlog.get_logger()

BUG = "The server had an error while processing your request. Its log says more."
"""What a client hears of an error that nobody expected; `guard` answers with it."""
HTTP_CODES = {404: "not_found"}


class HttpMethodError(InvalidRequestError):
    """The path is there, but takes other methods."""

    status = 405
    code = "method_not_allowed"


def install(app: FastAPI) -> None:
    """Registers the handlers."""
    app.add_exception_handler(FastchatQError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(RedisError, _on_redis_error)
    app.add_exception_handler(TimeoutError, _on_redis_error)  # Redis is what the routes wait for
    app.add_exception_handler(HTTPException, _on_http_exception)


def error_response(error: FastchatQError, scope: Scope, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response for an error, Retry-After included; in the words of the API that the request is one of."""
    extra = {**error.headers, **(headers or {})}
    if error.retry_after_s is not None:
        extra["retry-after"] = str(error.retry_after_s)
    if anthropic.speaks_anthropic(scope):
        body = anthropic.body_of(error, scope.get("state", {}).get("request_id"))
        return JSONResponse(body, anthropic.status_of(error), extra)
    return JSONResponse(error.body(), error.status, extra)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FastchatQError)
    return error_response(error, request.scope)


async def _on_redis_error(request: Request, error: Exception) -> JSONResponse:
    log.warning("redis error", path=request.url.path, error=str(error))
    if isinstance(error, OutOfMemoryError):
        full = QueueUnavailableError("The queue's memory is full. Nothing was accepted; retry later.")
        return error_response(full, request.scope)
    away = QueueUnavailableError(
        "The queue cannot be reached. What it may have accepted of this request is cancelled; retry in a moment."
    )
    return error_response(away, request.scope)


def allowed_methods(request: Request) -> list[str]:
    """Those of all routes of a path: Starlette tells those of the first."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = {method for route in routes if route.path_regex.match(request.url.path) for method in route.methods or ()}
    head = {"HEAD"} if "GET" in found and not request.url.path.endswith("/events") else set()
    return sorted(found | head | {"OPTIONS"})


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"Unknown request URL: {request.method} {request.url.path}. GET /openapi.json lists what there is."
    elif error.status_code == 405:
        allowed = {"allow": ", ".join(allowed_methods(request))}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=allowed)
        message = f"Not allowed to {request.method} on {request.url.path}. Allowed: {allowed['allow']}."
        return error_response(HttpMethodError(message), request.scope, allowed)
    problem = InvalidRequestError(message, code=HTTP_CODES.get(error.status_code))
    problem.status = error.status_code
    return error_response(problem, request.scope, error.headers)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_request(most_specific(error.errors())), request.scope)


def most_specific(details: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first error; where it is one branch of a union, the branch that got furthest into the value."""
    first = _path(details[0]["loc"])
    return max((d for d in details if _path(d["loc"]).startswith(first)), key=lambda d: len(_path(d["loc"])))


def invalid_request(detail: Mapping[str, Any]) -> InvalidRequestError:
    """One validation error of pydantic, in OpenAI's words: where, what is wrong, what was given."""
    kind, path = detail["type"], _path(detail["loc"])
    if kind == "json_invalid":
        reason = detail.get("ctx", {}).get("error", "")
        return InvalidRequestError(f"We could not parse the JSON body of your request: {reason}.", code="invalid_json")
    if kind == "extra_forbidden":
        path = _path(detail["loc"][:-1], detail["loc"][-1])
        return InvalidRequestError(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    if kind == "unsupported_parameter":
        name = _path(detail["loc"], detail["ctx"]["name"])
        instead = detail["ctx"]["instead"]
        way_out = f"Send '{instead}' instead." if instead else "Leave it out."
        message = f"Unsupported parameter: '{name}' is not supported by this server. {way_out}"
        return InvalidRequestError(message, param=name, code="unsupported_parameter")
    if kind == "missing":
        if not path:
            return InvalidRequestError("The request has no body. Send a JSON object.", code="missing_body")
        return InvalidRequestError(
            f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter"
        )
    value = detail.get("input")
    if kind == "field":  # found by a validator of the whole object
        path, value = _path(detail["loc"], detail["ctx"]["name"]), detail["ctx"]["given"]
    if not path:
        return InvalidRequestError(f"Invalid request: {detail['msg']}")
    given = "" if value is None and kind == "field" else f" (given: {_short(value)})"
    return InvalidRequestError(f"Invalid value for '{path}': {detail['msg']}{given}.", param=path, code="invalid_value")


BRANCHES = ("[key]", "constrained-", "dict[", "function-", "list[", "literal[", "nullable[", "tagged-union[")
"""How pydantic spells branches of unions and names of fields, beside "str" and names of classes; no part of a path."""


PLACES = ("body", "query", "path", "header")
"""Where FastAPI found a parameter; no part of its name."""


def _path(location: Sequence[int | str], last: str = "") -> str:
    """('body', 'messages', 0, 'content', 'str') -> messages[0].content; ``last`` is added as it is."""
    path = ""
    for part in location[1:] if location[:1] and location[0] in PLACES else location:
        if isinstance(part, int):
            path += f"[{part}]" if path else ""
        elif part != "str" and not part.startswith(BRANCHES) and not part[:1].isupper():
            path += f".{part}" if path else part
    return f"{path}.{last}" if path and last else path or last


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
