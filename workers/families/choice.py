"""Which family and which chat template a model gets: from what was asked, or what the model says of itself.

Names are compared whole. A path or a part of a name never decides: it once gave Hunyuan the template of Yuan.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from fastchat_q.errors import ConfigurationError

from .row import Family, families, read_rows

Template = str | dict[str, str]
"""A tokenizer may have several templates by name: ``default``, ``tool_use``."""


class NoTemplateError(ConfigurationError):
    """Nothing says how this model takes messages: it completes prompts only."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model is served with."""

    family: Family
    template: Template
    why: str
    """In a few words, for the log."""
    origin: Literal["model", "row", "file"]
    """Where the template comes from. A row leaves the start token to the tokenizer. A model's own knows its own ends:
    the family's stop texts and tokens are for the others."""
    declared: bool
    """The model itself names the family, so that its token ids are known to be right."""


def choose(
    wanted: str | None, own: Template | None, model_type: str | None, names: Iterable[str], source: str
) -> Choice:
    """The first of: what was asked for, the tokenizer's own template, the row that the model names.

    Args:
        wanted: ``--chat-template``: the name of a row, or a file (.jinja, or .toml with one row).
        own: the tokenizer's chat template.
        model_type: as in config.json.
        names: hub ids by which the model calls itself or its base.
        source: what the model was loaded from, for messages.

    Raises:
        NoTemplateError: there is none at all; the message says the ways out.
        ConfigurationError: there is none of that name.
    """
    named = _named(names)
    if wanted is not None:
        return _wanted(wanted, own, model_type, named)
    if own is not None:
        family = named or detect(model_type, own)
        return Choice(family, own, "the tokenizer's own", "model", named is not None)
    if named is not None and (template := named.chat_template()) is not None:
        return Choice(named, template, "the model names the family", "row", True)
    raise NoTemplateError(
        f"Model {source!r} has no chat template in its tokenizer, and its model card names no family that is known "
        "here, so it cannot take chat messages. Ways out: --chat-template NAME with a name that `fastchat-q models "
        "families` lists; --chat-template FILE with a Jinja template or a row of your own (docs/adding-a-model.md); "
        "or serve an instruction-tuned variant of the model."
    )


def detect(model_type: str | None, template: Template) -> Family:
    """The family whose marks a model's own template bears; the row ``own`` if there is none."""
    text = template if isinstance(template, str) else "\n".join(template.values())
    for family in families().values():
        declares = family.marks or family.model_types
        if declares and _bears(family, model_type, text):
            return family
    return families()["own"]


def declared_names(source: str, config: Mapping[str, object], card: Mapping[str, object]) -> list[str]:
    """Hub ids by which a model calls itself or its base: what was asked for, config.json, the model card's head."""
    base = card.get("base_model")
    found = [source, config.get("_name_or_path"), card.get("model_name")]
    found += base if isinstance(base, list) else [base]
    return [name for name in found if isinstance(name, str) and name]


def _bears(family: Family, model_type: str | None, text: str) -> bool:
    if family.model_types and model_type not in family.model_types:
        return False
    return all(mark in text for mark in family.marks) and not any(mark in text for mark in family.marks_absent)


def _named(names: Iterable[str]) -> Family | None:
    wanted = set(names)
    return next((family for family in families().values() if wanted.intersection(family.models)), None)


def _wanted(wanted: str, own: Template | None, model_type: str | None, named: Family | None) -> Choice:
    path = Path(wanted).expanduser()
    if path.suffix == ".jinja":
        text = _read(path)
        return Choice(named or detect(model_type, text), text, f"--chat-template {wanted}", "file", named is not None)
    if path.suffix == ".toml":
        rows = read_rows(_read(path), wanted, path.parent)
        if len(rows) != 1:
            raise ConfigurationError(f"--chat-template {wanted}: the file must hold one [[family]], not {len(rows)}.")
        family, declared = rows[0], True
    else:
        found = families().get(wanted)
        if found is None:
            raise ConfigurationError(_unknown(wanted))
        family, declared = found, found is named
    if family.api is not None:
        raise ConfigurationError(
            f"--chat-template {wanted}: this is the name of a hosted model, with no prompt of its own; "
            f"--engine {family.api} forwards to its provider."
        )
    bundled = family.chat_template()
    template = bundled or own
    if template is None:
        raise ConfigurationError(
            f"--chat-template {wanted}: models of this family bring their own template, and this model has none. "
            "Give its template as a file: --chat-template FILE.jinja"
        )
    return Choice(family, template, f"--chat-template {wanted}", "row" if bundled else "model", declared)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--chat-template {path}: {error}") from error


def _unknown(wanted: str) -> str:
    close = get_close_matches(wanted, families(), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return (
        f"--chat-template {wanted}: there is no family of that name{hint} `fastchat-q models families` lists them; "
        "a file ends in .jinja or .toml."
    )
