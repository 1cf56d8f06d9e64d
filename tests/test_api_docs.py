"""docs/api.md names every parameter that the API knows, honoured or refused."""

import re
from pathlib import Path

import pytest
from fastchat_q.api import completions, embeddings, formats, rerank, schemas, tokenize
from pydantic import BaseModel

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()


@pytest.mark.parametrize(
    "body",
    [
        schemas.ChatRequest,
        completions.CompletionRequest,
        embeddings.EmbeddingRequest,
        rerank.RerankRequest,
        formats.StructuredOutputs,
        tokenize.DetokenizeRequest,
        tokenize.TokenizeRequest,
    ],
)
def test_every_parameter_is_in_the_reference(body: type[BaseModel]) -> None:
    named = set(re.findall(r"`(\w+)[`.]", PAGE))
    assert {field.alias or name for name, field in body.model_fields.items()} <= named


def test_every_parameter_that_is_refused_is_in_the_reference() -> None:
    refused = PAGE[PAGE.index("Refused unless") : PAGE.index("### Answers")]
    assert set(re.findall(r"`(\w+)`", refused)) - {"unknown_parameter"} == set(schemas.NOT_SUPPORTED)


def test_every_parameter_of_completions_that_is_refused_is_in_the_reference() -> None:
    refused = PAGE[PAGE.index("Refused there unless") : PAGE.index("## Tokens")]
    assert set(re.findall(r"`(\w+)`", refused)) == set(completions.NOT_SUPPORTED)
