"""The API server without a queue behind it: the same application, routes and bytes, fed from its own memory.

What it relays is the ceiling that the queue is compared with (bench/run.py). Answers repeat the question's words until
max_tokens, as the echo engine's do with ``ignore_eos``.
"""

import argparse
import asyncio

import uvicorn
import uvloop
from fastchat_q.api.app import create_app
from fastchat_q.api.catalog import Catalog
from fastchat_q.api.relay import JobStream, Relay
from fastchat_q.api.service import Service

from fastchat_q.events import Delta, End, Result, Usage
from fastchat_q.jobs import Job
from fastchat_q.registry import ModelCard
from fastchat_q.settings import Settings


class OneModel(Catalog):
    """A catalogue with a single model, read from nowhere."""

    def __init__(self, name: str) -> None:
        self._card = ModelCard(name, "direct", None, 0)
        self._workers, self._known = {}, {name}

    def card(self, model: str) -> ModelCard | None:
        return self._card if model == self._card.name else None

    async def refresh(self) -> None:
        pass


class DirectRelay(Relay):
    """Feeds all open streams a token each, step by step, as fast as they are taken or at a pace."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._open: dict[str, tuple[JobStream, list[str], int]] = {}
        self._some = asyncio.Event()

    async def submit(self, job: Job) -> JobStream:
        stream = JobStream(job, 0.0)
        words = [f" {word}" for word in job.messages[-1].content.split()]
        self._open[job.id] = (stream, words, job.sampling.max_tokens or len(words))
        self._some.set()
        return stream

    def leave(self, stream: JobStream) -> None:
        self._open.pop(stream.job.id, None)

    async def run(self) -> None:
        while True:
            if not self._open:
                self._some.clear()
                await self._some.wait()
            for job_id, (stream, words, limit) in list(self._open.items()):
                n = stream.seen + 1
                stream.feed(Delta(n, 1, (n,), words[n % len(words)]))
                if n >= limit:
                    stream.feed(End(n, "succeeded", "length", Result("length", Usage(len(words), n))))
                    del self._open[job_id]
            await asyncio.sleep(self._delay_s)


async def serve(port: int, model: str, delay_s: float) -> None:
    """Serves until it is killed."""
    relay = DirectRelay(delay_s)
    service = Service(Settings(), None, OneModel(model), relay)
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
