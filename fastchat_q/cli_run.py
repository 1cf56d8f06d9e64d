"""``fastchat-q run`` and ``embed``: a chat in the terminal, and vectors of texts, through any API server."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .cli_common import EXIT_USAGE, ApiKey, AsJson, BaseUrl, StateDir, fail, load_settings, say

if TYPE_CHECKING:
    from .client import Api

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model of the server, or an alias.")]
System = Annotated[str | None, typer.Option("--system", help="What the model is told before the conversation.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0: always the likeliest token.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Of an answer.")]
VectorFormat = Annotated[
    Literal["jsonl", "json", "tsv"],
    typer.Option("--format", help="jsonl: an object a text; json: one document; tsv: numbers alone."),
]
BATCH = 256
"""Texts in a request of ``embed``."""


def run(
    model: ModelName,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]", help="Without it: a conversation, or what is piped in.")
    ] = None,
    system: System = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer as one chat.completion object.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Chat with a model: one PROMPT, or a conversation, where Ctrl-C ends an answer and /help tells what there is."""
    from .client import Server, with_server
    from .terminal import Chat, Options, converse, one_answer

    settings = load_settings(state_dir=state_dir)
    server = Server.find(settings, base_url, api_key)
    chat = Chat(Options(model, system, {"temperature": temperature, "max_tokens": max_tokens}))
    asked = " ".join(prompt or ())
    if not sys.stdin.isatty():
        piped = sys.stdin.read()
        asked = f"{asked}\n\n{piped}" if asked and piped.strip() else asked or piped
    elif not asked and not as_json:
        raise typer.Exit(with_server(server, lambda api: converse(api, chat), _waits))
    if not asked.strip():
        fail("There is no prompt: give one as an argument, or pipe one in.", EXIT_USAGE)
    raise typer.Exit(with_server(server, lambda api: one_answer(api, chat, asked, as_json), _waits))


def embed(
    model: ModelName,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="-: each line of stdin.")],
    form: VectorFormat = "jsonl",
    dimensions: Annotated[int | None, typer.Option("--dimensions", min=1, help="Numbers in a vector.")] = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Print the vectors of texts."""
    from .client import Server, with_server

    settings = load_settings(state_dir=state_dir)
    if texts == ["-"]:
        texts = [line.rstrip("\r\n") for line in sys.stdin]
        texts = [line for line in texts if line]
    if not texts:
        fail("There is no text to embed.", EXIT_USAGE)
    server = Server.find(settings, base_url, api_key)
    with_server(server, lambda api: _embed(api, model, texts, "json" if as_json else form, dimensions), _waits)


def _embed(api: "Api", model: str, texts: Sequence[str], form: str, dimensions: int | None) -> None:
    """Prints each part as it comes, but for one JSON document."""
    rows: list[dict[str, Any]] = []
    tokens = 0
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        size = {} if dimensions is None else {"dimensions": dimensions}
        reply = api.post("/v1/embeddings", {"model": model, "input": part, "encoding_format": "float", **size})
        for one in reply["data"]:
            row = {"index": start + one["index"], "text": part[one["index"]], "embedding": one["embedding"]}
            if form == "json":
                rows.append(row)
            elif form == "jsonl":
                print(json.dumps(row, ensure_ascii=False))
            else:
                print("\t".join(map(str, one["embedding"])))
        sys.stdout.flush()
        tokens += reply["usage"]["total_tokens"]
    if form == "json":
        print(json.dumps({"object": "list", "model": model, "data": rows, "usage": {"total_tokens": tokens}}))


def _waits(wait_s: float, why: str) -> None:
    say(f"{why} Trying again in {wait_s:g} s.")
