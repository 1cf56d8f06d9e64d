"""The API server without a queue behind it: the same application, routes and bytes, fed from its own memory.

What it relays is the ceiling that the queue is compared with (bench/run.py). Answers repeat the question's words until
max_tokens, as the echo engine's do with ``ignore_eos``.
"""

import argparse
import asyncio

import uvicorn
import uvloop
from fastchat_q.api.app import create_app
from fastchat_q.api.auth import Authenticator
from fastchat_q.api.catalog import Catalog
from fastchat_q.api.durability import Durability
from fastchat_q.api.limits import Limits
from fastchat_q.api.relay import Relay
from fastchat_q.api.service import Service
from fastchat_q.api.stream import JobStream, Submission

from fastchat_q.connection import connect
from fastchat_q.events import Delta, End, Piece, Result, Usage
from fastchat_q.jobs import Job
from fastchat_q.queue import Queue, Terms
from fastchat_q.registry import ModelCard
from fastchat_q.settings import Settings


class OneModel(Catalog):
    """A catalogue with a single model, read from nowhere."""

    def __init__(self, name: str) -> None:
        self._card = ModelCard(name, "direct", None, 0)
        self._workers, self._known, self._slots, self._trouble = {}, {name}, {}, {}
        self._awaited, self._aliases = {}, {}

    def card(self, model: str) -> ModelCard | None:
        return self._card if model == self._card.name else None

    def can_be_asked(self, model: str) -> bool:
        return model == self._card.name

    async def refresh(self) -> None:
        pass


class NoRedis(Durability):
    """There is nothing to object to."""

    def __init__(self) -> None:
        self.objection = None


class DirectRelay(Relay):
    """Feeds all open streams a token each, step by step, as fast as they are taken or at a pace."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._jobs: dict[str, tuple[JobStream, list[str], int]] = {}
        self._some = asyncio.Event()

    async def submit(self, job: Job, terms: Terms) -> JobStream:
        stream = JobStream(job.model, job.id, 0, Submission(job, terms), self._now(), lambda _: None)
        words = [f" {word}" for word in job.messages[-1].content.split()]
        self._jobs[job.id] = (stream, words, job.sampling.max_tokens or len(words))
        self._some.set()
        return stream

    def leave(self, stream: JobStream, grace_s: float = 0.0) -> None:
        self._jobs.pop(stream.job_id, None)

    async def run(self) -> None:
        while True:
            if not self._jobs:
                self._some.clear()
                await self._some.wait()
            for job_id, (stream, words, limit) in list(self._jobs.items()):
                n = stream.seen + 1
                stream.feed(Delta(n, 1, (Piece((n,), words[n % len(words)]),)))
                if n >= limit:
                    stream.feed(End(n, "succeeded", "length", Result("length", Usage(len(words), n))))
                    del self._jobs[job_id]
            await asyncio.sleep(self._delay_s)


async def serve(port: int, model: str, delay_s: float) -> None:
    """Serves until it is killed."""
    relay = DirectRelay(delay_s)
    nowhere = connect("unix:///nowhere")  # never used: what it is for is left out here
    service = Service(
        Settings(auth=False),
        Authenticator(None, None),
        OneModel(model),
        Limits(nowhere),
        relay,
        nowhere,
        Queue(nowhere),
        NoRedis(),
    )
    config = uvicorn.Config(
        create_app(service), port=port, http="httptools", ws="none", lifespan="off", access_log=False,
        proxy_headers=False, log_level="warning",
    )  # fmt: skip
    async with asyncio.TaskGroup() as group:
        feeding = group.create_task(relay.run())
        await uvicorn.Server(config).serve()
        feeding.cancel()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="echo")
    parser.add_argument("--token-delay-ms", type=float, default=0.0)
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.model, options.token_delay_ms / 1000))


if __name__ == "__main__":
    main()
