"""docs/api.md names every parameter that the API knows, honoured or refused."""

import re
from pathlib import Path

import pytest
from fastchat_q.api import embeddings, formats, rerank, response_request, schemas
from pydantic import BaseModel

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "api.md").read_text()
RESPONSES = (DOCS / "responses.md").read_text()


@pytest.mark.parametrize(
    "body", [schemas.ChatRequest, embeddings.EmbeddingRequest, rerank.RerankRequest, formats.StructuredOutputs]
)
def test_every_parameter_is_in_the_reference(body: type[BaseModel]) -> None:
    named = set(re.findall(r"`(\w+)[`.]", PAGE))
    assert {field.alias or name for name, field in body.model_fields.items()} <= named


def test_every_parameter_that_is_refused_is_in_the_reference() -> None:
    refused = PAGE[PAGE.index("Refused unless") : PAGE.index("### Answers")]
    assert set(re.findall(r"`(\w+)`", refused)) - {"unknown_parameter"} == set(schemas.NOT_SUPPORTED)


def test_every_parameter_of_a_response_is_in_its_reference() -> None:
    named = set(re.findall(r"`(\w+)[`.]", RESPONSES))
    assert response_request.ResponseRequest.model_fields.keys() <= named
    refused = RESPONSES[RESPONSES.index("Refused unless") : RESPONSES.index("Where another parameter")]
    assert set(re.findall(r"`(\w+)`", refused)) == set(response_request.NOT_SUPPORTED)
