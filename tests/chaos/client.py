"""One client's ways of getting an answer through servers that die: submit, read, come back, cancel."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .report import Report
from .transcript import BrokenStreamError, Transcript
from .wire import LOST, Wire

CHAT = "/v1/chat/completions"
PATIENCE_S = 90.0
"""A client tries for so long to be served by anybody."""
LONGEST_S = 300.0
"""No stream takes so long, whatever happens on the way."""
RETRY_S = 0.2
REFUSED = (429, 503)
"""Statuses that say «nothing was accepted, come again»."""


@dataclass(slots=True)
class Client:
    """Talks to any of the API servers. All transcripts end in `transcripts`, for the checker."""

    ports: Sequence[int]
    rng: random.Random
    report: Report
    transcripts: list[Transcript] = field(default_factory=list)
    wires: dict[int, Wire] = field(default_factory=dict)
    """Connections of streams that are being read."""

    def cut_all(self) -> None:
        """The network fails for a moment: every reader loses its connection."""
        for wire in self.wires.values():
            wire.cut()

    def port(self) -> int:
        """Any server."""
        return self.rng.choice(self.ports)

    async def submit(
        self, transcript: Transcript, body: dict[str, Any], key: str | None = None, port: int | None = None
    ) -> Wire | None:
        """Sends a chat request; None if it was not accepted, or nobody can know. Tries again only with a key."""
        headers = {"idempotency-key": key} if key else {}
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                wire = await Wire.request(port or self.port(), transcript.bearer, "POST", CHAT, body, headers)
            except LOST:
                self.report.count("requests", "lost before an answer")
            else:
                transcript.job_id = wire.headers.get("x-job-id", "")
                if transcript.job_id:
                    self._remember(transcript)
                    if wire.status == 200:
                        return wire
                    await self._take_error(transcript, wire)
                    return None
                wire.cut()
                self.report.count("requests", f"status {wire.status}")
                if wire.status not in REFUSED:
                    self.report.violate(f"a request was answered with {wire.status}", transcript.scenario)
                    return None
            if key is None:
                return None
            port = None
            await asyncio.sleep(RETRY_S)
        self.report.violate("a request with an idempotency key was not accepted in time", transcript.scenario)
        return None

    async def read(self, transcript: Transcript, wire: Wire, cuts: Sequence[int] = ()) -> None:
        """Reads a stream to its end, comes back when it is lost, and cuts it itself at some numbers of tokens."""
        try:
            async with asyncio.timeout(LONGEST_S):
                await self._read_on(transcript, wire, list(cuts))
        except TimeoutError:
            self._break(transcript, f"the stream did not end within {LONGEST_S:g} s")

    async def read_some(self, transcript: Transcript, wire: Wire, tokens: int) -> None:
        """Reads until there are so many tokens, or the end, or the connection is lost; then hangs up."""
        try:
            async for event in wire.events():
                self._feed(transcript, event)
                if transcript.seen >= tokens or transcript.end or transcript.broken:
                    break
        except LOST:
            self.report.count("requests", "stream lost")
        wire.cut()

    async def read_whole(self, transcript: Transcript, wire: Wire) -> bool:
        """The answer of a request without ``stream``; False: the connection was lost."""
        try:
            answer = await wire.json()
        except LOST:
            self.report.count("requests", "answer lost")
            wire.cut()
            return False
        try:
            transcript.feed_whole(answer)
        except BrokenStreamError as error:
            self._break(transcript, str(error))
        return True

    async def resume(self, transcript: Transcript) -> Wire | None:
        """Comes back behind the last event; None if that could not be done, which violates."""
        headers = {} if transcript.last_id is None else {"last-event-id": str(transcript.last_id)}
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                wire = await Wire.request(
                    self.port(), transcript.bearer, "GET", f"/v1/jobs/{transcript.job_id}/events", None, headers
                )
            except LOST:
                await asyncio.sleep(RETRY_S)
                continue
            if wire.status == 200:
                self.report.count("requests", "resumed")
                return wire
            wire.cut()
            if wire.status not in REFUSED:
                self._break(transcript, f"coming back was answered with {wire.status}")
                return None
            await asyncio.sleep(RETRY_S)
        self._break(transcript, "coming back did not succeed in time")
        return None

    async def cancel(self, transcript: Transcript) -> None:
        """``POST /v1/jobs/{id}/cancel`` until it is answered."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                wire = await Wire.request(
                    self.port(), transcript.bearer, "POST", f"/v1/jobs/{transcript.job_id}/cancel", {}, {}
                )
            except LOST:
                await asyncio.sleep(RETRY_S)
                continue
            wire.cut()
            if wire.status == 200:
                return
            if wire.status not in REFUSED:
                self._break(transcript, f"cancel was answered with {wire.status}")
                return
            await asyncio.sleep(RETRY_S)

    async def _read_on(self, transcript: Transcript, wire: Wire, cuts: list[int]) -> None:
        while not await self._read_once(transcript, wire, cuts):
            lost = time.monotonic()
            resumed = await self.resume(transcript)
            if resumed is None:
                return
            wire = resumed
            away_s = time.monotonic() - lost
            transcript.away_s = max(transcript.away_s, away_s)
            transcript.resumes += 1
            self.report.resumes_s.append(away_s)

    async def _read_once(self, transcript: Transcript, wire: Wire, cuts: list[int]) -> bool:
        """One connection; True: nothing is left to read, False: come back."""
        self.wires[id(transcript)] = wire
        try:
            async for event in wire.events():
                self._feed(transcript, event)
                if transcript.end or transcript.broken:
                    wire.cut()
                    return True
                if cuts and transcript.seen >= cuts[0]:
                    cuts.pop(0)
                    self.report.count("requests", "cut by the client")
                    wire.cut()
                    return False
        except LOST:
            pass
        finally:
            del self.wires[id(transcript)]
        self.report.count("requests", "stream lost")
        wire.cut()
        return False

    def _feed(self, transcript: Transcript, event: Any) -> None:
        try:
            transcript.feed(event)
        except BrokenStreamError as error:
            self._break(transcript, str(error))

    async def _take_error(self, transcript: Transcript, wire: Wire) -> None:
        """The job ended badly before the first byte: an error with a status of its own."""
        try:
            transcript.end = str((await wire.json())["error"]["code"])
        except LOST:
            wire.cut()
            transcript.end = "unknown"

    def _remember(self, transcript: Transcript) -> None:
        if not transcript.known:
            transcript.known = True
            self.transcripts.append(transcript)

    def _break(self, transcript: Transcript, why: str) -> None:
        transcript.broken = True
        self.report.violate("a transcript is broken", transcript.job_id, f"{why}\n{repr(transcript)[:1500]}")
