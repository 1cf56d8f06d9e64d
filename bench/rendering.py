"""What a plain token costs between the inbox and the socket, without either: parse, feed, take, render.

Prints microseconds a token, the best of some runs: nothing else should change it.
"""

import asyncio
import time

from fastchat_q.api.render import ChunkWriter, View
from fastchat_q.api.stream import JobStream, Submission

from fastchat_q.events import Piece, encode_payload, parse_line
from fastchat_q.jobs import Job, Message
from fastchat_q.queue import Terms

TOKENS = 20_000
RUNS = 15


def once(lines: list[bytes], job: Job) -> tuple[float, float]:
    """Microseconds a token of all, and of rendering alone."""
    stream = JobStream(job.model, job.id, 0, Submission(job, Terms()), 0.0, lambda _: None)
    writer = ChunkWriter(View(job.id, job.model, 0, "hi"))
    rendering = 0.0
    start = time.perf_counter()
    for line in lines:
        _, event = parse_line(line)
        stream.feed(event)
        events, stream._events = stream._events, []
        before = time.perf_counter()
        writer.events(events)
        rendering += time.perf_counter() - before
    return (time.perf_counter() - start) / len(lines) * 1e6, rendering / len(lines) * 1e6


async def main() -> None:
    """Runs and prints."""
    job = Job(id="01M7YSN24098N6EY5MJ6FR9HZN", model="m", messages=(Message(role="user", content="hi"),))
    lines = [
        b"%b %d 1 %b" % (job.id.encode(), n, encode_payload([Piece((n,), f" w{n}")])) for n in range(1, TOKENS + 1)
    ]
    found = [once(lines, job) for _ in range(RUNS)]
    print(f"all {min(f[0] for f in found):.2f} us a token, of this rendering {min(f[1] for f in found):.2f}")


if __name__ == "__main__":
    asyncio.run(main())
