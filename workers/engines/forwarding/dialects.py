"""The kinds of servers that speak OpenAI's API: what each takes beyond it, calls otherwise, or would ignore."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from fastchat_q.choices import DialectName
from fastchat_q.errors import InvalidRequestError
from fastchat_q.jobs import Feature, Guide

PARAMETERS: dict[Feature, frozenset[str]] = {
    "n": frozenset({"n"}),
    "sampling": frozenset({"top_k", "min_p", "min_tokens", "stop_token_ids"}),
    "penalties": frozenset({"presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"}),
    "logprobs": frozenset({"logprobs"}),
    "structured_outputs": frozenset({"response_format", "structured_outputs"}),
    "tools": frozenset({"tools"}),
    "reasoning": frozenset({"reasoning_effort"}),
    "vision": frozenset({"messages"}),
    "completions": frozenset({"prompt"}),
    "prompt_logprobs": frozenset({"echo"}),
    "tokenize": frozenset({"tokens"}),
}
BEYOND_OPENAI = frozenset(
    {
        *("top_k", "min_p", "min_tokens", "stop_token_ids", "ignore_eos", "repetition_penalty"),
        *("structured_outputs", "chat_template_kwargs", "add_special_tokens", "echo", "tokens"),
    }
)
"""What OpenAI's own API does not have; ``echo`` it has for models that are gone, ``tokens`` stands for /tokenize."""
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Our defaults, for servers that would take the model's own (its generation_config) instead."""


def vllm_guide(guide: Guide) -> dict[str, Any]:
    """vLLM's ``structured_outputs``."""
    return {"structured_outputs": {guide.kind: orjson.loads(guide.value) if guide.kind == "choice" else guide.value}}


def sglang_guide(guide: Guide) -> dict[str, Any]:
    """SGLang's ``regex``; its grammars are no Lark."""
    if guide.kind == "grammar":
        raise InvalidRequestError(
            "SGLang takes no Lark grammar: describe the answer by 'regex', 'choice' or 'json'.",
            param="structured_outputs",
            code="unsupported_parameter",
        )
    if guide.kind == "choice":
        choices = (re.sub(r"([\\.^$*+?{}\[\]|()])", r"\\\1", one) for one in orjson.loads(guide.value))
        return {"regex": f"({'|'.join(choices)})"}
    return {"regex": guide.value}


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a kind of server makes of a request.

    Args:
        whose: what a message calls it.
        ignores: parameters that it would drop without a word: requests with one of them are refused here.
        go_on: fields with which it continues a last message of the assistant; None: it does not.
        counts: it says how many tokens there are with every chunk, if asked to.
        names: of fields that it calls otherwise.
        neutral: fields whose default there is not ours.
        seed_bits: the width of a seed.
        guide: how it is told a guide that ``response_format`` cannot say.
        effort_in_template: ``reasoning_effort`` is nothing to it but an argument of the chat template.
        names_tools: it takes the name of a function as ``tool_choice``.
    """

    whose: str = "The server behind this model, as far as is known,"
    ignores: frozenset[str] = BEYOND_OPENAI
    go_on: Mapping[str, object] | None = None
    counts: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, object] = field(default_factory=dict)
    seed_bits: int = 64
    guide: Callable[[Guide], dict[str, Any]] = vllm_guide
    effort_in_template: bool = False
    names_tools: bool = True

    @property
    def features(self) -> tuple[Feature, ...]:
        """What a model behind such a server can do: all of which it does not ignore every parameter."""
        return tuple(feature for feature, parameters in PARAMETERS.items() if not parameters <= self.ignores)


PLAIN = Dialect()
"""Of a server that is not known: OpenAI's own parameters."""
DIALECTS: dict[DialectName, Dialect] = {
    "vllm": Dialect(
        "vLLM",
        frozenset(),
        {"continue_final_message": True, "add_generation_prompt": False},
        counts=True,
        neutral=NEUTRAL,
    ),
    "sglang": Dialect(
        "SGLang",
        frozenset({"tokens", "add_special_tokens"}),
        {"continue_final_message": True},
        counts=True,
        neutral=NEUTRAL,
        guide=sglang_guide,
    ),
    "llamacpp": Dialect(
        "llama.cpp",
        frozenset({"min_tokens", "stop_token_ids", "structured_outputs", "echo", "add_special_tokens", "tokens"}),
        {},
        names={"repetition_penalty": "repeat_penalty"},
        neutral={**NEUTRAL, "top_k": 0},
        seed_bits=31,
        effort_in_template=True,
        names_tools=False,
    ),
    "ollama": Dialect(
        "Ollama",
        BEYOND_OPENAI | {"n", "logprobs", "logit_bias", "tool_choice", "parallel_tool_calls"},
    ),
    "openai": Dialect("OpenAI's API", names={"max_tokens": "max_completion_tokens"}),
    "fastchat-q": Dialect("fastchat-q", frozenset()),
}
OWNERS: dict[str, DialectName] = {"system": "openai", "openai-internal": "openai", "library": "ollama"}
"""What stands for a dialect in ``owned_by`` of a list of models, beside its own name."""


def dialect_of(owner: str) -> Dialect:
    """The dialect of the server that lists its models as owned by ``owner``."""
    known: Mapping[str, Dialect] = DIALECTS  # type: ignore[assignment]
    return known.get(OWNERS.get(owner, owner.lower()), PLAIN)
