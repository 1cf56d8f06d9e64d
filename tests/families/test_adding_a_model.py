"""docs/adding-a-model.md, step by step: its own files, its own command lines, real workers."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastchat_q.workers.engines.loading.model import load
from fastchat_q.workers.engines.processing.rendering import Renderer

from fastchat_q.choices import LoadOptions
from fastchat_q.jobs import Job, Message
from tests.servers import wait_until
from tests.stack import Stack, running_stack

from .adapter_package import example, install, write

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: str, **environment: str) -> None:
    command = [sys.executable, *arguments]
    ran = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the document's files and models."""
    folder = tmp_path_factory.mktemp("shop")
    write(folder, "make_model.py", "my-format.jinja", "my-row.toml", "make_bigrams.py")
    run(folder, "make_model.py", "my-model")
    run(folder, "make_model.py", "bare-model", "--no-template")
    install(folder / "site", "bigrams", example("bigrams.py"), "bigrams:Adapter")
    run(folder, "make_bigrams.py", "bigram-model", PYTHONPATH=str(folder / "site"))
    return folder


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("s")) as running:
        yield running


def ask(stack: Stack, name: str, text: str, **fields: Any) -> tuple[str, str]:
    """(text, finish reason) of an answer."""
    create: Any = stack.client().chat.completions.create
    answer = create(model=name, messages=[{"role": "user", "content": text}], **fields)
    choice = answer.choices[0]
    return choice.message.content, choice.finish_reason


def test_a_model_with_its_own_template_needs_nothing(stack: Stack, shop: Path) -> None:
    worker = stack.start_worker("--threads", "1", "--model", str(shop / "my-model"))
    assert ask(stack, "my-model", "Hello!", max_tokens=5)[1] in {"length", "stop"}
    assert re.search(r"chat template +family=hermes .*the tokenizer's own", worker.output())
    worker.stop()


def test_a_row_of_one_s_own_is_served_from_its_file(stack: Stack, shop: Path) -> None:
    row = str(shop / "my-row.toml")
    worker = stack.start_worker("--threads", "1", "--model", str(shop / "bare-model"), "--chat-template", row)
    assert ask(stack, "bare-model", "Hello!", max_tokens=5)[1] in {"length", "stop"}
    assert re.search(r"chat template +family=my-format ", worker.output())
    worker.stop()


def test_a_model_without_a_template_completes_prompts_and_tells_chats_the_ways_out(stack: Stack, shop: Path) -> None:
    worker = stack.start_worker("--threads", "1", "--model", str(shop / "bare-model"))
    assert re.search(r"no chat template.*Ways out: --chat-template NAME", worker.output())
    with stack.client() as client:
        shown = client.models.retrieve("bare-model").model_dump()
        assert (shown["kind"], "completions" in shown["features"]) == ("completion", True)
        answer = client.completions.create(model="bare-model", prompt="Hello!", max_tokens=5)
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 5
        messages: Any = [{"role": "user", "content": "Hello!"}]
        with pytest.raises(openai.BadRequestError, match="--chat-template") as refused:
            client.chat.completions.create(model="bare-model", messages=messages)
        assert refused.value.code == "no_chat_template"
        with pytest.raises(openai.BadRequestError, match="--chat-template"):
            client.post(f"{stack.base}/tokenize", body={"model": "bare-model", "messages": messages}, cast_to=object)
    worker.stop()


def test_the_model_card_names_a_family(shop: Path) -> None:
    card = shop / "bare-model" / "README.md"
    card.write_text(example("bare-model/README.md"))
    try:
        chat = load(str(shop / "bare-model"), "cpu").chat
    finally:
        card.unlink()
    assert chat is not None
    assert (chat.family.name, chat.why) == ("vicuna_v1.1", "the model names the family")


@pytest.mark.parametrize(
    ("wanted", "family", "prompt"),
    [
        ("vicuna_v1.1", "vicuna_v1.1", " USER: Hello! ASSISTANT:"),
        ("my-format.jinja", "own", "[user] Hello!\n[assistant] "),
        ("my-row.toml", "my-format", "You are a pirate.\n\n[user] Hello!\n[assistant]"),
    ],
)
def test_a_template_is_asked_for(shop: Path, wanted: str, family: str, prompt: str) -> None:
    path = shop / wanted
    loaded = load(
        str(shop / "bare-model"), "cpu", options=LoadOptions(chat_template=str(path) if path.exists() else wanted)
    )
    assert loaded.chat is not None
    assert loaded.chat.family.name == family
    job = Job(id="j", model="m", messages=(Message(role="user", content="Hello!"),))
    ids = Renderer(loaded.tokenizer, 1024, loaded.chat).prompt(job)
    assert str(loaded.tokenizer.decode(ids)).endswith(prompt)


def test_an_adapter_serves_a_model_that_is_no_transformer(stack: Stack, shop: Path) -> None:
    worker = stack.start_worker("--model", str(shop / "bigram-model"), PYTHONPATH=str(shop / "site"))
    name = "bigram-model"
    assert ask(stack, name, "Hi!", temperature=0, max_tokens=200) == (" A cat sat on my hat.", "stop")
    assert ask(stack, name, "Hi!", temperature=0, stop=[" sat"]) == (" A cat", "stop")
    drawn = [ask(stack, name, "zzz", temperature=1, seed=seed, max_tokens=20)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    create: Any = stack.client().chat.completions.create
    stream = create(
        model=name,
        messages=[{"role": "user", "content": "Hi!"}],
        max_tokens=100_000_000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in range(20):
        next(stream)
    stream.close()
    wait_until(lambda: stack.live(name) == 0, "an endless answer whose reader left is cancelled")
    worker.stop()
