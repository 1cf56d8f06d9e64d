"""One exception tree; each error knows its OpenAI type and code and its HTTP status.

::

    FastchatQError                       500 server_error
    ├── InvalidRequestError              400 invalid_request_error
    │   ├── ContextLengthError           400 context_length_exceeded
    │   ├── RequestTimeoutError          408 request_timeout
    │   └── RequestTooLargeError         413 request_too_large
    ├── AuthenticationError              401 invalid_api_key
    ├── PermissionDeniedError            403 insufficient_scope
    │   └── ModelNotAllowedError         403 model_not_allowed
    ├── ModelNotFoundError               404 model_not_found
    ├── IdempotencyConflictError         422 idempotency_key_reused
    ├── UnknownFileError                 404 file_not_found
    ├── UnknownBatchError                404 batch_not_found
    ├── StorageQuotaError                403 storage_quota_exceeded
    ├── RateLimitError                   429 rate_limit_exceeded   with Retry-After
    ├── QuotaError                       429 insufficient_quota
    ├── QueueFullError                   429 queue_full            with Retry-After
    ├── TooManyBatchesError              429 too_many_batches      with Retry-After
    ├── QueueDrainingError               503 queue_draining        with Retry-After
    ├── NoWorkerError                    503 no_worker             with Retry-After
    ├── LoadFailedError                  503 load_failed           with Retry-After
    ├── QueueUnavailableError            503 queue_unavailable     with Retry-After
    ├── StorageUnavailableError          503 storage_unavailable   with Retry-After
    ├── StorageFullError                 507 storage_full
    ├── DeadlineError                    504 deadline_exceeded
    ├── JobFailedError                   500, or what the worker's error says
    │   └── RetryableError               the worker's trouble, not the job's: tried again with backoff
    ├── JobNotFoundError                 404 job_not_found
    └── ConfigurationError               never leaves the process: bad settings, stops a command with exit code 2

The shape on the wire is OpenAI's: https://platform.openai.com/docs/guides/error-codes
"""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PARAM = re.compile(r"([^.\[]*)(.*)", re.DOTALL)
"""The name of a parameter, and the path within it."""


class FastchatQError(Exception):
    """Base of all errors. ``message`` names the value, the limit and the way out."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None
    retry_after_s: int | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    """Response headers that go with the error."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def respell(self, spelt: Mapping[str, str]) -> None:
        """Names parameters as the request has them, not as the job: a worker knows only the job."""
        name, rest = PARAM.fullmatch(self.param or "").groups()  # type: ignore[union-attr]  # it matches anything
        if name in spelt:
            self.param = spelt[name] + rest
            self.message = self.message.replace(f"'{name}'", f"'{spelt[name]}'")
        if self.code == "context_length_exceeded":  # nothing that a client wrote is in this one
            for old, new in spelt.items():
                self.message = re.sub(rf"\b{old}\b", new, self.message)


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


class RequestTimeoutError(InvalidRequestError):
    """The body was not whole in time."""

    status = 408
    code = "request_timeout"


class AuthenticationError(FastchatQError):
    """No key, or one that is not known."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDeniedError(FastchatQError):
    """The key is good, but not for this."""

    status = 403
    type = "permission_denied"
    code = "insufficient_scope"


class ModelNotAllowedError(PermissionDeniedError):
    """The model is not on the key's list."""

    code = "model_not_allowed"


class ModelNotFoundError(FastchatQError):
    """No worker ever served a model of that name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class IdempotencyConflictError(FastchatQError):
    """The idempotency key was used for another request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__(
            "This Idempotency-Key was used for another request. Send the same request again, or take a new key."
        )


class JobNotFoundError(FastchatQError):
    """No such job, or not the caller's, or it ended long ago, or Redis lost it."""

    status = 404
    type = "invalid_request_error"
    code = "job_not_found"

    def __init__(self, public_id: str) -> None:
        super().__init__(
            f"There is no job {public_id!r}: it never was, it ended too long ago, or the queue has lost it.", param="id"
        )


class RateLimitError(FastchatQError):
    """The key has used up its requests or tokens of the minute; nothing was queued."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.retry_after_s, self.headers = retry_after_s, headers


class QuotaError(FastchatQError):
    """The key has used up the tokens that it was given; nothing was queued. Waiting does not help."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, message: str, *, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.headers = {**headers, "x-should-retry": "false"}  # the official clients would try again


class QueueFullError(FastchatQError):
    """The lane, or the tenant's share of it, holds as many waiting jobs as it may."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    max_retry_after_s = 600

    def __init__(self, message: str, wait_s: float, *, own: bool = False) -> None:
        """``own``: it is the tenant's share that is full."""
        self.own = own
        self.retry_after_s = min(max(math.ceil(wait_s), 1), self.max_retry_after_s)
        super().__init__(f"{message} (in about {self.retry_after_s} s).")


class QueueDrainingError(FastchatQError):
    """An operator drains the queue."""

    status = 503
    code = "queue_draining"
    retry_after_s = 30


class NoWorkerError(FastchatQError):
    """The model is known, but no worker serves it now."""

    status = 503
    code = "no_worker"
    retry_after_s = 5


class LoadFailedError(FastchatQError):
    """The model is loaded on demand, and that failed lately."""

    status = 503
    code = "load_failed"

    def __init__(self, model: str, reason: str, retry_in_s: int) -> None:
        self.retry_after_s = max(retry_in_s, 1)
        super().__init__(
            f"Model {model!r} could not be loaded: {reason}. It is tried again for requests that come in "
            f"{self.retry_after_s} s or later.",
            param="model",
        )


class QueueUnavailableError(FastchatQError):
    """Redis cannot be reached, or refuses writes; nothing was accepted."""

    status = 503
    code = "queue_unavailable"
    retry_after_s = 2


class UnknownFileError(FastchatQError):
    """No such file, or not the caller's, or it was deleted or has expired."""

    status = 404
    type = "invalid_request_error"
    code = "file_not_found"

    def __init__(self, file_id: str) -> None:
        super().__init__(f"No such File object: {file_id[:80]}", param="id")


class UnknownBatchError(FastchatQError):
    """No such batch, or not the caller's."""

    status = 404
    type = "invalid_request_error"
    code = "batch_not_found"

    def __init__(self, batch_id: str) -> None:
        super().__init__(f"No batch found with id '{batch_id[:80]}'.", param="batch_id")


class TooManyBatchesError(FastchatQError):
    """The tenant has as many open batches as it may; nothing was accepted."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_batches"
    retry_after_s = 60


class StorageQuotaError(FastchatQError):
    """The tenant's files take as much room as they may; nothing was kept."""

    status = 403
    type = "insufficient_quota"
    code = "storage_quota_exceeded"


class StorageUnavailableError(FastchatQError):
    """The storage of files cannot be reached, or refuses; nothing was kept."""

    status = 503
    code = "storage_unavailable"
    retry_after_s = 5


class StorageFullError(FastchatQError):
    """The storage of files has no room left; nothing was kept. Sending a file again at once would not help."""

    status = 507
    code = "storage_full"
    headers = MappingProxyType({"x-should-retry": "false"})


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


class RetryableError(JobFailedError):
    """The worker is in trouble (no memory left, a device reset), and the job is not to blame: another try may do.

    Args:
        counts: it is one of the few tries that a job has; if not, only its deadline ends them.
        retry_after_s: when to try again; None: after a backoff.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        code: str | None = None,
        counts: bool = True,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message, status=status, code=code)
        self.counts, self.retry_after_s = counts, retry_after_s


class ConfigurationError(FastchatQError):
    """A setting or the environment is wrong; the message says which and what to do."""
