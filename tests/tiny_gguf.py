"""The built-in model as a GGUF file, for llama.cpp: written as llama.cpp's own converter writes a Llama."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from safetensors.numpy import load_file

MODEL = Path(__file__).parent.parent / "workers" / "engines" / "tiny" / "model"
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PRE_TOKENIZER = "smollm"
"""llama.cpp's name for «single digits, then GPT-2's expression»."""


def write(path: Path) -> None:
    """Writes the file."""
    config = json.loads((MODEL / "config.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, config)
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    for name, weight in load_file(MODEL / "model.safetensors").items():
        to, what = _renamed(name)
        if what in heads:
            weight = _interleaved(weight, heads[what])
        writer.add_tensor(to, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str) -> tuple[str, str]:
    if name in NAMES:
        return NAMES[name], ""
    _, _, layer, rest = name.split(".", 3)
    what = rest.removesuffix(".weight")
    return f"blk.{layer}.{LAYER_NAMES[what]}.weight", what


def _interleaved(weight: Any, heads: int) -> Any:
    """From Hugging Face's halves of rotary pairs to llama.cpp's neighbours."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _add_tokenizer(writer: GGUFWriter, config: dict[str, Any]) -> None:
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    ids = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    tokens, kinds = [], []
    for number in range(config["vocab_size"]):
        token = added.get(number)
        tokens.append(token["content"] if token else ids.get(number, f"[PAD{number}]"))
        if token is None:
            kinds.append(TokenType.NORMAL if number in ids else TokenType.UNUSED)
        else:
            kinds.append(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((MODEL / "chat_template.jinja").read_text())
