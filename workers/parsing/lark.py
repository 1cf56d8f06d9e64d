"""Grammars of calls for llguidance: which text may come where a call must."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_CALLS = 16
JSON_OPTIONS = {"whitespace_pattern": r"(\x0A?\x20{0,8})"}
"""Little white space: a weak model would go on with it."""
NO_PARAMETERS = {"type": "object", "properties": {}}
OPEN = (
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "propertyNames",
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
)
"""Keywords that may say of more parameters than ``properties`` does."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, an object."""
    strict: bool = False
    """A keyword of the schema that cannot be held to is refused."""

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> "Function":
        """From OpenAI's object.

        Where it leaves open whether there are more parameters than it names, there are none: such a call would fail.
        """
        function = tool["function"]
        parameters = function.get("parameters") or NO_PARAMETERS
        if "properties" in parameters and not any(keyword in parameters for keyword in OPEN):
            parameters = {**parameters, "additionalProperties": False}
        return cls(function["name"], parameters, bool(function.get("strict")))

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of its parameters."""
        found = self.parameters.get("properties")
        return found if isinstance(found, Mapping) else {}

    @property
    def required(self) -> frozenset[str]:
        """The parameters that must be there."""
        found = self.parameters.get("required")
        return frozenset(found) if isinstance(found, list) else frozenset()

    def schema_of(self, parameter: str) -> dict[str, Any]:
        """The schema of one of its parameters, with what it refers to."""
        found = self.properties.get(parameter, {})
        shared = {name: self.parameters[name] for name in ("$defs", "definitions") if name in self.parameters}
        return {**shared, **found} if isinstance(found, Mapping) else {}


@dataclass(slots=True)
class Lark:
    """Rules as they are put together.

    ``tokens`` are those that the tokenizer keeps whole: llguidance takes them by number, and not as text.
    """

    tokens: Mapping[str, int]
    rules: list[str] = field(default_factory=list)

    def text(self, text: str) -> str:
        """This text, as an expression; empty for none."""
        known = sorted((token for token in self.tokens if token and token in text), key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, known)) + ")", text) if known else [text]
        return " ".join(self._piece(piece) for piece in pieces if piece)

    def _piece(self, piece: str) -> str:
        token = self.tokens.get(piece)
        return json.dumps(piece) if token is None else f"<[{token}]>"

    def rule(self, *alternatives: str) -> str:
        """A rule of these alternatives; its name."""
        return self._add("r", " | ".join(alternatives))

    def _add(self, kind: str, body: str) -> str:
        name = f"{kind}{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def arguments(self, function: Function) -> str:
        """The arguments of a function as JSON."""
        return self.json(function.parameters, function.strict)

    def json(self, schema: Mapping[str, Any], strict: bool) -> str:
        """A value as JSON."""
        given = {**schema, "x-guidance": {**JSON_OPTIONS, "lenient": not strict}}
        return self._add("json", "%json " + json.dumps(given))

    def up_to(self, end: str, *without: str) -> str:
        """Any text, and then this end, which is not in it; nor are the others, which the parser would take for one."""
        barred = [re.escape(text).replace("/", r"\/") for text in without if text and text not in self.tokens]
        text = r"/(.|\n)*/"
        if barred:
            text = f"TEXT{len(self.rules)}"
            self.rules.append(rf"{text}: /(.|\n)*/ & ~/(.|\n)*({'|'.join(barred)})(.|\n)*/")
        if end in self.tokens:
            return self.rule(f"{text} {self.text(end)}")
        name = f"up{len(self.rules)}"
        self.rules.append(f"{name}[suffix={json.dumps(end)}]: {text}")
        return name

    def calls(self, calls: Iterable[str], many: bool, between: str = "") -> str:
        """One of these calls, or several."""
        one = self.rule(*calls)
        return f"{one} ({between} {one}){{0,{MOST_CALLS - 1}}}" if many else one

    def grammar(self, start: str) -> str:
        """The whole."""
        return "\n".join([f"start: {start}", *self.rules]) + "\n"
