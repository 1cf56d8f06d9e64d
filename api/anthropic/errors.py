"""Errors in Anthropic's words. Which requests get them is seen by the path, whoever raises the error.

https://platform.claude.com/docs/en/api/errors
"""

from typing import Any

from starlette.types import Scope

from fastchat_q.errors import FastchatQError, QueueFullError

TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
OVERLOADED = 529
"""Anthropic's status for a server that is busy with others' requests; its clients send the request again."""
TOO_LONG = "prompt is too long: "
"""How Anthropic's own message begins: agents look for it, and shorten the conversation."""


def speaks_anthropic(scope: Scope) -> bool:
    """Whether the request is one of Anthropic's API. Its client names the version with each."""
    path: str = scope["path"]
    if path.startswith("/v1/models"):
        return any(name == b"anthropic-version" for name, _ in scope["headers"])
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def status_of(error: FastchatQError) -> int:
    """The HTTP status: a queue that others have filled is no limit of the caller's."""
    return OVERLOADED if isinstance(error, QueueFullError) and not error.own else error.status


def body_of(error: FastchatQError, request_id: str | None = None) -> dict[str, Any]:
    """The error object. ``details.error_code`` is the code that OpenAI's object has; the client shows it as
    ``error_code``.
    """
    status = status_of(error)
    message = TOO_LONG + error.message if error.code == "context_length_exceeded" else error.message
    said: dict[str, Any] = {"type": TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")}
    said["message"] = message
    if error.code is not None:
        said["details"] = {"error_code": error.code}
    return {"type": "error", "error": said, "request_id": request_id}
