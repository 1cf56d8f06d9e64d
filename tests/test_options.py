"""An option of the command line is understood by the engine it is given to, or refused by name; never dropped."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args

import pytest
from fastchat_q.workers.forwarders import KINDS

from fastchat_q.choices import (
    UNDERSTOOD,
    EncoderOptions,
    EngineName,
    LoadOptions,
    UpstreamOptions,
    WorkerOptions,
    flag,
    stall_s,
)
from fastchat_q.errors import ConfigurationError

LOAD: dict[str, Any] = {
    "quantization": "bitsandbytes-4bit",
    "num_gpus": 4,
    "max_gpu_memory": "20GiB",
    "cpu_offload": True,
    "max_cpu_memory": "64GiB",
    "offload_dir": "folder",
    "revision": "v2",
    "trust_remote_code": True,
    "allow_pickle": True,
    "chat_template": "chatml",
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
    "max_model_len": 77,
    "kv_memory": "8GiB",
}
UPSTREAM: dict[str, Any] = {"base_url": "http://x/v1", "api_key_env": "KEY", "dialect": "vllm"}
ENCODER: dict[str, Any] = {"pooling": "cls", "prompt_name": "query", "batch_tokens": 9}
OWN: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "threads": 2,
    "token_delay_ms": 0.0,
    "engine_arg": ("a=b",),
    "lora": ("a=b",),
}
OPTIONS = {**OWN, **LOAD, **UPSTREAM, **ENCODER}


def given(engine: str, name: str) -> WorkerOptions:
    """A worker's options with one of them set."""
    for part, kind, values in (
        ("load", LoadOptions, LOAD),
        ("upstream", UpstreamOptions, UPSTREAM),
        ("encoder", EncoderOptions, ENCODER),
    ):
        if name in values:
            own: Any = {part: kind(**{name: values[name]})}
            return WorkerOptions("m", engine=engine, **own)  # type: ignore[arg-type]
    return WorkerOptions("m", engine=engine, **{name: OWN[name]})  # type: ignore[arg-type]


def test_every_option_is_understood_by_some_engine_and_every_engine_has_a_row() -> None:
    def names(kind: Any) -> set[str]:
        found = {one.name for one in fields(kind)}
        nested = [one for one in (LoadOptions, UpstreamOptions, EncoderOptions) if is_dataclass(one)]
        return found if kind is not WorkerOptions else found.union(*map(names, nested))

    parts, everybody = {"load", "upstream", "encoder"}, {"model", "name", "engine", "slots"}
    assert set(UNDERSTOOD) == set(get_args(EngineName))
    assert set().union(*UNDERSTOOD.values()) == names(WorkerOptions) - parts - everybody == set(OPTIONS)


@pytest.mark.parametrize("engine", get_args(EngineName))
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_the_engine_does_not_understand_is_refused_by_name(engine: EngineName, name: str) -> None:
    if name in UNDERSTOOD[engine]:
        given(engine, name)
        return
    with pytest.raises(ConfigurationError) as refused:
        given(engine, name)
    assert f"{flag(name)} " in str(refused.value)
    assert f"--engine {engine}" in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("openai", "quantization"), ("anthropic", "num_gpus"), ("gemini", "device"), ("echo", "dtype"),
        ("openai", "max_model_len"), ("echo", "kv_memory"), ("gemini", "chat_template"), ("echo", "tool_call_parser"),
        ("openai", "revision"), ("embeddings", "kv_memory"), ("rerank", "kv_memory"), ("rerank", "pooling"),
        ("transformers", "base_url"), ("transformers", "api_key_env"), ("llama-cpp", "quantization"),
        ("llama-cpp", "num_gpus"), ("llama-cpp", "base_url"), ("vllm", "quantization"), ("openai", "threads"),
        ("transformers", "token_delay_ms"), ("transformers", "engine_arg"), ("echo", "lora"),
    ],
)  # fmt: skip
def test_what_would_be_dropped_is_not_in_the_table(engine: EngineName, name: str) -> None:
    assert name not in UNDERSTOOD[engine]


def test_the_refusal_says_the_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"only for --engine transformers\. Leave it out"):
        given("echo", "kv_memory")
    with pytest.raises(ConfigurationError, match="--engine-arg KEY=VALUE"):
        given("vllm", "quantization")
    with pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES"):
        given("llama-cpp", "num_gpus")


def test_a_model_behind_another_server_may_think_in_silence_for_longer_unless_told_otherwise() -> None:
    forwarding = {engine: stall_s(engine, None) for engine in get_args(EngineName)}
    assert {engine for engine, seconds in forwarding.items() if seconds == 600} == set(KINDS)
    assert {seconds for engine, seconds in forwarding.items() if engine not in KINDS} == {60}
    assert stall_s("openai", 5) == stall_s("transformers", 5) == 5
