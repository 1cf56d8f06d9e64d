"""``/v1/files``: uploads that stream into the storage, and what is there."""

from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import quote

import structlog
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from fastchat_q.errors import FastchatQError, InvalidRequestError
from fastchat_q.files import FileRecord, Order, check_quota

from .auth import caller_of
from .render import to_json
from .service import Service, service_of, tenant_of
from .uploads import ANCHOR, MAX_EXPIRY_S, MIN_EXPIRY_S, PURPOSES, SECONDS, Body, UploadForm, check_declared
from .uploads import check_file_size as check_size

log = structlog.get_logger()
router = APIRouter(tags=["files"])

MAX_LISTED = 10_000
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        ANCHOR: {"type": "string", "enum": ["created_at"]},
                        SECONDS: {"type": "integer", "minimum": MIN_EXPIRY_S, "maximum": MAX_EXPIRY_S},
                    },
                }
            }
        },
    }
}
Purpose = Annotated[str | None, Query(max_length=100, description="Only files with this purpose.")]
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]
After = Annotated[str | None, Query(max_length=100, description="The id of a file: the page begins behind it.")]


@router.post("/v1/files", summary="Upload a file", openapi_extra=FORM)
async def create_file(request: Request) -> Response:
    """Stores a file while it comes. It is there once it has come whole and the reply says so."""
    service = service_of(request)
    body = Body(request, service.settings.stalled_client_s)
    try:
        record = await _store(request, service, body)
    except ClientDisconnect:
        log.info("upload cut off by its client")
        return Response(status_code=499)
    except FastchatQError as error:
        await _let_it_finish(body, error)
        raise
    log.info("file stored", file=record.id, bytes=record.bytes, purpose=record.purpose)
    return _reply(file_object(record))


@router.get("/v1/files", summary="List files")
async def list_files(
    request: Request, purpose: Purpose = None, limit: Limit = MAX_LISTED, order: Order = "desc", after: After = None
) -> Response:
    """Files of the caller's tenant by the time of their creation; newest first, unless `order` is `asc`."""
    files = service_of(request).files
    records, more = await files.list(tenant_of(request), purpose=purpose, after=after, limit=limit, order=order)
    return _reply(
        {
            "object": "list",
            "data": [file_object(record) for record in records],
            "has_more": more,
            "first_id": records[0].id if records else None,
            "last_id": records[-1].id if records else None,
        }
    )


@router.get("/v1/files/{file_id}", summary="Retrieve a file")
async def retrieve_file(file_id: str, request: Request) -> Response:
    """What is known of a file."""
    return _reply(file_object(await service_of(request).files.get(file_id, tenant_of(request))))


@router.get(
    "/v1/files/{file_id}/content",
    summary="Download a file",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The bytes of the file."}},
)
async def download_file(file_id: str, request: Request) -> Response:
    """The bytes of a file, as they were uploaded."""
    files = service_of(request).files
    record = await files.get(file_id, tenant_of(request))
    content = files.content(record)
    first = await anext(content, b"")  # what goes wrong here is still a status of its own
    headers = {
        "content-length": str(record.bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(record.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_joined(first, content), headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", summary="Delete a file")
async def delete_file(file_id: str, request: Request) -> Response:
    """Deletes a file for good; not one that an open batch reads."""
    service, tenant = service_of(request), tenant_of(request)
    await service.files.get(file_id, tenant)
    reader = (await service.batches.open_inputs()).get(file_id)
    if reader is not None:
        raise InvalidRequestError(
            f"The file {file_id!r} is read by the batch {reader!r}. Wait until that has ended, or cancel it.",
            param="file_id",
            code="file_in_use",
        )
    await service.files.delete(file_id, tenant)
    log.info("file deleted", file=file_id)
    return _reply({"id": file_id, "object": "file", "deleted": True})


def file_object(record: FileRecord) -> dict[str, Any]:
    """OpenAI's object: https://platform.openai.com/docs/api-reference/files/object"""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
        "status_details": None,
    }


async def _store(request: Request, service: Service, body: Body) -> FileRecord:
    files, settings, tenant = service.files, service.settings, caller_of(request).tenant
    check_declared(request.headers.get("content-length"), settings.max_file_bytes)
    used = await files.stored_bytes(tenant)

    def check(size: int) -> None:
        check_size(size, settings.max_file_bytes)
        check_quota(used + size, settings.max_stored_bytes)

    form = UploadForm(request.headers.get("content-type", ""), check)
    draft = await files.write(form.file(body.pieces()))
    try:
        return await files.publish(
            draft,
            tenant=tenant,
            filename=form.filename or "",
            purpose=form.purpose,
            expires_after_s=form.expires_after_s,
            max_stored_bytes=settings.max_stored_bytes,
        )
    except BaseException:
        await files.discard(draft)
        raise


async def _let_it_finish(body: Body, error: FastchatQError) -> None:
    """A client that is still sending reads no answer: what it sends is taken, within bounds."""
    try:
        finished = await body.drain()
    except (ClientDisconnect, FastchatQError):
        finished = False
    if not finished:
        error.headers = {**error.headers, "connection": "close"}


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def _reply(answer: dict[str, Any]) -> Response:
    return Response(to_json(answer), media_type="application/json")
