"""Whether the transformers engine's memory grows: ``python bench/engine_memory.py``, JSON on stdout.

One process, the built-in model, short requests of changing lengths one after another, some of them cancelled, some
with a prompt that others had. Resident memory is read every thousand requests, after a first thousand that fills what
is kept on purpose (the prefix cache, the allocator's pools).
"""

import argparse
import json
import os
import random
import threading
import time

import torch
from fastchat_q.workers.engines.base import Output, Request
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.loading.model import load
from processes import machine

from fastchat_q.jobs import Job, Message, Sampling

TALK = "what is the capital of France and how many legs does a spider have tell me a story about the sea"
WORDS = TALK.split()
AT_ONCE = 32
KV_BYTES = 64 * 2**20
EVERY = 1000
PATIENCE_S = 120.0


def resident_mb() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(count: int) -> tuple[list[float], float]:
    """Resident memory (MiB) after each `EVERY` requests, and the seconds that all took."""
    chance = random.Random(0)
    free = threading.Semaphore(AT_ONCE)

    def take(outputs: list[Output]) -> None:
        for output in outputs:
            if output.ended is not None:
                if output.ended.error is not None:
                    print(output.ended.error, flush=True)
                    os._exit(1)
                free.release()

    engine = TransformersEngine("tiny", AT_ONCE, load("tiny", device="cpu"), KV_BYTES)
    engine.start(take, lambda: os._exit(1))
    readings, began = [], time.perf_counter()
    for i in range(count):
        if not free.acquire(timeout=PATIENCE_S):
            raise TimeoutError(f"request {i}")
        words = " ".join(chance.choices(WORDS, k=chance.randint(1, 40)))
        if i % 4 == 0:
            words = " ".join(WORDS * 3)
        sampling = Sampling(
            temperature=i % 2, top_p=0.9, seed=i, max_tokens=chance.randint(1, 12), ignore_eos=True, n=1 + i % 7 // 6
        )
        job = Job(id=str(i), model="tiny", messages=(Message(role="user", content=words),), sampling=sampling)
        engine.submit(Request(job, job.id))
        if i % 50 == 49:  # one that is cancelled, in a place of its own
            lost = job.model_copy(update={"id": f"{i} lost", "sampling": Sampling(max_tokens=400, ignore_eos=True)})
            engine.submit(Request(lost, lost.id))
            engine.cancel(lost.id)
        if (i + 1) % EVERY == 0:
            readings.append(round(resident_mb(), 1))
    seconds = time.perf_counter() - began
    engine.stop()
    return readings, seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    readings, seconds = run(options.requests)
    report = {
        "machine": machine(),
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "resident_mib_every_thousand": readings,
        "growth_mib_after_the_first_thousand": round(readings[-1] - readings[0], 1),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
