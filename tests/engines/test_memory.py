"""What a plan counts is what a loaded model takes: weights, caches and quantised weights, byte for byte or nearly."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fastchat_q.workers.engines.loading.builtin import BUILTIN_DIRS
from fastchat_q.workers.engines.loading.configs import context_length
from fastchat_q.workers.engines.loading.memory import cache_layers, footprint, skeleton, weight_bytes
from fastchat_q.workers.engines.loading.model import load
from fastchat_q.workers.engines.loading.plan import plan
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fastchat_q.choices import LoadOptions, Quantization
from fastchat_q.errors import ConfigurationError

from .random_models import COMMON, CONFIGS, SPECIAL, VOCABULARY
from .tensors import bytes_held, bytes_of

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, **SPECIAL}
EXPERTS: dict[str, Any] = {**COMMON, "num_experts_per_tok": 2, "head_dim": 8}
MORE = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "falcon": lambda: transformers.FalconConfig(**SMALL, num_hidden_layers=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "gpt_oss": lambda: transformers.GptOssConfig(**EXPERTS, num_local_experts=4, sliding_window=20),
    "jamba": lambda: transformers.JambaConfig(
        **COMMON | {"num_hidden_layers": 8}, num_experts=4, num_experts_per_tok=2, mamba_d_state=8
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **EXPERTS | {"num_hidden_layers": 4}, intermediate_size_mlp=64, num_local_experts=4, attention_chunk_size=24
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, **SPECIAL),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **EXPERTS | {"num_hidden_layers": 4},
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
ALL = CONFIGS | MORE
QUANTISABLE = ["llama", "gpt2", "opt", "mixtral", "gemma3", "phi3", "gpt_neox"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_weights_and_caches_are_counted_to_the_byte(name: str, dtype: torch.dtype) -> None:
    config = ALL[name]()
    bare = skeleton(AutoModelForCausalLM, config, dtype)
    count = footprint(bare, None, slots=2, prefill=64, stored=None, cache=cache_layers(bare))
    real = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert count.weights == bytes_of(real)
    assert count.parameters == sum(p.numel() for p in real.parameters())
    for tokens in (7, 40, 100):
        ids = torch.ones((2, tokens), dtype=torch.long)
        with torch.inference_mode():
            output = real(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        held = output.past_key_values if "past_key_values" in output else output.cache_params
        assert count.cache_bytes(2, tokens) == pytest.approx(bytes_held(held), rel=0.02), tokens


def test_an_encoder_decoder_is_counted_with_its_two_caches() -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    real = AutoModelForSeq2SeqLM.from_config(config).eval()
    bare = skeleton(AutoModelForSeq2SeqLM, config, torch.float32)
    count = footprint(bare, None, 1, 64, None, cache_layers(bare))
    assert count.weights == bytes_of(real)
    ids = torch.ones((1, 48), dtype=torch.long)
    with torch.inference_mode():
        cache = real(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    held = bytes_held([cache.self_attention_cache, cache.cross_attention_cache])
    assert count.cache_bytes(1, 48) == held


@pytest.mark.parametrize("method", ["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8wo"])
@pytest.mark.parametrize("name", QUANTISABLE)
def test_quantised_weights_are_counted_to_a_few_percent(tmp_path: Path, name: str, method: Quantization) -> None:
    pytest.importorskip("torchao" if method.startswith("torchao") else "bitsandbytes")
    from fastchat_q.workers.engines.loading.quantization import arguments

    config = ALL[name]()
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    counted = weight_bytes(skeleton(AutoModelForCausalLM, config, torch.float32), method)
    real = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map={"": "cpu"}, **arguments(method, torch.float32)
    )
    assert counted == pytest.approx(bytes_of(real), rel=0.03)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (transformers.LlamaConfig(max_position_embeddings=8192), 8192),
        (
            transformers.LlamaConfig(
                max_position_embeddings=131072,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
            131072,
        ),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 32768}), 32768),
        (transformers.OPTConfig(max_position_embeddings=2048), 2048),
        (transformers.GPT2Config(n_positions=1024), 1024),
        (transformers.GPTJConfig(n_positions=2048), 2048),
        (transformers.BloomConfig(seq_length=2048), 2048),
        (transformers.BloomConfig(), None),
        (transformers.FalconConfig(max_position_embeddings=2048), 2048),
        (transformers.MptConfig(max_seq_len=65536), 65536),
        (transformers.T5Config(n_positions=512), 512),
        (transformers.T5Config(), None),
        (transformers.MambaConfig(), None),
        (transformers.WhisperConfig(max_target_positions=448), 448),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, transformers.PreTrainedConfig) else str(value),
)
def test_the_context_length_is_found_under_the_name_that_each_family_gives_it(
    config: transformers.PreTrainedConfig, length: int | None
) -> None:
    assert context_length(config) == length
    assert context_length(config, cap=256) == 256
    assert context_length(config, cap=10**9) == (length or 10**9)


def test_a_cap_on_the_context_reaches_what_is_loaded() -> None:
    assert load("tiny", "cpu", options=LoadOptions(max_model_len=100)).context_length == 100


def test_the_plan_of_the_built_in_model_is_what_its_load_takes() -> None:
    found = plan("tiny", "cpu", "auto", LoadOptions(), slots=4)
    loaded = load("tiny", "cpu")
    assert found.asked.weights == bytes_of(loaded.model)
    assert found.tokens == found.context_length == loaded.context_length
    assert found.stored == found.parameters * 2  # float16 on disk
    assert found.asked.cache == 4 * found.tokens * (found.cache_per_token or 0)
    assert found.asked.fits_on == "cpu"
    assert "--dtype float32" in found.advice


def test_a_model_that_does_not_fit_is_planned_with_what_does() -> None:
    tight = plan("tiny", "cpu", "float32", LoadOptions(max_cpu_memory="6MiB"), slots=1, tokens=64)
    assert tight.asked.fits_on is None
    assert "it fits on cpu with --dtype bfloat16" in tight.advice
    crowded = plan("tiny", "cpu", "bfloat16", LoadOptions(max_cpu_memory="12MiB"), slots=64)
    assert "--slots " in crowded.advice
    none = plan("tiny", "cpu", "float32", LoadOptions(max_cpu_memory="100KB"), slots=1, tokens=64)
    assert "does not fit on this machine" in none.advice


def test_the_command_prints_one_document_and_needs_no_weights(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(  # the shape of Llama 3.1 8B, which has 8,030,261,248 parameters
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "fastchat_q.cli", "plan", str(tmp_path), "--device", "cpu", "--slots", "1"]
    ran = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["parameters"] == 8_030_261_248
    assert document["asked"]["weights"] == pytest.approx(16_060_522_496, rel=0.001)
    assert document["cache_per_token"] == 131_072
    assert document["stored"] is None


def test_the_command_prints_tables_and_its_advice_on_stderr() -> None:
    command = [sys.executable, "-m", "fastchat_q.cli", "plan", "tiny", "--slots", "2", "--context-length", "512"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert "1,697,472" in ran.stdout
    assert "bitsandbytes-4bit" in ran.stdout
    assert "CACHE 2 X 512" in ran.stdout
    assert "It fits on " in ran.stderr


def test_weights_that_do_not_fit_are_refused_before_they_are_read() -> None:
    with pytest.raises(ConfigurationError, match=r"weights are 6\.48 MiB.*room for 1\.00 MiB.*--quantization"):
        load("tiny", "cpu", options=LoadOptions(max_cpu_memory="1MiB"))


def test_the_allocators_last_word_is_told_as_what_it_is(tmp_path: Path) -> None:
    """In a process of its own whose address space ends early, as on a machine without memory."""
    config = transformers.LlamaConfig(**COMMON | {"vocab_size": 300_000, "hidden_size": 512, "num_attention_heads": 8})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((BUILTIN_DIRS["tiny"] / name).read_bytes())
    code = f"""
import resource
from fastchat_q.workers.engines.loading.model import load
from fastchat_q.errors import ConfigurationError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 900 * 2**20, -1))
try: load({str(tmp_path)!r}, "cpu", "float32")
except ConfigurationError as error: print("REFUSED", error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert "REFUSED" in ran.stdout, ran.stdout + ran.stderr
    assert "does not fit on cpu" in ran.stdout
    assert "--quantization" in ran.stdout
