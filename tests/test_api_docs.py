"""docs/api.md and docs/anthropic.md name every parameter that the API knows, honoured or refused."""

import re
from pathlib import Path

import pytest
from fastchat_q.api import embeddings, formats, rerank, schemas
from fastchat_q.api.anthropic import request as anthropic
from pydantic import BaseModel

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "api.md").read_text()
ANTHROPIC = (DOCS / "anthropic.md").read_text()


@pytest.mark.parametrize(
    "body", [schemas.ChatRequest, embeddings.EmbeddingRequest, rerank.RerankRequest, formats.StructuredOutputs]
)
def test_every_parameter_is_in_the_reference(body: type[BaseModel]) -> None:
    named = set(re.findall(r"`(\w+)[`.]", PAGE))
    assert {field.alias or name for name, field in body.model_fields.items()} <= named


def test_every_parameter_that_is_refused_is_in_the_reference() -> None:
    refused = PAGE[PAGE.index("Refused unless") : PAGE.index("### Answers")]
    assert set(re.findall(r"`(\w+)`", refused)) - {"unknown_parameter"} == set(schemas.NOT_SUPPORTED)


@pytest.mark.parametrize("body", [anthropic.MessageRequest, anthropic.Tool, anthropic.Thinking, anthropic.ToolChoice])
def test_every_parameter_of_a_message_is_in_its_reference(body: type[BaseModel]) -> None:
    named = set(re.findall(r"`(\w+)[`.:]", ANTHROPIC)) | {"type"}
    assert {field.alias or name for name, field in body.model_fields.items()} <= named


def test_every_parameter_of_a_message_that_is_refused_is_in_its_reference() -> None:
    refused = ANTHROPIC[ANTHROPIC.index("Refused unless") : ANTHROPIC.index("Blocks of other types")]
    assert set(re.findall(r"`(\w+)`", refused)) == set(anthropic.NOT_SUPPORTED)
    assert set(anthropic.TOOL_NOT_SUPPORTED) <= set(re.findall(r"`(\w+)`", ANTHROPIC))
