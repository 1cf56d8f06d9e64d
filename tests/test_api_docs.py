"""docs/api.md and docs/anthropic.md name every parameter that the API knows; other pages name what there is."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from fastchat_q.api import completions, embeddings, formats, rerank, response_request, schemas, tokenize
from fastchat_q.api.anthropic import request as anthropic
from pydantic import BaseModel

from fastchat_q.cli import app
from fastchat_q.jobs import Guide, Sampling
from fastchat_q.settings import Settings

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "api.md").read_text()
ANTHROPIC = (DOCS / "anthropic.md").read_text()
RESPONSES = (DOCS / "responses.md").read_text()


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


@pytest.mark.parametrize("body", [anthropic.MessageRequest, anthropic.Tool, anthropic.Thinking, anthropic.ToolChoice])
def test_every_parameter_of_a_message_is_in_its_reference(body: type[BaseModel]) -> None:
    named = set(re.findall(r"`(\w+)[`.:]", ANTHROPIC)) | {"type"}
    assert {field.alias or name for name, field in body.model_fields.items()} <= named


def test_every_parameter_of_a_message_that_is_refused_is_in_its_reference() -> None:
    refused = ANTHROPIC[ANTHROPIC.index("Refused unless") : ANTHROPIC.index("Blocks of other types")]
    assert set(re.findall(r"`(\w+)`", refused)) == set(anthropic.NOT_SUPPORTED)
    assert set(anthropic.TOOL_NOT_SUPPORTED) <= set(re.findall(r"`(\w+)`", ANTHROPIC))


def test_the_reference_says_of_each_parameter_which_feature_a_model_needs_for_it() -> None:
    everything = Sampling(
        n=2,
        top_k=1,
        min_p=0.5,
        min_tokens=1,
        stop_token_ids=(1,),
        presence_penalty=1,
        frequency_penalty=1,
        repetition_penalty=2,
        logit_bias={"1": 1},
        logprobs=1,
        guide=Guide(kind="json_object"),
    )
    asked = {**everything.asks(), **Sampling(guide=Guide(kind="regex", value="a")).asks(), "tools": "tools"}
    rows = re.findall(r"^\| (.*?) \| .*? ?\| ?(?:`(\w+)`)? ?\| .*\|$", PAGE[PAGE.index("## Chat completions") :], re.M)
    said = {name: feature for names, feature in rows for name in re.findall(r"`(\w+)`", names)}
    assert {name: said.get(name) for name in asked} == asked


MIGRATIONS = sorted(DOCS.glob("migrating-from-*.md"))
ROOT_COMMAND = typer.main.get_command(app)


def flags_of(command: Any) -> set[str]:
    """Those of a command and of all below it."""
    own = {flag for parameter in command.params for flag in parameter.opts}
    return own.union(*map(flags_of, getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", MIGRATIONS, ids=[page.stem for page in MIGRATIONS])
def test_who_comes_from_elsewhere_is_sent_to_commands_flags_and_settings_that_are_there(page: Path) -> None:
    rows = re.findall(r"^\| (?!---).*? \| (.*) \|$", page.read_text(), re.M)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    commands = {span.split()[1] for span in spans if span.startswith("fastchat-q ")}
    assert commands <= set(ROOT_COMMAND.commands)
    flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z-]+", span)}
    assert flags
    assert flags <= flags_of(ROOT_COMMAND)
    settings = {name for span in spans for name in re.findall(r"FASTCHAT_Q_(\w+)", span)}
    assert {name.lower() for name in settings} <= set(Settings.model_fields)


def test_every_parameter_of_a_response_is_in_its_reference() -> None:
    named = set(re.findall(r"`(\w+)[`.]", RESPONSES))
    assert response_request.ResponseRequest.model_fields.keys() <= named
    refused = RESPONSES[RESPONSES.index("Refused unless") : RESPONSES.index("Where another parameter")]
    assert set(re.findall(r"`(\w+)`", refused)) == set(response_request.NOT_SUPPORTED)


def test_every_parameter_of_completions_that_is_refused_is_in_the_reference() -> None:
    refused = PAGE[PAGE.index("Refused there unless") : PAGE.index("## Tokens")]
    assert set(re.findall(r"`(\w+)`", refused)) == set(completions.NOT_SUPPORTED)
