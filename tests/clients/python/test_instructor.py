"""Instructor: typed answers by tools and by JSON schema. `tiny` knows no JSON: constrained decoding makes it right."""

from typing import Any, Literal

import instructor
import openai
import pytest
from bias import TERSE
from conftest import API_KEY, BASE_URL
from pydantic import BaseModel, ConfigDict, Field

HELLO: Any = [{"role": "user", "content": "My name is Bob and I am 3."}]
MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


class Address(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else JSON schema lets `tiny` go on with properties of its own
    street: str
    kind: Literal["home", "work"]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    age: int = Field(ge=0, le=150)
    addresses: list[Address] = Field(max_length=2)


def wrapped(mode: instructor.Mode) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=BASE_URL, api_key=API_KEY), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_has_its_type_at_the_first_try(mode: instructor.Mode) -> None:
    person, raw = wrapped(mode).chat.completions.create_with_completion(
        model="tiny", messages=HELLO, response_model=Person, max_retries=0, logit_bias=TERSE, temperature=1, seed=3
    )
    assert isinstance(person, Person)
    assert raw.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_partial_answer_grows(mode: instructor.Mode) -> None:
    parts = list(
        wrapped(mode).chat.completions.create_partial(
            model="tiny", messages=HELLO, response_model=Person, max_retries=0, logit_bias=TERSE, temperature=1, seed=3
        )
    )
    assert len(parts) > 1
    assert parts[-1].age is not None


async def test_an_asynchronous_answer() -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY))
    person = await client.chat.completions.create(
        model="tiny", messages=HELLO, response_model=Person, max_retries=0, logit_bias=TERSE
    )
    assert isinstance(person, Person)
