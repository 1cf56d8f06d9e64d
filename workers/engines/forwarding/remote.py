"""Engines that forward to another server: what they all do about one that is away, busy, or cut off in an answer.

What a request and an answer look like on the wire is the subclass's; it raises what its client library raises, and says
in `troubled` what that means.
"""

import asyncio
import email.utils
import math
import random
import time
from abc import abstractmethod
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import structlog

from fastchat_q.choices import DialectName
from fastchat_q.errors import FastchatQError, InvalidRequestError, JobFailedError, RetryableError
from fastchat_q.events import Piece
from fastchat_q.jobs import Job
from fastchat_q.registry import ModelCard

from ..async_engine import AsyncEngine, Give
from ..base import UPSTREAM_BUSY, CannotResumeError, Ended, Request
from ..processing.replay import Replay

log = structlog.get_logger()

CONNECT_S = 10.0
TIMEOUT = httpx2.Timeout(None, connect=CONNECT_S)
"""How long an answer may pause is the worker's to say, not the client's."""
UNKNOWN_ID = -1
"""Of a token whose id the server does not tell."""
PROBE_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""While the server is away it is asked in these intervals, the last one over and over."""
BUSY_S = 2.0
"""What a server that is busy is spared when it does not say for how long."""
MAX_PAUSE_S = 60.0
AWAY_S = 1.0
"""Until a job that could not be sent is tried again: it waits in the queue, where any worker may take it."""

REFUSED = frozenset({400, 409, 411, 413, 415, 416, 422, 451})
"""Statuses that say something about the request; the client of ours gets them as they are."""
CODES = {"exceed_context_size_error": "context_length_exceeded"}
"""OpenAI's codes for what llama.cpp says by types of its own."""
BUSY = frozenset({429, 503, 529})


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where the other server is and how it is spoken to.

    Args:
        model: its name for the model.
        base_url: None: the client library's own.
        api_key: never logged, never part of an error.
        dialect: the kind of server, if the operator said it.
    """

    model: str
    base_url: str | None
    api_key: str | None
    dialect: DialectName | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with a request, as the client library tells it.

    Args:
        status: of the reply; 0: there was none, or it broke off.
        message: the server's own words.
        unsent: the server was not reached at all.
        retry_after_s: what it asked for.
    """

    status: int
    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None
    unsent: bool = False
    retry_after_s: float | None = None


class BrokenOffError(Exception):
    """The answer ended without its end."""


class RemoteEngine(AsyncEngine):
    """Forwards requests. `trouble` says why it takes none at the moment: jobs wait in the queue meanwhile."""

    errors: tuple[type[Exception], ...]
    """What the client library raises."""

    def __init__(self, card: ModelCard, slots: int, upstream: Upstream) -> None:
        super().__init__(card, slots)
        self.upstream = upstream
        self._away = asyncio.Event()
        self._paused_until = 0.0

    @abstractmethod
    async def answer(self, request: Request, give: Give, prefix: str, done: int) -> Ended:
        """Sends a request and gives each piece of the answer.

        Args:
            prefix: the answer goes on behind this text, which is `done` tokens; only where `continues` said so.

        Raises:
            BrokenOffError: or anything of ``errors``.
        """

    @abstractmethod
    async def probe(self) -> None:
        """Asks the server for something cheap. Raises what ``errors`` says, if it does not answer."""

    @abstractmethod
    def troubled(self, error: Exception) -> Trouble:
        """What one of ``errors`` means."""

    def continues(self, job: Job) -> bool:
        """Whether the server takes the beginning of an answer and goes on with it."""
        return False

    def repeats(self, job: Job) -> bool:
        """Whether the same request may have the same answer once more."""
        return job.sampling.temperature == 0

    def duties(self) -> list[Coroutine[Any, Any, None]]:
        return [self._look_for_it()]

    async def serve(self, request: Request, give: Give) -> Ended:
        try:
            return await self._serve_from(request, give)
        except BrokenOffError as error:
            raise RetryableError(str(error), status=502, code="upstream_lost") from error
        except self.errors as error:
            raise self._meaning(request.job.id, self.troubled(error)) from error

    async def _serve_from(self, request: Request, give: Give) -> Ended:
        """From the beginning, or from where an earlier attempt left off."""
        if not any(piece.said or piece.finish for piece in request.prior):
            return await self.answer(request, give, "", 0)
        if self.continues(request.job) and is_continuable(request):
            passed_on = Counted(give)
            try:
                return await self._continue(request, passed_on)
            except self.errors as error:
                if passed_on.count or self.troubled(error).status not in REFUSED:
                    raise
                log.info("upstream does not go on with an answer", job=request.job.id)
        if not self.repeats(request.job):
            raise CannotResumeError("its server neither goes on with an answer nor repeats one")
        replay = Replay(request.prior, give)
        ended = await self.answer(request, replay.give, "", 0)
        replay.ended()
        return ended

    async def _continue(self, request: Request, give: Give) -> Ended:
        prefix = "".join(piece.text for piece in request.prior)
        done, most = sum(piece.k for piece in request.prior), request.job.sampling.max_tokens
        if most is not None and done >= most:
            done = most - 1  # the log ends with its last token, but nobody knows the finish reason
        kept = prefix.rstrip()  # chat templates strip it, and some servers refuse it: then it has to come again
        replay = Replay([Piece(text=prefix[len(kept) :])], give)
        ended = await self.answer(request, replay.give, kept, done)
        replay.ended()
        return ended

    def _meaning(self, job_id: str, trouble: Trouble) -> FastchatQError:
        error = job_error(trouble)
        if trouble.unsent:
            self.is_away(trouble.message)
        elif error.code == UPSTREAM_BUSY:
            self._pause(BUSY_S if trouble.retry_after_s is None else trouble.retry_after_s)
        if trouble.status not in REFUSED:
            code = trouble.code or trouble.type  # not its message: some servers repeat a part of the key
            log.warning("upstream failed", job=job_id, status=trouble.status, code=code, means=error.code)
        return error

    def _pause(self, seconds: float) -> None:
        """Takes no further jobs for so long."""
        until = time.monotonic() + min(seconds, MAX_PAUSE_S)
        if until > self._paused_until and not self._away.is_set():
            self._paused_until = until
            self.trouble = f"the upstream server asks for a pause of {seconds:g} s"
            self._loop.call_at(self._loop.time() + until - time.monotonic(), self._go_on)

    def _go_on(self) -> None:
        if not self._away.is_set() and time.monotonic() >= self._paused_until - 0.01:
            self.trouble = ""

    def is_away(self, why: str) -> None:
        """Takes no jobs until `probe` says that the server is there."""
        if not self._away.is_set():
            log.warning("upstream is away", why=why)
        self.trouble = f"the upstream server cannot be reached: {why}"
        self._away.set()

    async def _look_for_it(self) -> None:
        """While the server is away: until it answers again."""
        while True:
            await self._away.wait()
            for tries in range(1_000_000_000):
                await asyncio.sleep(PROBE_S[min(tries, len(PROBE_S) - 1)])
                if await self._answers():
                    break
            log.info("upstream is back")
            self._away.clear()
            self.trouble = ""

    async def _answers(self) -> bool:
        try:
            await self.probe()
        except self.errors as error:
            trouble = self.troubled(error)
            return 0 < trouble.status < 500
        return True


class Counted:
    """Passes pieces on, and knows whether there were any."""

    def __init__(self, give: Give) -> None:
        self._give = give
        self.count = 0

    def __call__(self, piece: Piece) -> None:
        self.count += 1
        self._give(piece)


def is_continuable(request: Request) -> bool:
    """Whether the text of the answer so far is all that a server needs to go on with it."""
    sampling, prior = request.job.sampling, request.prior
    return (
        sampling.n == 1
        and sampling.guide is None
        and sampling.logprobs is None
        and not any(piece.reasoning or piece.tool_calls for piece in prior)
        and any(piece.text.strip() for piece in prior)
    )


def job_error(trouble: Trouble) -> FastchatQError:
    """What our client is told, or that the job is tried again. Nothing of a reply that could hold a secret goes out."""
    if trouble.unsent:
        return patient("The upstream server cannot be reached.", "upstream_away", AWAY_S)
    if trouble.code == "insufficient_quota":  # a 429 that no waiting mends
        return JobFailedError("The upstream server's quota is used up.", status=502, code="upstream_quota")
    if trouble.status in BUSY:
        wait_s = BUSY_S if trouble.retry_after_s is None else trouble.retry_after_s
        return patient("The upstream server is busy.", UPSTREAM_BUSY, wait_s)
    if trouble.status in REFUSED:
        refused = InvalidRequestError(trouble.message, param=trouble.param, code=trouble.code)
        refused.status = trouble.status
        return refused
    if trouble.status == 0 or trouble.status == 408 or trouble.status >= 500:
        what = f"failed (HTTP {trouble.status})" if trouble.status else "broke the answer off"
        return RetryableError(f"The upstream server {what}.", status=502, code="upstream_error")
    return JobFailedError(
        f"The upstream server does not accept this worker's requests (HTTP {trouble.status}): its operator should look "
        "at the key, the base URL and the name of the model.",
        status=502,
        code="upstream_refused",
    )


def patient(message: str, code: str, wait_s: float) -> RetryableError:
    """Trouble that passes: no number of tries is too many, until the job's deadline."""
    jitter = random.uniform(1.0, 1.25)  # those that failed together do not come back together
    return RetryableError(
        message, status=503, code=code, counts=False, retry_after_s=max(1, math.ceil(wait_s * jitter))
    )


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds that a reply asks to wait: a number, or the time until a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def status_trouble(status: int, body: object, message: str, headers: Mapping[str, str]) -> Trouble:
    """An error reply: OpenAI's or Anthropic's error object, or one inside of ``error``."""
    detail: Any = body if isinstance(body, Mapping) else {}
    detail = detail.get("error") if isinstance(detail.get("error"), Mapping) else detail
    return Trouble(
        status,
        str(detail.get("message") or message),
        _word(detail.get("type")),
        _word(detail.get("code")) or CODES.get(str(detail.get("type"))),
        _word(detail.get("param")),
        retry_after_s=retry_after_s(headers),
    )


def connection_trouble(error: Exception) -> Trouble:
    """No reply, or half of one."""
    cause = error if isinstance(error, httpx2.HTTPError) else error.__cause__ or error
    unsent = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout)
    return Trouble(0, f"{type(cause).__name__}: {cause}", unsent=unsent)


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None
