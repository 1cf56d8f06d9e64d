"""Web pages of other origins, where the operator allows them. No cookies: a key is sent in a header, or nothing is."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from fastchat_q.errors import PermissionDeniedError

from .problems import error_response

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "POST")
RATE_LIMITS = [
    f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")
]
EXPOSED = ("openai-processing-ms", "retry-after", "x-fastchat-q-model", "x-job-id", "x-request-id", *RATE_LIMITS)
"""Headers of answers that pages may read."""
PREFLIGHT_S = 3600


class OriginNotAllowedError(PermissionDeniedError):
    """A page of this origin, or its method, is not allowed."""

    code = "origin_not_allowed"


class Cors(CORSMiddleware):
    """Answers preflights, and adds what browsers look for to all other answers, errors included."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=EXPOSED,
            max_age=PREFLIGHT_S,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """As Starlette's, with a body of our own."""
        response = super().preflight_response(request_headers)
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        if response.status_code == 200:
            return Response(status_code=204, headers=headers)
        refused = bytes(response.body).decode().removeprefix("Disallowed CORS ")
        return error_response(
            OriginNotAllowedError(
                f"This {refused} is not allowed for pages of {request_headers['origin'][:200]!r}. The server's setting "
                "FASTCHAT_Q_CORS_ORIGINS names the origins."
            ),
            {"type": "http", "path": ""},  # a browser reads the status alone
            headers,
        )
