"""Responses as they are kept, which is as jobs: one by its id, and the conversation that one goes on with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from fastchat_q import blobs, keys, tokens
from fastchat_q.errors import InvalidRequestError, JobFailedError, RequestTooLargeError
from fastchat_q.events import Delta
from fastchat_q.keys import parse_public_job_id
from fastchat_q.records import JobRecord, read_record

from . import answers
from .render import View
from .response_items import Item, ItemReference, image_parts
from .response_output import ID_PREFIX, item_id
from .response_request import NOTHING, Context, ResponseRequest
from .service import Service

FAILED = {"failed": "failed", "cancelled": "was cancelled", "in_progress": "has not ended", "queued": "has not ended"}
"""Statuses of responses that no other goes on with."""


class ResponseNotFoundError(InvalidRequestError):
    """No such response, or not the caller's, or it is not kept (any more)."""

    status = 404

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"Response with id {response_id[:200]!r} not found: it never was, was not stored, was deleted, or ended "
            "too long ago.",
            param="id",
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """A response at one moment."""

    view: View
    record: JobRecord
    deltas: Sequence[Delta]
    key: tuple[str, str]
    """The slug of its queue, and the id of its job."""

    @property
    def public_id(self) -> str:
        """Of its job."""
        return keys.public_job_id(*self.key)

    @property
    def inputs(self) -> list[Item]:
        """The items of its request."""
        found: list[Item] = self.view.extra["input"]
        return found

    def items(self) -> list[Item]:
        """Those of its request and of its output, each with its id; a call that was cut off is none."""
        given = [
            {**item, "id": item.get("id") or item_id(item["type"], f"i{number}", self.public_id)}
            for number, item in enumerate(self.inputs)
        ]
        output: list[Item] = answers.state(self.view, self.record, self.deltas)["output"]
        return given + [one for one in output if one["type"] != "function_call" or one["status"] == "completed"]


async def load(service: Service, response_id: str, tenant: str | None) -> Stored:
    """A response by its id.

    Args:
        tenant: whose it must be; None: anybody's.

    Raises:
        ResponseNotFoundError: there is none.
    """
    is_one = response_id.startswith(ID_PREFIX)
    stored = await _find(service, response_id.removeprefix(ID_PREFIX), tenant) if is_one else None
    if stored is None:
        raise ResponseNotFoundError(response_id)
    return stored


async def _find(service: Service, public_id: str, tenant: str | None) -> Stored | None:
    key = parse_public_job_id(public_id)
    if key is None:
        return None
    record = await read_record(service.redis, *key, whole=True, slots=service.catalog.slots(key[0]))
    if record is None or not record.view or tenant not in (None, record.tenant):
        return None
    view = View.from_json(record.view)
    if view.form != "response" or not view.extra["echo"]["store"]:
        return None
    return Stored(view, record, await tokens.read(service.redis, *key), key)


async def context_of(service: Service, tenant: str | None, body: ResponseRequest) -> Context:
    """What a request refers to: the responses before it, and items by their ids. They are kept anew from now on.

    Raises:
        InvalidRequestError: something is not there, or not to be gone on with.
        RequestTooLargeError: it is too much.
    """
    given = () if isinstance(body.input, str) else body.input
    wanted = [item.id for item in given if isinstance(item, ItemReference)]
    if body.previous_response_id is None and not wanted:
        return NOTHING
    found = await _chain(service, tenant, body.previous_response_id) if body.previous_response_id else []
    items = [item for stored in reversed(found) for item in stored.items()]
    references = {item["id"]: item for item in items}
    others: dict[str, Stored] = {}
    for one in dict.fromkeys(wanted):
        public_id = one.split("_", 2)[-1]
        if one in references or public_id in others:
            continue
        stored = await _find(service, public_id, tenant)
        if stored is not None:
            others[public_id] = stored
            references |= {item["id"]: item for item in stored.items()}
    referred = [references[one] for one in wanted if one in references]
    await _keep(service, [*found, *others.values()])
    return Context(items, references, await _images(service, [*found, *others.values()]), _size([*items, *referred]))


async def _chain(service: Service, tenant: str | None, response_id: str) -> list[Stored]:
    """The responses of a conversation, the latest first."""
    found: list[Stored] = []
    left = service.settings.max_body_bytes
    before: str | None = response_id
    while before is not None:
        stored = await _find(service, before.removeprefix(ID_PREFIX), tenant)
        if stored is None:
            raise InvalidRequestError(
                f"Previous response with id {before[:200]!r} not found: it never was, was not stored, was deleted, or "
                "ended too long ago.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if not found:
            _check_can_be_gone_on_with(stored, before)
        found.append(stored)
        left -= _size(stored.inputs)
        if left < 0:
            raise RequestTooLargeError(
                f"The conversation behind {response_id!r} has more than {service.settings.max_body_bytes} bytes. Begin "
                "a new one, or raise FASTCHAT_Q_MAX_BODY_BYTES on the server.",
                param="previous_response_id",
            )
        before = stored.view.extra["echo"]["previous_response_id"]
    return found


def _check_can_be_gone_on_with(stored: Stored, response_id: str) -> None:
    status = answers.state(stored.view, stored.record, ())["status"]
    if status in FAILED:
        way_out = "Wait for its end" if status in ("queued", "in_progress") else "Go on with the one before"
        raise InvalidRequestError(
            f"Previous response with id {response_id!r} {FAILED[status]}: no other can go on with it. {way_out}.",
            param="previous_response_id",
            code="previous_response_not_completed",
        )


async def _keep(service: Service, found: Sequence[Stored]) -> None:
    """A conversation is kept as long as it goes on: the time of each of its responses begins anew."""
    keep_ms = round(service.settings.result_ttl_s * 1000)
    pipe = service.redis.pipeline(transaction=False)
    for stored in found:
        names = keys.model_keys(stored.key[0])
        if stored.record.end() is not None:
            pipe.pexpire(names.job(stored.key[1]), keep_ms)
            pipe.pexpire(names.log(stored.key[1]), keep_ms)
    await pipe.execute()


async def _images(service: Service, found: Sequence[Stored]) -> Mapping[str, bytes]:
    """The images of their requests, by digest."""
    images: dict[str, bytes] = {}
    for stored in found:
        digests = [part["blob"] for part in image_parts(stored.inputs) if part["image_url"] is None]
        try:
            images |= await blobs.fetch(service.redis, stored.key[0], sorted(set(digests) - images.keys()))
        except JobFailedError as error:
            raise InvalidRequestError(
                "An image of the conversation is not kept any more. Begin a new one with what is needed of it.",
                param="previous_response_id",
                code="part_lost",
            ) from error
    return images


def _size(items: Sequence[Item]) -> int:
    return len(orjson.dumps(items))
