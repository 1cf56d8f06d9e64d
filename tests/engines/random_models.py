"""Small real models for the engine tests: random weights in many architectures, and one that recites a given text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from fastchat_q.workers.engines.loading.model import Loaded
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
WINDOW = 16
SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, **EAGER_EXPERTS}


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in COMMON.items() if name not in names}


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=8),
    "mistral with a window": lambda: transformers.MistralConfig(**COMMON, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, attn_implementation="eager"
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON, head_dim=8, sliding_window=WINDOW, layer_types=SLIDING_AND_FULL
    ),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **SPECIAL
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_without("num_key_value_heads")),
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
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **SPECIAL
    ),
    "falcon with alibi": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **SPECIAL
    ),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4, **MOE),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=SLIDING_AND_FULL,
        num_local_experts=4,
        **MOE,
        attn_implementation="eager",
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_without("num_key_value_heads"),
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        **MOE,
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **COMMON,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=WINDOW,
        **EAGER_EXPERTS,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **COMMON,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        **MOE,
    ),
    "jamba": lambda: transformers.JambaConfig(
        **COMMON,
        use_mamba_kernels=False,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=8,
        attn_layer_period=2,
        attn_layer_offset=1,
        **EAGER_EXPERTS,
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, **SPECIAL
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        **SPECIAL,
    ),
}


def random_model(name: str) -> PreTrainedModel:
    """A model whose weights are spread widely enough for answers that are not one token for ever.

    In float64, so that no two tokens come so close that the order of a sum decides between them.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    return _spread(model)


def random_t5() -> PreTrainedModel:
    """An encoder-decoder."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return _spread(transformers.T5ForConditionalGeneration(config))


def _spread(model: PreTrainedModel) -> PreTrainedModel:
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
