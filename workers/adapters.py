"""Adapters: Python for the behaviour of a model that no row can say. Packages register them as entry points.

A package names its adapters in the group ``fastchat_q.adapters``; docs/adding-a-model.md has a whole one.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from fastchat_q.errors import ConfigurationError
from fastchat_q.jobs import Sampling

GROUP = "fastchat_q.adapters"


class Adapter(Protocol):
    """What an adapter must have; and any of `Loads`, `Templates` and `Generates`. What it lacks goes as usual."""

    def match(self, config: Mapping[str, Any]) -> bool:
        """Whether a model is its own, by the model's config.json. Look at its type or architecture, not at names."""
        ...


@runtime_checkable
class Loads(Protocol):
    """Loads the model itself."""

    def load(self, path: str, *, device: Any, dtype: Any) -> tuple[Any, Any]:
        """(model, tokenizer) from a folder or hub id; device and dtype are torch's."""
        ...


@runtime_checkable
class Templates(Protocol):
    """Writes the prompt itself."""

    def template(self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None, **options: Any) -> str:
        """The prompt as text, with the control tokens that belong into it.

        Raise any error with words for the client to refuse messages. Options are the request's template_kwargs.
        """
        ...


@runtime_checkable
class Generates(Protocol):
    """Makes the tokens itself, for models that have no usual forward pass."""

    def generate(
        self, model: Any, tokenizer: Any, prompt: list[int], done: list[int], sampling: Sampling
    ) -> Iterator[int]:
        """Token ids, one after the other. Requests take turns token by token, so keep no state but the iterator's.

        Args:
            done: tokens that are generated already, when an earlier attempt was interrupted: go on behind them.
            sampling: the iterator draws by it; stop strings, stop tokens and limits are watched by the engine.
        """
        ...


def find(config: Mapping[str, Any]) -> Adapter | None:
    """The one installed adapter that claims a model.

    Raises:
        ConfigurationError: an adapter cannot be imported or does not answer, or two claim the model.
    """
    claims = [(entry, adapter) for entry, adapter in _installed() if _claims(entry, adapter, config)]
    if len(claims) > 1:
        names = " and ".join(_where(entry) for entry, _ in claims)
        raise ConfigurationError(f"Two adapters claim this model: {names}. Uninstall one, or narrow its match().")
    return claims[0][1] if claims else None


def _installed() -> list[tuple[EntryPoint, Adapter]]:
    return [(entry, _load(entry)) for entry in sorted(entry_points(group=GROUP))]


def _load(entry: EntryPoint) -> Adapter:
    try:
        found = entry.load()
        adapter = found() if isinstance(found, type) else found
    except Exception as error:  # code of others may raise anything as it is imported
        raise ConfigurationError(
            f"Adapter {_where(entry)} cannot be imported: {type(error).__name__}: {error}. Mend or uninstall it."
        ) from error
    if not callable(getattr(adapter, "match", None)):
        raise ConfigurationError(f"Adapter {_where(entry)} has no match(config), so it cannot say which model is its.")
    checked: Adapter = adapter
    return checked


def _claims(entry: EntryPoint, adapter: Adapter, config: Mapping[str, Any]) -> bool:
    try:
        return bool(adapter.match(config))
    except Exception as error:
        raise ConfigurationError(f"Adapter {_where(entry)}: match() failed: {type(error).__name__}: {error}") from error


def _where(entry: EntryPoint) -> str:
    package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
    return f"{entry.name!r} ({entry.value}{package})"
