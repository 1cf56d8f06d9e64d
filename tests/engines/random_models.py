"""Small real models for the engine tests: random weights in many architectures, and one that recites a given text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from fastchat_q.workers.engines.loading import Loaded
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY = 1024
CONTEXT = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EAGER_EXPERTS: dict[str, Any] = {"experts_implementation": "eager"}  # the default kernel has no float64
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **SPECIAL
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        **SPECIAL,
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **SPECIAL),
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, **EAGER_EXPERTS
    ),
    "mistral with a window": lambda: transformers.MistralConfig(**COMMON, sliding_window=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON, head_dim=8, sliding_window=16, layer_types=SLIDING_AND_FULL
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, **SPECIAL
    ),
}
ONE_ROW_EACH = {"mistral with a window", "gemma3", "mamba"}
"""Whose cache is more than plain keys and values, so that their rows do not share a forward pass."""


def random_model(name: str) -> PreTrainedModel:
    """A model whose weights are spread widely enough for answers that are not one token for ever.

    In float64, so that no two tokens come so close that the order of a sum decides between them.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6.0)
    torch.nn.Module.eval(model)
    torch.nn.Module.double(model)
    return model


def reciting_model(script: Sequence[int], prompt_tokens: int, confidence: float = 12.0) -> PreTrainedModel:
    """A GPT-2 that answers any prompt of that length with these tokens: each follows from its position alone."""
    context = prompt_tokens + len(script)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=context,
        n_layer=1,
        n_head=1,
        n_positions=context,
        **SPECIAL,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(context))
        for name, weight in model.named_parameters():
            if name.endswith("c_proj.weight"):  # attention and MLP add nothing to the position
                weight.zero_()
        model.lm_head.weight.normal_(std=0.02)
        for step, token in enumerate(script):  # the last norm makes a one-hot vector sqrt(context) high
            model.lm_head.weight[token, prompt_tokens - 1 + step] += confidence / context**0.5
    torch.nn.Module.eval(model)
    return model


def loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int] = frozenset()) -> Loaded:
    """A model with the built-in tokenizer, as `loading.load` would give it."""
    length = getattr(model.config, "max_position_embeddings", None)
    return Loaded(model, tokenizer, torch.device("cpu"), length, eos_ids)
