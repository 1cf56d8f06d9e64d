"""Aliases: names that stand for models by weights, from the command line to the answer."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from ulid import ULID

from fastchat_q import keys
from fastchat_q.aliases import Alias, Aliases, parse
from fastchat_q.errors import ConfigurationError

from .http_client import Reply, get, post
from .stack import API_KEY, Stack, environment_of, running_stack

CHI_SQUARE_1_IN_1000 = {1: 10.83, 2: 13.82, 3: 16.27}
"""Degrees of freedom -> what chance exceeds once in a thousand: https://en.wikipedia.org/wiki/Chi-squared_distribution"""


def chi_square(counts: Counter[str], alias: Alias) -> float:
    total = sum(counts.values())
    return sum((counts[model] - share * total) ** 2 / (share * total) for model, share in alias.shares.items())


@pytest.mark.parametrize("text", ["chat=a:0.9,b:0.1", "chat=a:1,b:2,c:3,d:4", "chat=a:0.001,b:0.999", "chat=a,b"])
def test_models_are_chosen_as_often_as_their_weights_say(text: str) -> None:
    alias = parse(text)
    counts = Counter(alias.choose(f"key-{number}", alias.weights) for number in range(50_000))
    assert chi_square(counts, alias) < CHI_SQUARE_1_IN_1000[len(alias.weights) - 1]


def test_ids_of_one_moment_are_spread_as_well() -> None:
    """They are what the API chooses by, and differ in their last characters alone."""
    alias = parse("chat=a:3,b:1")
    ids = [str(ULID.from_timestamp(1_700_000_000)) for _ in range(20_000)]
    counts = Counter(alias.choose(job_id, alias.weights) for job_id in ids)
    assert abs(counts["b"] / 20_000 - 0.25) < 0.02, "six standard deviations"


def test_a_key_keeps_its_model_and_a_model_that_drops_out_moves_its_own_keys_alone() -> None:
    alias = parse("chat=a:5,b:3,c:2")
    keys_ = [f"key-{number}" for number in range(5_000)]
    before = {key: alias.choose(key, {"a", "b", "c"}) for key in keys_}
    assert before == {key: alias.choose(key, {"a", "b", "c"}) for key in keys_}
    after = {key: alias.choose(key, {"a", "c"}) for key in keys_}
    moved = {key for key in keys_ if before[key] != after[key]}
    assert moved == {key for key in keys_ if before[key] == "b"}
    counts = Counter(after.values())
    assert chi_square(counts, Alias("chat", {"a": 5, "c": 2})) < CHI_SQUARE_1_IN_1000[1]
    assert {alias.choose(key, ()) for key in keys_} == {"a", "b", "c"}, "with nobody there the refusal names one"


def test_a_definition_is_read_with_weights_of_any_size_and_names_with_colons() -> None:
    assert parse("chat=vicuna:0.9,vicuna-next:0.1").shares == {"vicuna": 0.9, "vicuna-next": 0.1}
    assert parse("chat=a:30, b:10").shares == {"a": 0.75, "b": 0.25}
    assert parse("chat=llama3:8b").weights == {"llama3:8b": 1.0}
    assert parse("chat=llama3:8b:2,Qwen/Qwen3-0.6B").weights == {"llama3:8b": 2.0, "Qwen/Qwen3-0.6B": 1.0}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("chat", "expected NAME=MODEL:WEIGHT"),
        ("chat=", "expected NAME=MODEL:WEIGHT"),
        ("=a", "needs 1 to 256"),
        ("chat=a:0", "must be a positive number"),
        ("chat=a:-1", "must be a positive number"),
        ("chat=a:nan,b", "must be a positive number"),
        ("chat=a:inf", "must be a positive number"),
        ("chat=a,a:2", "twice"),
        ("chat=a,,b", "names no model"),
        ("chat=chat:1,b", "stands for itself"),
    ],
)
def test_a_definition_that_makes_no_sense_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        parse(text)


async def test_an_alias_hides_no_model_and_stands_for_no_alias(redis: "Redis") -> None:
    aliases = Aliases(redis)
    await aliases.put(parse("chat=a:1,b:1"), {"a", "b"})
    await aliases.put(parse("chat=a:3,b:1"), {"a", "b"})
    assert {str(alias) for alias in (await aliases.all()).values()} == {"a:3,b:1"}
    for text, complaint in (("a=b", "is a model"), ("x=chat", "is an alias itself"), ("b=c", "that must be a model")):
        with pytest.raises(ConfigurationError, match=complaint):
            await aliases.put(parse(text), {"a"})
    await redis.hset(keys.ALIASES, "foreign", "no json")  # type: ignore[misc]
    await redis.hset(keys.ALIASES, "wrong", '{"a": -1}')  # type: ignore[misc]
    assert list(await aliases.all()) == ["chat"]
    assert await aliases.remove("chat")
    assert not await aliases.remove("chat")


@pytest.fixture(scope="module")
def two() -> Iterator[Stack]:
    """A stack with echo workers for the models ``old`` and ``new``."""
    with tempfile.TemporaryDirectory(prefix="fq") as folder, running_stack(Path(folder)) as stack:
        for name in ("old", "new"):
            stack.start_worker("--engine", "echo", "--model", name, "--token-delay-ms", "0")
        yield stack


def models(stack: Stack, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """``fastchat-q models …``."""
    command = [sys.executable, "-m", "fastchat_q.cli", "models", *arguments]
    environment = environment_of(stack.server.environment())
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def make(stack: Stack, definition: str) -> None:
    """Makes an alias, and waits until the API knows it as it is now."""
    done = models(stack, "alias", definition)
    assert done.returncode == 0, done.stderr
    get(stack.port, "/v1/models")  # it reads the registry, aliases with it


def ask(stack: Stack, model: str, *, idempotency_key: str | None = None, api_key: str = API_KEY) -> Reply:
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}]}
    headers = {"authorization": f"Bearer {api_key}", "idempotency-key": idempotency_key}
    return post(stack.port, body, headers=headers)


def test_requests_for_an_alias_go_to_its_models_and_the_answer_names_the_alias(two: Stack) -> None:
    make(two, "chat=old:0.5,new:0.5")
    replies = [ask(two, "chat") for _ in range(40)]
    assert {reply.status for reply in replies} == {200}
    assert {reply.json()["model"] for reply in replies} == {"chat"}
    went_to = Counter(reply.headers["x-fastchat-q-model"] for reply in replies)
    assert set(went_to) == {"old", "new"}
    assert all(reply.headers["x-job-id"].startswith(reply.headers["x-fastchat-q-model"] + ".") for reply in replies)
    assert ask(two, "old").headers["x-fastchat-q-model"] == "old"
    job = get(two.port, f"/v1/jobs/{replies[0].headers['x-job-id']}").json()
    assert job["model"] == replies[0].headers["x-fastchat-q-model"], "the job's record says what it really was"


def test_a_stream_names_the_alias_too(two: Stack) -> None:
    make(two, "chat=old")
    stream = two.client().chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "hello there"}], stream=True
    )
    assert {chunk.model for chunk in stream} == {"chat"}


def test_an_idempotency_key_keeps_its_model_when_the_alias_changes(two: Stack) -> None:
    make(two, "chat=old")
    first = ask(two, "chat", idempotency_key="again")
    make(two, "chat=new")
    assert ask(two, "chat").headers["x-fastchat-q-model"] == "new"
    again = ask(two, "chat", idempotency_key="again")
    assert again.headers["x-fastchat-q-model"] == "old"
    assert (again.status, again.json()) == (200, first.json()), "the same job"


def test_the_name_that_is_asked_for_is_the_one_that_a_key_must_allow(two: Stack) -> None:
    """An operator makes aliases: who may use one may use what it stands for, but only by that name."""
    make(two, "chat=old:1,new:1")
    for_alias, for_model = two.make_key("--model", "chat"), two.make_key("--model", "old")
    assert ask(two, "chat", api_key=for_alias).status == 200
    refused = ask(two, "old", api_key=for_alias)
    assert (refused.status, refused.error()["code"]) == (403, "model_not_allowed")
    assert ask(two, "old", api_key=for_model).status == 200
    refused = ask(two, "chat", api_key=for_model)
    assert (refused.status, refused.error()["code"]) == (403, "model_not_allowed")
    listed = get(two.port, "/v1/models", authorization=f"Bearer {for_alias}").json()["data"]
    assert [model["id"] for model in listed] == ["chat"]


def test_aliases_are_listed_on_the_command_line_and_by_the_api(two: Stack) -> None:
    make(two, "chat=old:3,later:1")
    [shown] = json.loads(models(two, "alias", "--json").stdout)["data"]
    assert shown["targets"] == [
        {"model": "old", "weight": 3.0, "share": 0.75, "there": True},
        {"model": "later", "weight": 1.0, "share": 0.25, "there": False},
    ]
    assert [line.split()[:4] for line in models(two, "alias").stdout.splitlines()[1:]] == [
        ["chat", "old", "75.0%", "yes"],
        ["chat", "later", "25.0%", "no"],
    ]
    listed = {model["id"]: model["state"] for model in get(two.port, "/v1/models").json()["data"]}
    assert listed == {"chat": "serving", "old": "serving", "new": "serving"}
    assert get(two.port, "/v1/models/chat").json()["id"] == "chat"
    assert {row["card"]["name"] for row in json.loads(models(two, "ls", "--json").stdout)["data"]} == {"old", "new"}


def test_an_unknown_model_is_a_warning_and_nonsense_an_error(two: Stack) -> None:
    done = models(two, "alias", "chat=old:1,never:1")
    assert done.returncode == 0
    assert "no worker serves 'never' now" in done.stderr
    get(two.port, "/v1/models")
    assert {ask(two, "chat").headers["x-fastchat-q-model"] for _ in range(10)} == {"old"}
    for wrong in ("old=new", "chat=old:x:-1", "x=chat"):
        done = models(two, "alias", wrong)
        assert (done.returncode, done.stdout) == (2, ""), wrong
        assert done.stderr.startswith("fastchat-q: ")


def test_an_alias_that_is_removed_is_not_found_any_more(two: Stack) -> None:
    for how in (("chat=",), ("--rm", "chat")):
        make(two, "chat=old")
        assert ask(two, "chat").status == 200
        assert models(two, "alias", *how).returncode == 0
        get(two.port, "/v1/models")
        assert (ask(two, "chat").status, ask(two, "chat").error()["code"]) == (404, "model_not_found")
        assert models(two, "alias", *how).returncode == 4


def test_a_model_without_a_worker_leaves_its_share_to_the_others(stack: Stack) -> None:
    flags = ("--engine", "echo", "--token-delay-ms", "0", "--model")
    first, _ = stack.start_worker(*flags, "old"), stack.start_worker(*flags, "new")
    make(stack, "chat=old:999,new:1")
    assert ask(stack, "chat").headers["x-fastchat-q-model"] == "old"
    assert first.stop() == 0
    get(stack.port, "/v1/models")
    assert {ask(stack, "chat").headers["x-fastchat-q-model"] for _ in range(10)} == {"new"}
