"""A prompt as a chat template renders it, for people to look at: with Jinja alone, where transformers is not there."""

from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(template: str, messages: Sequence[dict[str, Any]]) -> str:
    """The prompt of a conversation up to the assistant's next turn, in the environment that transformers uses."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template).render(messages=list(messages), add_generation_prompt=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
