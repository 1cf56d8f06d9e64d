"""Five answers to each of two dozen schemas, from a model that knows no JSON: each ends, parses and validates.

Most have bounds and end where the model pleases. Those without would never end with this model: they are brought to
their end within max_tokens (``workers/engines/processing/closing.py``). None may be cut off.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field, TypeAdapter

from .conftest import shared_stack

TRIES = 5


class Color(Enum):
    """Of a `Product`."""

    RED = "red"
    GREEN = "green"


class Address(BaseModel):
    """Of a `Customer`."""

    street: str = Field(max_length=20)
    number: int = Field(ge=1, le=9999)
    zip: str = Field(pattern=r"^\d{5}$")


class Customer(BaseModel):
    """A model with models in it, as Instructor sends it: `$defs`, `$ref`, titles, defaults and descriptions."""

    name: str = Field(max_length=20, description="First and last name")
    address: Address
    others: list[Address] = Field(default_factory=list, max_length=2)
    newsletter: bool = False


class Product(BaseModel):
    """Enumerations, optional fields and literals."""

    color: Color
    kind: Literal["book", "toy"]
    price: float = Field(ge=0, le=1000)
    note: str | None = Field(default=None, max_length=10)


class Tree(BaseModel):
    """It refers to itself."""

    value: int
    children: list["Tree"] = Field(max_length=2)


def an_object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """A closed object, all of whose properties are required unless said otherwise."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


SHORT = {"type": "string", "maxLength": 12}

SCHEMAS: dict[str, dict[str, Any]] = {
    "flat object": an_object(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "nested objects": an_object(a=an_object(b=an_object(c=SHORT, d={"type": "boolean"}))),
    "enum of several types": an_object(x={"enum": ["red", 5, None, True, 1.5, "grün"]}),
    "array with bounds": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 5},
    "numbers with bounds": an_object(
        low={"type": "number", "minimum": -1.5, "maximum": 2.5},
        above={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        step={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    ),
    "anyOf": {"anyOf": [an_object(a={"type": "integer"}), an_object(b=SHORT), {"type": "null"}]},
    "references": {
        "$defs": {"point": an_object(x={"type": "integer"}, y={"type": "integer"})},
        **an_object(
            begin={"$ref": "#/$defs/point"}, way={"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 3}
        ),
    },
    "constants": an_object(type={"const": "event"}, version={"const": 2}, who=SHORT),
    "nullable": an_object(a={"type": ["string", "null"], "maxLength": 8}, b={"type": ["integer", "null"]}),
    "patterns": an_object(
        plate={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, slug={"type": "string", "pattern": "^[a-z]{1,12}$"}
    ),
    "formats": an_object(
        day={"type": "string", "format": "date"},
        at={"type": "string", "format": "date-time"},
        id={"type": "string", "format": "uuid"},
        host={"type": "string", "format": "ipv4"},
    ),
    "optional properties": an_object(["a"], a=SHORT, b={"type": "integer"}, c={"type": "boolean"}),
    "recursive": {
        "$defs": {
            "node": an_object(v={"type": "integer"}, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
        },
        "$ref": "#/$defs/node",
    },
    "unicode keys": an_object(**{"größe": {"type": "integer"}, "名前": SHORT, 'a "b" \\c': {"type": "boolean"}}),
    "map of numbers": {
        "type": "object",
        "additionalProperties": {"type": "integer"},
        "maxProperties": 3,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"enum": ["m", "km"]}, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "unbounded text": an_object(title={"type": "string"}, body={"type": "string"}),
    "many required": an_object(**{f"field{number}": {"type": "string"} for number in range(30)}),
    "pattern anywhere": {"type": "string", "pattern": "foo"},
    "pattern at the end": an_object(a={"type": "string", "pattern": "^a.*z$"}),
    "pydantic, nested": Customer.model_json_schema(),
    "pydantic, enumerations": Product.model_json_schema(),
    "pydantic, recursive": Tree.model_json_schema(),
}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """Of a worker with sixteen slots."""
    with shared_stack("--model", "tiny", "--slots", "16", "--threads", "1") as stack, stack.client() as found:
        yield found


def ask(client: openai.OpenAI, name: str, seed: int) -> str:
    """An answer; fails if it was cut off."""
    schema = {"name": "answer", "schema": SCHEMAS[name], "strict": True}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": f"Give me a record: {name}"}],
        temperature=1,
        seed=seed,
        response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[arg-type]
    )
    assert answer.choices[0].finish_reason == "stop", (name, seed, answer)
    return answer.choices[0].message.content or ""


def test_all_answers_to_all_schemas_parse_and_validate(client: openai.OpenAI) -> None:
    assert len(SCHEMAS) * TRIES >= 100
    asked = [(name, 1000 * number + seed) for number, name in enumerate(SCHEMAS) for seed in range(TRIES)]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda what: ask(client, *what), asked))
    for (name, seed), text in zip(asked, answers, strict=True):
        try:
            validate(json.loads(text), SCHEMAS[name])
        except (ValueError, jsonschema.ValidationError) as error:
            raise AssertionError(f"{name}, seed {seed}: {text!r}") from error
    assert len(set(answers)) > len(SCHEMAS) * 2, "the model chooses: these are not canned"


def validate(value: Any, schema: dict[str, Any]) -> None:
    """Formats included."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


@pytest.mark.parametrize(
    "schema",
    [
        TypeAdapter(list[Customer]).json_schema(),
        an_object(email={"type": "string", "format": "email"}, page={"type": "string", "format": "uri"}),
        an_object(a={"type": "string", "minLength": 20}, b={"type": "array", "items": SHORT, "minItems": 2}),
        {"type": "object"},
    ],
)
@pytest.mark.parametrize("max_tokens", [150, 222, 300])
def test_an_answer_that_has_no_end_of_its_own_is_brought_to_one_within_max_tokens(
    client: openai.OpenAI, schema: dict[str, Any], max_tokens: int
) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Write as much as you can."}],
        max_tokens=max_tokens,
        seed=max_tokens,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    assert answer.choices[0].finish_reason == "stop", answer
    validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_a_limit_that_no_answer_fits_cuts_it_off_and_says_so(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=20,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": an_object(a={"type": "string", "minLength": 1000})},
        },
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
