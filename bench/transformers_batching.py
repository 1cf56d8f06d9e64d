"""tokens/s of transformers' continuous batching without a server: transformers_batching.py MODEL TOKENS LEVEL…

So many requests are always under way; a new one takes the place of each that ended. The last line is JSON.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

PROMPT = " ".join(f"word{n}" for n in range(20))


def main() -> None:
    """One level after another."""
    folder, tokens, levels = sys.argv[1], int(sys.argv[2]), [int(level) for level in sys.argv[3:]]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt(level: int, serial: int) -> list[int]:
        message = {"role": "user", "content": f"{level} {serial:08d} {PROMPT}"}
        made = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        return list(made["input_ids"]) if not isinstance(made, list) else made

    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=512)
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
    manager.start()
    found = {}
    try:
        for level in levels:
            _run(manager, prompt, 2, 1, tokens)
            requests = max(8, 2 * level)
            began = time.perf_counter()
            _run(manager, prompt, requests, level, tokens)
            found[level] = requests * tokens / (time.perf_counter() - began)
    finally:
        manager.stop(block=True)
    print(json.dumps(found))


def _run(manager, prompt: Callable[[int, int], list[int]], requests: int, level: int, tokens: int) -> None:  # type: ignore[no-untyped-def]
    sent = 0
    for _ in range(min(level, requests)):
        manager.add_request(prompt(requests, sent), max_new_tokens=tokens)
        sent += 1
    ended = 0
    while ended < requests:
        result = manager.get_result(timeout=60)
        assert result is not None, "no result within a minute"
        if result.is_finished():
            assert len(result.generated_tokens) == tokens, len(result.generated_tokens)
            ended += 1
            if sent < requests:
                manager.add_request(prompt(requests, sent), max_new_tokens=tokens)
                sent += 1


if __name__ == "__main__":
    main()
