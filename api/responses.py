"""``/v1/responses``: create, retrieve, stream on, cancel, delete, what went in. A response is a job with its log."""

import base64
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import Response

from fastchat_q import blobs
from fastchat_q.errors import InvalidRequestError, JobFailedError
from fastchat_q.images import media_type

from . import answers, response_request
from .asked import Asked, off_the_loop_if_large
from .asking import answer
from .following import LastEventId, StartingAfter, event_id, follow
from .render import to_json
from .response_items import Item, image_parts, shown
from .response_output import events_so_far, item_id
from .response_request import IMAGE_URLS, ResponseRequest, asked
from .response_store import Stored, context_of, load
from .service import Service, service_of, tenant_of
from .stream import INVALID_EVENT_ID, EventId
from .tokenize import asked_count

router = APIRouter(tags=["responses"])

Include = Annotated[list[str] | None, Query()]
Includes = Annotated[list[str] | None, Query(alias="include[]", description="The same, as OpenAI's clients spell it.")]
CANCELLED = "cancelled by request"


async def no_other_query(request: Request) -> None:
    """Refuses query parameters that the route does not have."""
    known = {one.alias for one in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise InvalidRequestError(f"Unknown parameter: '{name[:80]}'.", param=name[:80], code="unknown_parameter")


@router.post(
    "/v1/responses",
    summary="Create a response",
    responses={200: {"description": "A response object, or server-sent events if `stream` is true."}},
)
async def create_response(body: ResponseRequest, request: Request) -> Response:
    """Queues the request as a job; with `background` it is done without its client."""
    return await answer(request, await _asked(body, request))


@router.post("/v1/responses/input_tokens", summary="Count the tokens of a response's input")
async def count_input_tokens(body: ResponseRequest, request: Request) -> Response:
    """Answers `input_tokens`: of the very prompt that the same response would have. The rest of it changes nothing."""
    return await answer(request, _counted(await _asked(body, request)))


@router.post("/v1/responses/compact", include_in_schema=False)
async def compact() -> Response:
    """Not there: by its path alone, it would be a response that cannot be posted to."""
    raise HTTPException(404)


async def _asked(body: ResponseRequest, request: Request) -> Asked:
    service = service_of(request)
    size = len(await request.body())
    context = await context_of(service, tenant_of(request), body)
    return await off_the_loop_if_large(size, asked, body, service.settings, size, context)


def _counted(found: Asked) -> Asked:
    """What a request asks for that wants to know only how many tokens the prompt of this one has."""
    job = found.job
    tools = () if job.tool_choice == "none" else job.tools  # the prompt leaves them out then
    count = asked_count(
        found.body,
        job.model,
        job.messages,
        tools=tools,
        template_kwargs=job.template_kwargs,
        images=found.images,
        form="input_tokens",
    )
    return replace(count, spelt=found.spelt)


@router.get(
    "/v1/responses/{response_id}",
    summary="Retrieve a response",
    dependencies=[Depends(no_other_query)],
    responses={200: {"description": "A response object, or the events of its stream if `stream` is true."}},
)
async def retrieve_response(
    response_id: str,
    request: Request,
    stream: bool = False,
    starting_after: StartingAfter = None,
    last_event_id: LastEventId = None,
    include_obfuscation: bool = False,
    include: Include = None,
    includes: Includes = None,
) -> Response:
    """As far as it is; with `stream` its events, behind the one with the number `starting_after`, on any server."""
    service, tenant = service_of(request), tenant_of(request)
    _check_include([*(include or ()), *(includes or ())])
    if include_obfuscation:
        raise InvalidRequestError(
            "Unsupported parameter: 'include_obfuscation': nothing hides the lengths of tokens here. Leave it out.",
            param="include_obfuscation",
            code="unsupported_parameter",
        )
    stored = await load(service, response_id, tenant)
    after = event_id(last_event_id) if starting_after is None else event_id(starting_after, "starting_after")
    if not stream:
        if starting_after is not None:
            raise InvalidRequestError("'starting_after' is only allowed when 'stream' is true.", param="starting_after")
        return _reply(stored)
    events = events_so_far(stored.view, stored.deltas, stored.record.end())
    if isinstance(after, EventId) or (after is not None and after >= events):
        raise InvalidRequestError(
            f"There is no going on behind the event {after}: the response has had {events} events, from 0 on. Read it "
            "from its beginning, without 'starting_after'.",
            param="starting_after",
            code=INVALID_EVENT_ID,
        )
    return await follow(service, request.state.request_id, *stored.key, tenant, after)


@router.post("/v1/responses/{response_id}/cancel", summary="Cancel a response")
async def cancel_response(response_id: str, request: Request) -> Response:
    """Ends a response that goes on in the background; one that has ended stays as it is."""
    service, tenant = service_of(request), tenant_of(request)
    stored = await load(service, response_id, tenant)
    if not stored.view.extra["background"]:
        raise InvalidRequestError(
            "Cannot cancel a synchronous response, only one that was created with 'background': true. Hang up instead.",
            param="id",
        )
    await service.queue.cancel(*stored.key, CANCELLED, tenant=tenant)
    return _reply(await load(service, response_id, tenant))


@router.delete("/v1/responses/{response_id}", summary="Delete a response")
async def delete_response(response_id: str, request: Request) -> Response:
    """Forgets what was asked and answered; a response that has not ended is cancelled."""
    service, tenant = service_of(request), tenant_of(request)
    stored = await load(service, response_id, tenant)
    await service.queue.forget(*stored.key, tenant=tenant)
    body = to_json({"id": response_id, "object": "response", "deleted": True})
    return Response(body, media_type="application/json")


@router.get(
    "/v1/responses/{response_id}/input_items",
    summary="List the input items of a response",
    dependencies=[Depends(no_other_query)],
)
async def list_input_items(
    response_id: str,
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    include: Include = None,
    includes: Includes = None,
) -> Response:
    """What was in the request itself, and not in the conversation before."""
    service = service_of(request)
    wanted = _check_include([*(include or ()), *(includes or ())])
    stored = await load(service, response_id, tenant_of(request))
    items = list(enumerate(stored.inputs))
    urls = await _data_urls(service, stored, stored.inputs) if IMAGE_URLS in wanted else {}
    own = [shown(item, item_id(item["type"], f"i{number}", stored.public_id), urls.get) for number, item in items]
    if order == "desc":
        own.reverse()
    first = 0
    if after is not None:
        ids = [item["id"] for item in own]
        if after not in ids:
            raise InvalidRequestError(f"There is no input item {after!r} in this response.", param="after")
        first = ids.index(after) + 1
    page = own[first : first + limit]
    body = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": first + limit < len(own),
    }
    return Response(to_json(body), media_type="application/json")


async def _data_urls(service: Service, stored: Stored, items: list[Item]) -> dict[str, str]:
    digests = sorted({part["blob"] for part in image_parts(items) if part["image_url"] is None})
    try:
        found = await blobs.fetch(service.redis, stored.key[0], digests)
    except JobFailedError as error:
        raise InvalidRequestError("An image of this response is not kept any more.", param="include") from error
    return {
        digest: f"data:{media_type(content)};base64,{base64.b64encode(content).decode()}"
        for digest, content in found.items()
    }


def _check_include(include: list[str]) -> list[str]:
    """What is asked for beside the rest: much of it is there in any case, or is of tools that run on the server.

    Raises:
        InvalidRequestError: it is neither.
    """
    known = get_args(response_request.Include)
    for name in include:
        if name not in known:
            raise InvalidRequestError(
                f"Invalid value for 'include': {name[:80]!r} is none of {', '.join(map(repr, known))}.", param="include"
            )
    return include


def _reply(stored: Stored) -> Response:
    body: dict[str, Any] = answers.state(stored.view, stored.record, stored.deltas)
    return Response(to_json(body), headers={"x-job-id": stored.public_id}, media_type="application/json")
