"""What the tests of the vLLM engine share: how it is started, what it is asked, and small models made for it."""

import importlib.util
import json
import runpy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastchat_q.workers.engines.base import Request

from fastchat_q.choices import LoadOptions, WorkerOptions
from fastchat_q.events import Piece
from fastchat_q.jobs import Job, Sampling

from .engines.driving import Answer, Driver, job

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"
)
SLOW = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
"""vLLM starts slowly, and warns."""
CONTEXT = 512
STARTUP_S = 400.0
LONG = " ".join(f"word{n}" for n in range(20))
LOAD = LoadOptions(max_model_len=CONTEXT)
OPTIONS = WorkerOptions("", "tiny", "vllm", 16, "auto", "float32", load=LOAD)
EAGER = ("enforce-eager=true",)
"""Without compilation, which takes a minute and changes the order of sums."""


@contextmanager
def environment() -> Iterator[None]:
    """vLLM reads its settings from the environment, and hands it on to its processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        yield


@contextmanager
def running(options: WorkerOptions, adapters: dict[str, str] | None = None) -> Iterator[Driver]:
    """An engine that serves ``tiny`` and its adapters, within a minute or so."""
    from fastchat_q.workers.engines.vllm import setup as vllm_setup

    with environment():
        driver = Driver(vllm_setup.build(options, "tiny", adapters))
        try:
            yield driver
        finally:
            driver.engine.stop()
        assert driver.engine.failure is None


def asks(job_id: str, text: str = LONG, *, model: str = "tiny", job_fields: Any = None, **fields: Any) -> Job:
    """A greedy job of 24 tokens, unless the fields of its sampling say otherwise."""
    sampling = Sampling(**{"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **fields})
    return job(job_id, text).model_copy(update={"model": model, "sampling": sampling, **(job_fields or {})})


def resumed(driver: Driver, one: Job, prior: Sequence[Piece]) -> Answer:
    """The rest of an answer that was cut off."""
    driver.take(Request(one, one.id, tuple(prior)))
    [answer] = driver.wait(one.id)
    return answer


def llama(folder: Path) -> Path:
    """The tiny Llama of the benchmarks."""
    made: Path = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "tiny_llama.py"))["make"](folder)
    return made


def lora(model: Any, folder: Path, seed: int, *, width: int | None = None) -> Path:
    """A LoRA adapter of rank 8 that changes a lot.

    Args:
        width: of its input, if that is not to be the model's.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, block in enumerate(model.model.layers):
        weight = block.self_attn.q_proj.weight
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, width or weight.shape[1], generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 8, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def merged(model: Any, adapter: Path) -> Iterator[None]:
    """The model of `lora` with its adapter's weights in its own."""
    import torch
    from safetensors.torch import load_file

    tensors, originals = load_file(adapter / "adapter_model.safetensors"), []
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            originals.append(block.self_attn.q_proj.weight.clone())
            block.self_attn.q_proj.weight += 2.0 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        yield
        for block, original in zip(model.model.layers, originals, strict=True):
            block.self_attn.q_proj.weight.copy_(original)


def talker(folder: Path, scripts: dict[str, Sequence[str]], special: Sequence[str]) -> Path:
    """A Llama that says what it is told: a prompt's last token chooses a script.

    Each text of a script is a token of its own, and no two scripts have one in common. Its layers do nothing; its head
    gives the token behind each.

    Args:
        scripts: the token that a prompt ends with -> what follows it. The template takes it from ``script``.
        special: those tokens that are special ones.
    """
    import torch
    from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

    llama(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    words = [word for start, script in scripts.items() for word in (start, *script)]
    tokenizer.add_tokens([AddedToken(word, special=word in special, normalized=False) for word in words])
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if tools %}{{ tools | tojson }}{% endif %}{{ script }}"
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedded = model.model.embed_tokens.weight
        embedded.copy_(torch.randn(embedded.shape, generator=generator))
        model.lm_head.weight.zero_()
        for start, script in scripts.items():
            said = [tokenizer.convert_tokens_to_ids(word) for word in (start, *script)]
            for here, there in zip(said, [*said[1:], tokenizer.eos_token_id], strict=True):
                model.lm_head.weight[there] += embedded[here]
    model.save_pretrained(folder)
    return folder
