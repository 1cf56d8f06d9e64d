"""``/v1/batches``: many requests in a file, answered in a file, whenever there is room for them. OpenAI's batch API."""

import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field

from fastchat_q.batches import Manifest, new_batch_id
from fastchat_q.errors import InvalidRequestError, StorageUnavailableError, TooManyBatchesError, UnknownFileError
from fastchat_q.ledger import Ledger, Part
from fastchat_q.storage import MissingObjectError

from .auth import caller_of, check_scope
from .endpoints import ENDPOINTS
from .fields import Metadata, Strict
from .render import to_json
from .service import Service, service_of, tenant_of

router = APIRouter(tags=["batches"])

WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_WINDOW_S = 30 * 86400
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 86400


class OutputExpiresAfter(Strict):
    """When the files of results are deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)


class BatchRequest(Strict):
    """The body of ``POST /v1/batches``."""

    input_file_id: str = Field(min_length=1, max_length=64)
    endpoint: str = Field(max_length=64)
    completion_window: str = Field(max_length=16)
    """``24h``. Extension: any number of s, m, h or d, to 30 days."""
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None


@router.post("/v1/batches", summary="Create a batch", responses={200: {"description": "A batch object."}})
async def create_batch(body: BatchRequest, request: Request) -> Response:
    """Takes a file of requests; durable when this answers. The orchestrator reads it and works on it."""
    service, caller = service_of(request), caller_of(request)
    check_scope(caller, "batch", "batches")
    if body.endpoint not in ENDPOINTS:
        raise InvalidRequestError(
            f"Invalid value for 'endpoint': {body.endpoint!r}. Batches take {', '.join(sorted(ENDPOINTS))}.",
            param="endpoint",
            code="invalid_value",
        )
    window_s = _window_s(body.completion_window)
    await _check_input(service, body.input_file_id, tenant_of(request))
    limit = service.settings.max_open_batches
    if await service.batches.num_open(caller.tenant) >= limit:
        raise TooManyBatchesError(
            f"You have {limit} batches that have not ended, which is the limit. Wait for one of them, cancel one, or "
            "raise FASTCHAT_Q_MAX_OPEN_BATCHES on the server."
        )
    reservation = await service.limits.admit_batch(caller)
    created_at = int(time.time())
    manifest = Manifest(
        id=new_batch_id(),
        caller=caller.model_dump(mode="json"),
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        created_at=created_at,
        expires_at=created_at + window_s,
        metadata=body.metadata,
        output_expires_after_s=body.output_expires_after.seconds if body.output_expires_after else None,
    )
    return _reply((await service.batches.create(manifest)).to_dict(), reservation.headers)


@router.get("/v1/batches", summary="List batches")
async def list_batches(
    request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> Response:
    """The caller's batches, the newest first."""
    found, more = await service_of(request).batches.list(tenant_of(request), after, limit)
    ids = [batch["id"] for batch in found]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return _reply({"object": "list", "data": found, "first_id": first, "last_id": last, "has_more": more})


@router.get("/v1/batches/{batch_id}", summary="Retrieve a batch")
async def retrieve_batch(batch_id: str, request: Request) -> Response:
    """A batch as of about a second ago."""
    return _reply(await service_of(request).batches.get(batch_id, tenant_of(request)))


@router.post("/v1/batches/{batch_id}/cancel", summary="Cancel a batch")
async def cancel_batch(batch_id: str, request: Request) -> Response:
    """What waits ends at once, what runs within seconds; what is there by then is in the output file."""
    check_scope(caller_of(request), "batch", "batches")
    return _reply(await service_of(request).batches.cancel(batch_id, tenant_of(request)))


@router.get("/v1/batches/{batch_id}/output", summary="Download a batch's answers so far")
async def download_output(batch_id: str, request: Request) -> Response:
    """Extension: the lines of the output file that are there by now, of a batch in any state."""
    return await _download(batch_id, "output", request)


@router.get("/v1/batches/{batch_id}/errors", summary="Download a batch's errors so far")
async def download_errors(batch_id: str, request: Request) -> Response:
    """Extension: the same for the error file."""
    return await _download(batch_id, "errors", request)


async def _download(batch_id: str, part: Part, request: Request) -> Response:
    service, tenant = service_of(request), tenant_of(request)
    await service.batches.get(batch_id, tenant)
    pieces = _pieces(service, batch_id, part)
    first = await anext(pieces, b"")  # an error of the storage has a status of its own

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(body(), media_type="application/jsonl")


async def _pieces(service: Service, batch_id: str, part: Part) -> AsyncIterator[bytes]:
    """Of a batch that ends meanwhile, the rest comes out of its file: that is all segments, one after the other."""
    sent = 0
    batch = await service.batches.load(batch_id)
    if batch.ended is None:
        try:
            async for piece in Ledger(service.batches.storage, batch_id).read(part, batch.head):
                sent += len(piece)
                yield piece
            return
        except MissingObjectError:
            batch = await service.batches.load(batch_id)
    if batch.ended is None:
        raise StorageUnavailableError("Answers of this batch are missing in the storage. Its log says more.")
    file_id = batch.ended.output_file_id if part == "output" else batch.ended.error_file_id
    if file_id is not None:
        async for piece in service.files.content(await service.files.get(file_id, batch.manifest.tenant), sent):
            yield piece


def _window_s(window: str) -> int:
    match = WINDOW.fullmatch(window)
    seconds = int(match[1]) * SECONDS[match[2]] if match else 0
    if not 0 < seconds <= MAX_WINDOW_S:
        raise InvalidRequestError(
            f"Invalid value for 'completion_window': {window!r}. Send '24h', or another time such as '1h' or '7d', of "
            "30 days at the most.",
            param="completion_window",
            code="invalid_value",
        )
    return seconds


async def _check_input(service: Service, file_id: str, tenant: str | None) -> None:
    try:
        record = await service.files.get(file_id, tenant)
    except UnknownFileError as error:
        raise InvalidRequestError(
            f"Invalid value for 'input_file_id': {error.message}.", param="input_file_id", code="file_not_found"
        ) from error
    if record.purpose != "batch":
        raise InvalidRequestError(
            f"Invalid value for 'input_file_id': the file has the purpose {record.purpose!r}; upload it with 'batch'.",
            param="input_file_id",
            code="invalid_file_purpose",
        )


def _reply(found: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(found), headers=headers, media_type="application/json")
