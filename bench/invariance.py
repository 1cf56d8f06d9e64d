"""How often a seeded answer changes with what shares its batch, or with the point where it is resumed, by dtype.

    OMP_NUM_THREADS=1 python bench/invariance.py [--answers 40]

Greedy and at temperature 1, 60 tokens, alone against among 7 others, and alone against resumed behind token 30. The
random numbers are the same each time; what differs is how sums are rounded when a pass has another shape.
"""

import argparse
import queue

import torch
from fastchat_q.workers.engines.base import Output, Request
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.loading.model import load

from fastchat_q.events import Piece
from fastchat_q.jobs import Job, Message, Sampling

NEIGHBOURS, TOKENS, CUT = 7, 60, 30
TALK = "what is the capital of France and how many legs does a spider have tell me a story about the sea"
WORDS = TALK.split()


def asked(name: str, number: int, temperature: float) -> Job:
    """Prompts of 1 to 20 words."""
    text = " ".join(WORDS[: 1 + number * 7 % 20])
    sampling = Sampling(max_tokens=TOKENS, temperature=temperature, seed=number, ignore_eos=True)
    return Job(id=name, model="m", messages=(Message(role="user", content=text),), sampling=sampling)


def said(
    engine: TransformersEngine, outputs: "queue.Queue[list[Output]]", jobs: list[Job], prior: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """The tokens of the first of these jobs, which run together."""
    for job in jobs:
        engine.submit(Request(job, job.id, (Piece(prior),) if prior else ()))
    ids, ended = list(prior), 0
    while ended < len(jobs):
        for output in outputs.get(timeout=60):
            ended += output.ended is not None
            if output.ticket == jobs[0].id:
                ids += [token for piece in output.pieces for token in piece.ids]
    return tuple(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in ("bfloat16", "float16", "float32"):
        engine = TransformersEngine("m", NEIGHBOURS + 1, load("tiny", device="cpu", dtype=dtype))
        outputs: queue.Queue[list[Output]] = queue.Queue()
        engine.start(outputs.put, lambda: None)
        for temperature in (0.0, 1.0):
            among = resumed = 0
            for number in range(options.answers):
                job = asked("one", number, temperature)
                alone = said(engine, outputs, [job])
                others = [asked(f"other {i}", number + 3 * i + 1, 1.0) for i in range(NEIGHBOURS)]
                among += said(engine, outputs, [job, *others]) != alone
                resumed += said(engine, outputs, [job], alone[:CUT]) != alone
            print(f"{dtype} temperature {temperature}: of {options.answers} answers {among} differ among")
            print(f"    {NEIGHBOURS} others, {resumed} when resumed behind token {CUT}", flush=True)
        engine.stop()


if __name__ == "__main__":
    main()
