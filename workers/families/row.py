"""A family of models as a row of data, and the chat template that the row makes."""

import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from fastchat_q.errors import ConfigurationError

ROW_FILES = ("fastchat.toml", "today.toml")
TURNS = "turns.jinja"
CONTENT = "{content}"


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(_Row):
    """A turn that every conversation of the family begins with."""

    role: Literal["user", "assistant"]
    content: str


class Format(_Row):
    """How turns become text (``turns.jinja``). Each pattern holds ``{content}`` once; ``{round}`` counts the user's."""

    user: str
    assistant: str
    open: str
    """What asks the assistant for its turn."""
    start: str = ""
    """Before everything else. The tokenizer's start token is added by itself where the tokenizer has one."""
    system: str | None = None
    """None: the family knows no system message, and one is refused or folded."""
    no_system: str | None = None
    """In the place of ``system`` when the message is empty. None: the pattern is written around nothing."""
    fold_system: bool = False
    """A system message goes before the first user turn's text."""
    first_user: str | None = None
    last: str | None = None
    """The pattern of the last turn, whoever's it is."""
    first_round: int = 0
    strip: bool = False
    """Without white space around the contents."""
    squeeze: bool = False
    """With single line breaks for double ones."""
    last_exchange: bool = False
    """Only the last turn of each side is shown."""

    @model_validator(mode="after")
    def _patterns_hold_the_content(self) -> "Format":
        for name in ("system", "user", "first_user", "assistant", "last"):
            pattern = getattr(self, name)
            if pattern is not None and pattern.count(CONTENT) != 1:
                raise ValueError(f"{name} = {pattern!r} must hold {CONTENT} once")
        return self

    def parts(self) -> dict[str, Any]:
        """The same with each pattern as the texts before and behind the content, as the template takes it."""
        return {
            name: tuple(value.split(CONTENT)) if isinstance(value, str) and CONTENT in value else value
            for name, value in self
        }


class Family(_Row):
    """A row. Everything but the name may be left out."""

    name: str
    template: str | None = None
    """A Jinja file beside the row. With neither it nor a format, models of the family bring their own template."""
    format: Format | None = None
    """How turns of plain text are written: the parameters of ``turns.jinja``."""
    system: str = ""
    """The system message of conversations that have none."""
    examples: tuple[Example, ...] = ()
    models: tuple[str, ...] = ()
    """Hub ids, exact, of models whose template this is."""
    model_types: tuple[str, ...] = ()
    """``model_type`` of config.json, exact, of models that may belong to the family; empty: any."""
    marks: tuple[str, ...] = ()
    """Texts that a model's own template must all hold to belong to the family."""
    marks_absent: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    stop_tokens: tuple[str, ...] = ()
    """Special tokens, as text, that end an answer, where the tokenizer has them."""
    stop_token_ids: tuple[int, ...] = ()
    """The same by number: of the vocabulary of ``models``, and used for them alone."""
    tool_parser: str | None = None
    """How tool calls are written, by the name of vLLM's parser."""
    reasoning_parser: str | None = None
    roles: tuple[str, ...] = ("system", "user", "assistant")
    """What the bundled template takes; a model's own template decides for itself."""
    api: str | None = None
    """The engine that forwards to the provider of these hosted models: no prompt is rendered here."""
    differs: str | None = None
    """Where the prompt is not what FastChat made, and why."""
    notes: str | None = None
    _folder: Path | None = PrivateAttr(default=None)  # where a template of a row from outside the package lies

    @property
    def bundled(self) -> bool:
        """Whether the row has a chat template."""
        return self.template is not None or self.format is not None

    def chat_template(self) -> str | None:
        """The whole template as one text, to be set as a tokenizer's. None: models of the family bring their own.

        Raises:
            ConfigurationError: the row names a file that is not there.
        """
        if not self.bundled:
            return None
        name = self.template or TURNS
        own = self._folder / name if self._folder is not None else None
        path = own if own is not None and own.is_file() else files(__package__).joinpath(name)
        if not path.is_file():
            raise ConfigurationError(f"Family {self.name!r}: there is no template {name!r} beside its row.")
        values = {
            "family": self.name,
            "system": self.system,
            "examples": [example.model_dump() for example in self.examples],
            "format": self.format.parts() if self.format is not None else {},
        }
        given = "".join(f"{{%- set {name} = {value!r} -%}}\n" for name, value in values.items())
        return given + path.read_text(encoding="utf-8")


@cache
def families() -> dict[str, Family]:
    """All rows of the package by name, in the order in which they are looked through."""
    rows: dict[str, Family] = {}
    for name in ROW_FILES:
        for row in read_rows(files(__package__).joinpath(name).read_text(encoding="utf-8"), name):
            if row.name in rows:
                raise ConfigurationError(f"{name}: there are two families {row.name!r}.")
            rows[row.name] = row
    return rows


def read_rows(text: str, source: str, folder: Path | None = None) -> list[Family]:
    """Rows from TOML.

    Raises:
        ConfigurationError: it is not TOML, or an entry is not known, is missing or has the wrong form.
    """
    try:
        entries = tomllib.loads(text)
        if set(entries) - {"family"} or not isinstance(entries.get("family", []), list):
            raise ConfigurationError(f"{source}: rows begin with [[family]], not [{sorted(entries)[0]}].")
        rows = [Family.model_validate(entry) for entry in entries.get("family", [])]
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{source} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigurationError(f"{source}: {where}: {first['msg']} (given: {first['input']!r:.80})") from error
    for row in rows:
        row._folder = folder
    return rows
