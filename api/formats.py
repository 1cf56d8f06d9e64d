"""What an answer must look like: OpenAI's ``response_format``, and ``structured_outputs`` as in vLLM."""

from typing import Annotated, Literal, Self

import orjson
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fastchat_q.jobs import Guide

from .fields import NAME, JsonObject, Strict, Text, field_error


class JsonSchema(Strict):
    """A JSON schema with a name."""

    name: str = Field(pattern=NAME)
    description: Text | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None
    """The answer follows the schema in any case."""


class ResponseFormat(Strict):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise field_error("json_schema", "The type 'json_schema' needs it")
        if self.type != "json_schema" and self.json_schema is not None:
            raise field_error("json_schema", f"The type '{self.type}' has no such field")
        return self

    def to_guide(self) -> Guide | None:
        """The same for an engine."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Guide(kind="json_object")
        return Guide(kind="json_schema", value=orjson.dumps(self.json_schema.schema_).decode())


class StructuredOutputs(Strict):
    """Extension, as in vLLM: exactly one of these."""

    json_: JsonObject | Text | None = Field(default=None, alias="json")
    """A JSON schema, as an object or as text."""
    regex: Annotated[Text, Field(min_length=1)] | None = None
    choice: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1)] | None = None
    grammar: Annotated[Text, Field(min_length=1)] | None = None
    """In the syntax of Lark."""
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "structured_outputs", "Exactly one of json, regex, choice, grammar and json_object is needed"
            )
        if isinstance(self.json_, str):
            try:
                orjson.loads(self.json_)
            except orjson.JSONDecodeError as error:
                raise field_error("json", f"It is no JSON: {error}", self.json_) from error
        return self

    def to_guide(self) -> Guide:
        """The same for an engine."""
        if self.json_ is not None:
            schema = self.json_ if isinstance(self.json_, str) else orjson.dumps(self.json_).decode()
            return Guide(kind="json_schema", value=schema)
        if self.choice is not None:
            return Guide(kind="choice", value=orjson.dumps(self.choice).decode())
        if self.regex is not None:
            return Guide(kind="regex", value=self.regex)
        if self.grammar is not None:
            return Guide(kind="grammar", value=self.grammar)
        return Guide(kind="json_object")
