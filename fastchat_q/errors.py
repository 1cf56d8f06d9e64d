"""One exception tree; each error knows its OpenAI type and code and its HTTP status.

::

    FastchatQError                       500 server_error
    ├── InvalidRequestError              400 invalid_request_error
    │   ├── ContextLengthError           400 context_length_exceeded
    │   └── RequestTooLargeError         413 request_too_large
    ├── AuthenticationError              401 invalid_api_key
    ├── ModelNotFoundError               404 model_not_found
    ├── QueueFullError                   429 queue_full            with Retry-After
    ├── NoWorkerError                    503 no_worker             with Retry-After
    ├── QueueUnavailableError            503 queue_unavailable     with Retry-After
    ├── DeadlineError                    504 deadline_exceeded
    ├── JobFailedError                   500, or what the worker's error says
    └── ConfigurationError               never leaves the process: bad settings, stops a command with exit code 2

The shape on the wire is OpenAI's: https://platform.openai.com/docs/guides/error-codes
"""

from typing import Any, ClassVar


class FastchatQError(Exception):
    """Base of all errors. ``message`` names the value, the limit and the way out."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(FastchatQError):
    """The request cannot be served as it is; nothing was queued, or the worker refused it before the first token."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code


class ContextLengthError(InvalidRequestError):
    """Prompt plus requested completion do not fit the model's context."""

    code = "context_length_exceeded"


class RequestTooLargeError(InvalidRequestError):
    """The body is larger than the server takes."""

    status = 413
    code = "request_too_large"


class AuthenticationError(FastchatQError):
    """No key, or one that is not known."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ModelNotFoundError(FastchatQError):
    """No worker ever served a model of that name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class QueueFullError(FastchatQError):
    """The lane holds as many waiting jobs as it may."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after_s = 5


class NoWorkerError(FastchatQError):
    """The model is known, but no worker serves it now."""

    status = 503
    code = "no_worker"
    retry_after_s = 5


class QueueUnavailableError(FastchatQError):
    """Redis cannot be reached, or refuses writes; nothing was accepted."""

    status = 503
    code = "queue_unavailable"
    retry_after_s = 2


class DeadlineError(FastchatQError):
    """The job was not done by its deadline."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class JobFailedError(FastchatQError):
    """The worker ended the job with an error, which is passed on as it said it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        type: str = "server_error",  # noqa: A002  the name on the wire
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.status, self.type, self.code = status, type, code


class ConfigurationError(FastchatQError):
    """A setting or the environment is wrong; the message says which and what to do."""
