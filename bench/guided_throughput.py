"""What guides cost an engine: 8 requests at a time to the built-in model, without guides and with, in turn.

    OMP_NUM_THREADS=1 python bench/guided_throughput.py [--rounds 5]

Both generate the same number of tokens. On a loaded machine the processor seconds are the ones to compare.
"""

import argparse
import json
import queue
import statistics
import time

import torch
from fastchat_q.workers.engines.base import Output, Request
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.loading.model import load

from fastchat_q.jobs import Guide, Job, Message, Sampling

CONCURRENT, TOKENS = 8, 200
RECORD = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
    },
    "required": ["id", "name", "tags"],
    "additionalProperties": False,
}
GUIDES = {
    "none": None,
    "records": Guide(kind="json_schema", value=json.dumps({"type": "array", "items": RECORD, "minItems": 10_000})),
    "long text": Guide(kind="json_schema", value=json.dumps({"type": "string", "minLength": 100_000})),
    "regex": Guide(kind="regex", value="([a-z]{1,8} ){10000}"),
}


def measure(engine: TransformersEngine, outputs: "queue.Queue[list[Output]]", guide: Guide | None) -> tuple[float, ...]:
    """Tokens a second, by the clock and by the processor."""
    for seed in range(CONCURRENT):
        sampling = Sampling(max_tokens=TOKENS, ignore_eos=True, seed=seed, guide=guide)
        job = Job(id=str(seed), model="m", messages=(Message(role="user", content="hi"),), sampling=sampling)
        engine.submit(Request(job, job.id))
    clock, processor = time.perf_counter(), time.process_time()
    tokens = ended = 0
    while ended < CONCURRENT:
        for output in outputs.get(timeout=60):
            tokens += sum(len(piece.ids) for piece in output.pieces)
            ended += output.ended is not None
    assert tokens == CONCURRENT * TOKENS
    return tokens / (time.perf_counter() - clock), tokens / (time.process_time() - processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outputs: queue.Queue[list[Output]] = queue.Queue()
    engine = TransformersEngine("m", CONCURRENT, load("tiny", device="cpu"))
    engine.start(outputs.put, lambda: None)
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in GUIDES}
    for number in range(options.rounds + 1):
        for name, guide in GUIDES.items():
            figure = measure(engine, outputs, guide)
            if number:  # the first round compiles
                figures[name].append(figure)
    engine.stop()
    plain = statistics.median(figure[1] for figure in figures["none"])
    for name, some in figures.items():
        clock, processor = (statistics.median(column) for column in zip(*some, strict=True))
        print(f"{name:10} {clock:7.0f} tokens/s, {processor:7.0f} a processor second ({processor / plain - 1:+.1%})")


if __name__ == "__main__":
    main()
