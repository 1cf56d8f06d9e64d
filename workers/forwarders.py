"""Engines that forward to another server: which there are, where their keys are, and what they need installed."""

import os
from dataclasses import dataclass
from importlib import import_module

from fastchat_q.choices import WorkerOptions
from fastchat_q.errors import ConfigurationError

from .engines.base import Engine


@dataclass(frozen=True, slots=True)
class Forwarder:
    """A kind of server.

    Args:
        module: in ``engines/forwarding/``; it holds ``connect`` and imports the client library.
        key: the variable that the client library itself would read.
    """

    module: str
    key: str | None


KINDS = {
    "openai": Forwarder("openai", "OPENAI_API_KEY"),
    "anthropic": Forwarder("anthropic", "ANTHROPIC_API_KEY"),
    "gemini": Forwarder("gemini", "GEMINI_API_KEY"),
    "llama-cpp": Forwarder("llama_cpp", None),
}


def build(options: WorkerOptions, name: str, slots: int) -> Engine:
    """The engine, connected as far as its server is there.

    Raises:
        ConfigurationError: a key or a package is missing, or the server refuses the key.
    """
    kind = KINDS[options.engine]
    try:
        module = import_module(f".engines.forwarding.{kind.module}", __package__)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The {options.engine} engine needs {error.name}, which is not installed: "
            f"pip install 'fastchat-q[{options.engine}]'."
        ) from error
    server = options.upstream
    upstream = module.Upstream(options.model, server.base_url, _key(options, kind), server.dialect)
    more = {"options": options} if options.engine == "llama-cpp" else {}
    engine: Engine = module.connect(name, slots, upstream, **more)
    return engine


def _key(options: WorkerOptions, kind: Forwarder) -> str | None:
    """The key; the default variable may be missing, as many servers ask for none.

    Raises:
        ConfigurationError: the variable that was named is not set, or a key would go nowhere.
    """
    if options.upstream.api_key_env is not None:
        key = os.environ.get(options.upstream.api_key_env)
        if not key:
            raise ConfigurationError(
                f"--api-key-env {options.upstream.api_key_env}: there is no such environment variable."
            )
        return key
    if options.engine == "openai" and options.upstream.base_url is not None:
        return None  # a key of OpenAI's is not for anybody else
    key = os.environ.get(kind.key or "") or None
    if options.engine == "openai" and key is None:
        raise ConfigurationError("The openai engine needs --base-url URL, or OPENAI_API_KEY for OpenAI itself.")
    return key
