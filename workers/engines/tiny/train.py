"""Train the built-in model from scratch: ``python -m fastchat_q.workers.engines.tiny.train OUT_DIR``.

About 1.7 M parameters of the Llama architecture, a byte-level BPE of 1,024 tokens, ChatML. One CPU core needs some
20 minutes. The same command gives the same bytes on the same kind of CPU with the same versions of the libraries.
It is no general trainer, and needs torch 2.9 or newer (for ``torch.optim.Muon``).
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .dialogues import Dialogue, training_dialogue

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TOOL_MARKS = ["<tool_call>", "</tool_call>"]  # single tokens but not special ones, so that decoding keeps them
NUM_TOKENS = 1024
CONTEXT_LENGTH = 1024
MAX_TRAINED_TOKENS = 512  # a longer dialogue is cut off; the long story and a few turns before it fit
TOKENS_PER_STEP = 2048
DIALOGUES_PER_POOL = 1536  # drawn at once and sorted by length, so that a batch has little padding
NO_LABEL = -100

WARM_UP_STEPS = 60
DECAY_FRACTION = 0.6
MATRIX_LEARNING_RATE = 0.02
OTHER_LEARNING_RATE = 0.004

# ChatML; tools go into the system turn, one JSON definition a line, and calls stand between <tool_call> marks.
CHAT_TEMPLATE = """\
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- if has_system or tools -%}
<|im_start|>system
{% if has_system %}{{ messages[0]['content'] }}{% endif %}
{%- if tools %}
{%- if has_system %}{{ '\\n' }}{% endif %}Tools:
{%- for tool in tools %}{{ '\\n' }}{{ (tool['function'] if 'function' in tool else tool) | tojson }}{% endfor %}
{%- endif %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if not (loop.first and has_system) -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}
{%- set arguments = call['function']['arguments'] -%}
<tool_call>{"name": {{ call['function']['name'] | tojson }}, "arguments": {{ arguments if arguments is string \
else arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif %}"""


def render(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> str:
    """The dialogue as the chat template has it."""
    return str(tokenizer.apply_chat_template(dialogue.messages, tools=[*dialogue.tools] or None, tokenize=False))


def plain_text(dialogue: Dialogue) -> str:
    """The dialogue without its marks, which are tokens from the outset and not to be learnt."""
    definitions = [json.dumps(tool["function"]) for tool in dialogue.tools]
    text = "\n".join([*definitions, *(message["content"] for message in dialogue.messages)])
    return text.replace(TOOL_MARKS[0], "").replace(TOOL_MARKS[1], "")


def train_tokenizer(num_dialogues: int = 20_000) -> PreTrainedTokenizerBase:
    """A byte-level BPE in which each digit is a token of its own, with the chat template."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    rng = Random(1)
    texts = (plain_text(training_dialogue(rng)) for _ in range(num_dialogues))
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS - len(TOOL_MARKS),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in TOOL_MARKS])
    fast: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    tokenizer: PreTrainedTokenizerBase = fast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU faster than sdpa for short rows; not written to config.json
    return model


def encode(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Token ids and labels, equally long: a label is the id where the assistant writes, ``NO_LABEL`` elsewhere."""
    assistant = tokenizer.encode(START + "assistant\n", add_special_tokens=False)
    ids = tokenizer.encode(render(tokenizer, dialogue), add_special_tokens=False)
    labels = [NO_LABEL] * len(ids)
    writing = False
    for i, token in enumerate(ids):
        if writing:
            labels[i] = token
            writing = token != tokenizer.eos_token_id
        else:
            writing = ids[max(0, i + 1 - len(assistant)) : i + 1] == assistant
    return ids[:MAX_TRAINED_TOKENS], labels[:MAX_TRAINED_TOKENS]


def length(row: tuple[list[int], list[int]]) -> int:
    return len(row[0])


def batches(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of ids and labels, each (batch, length) int64, right-padded; rows are of about equal length."""
    rng = Random(seed)
    while True:
        pool = sorted((encode(tokenizer, training_dialogue(rng)) for _ in range(DIALOGUES_PER_POOL)), key=length)
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in pool:
            if (len(groups[-1]) + 1) * length(row) > TOKENS_PER_STEP:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(map(length, group))
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [NO_LABEL] * (width - len(labels)) for _, labels in group]),
            )


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (https://kellerjordan.github.io/posts/muon/), AdamW for all else."""
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in parameters.items() if p.dim() != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01, momentum=0.95, ns_steps=4),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.97), weight_decay=0, fused=True),
    ]


def schedule(step: int, num_steps: int) -> float:
    """The factor of the learning rates: a linear warm-up, a flat stretch, a linear decay to nearly nothing."""
    left = 1 - step / num_steps
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.01, left / DECAY_FRACTION))


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy over what the assistant writes; the other positions are left out of the output layer."""
    targets = labels[:, 1:]  # (batch, length - 1) int64
    learnt = targets != NO_LABEL
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # (batch, length - 1, hidden) bfloat16
        logits = model.lm_head(hidden[learnt])  # (learnt positions, vocab) bfloat16
    return functional.cross_entropy(logits.float(), targets[learnt])


def train(model: LlamaForCausalLM, data: Iterator[tuple[Tensor, Tensor]], num_steps: int) -> None:
    optimizers = new_optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started_s, num_seen, mean_loss = time.perf_counter(), 0, 0.0
    for step, (ids, labels) in zip(range(num_steps), data, strict=False):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(step, num_steps)
        loss = loss_of(model, ids, labels)
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        num_seen += ids.numel()
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            elapsed_s = time.perf_counter() - started_s
            print(f"step={step + 1} loss={mean_loss:.4f} tokens={num_seen} {elapsed_s:.0f}s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (float16), configuration, tokenizer and chat template, as ``from_pretrained`` reads them."""
    trained: Any = model  # transformers wraps ``to`` in a way that type checkers reject
    trained.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in model of fastchat-q from scratch, on the CPU.")
    parser.add_argument("out_dir", type=Path, help="where the model goes; its files are overwritten")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for weights and dialogues (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters={num_parameters} tokens={len(tokenizer)} steps={arguments.steps}", flush=True)
    train(model, batches(tokenizer, arguments.seed), arguments.steps)
    save(model, tokenizer, arguments.out_dir)
    for path in sorted(arguments.out_dir.iterdir()):
        print(f"{path.stat().st_size:>9} {path.name}")


if __name__ == "__main__":
    main()
