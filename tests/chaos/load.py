"""What the clients do: scenarios drawn at random, some dozens at a time."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from . import MODEL
from .client import CHAT, RETRY_S, Client
from .engine import Orders
from .report import Report
from .transcript import Intent, Transcript
from .wire import LOST, Wire

BATCH_SHARE = 0.2
"""Part of the jobs that go to the batch lane."""
POISON_EVERY_S = 75.0


@dataclass(frozen=True, slots=True)
class Shape:
    """How long jobs are and how fast."""

    tokens: tuple[int, int] = (20, 200)
    delay_ms: tuple[float, float] = (5.0, 20.0)


class Load:
    """Runs scenarios with ``clients`` clients until told to stop; `transcripts` are what they saw."""

    def __init__(
        self,
        ports: list[int],
        bearers: list[str],
        rng: random.Random,
        report: Report,
        clients: int,
        shape: Shape,
    ) -> None:
        self._rng, self._report, self._shape = rng, report, shape
        self._bearers = bearers
        self._clients = clients
        self._client = Client(ports, rng, report)
        self._keys = 0
        self._scenarios: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self.stream),
            (12, self.whole),
            (18, self.cut_and_resume),
            (12, self.duplicates_at_once),
            (8, self.duplicate_later),
            (5, self.leave),
            (4, self.cancel),
            (6, self.detach),
            (2, self.other_body),
        ]

    @property
    def transcripts(self) -> list[Transcript]:
        """All that clients remember."""
        return self._client.transcripts

    def cut_all(self) -> None:
        """Every reader of a stream loses its connection at once."""
        self._client.cut_all()

    async def run(self, until: float) -> None:
        """Starts scenarios until then (monotonic clock), and returns when all have ended."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._one_client(until))
            group.create_task(self._poison_now_and_then(until))

    async def _one_client(self, until: float) -> None:
        weights = [weight for weight, _ in self._scenarios]
        while time.monotonic() < until:
            [(_, scenario)] = self._rng.choices(self._scenarios, weights)
            self._report.count("scenarios", scenario.__name__.replace("_", " "))
            await scenario()
            await asyncio.sleep(self._rng.uniform(0.0, 0.2))

    async def stream(self) -> None:
        """Reads a stream to its end; comes back only if the server goes."""
        transcript, body = self._request("stream", "read")
        wire = await self._client.submit(transcript, body)
        if wire is not None:
            await self._client.read(transcript, wire)

    async def whole(self) -> None:
        """A request without ``stream``; with a key it is sent again when its server is killed."""
        transcript, body = self._request("whole", "read", stream=False)
        await self._get_whole(transcript, body, self._key() if self._rng.random() < 0.5 else None)

    async def cut_and_resume(self) -> None:
        """Hangs up in the middle, once or twice, and comes back to either server."""
        transcript, body = self._request("cut", "read")
        wire = await self._client.submit(transcript, body)
        if wire is not None:
            cuts = sorted(self._rng.randint(0, transcript.length) for _ in range(self._rng.randint(1, 2)))
            await self._client.read(transcript, wire, cuts)

    async def duplicates_at_once(self) -> None:
        """The same request with the same key, two or three times at once, on any servers."""
        first, body = self._request("duplicate", "read")
        key = self._key()
        twins = [
            first,
            *(Transcript("duplicate", "read", first.bearer, first.length) for _ in range(self._rng.randint(1, 2))),
        ]
        await asyncio.gather(*(self._stream_with_key(twin, body, key) for twin in twins))
        self._same_job(twins)

    async def duplicate_later(self) -> None:
        """The same request once more, in the middle or after the end; the second may want it whole."""
        first, body = self._request("duplicate", "read")
        key = self._key()
        second = Transcript("duplicate later", "read", first.bearer, first.length)
        after_s = self._rng.uniform(0.1, 3.0)

        async def later() -> None:
            await asyncio.sleep(after_s)
            await self._stream_with_key(second, body, key)

        await asyncio.gather(self._stream_with_key(first, body, key), later())
        self._same_job([first, second])

    async def other_body(self) -> None:
        """Another request with a key that is taken gets 422."""
        transcript, body = self._request("other body", "read")
        key = self._key()
        wire = await self._client.submit(transcript, body, key)
        if wire is None:
            return
        other = {**body, "seed": 1}
        try:
            refused = await Wire.request(
                self._client.port(), transcript.bearer, "POST", CHAT, other, {"idempotency-key": key}
            )
        except LOST:
            pass
        else:
            refused.cut()
            if refused.status not in (422, 429, 503):
                self._report.violate(f"another body with a used key got {refused.status}", transcript.job_id)
            self._report.count("requests", f"other body: status {refused.status}")
        await self._client.read(transcript, wire)

    async def leave(self) -> None:
        """Hangs up and does not come back."""
        transcript, body = self._request("leave", "leave")
        wire = await self._client.submit(transcript, body)
        if wire is not None:
            await self._client.read_some(transcript, wire, self._rng.randint(0, transcript.length))

    async def cancel(self) -> None:
        """Has the job cancelled in the middle, and reads on to the end."""
        transcript, body = self._request("cancel", "cancel")
        wire = await self._client.submit(transcript, body)
        if wire is None:
            return

        async def later() -> None:
            await asyncio.sleep(self._rng.uniform(0.0, 1.5))
            await self._client.cancel(transcript)

        await asyncio.gather(self._client.read(transcript, wire), later())

    async def detach(self) -> None:
        """Hangs up from a job that is to go on, and reads it all from the beginning later."""
        left, body = self._request("detach", "detach", on_disconnect="continue")
        wire = await self._client.submit(left, body)
        if wire is None:
            return
        await self._client.read_some(left, wire, self._rng.randint(0, left.length // 2))
        await asyncio.sleep(self._rng.uniform(0.5, 5.0))
        reader = Transcript("read later", "read", left.bearer, left.length, left.job_id)
        self.transcripts.append(reader)
        again = await self._client.resume(reader)
        if again is not None:
            await self._client.read(reader, again)

    async def poison(self) -> None:
        """A job that kills every worker it comes to."""
        transcript, body = self._request("poison", "poison", poison_at=self._rng.choice([0, 3]))
        wire = await self._client.submit(transcript, body, self._key())
        if wire is not None:
            await self._client.read(transcript, wire)

    async def _poison_now_and_then(self, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            while (left := until - time.monotonic()) > POISON_EVERY_S / 2:
                await asyncio.sleep(min(left, self._rng.uniform(0.2, 0.6) * POISON_EVERY_S))
                self._report.count("scenarios", "poison")
                self._report.note("poison submitted")
                group.create_task(self.poison())
                await asyncio.sleep(POISON_EVERY_S / 2)

    async def _stream_with_key(self, transcript: Transcript, body: dict[str, Any], key: str) -> None:
        wire = await self._client.submit(transcript, body, key)
        if wire is not None:
            await self._client.read(transcript, wire)

    async def _get_whole(self, transcript: Transcript, body: dict[str, Any], key: str | None) -> None:
        while True:
            wire = await self._client.submit(transcript, body, key)
            if wire is None or await self._client.read_whole(transcript, wire):
                return
            if key is None:
                transcript.intent = "leave"  # it cannot ask for its job again
                return
            await asyncio.sleep(RETRY_S)

    def _same_job(self, twins: list[Transcript]) -> None:
        ids = {twin.job_id for twin in twins if twin.job_id}
        if len(ids) > 1:
            self._report.violate("one idempotency key made several jobs", " ".join(sorted(ids)))
        self._report.count("duplicates", "attached", len(twins) - 1)

    def _request(
        self,
        scenario: str,
        intent: Intent,
        *,
        stream: bool = True,
        poison_at: int | None = None,
        **fields: Any,
    ) -> tuple[Transcript, dict[str, Any]]:
        length = self._rng.randint(*self._shape.tokens)
        orders = Orders(delay_ms=round(self._rng.uniform(*self._shape.delay_ms), 1), poison_at=poison_at)
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": orders.model_dump_json()}],
            "max_tokens": length,
            "stream": stream,
            **fields,
        }
        if stream and self._rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        if self._rng.random() < BATCH_SHARE:
            body["service_tier"] = "flex"
        return Transcript(scenario, intent, self._rng.choice(self._bearers), length), body

    def _key(self) -> str:
        self._keys += 1
        return f"key-{self._keys}-{self._rng.getrandbits(64):x}"
