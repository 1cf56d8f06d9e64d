"""What choosing tokens costs a step, without a model: rows x vocabulary x what the requests ask for.

    OMP_NUM_THREADS=1 python bench/sampling_cost.py [--tokenizers DIR ...] [--device cuda]

Guided rows need a real vocabulary: they are measured for the built-in model's and for those of --tokenizers. The
median of a few steps is printed, in milliseconds for all rows together; every step draws from fresh logits. On the CPU
it is the time that the process was running, so other load on the machine matters little.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from fastchat_q.workers.engines.batching.sampling import Sampler
from fastchat_q.workers.engines.loading.builtin import BUILTIN_DIRS
from fastchat_q.workers.engines.processing.sequence import Language, Sequence
from fastchat_q.workers.engines.processing.structured import Guides
from fastchat_q.workers.engines.processing.text import TokenTexts
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastchat_q.jobs import Guide, Sampling

ROWS = (1, 8, 32, 64)
VOCABULARIES = (1_024, 32_000, 128_000)
PROMPT_TOKENS = 500
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logprobs": {"temperature": 0.8, "logprobs": 5},
    "all": {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": dict.fromkeys(range(20), 1.0),
        "min_tokens": 10_000,
        "logprobs": 5,
    },
    "guided": {"temperature": 0.8, "guide": Guide(kind="json_schema", value=json.dumps(SCHEMA))},
}


def measure(language: Language, texts: TokenTexts, rows: int, parameters: dict[str, Any], device: str) -> float:
    """Milliseconds of one step."""
    prompt = [i * 7 % language.vocabulary for i in range(PROMPT_TOKENS)]
    sequences = [Sequence(str(i), prompt, 10**6, Sampling(seed=i, **parameters), language) for i in range(rows)]
    while not all(sequence.ready for sequence in sequences):
        time.sleep(0.01)
    sampler, times = Sampler(texts), []
    shape = (rows, language.vocabulary)
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = time.perf_counter()
    while len(times) < 12 and (len(times) < 3 or time.perf_counter() - began < 2):
        logits = torch.randn(shape, device=device) * 4  # peaked about as much as a small model's
        logits[:, :20] += 8.0
        if device != "cpu":
            torch.accelerator.synchronize()
        start = clock()
        picks = sampler.pick(logits, sequences)
        times.append(clock() - start)
        for i, picked in enumerate(picks):
            if sequences[i].accept(picked).ended is not None:  # a complete guided answer: the next one
                sequences[i] = Sequence(str(i), prompt, 10**6, Sampling(seed=i, **parameters), language)
    return statistics.median(times[1:]) * 1e3


class Plain:
    """A vocabulary of any size, for rows whose text does not matter."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        return "a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="*", default=[])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    some: list[PreTrainedTokenizerBase] = [
        AutoTokenizer.from_pretrained(path) for path in (BUILTIN_DIRS["tiny"], *options.tokenizers)
    ]
    by_size = {len(tokenizer): tokenizer for tokenizer in some}
    print(f"{'ms a step':24}" + "".join(f"{rows:>4} rows" for rows in ROWS))
    for size in VOCABULARIES:
        tokenizer = by_size.get(size)
        eos = frozenset([size - 1 if tokenizer is None else int(tokenizer.eos_token_id)])
        guides = Guides(tokenizer or some[0], size, eos)
        language = Language(size, eos, lambda ids: "a" * len(ids), guides)
        for kind, parameters in KINDS.items():
            if kind == "guided" and tokenizer is None:
                continue
            with torch.inference_mode():
                figures = [
                    measure(language, TokenTexts(tokenizer or Plain()), rows, parameters, options.device)
                    for rows in ROWS
                ]
            print(f"{size:>9,} {kind:14}" + "".join(f"{figure:9.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
