"""API keys: what is stored, what the command line does with them, and what the API server answers their holders."""

import json
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from fastchat_q.api.auth import KNOWN_S, MAX_UNKNOWN, Authenticator
from redis.asyncio import Redis

from fastchat_q import keys
from fastchat_q.addresses import without_password
from fastchat_q.cli_keys import parse_expiry
from fastchat_q.connection import connect
from fastchat_q.credentials import load_or_create_pepper, new_api_key
from fastchat_q.errors import AuthenticationError, ConfigurationError, QueueUnavailableError
from fastchat_q.keystore import KeyStore
from fastchat_q.settings import Settings
from fastchat_q.tenants import BOOTSTRAP, ApiKey, Caller, digest

from .http_client import Reply, get, post
from .stack import Stack, running_stack, wait_until

PEPPER = "p" * 32
NOW = datetime(2030, 1, 1, tzinfo=UTC)
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


def caller(**fields: Any) -> Caller:
    return Caller(**{"key_id": "key_1", "tenant": "t", "scopes": frozenset({"inference"}), **fields})


def fastchat_q(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fastchat_q.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def key_command(stack: Stack, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return fastchat_q(
        "key", *arguments, "--redis-url", stack.server.url, "--state-dir", str(stack.folder), **environment
    )


def listed(stack: Stack) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(key_command(stack, "ls", "--json").stdout)["data"]
    return found


def ask(stack: Stack, key: str, **fields: Any) -> Reply:
    return post(stack.port, {**CHAT, **fields}, headers={"authorization": f"Bearer {key}"})


def test_a_record_comes_back_as_it_was() -> None:
    everything = caller(
        models=("tiny", "Qwen/*"), expires=5, rpm=1, tpm=2, max_parallel=3, max_queued=4, weight=5, scopes={"batch"}
    )
    for record in (ApiKey(caller=c, name="n ü", created=7, last4="abcd") for c in (everything, caller())):
        stored = {name.encode(): value.encode() for name, value in record.to_hash().items()}
        assert ApiKey.from_hash(stored) == record


def test_a_model_is_allowed_by_its_exact_name_or_by_its_beginning() -> None:
    assert caller().may_use("anything")
    listed = caller(models=("tiny", "Qwen/*"))
    allowed = {"tiny": True, "tiny2": False, "Qwen/Qwen3": True, "qwen/x": False, "": False}
    assert {model: listed.may_use(model) for model in allowed} == allowed


@pytest.mark.parametrize(
    ("text", "days"), [("30d", 30), ("2w", 14), ("24h", 1), ("2030-01-03", 2), ("2030-01-03T01:00+01:00", 2)]
)
def test_an_expiry_is_a_span_or_a_date(text: str, days: int) -> None:
    assert parse_expiry(text, NOW) == NOW.timestamp() + days * 86400


@pytest.mark.parametrize("text", ["soon", "", "3 days", "2029-12-31", "0d", "-1d", "999999w"])
def test_an_expiry_that_is_none_or_in_the_past_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_expiry(text, NOW)


def test_the_pepper_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "new")
    pepper = load_or_create_pepper(settings)
    assert len(pepper) == 43
    assert load_or_create_pepper(settings) == pepper
    assert stat.S_IMODE((tmp_path / "new" / "key_pepper").stat().st_mode) == 0o600
    assert load_or_create_pepper(Settings(key_pepper="x" * 32)) == "x" * 32
    with pytest.raises(ConfigurationError, match="31 characters"):
        load_or_create_pepper(Settings(key_pepper="x" * 31))


async def test_redis_holds_neither_the_key_nor_what_it_could_be_found_by_without_the_pepper(redis: "Redis") -> None:
    key, record = await KeyStore(redis, PEPPER).create(caller(), "n")
    assert len(key.removeprefix("sk-fcq-")) == 43
    assert await redis.exists(keys.api_key(digest(PEPPER, key)))
    assert not await redis.exists(keys.api_key(digest("q" * 32, key)))
    for name in await redis.keys("*"):
        kept = await (redis.get(name) if await redis.type(name) == b"string" else redis.hgetall(name))
        assert key not in str(kept)
        assert key[7:] not in str(kept)
    assert record.last4 == key[-4:]


async def test_a_key_made_with_another_pepper_is_refused_at_once(redis: "Redis") -> None:
    await KeyStore(redis, PEPPER).create(caller(), "n")
    with pytest.raises(ConfigurationError, match="another pepper"):
        await KeyStore(redis, "q" * 32).create(caller(key_id="key_2"), "m")
    assert len(await KeyStore(redis, PEPPER).all()) == 1


async def test_a_key_that_is_used_often_is_looked_up_once_in_five_seconds(redis: "Redis") -> None:
    now = 0.0
    store = KeyStore(redis, PEPPER)
    auth = Authenticator(store, "boot", lambda: now)
    key, record = await store.create(caller(), "n")
    assert await auth.caller(f"Bearer {key}") == record.caller
    await store.revoke("n")
    now = KNOWN_S - 0.1
    assert await auth.caller(f"bearer  {key}") == record.caller
    now = KNOWN_S + 0.1
    with pytest.raises(AuthenticationError, match="revoked"):
        await auth.caller(f"Bearer {key}")


async def test_invented_keys_do_not_push_out_a_good_one(redis: "Redis") -> None:
    store = KeyStore(redis, PEPPER)
    auth = Authenticator(store, "boot")
    key, record = await store.create(caller(), "n")
    await auth.caller(f"Bearer {key}")
    for _ in range(MAX_UNKNOWN + 10):
        with pytest.raises(AuthenticationError):
            await auth.caller(f"Bearer {new_api_key()}")
    await redis.flushall()
    assert await auth.caller(f"Bearer {key}") == record.caller


async def test_without_redis_a_key_is_not_called_wrong_and_the_bootstrap_key_works(folder: Path) -> None:
    async with connect(f"unix://{folder}/nobody.sock") as away:
        auth = Authenticator(KeyStore(away, PEPPER), "boot")
        assert await auth.caller("Bearer boot") == BOOTSTRAP
        with pytest.raises(QueueUnavailableError):
            await auth.caller(f"Bearer {new_api_key()}")
        with pytest.raises(AuthenticationError):
            await auth.caller("Bearer sk-something-else")


def test_a_key_answers_for_its_life(echo_stack: Stack) -> None:
    made = key_command(echo_stack, "create", "--name", "life", "--json")
    key = json.loads(made.stdout)
    assert ask(echo_stack, key["key"]).status == 200
    assert key["key"] not in key_command(echo_stack, "ls", "--json").stdout
    revoked = key_command(echo_stack, "revoke", key["id"])
    assert revoked.stdout == f"revoked {key['id']} (life)\n"
    wait_until(lambda: ask(echo_stack, key["key"]).status == 401, "it is refused", KNOWN_S + 10)
    error = ask(echo_stack, key["key"]).error()
    assert error["code"] == "invalid_api_key"
    assert "revoked" in error["message"]


def test_an_expired_key_is_refused_with_its_date(echo_stack: Stack) -> None:
    key = echo_stack.make_key("--expires", "1s")
    wait_until(lambda: ask(echo_stack, key).status == 401, "its time is over")
    reply = ask(echo_stack, key)
    assert reply.headers["www-authenticate"] == "Bearer"
    assert "expired at 20" in reply.error()["message"]
    states = {row["key_hint"][-4:]: row["state"] for row in listed(echo_stack)}
    assert states[key[-4:]] == "expired"


def test_a_key_without_the_scope_is_refused_with_403(echo_stack: Stack) -> None:
    reply = ask(echo_stack, echo_stack.make_key("--scope", "batch", "--scope", "admin"))
    assert reply.status == 403
    error = reply.error()
    assert (error["type"], error["code"]) == ("permission_denied", "insufficient_scope")
    assert "admin, batch" in error["message"]


def test_the_batch_lane_needs_a_scope_of_its_own(echo_stack: Stack) -> None:
    key = echo_stack.make_key("--scope", "inference")
    assert ask(echo_stack, key).status == 200
    refused = ask(echo_stack, key, service_tier="flex")
    assert (refused.status, refused.error()["code"]) == (403, "insufficient_scope")
    assert "'flex'" in refused.error()["message"]
    assert ask(echo_stack, echo_stack.make_key(), service_tier="flex").status == 200


def test_a_key_sees_and_uses_only_the_models_on_its_list(echo_stack: Stack) -> None:
    other, fitting = echo_stack.make_key("--model", "tiny"), echo_stack.make_key("--model", "ec*")
    reply = ask(echo_stack, other)
    assert reply.status == 403
    error = reply.error()
    assert (error["type"], error["code"], error["param"]) == ("permission_denied", "model_not_allowed", "model")
    assert "'echo'" in error["message"]
    assert "tiny" in error["message"]
    assert ask(echo_stack, fitting).status == 200
    lists = [get(echo_stack.port, "/v1/models", authorization=f"Bearer {key}").json() for key in (other, fitting)]
    assert [[model["id"] for model in found["data"]] for found in lists] == [[], ["echo"]]
    assert get(echo_stack.port, "/v1/models/echo", authorization=f"Bearer {other}").status == 403
    assert "Did you mean" not in ask(echo_stack, other, model="tiny").error()["message"]


def test_a_job_carries_its_tenant_and_only_that_tenant_and_an_admin_see_it(echo_stack: Stack) -> None:
    mine, others = echo_stack.make_key("--tenant", "lab"), echo_stack.make_key("--tenant", "shop")
    public_id = ask(echo_stack, mine).headers["x-job-id"]
    assert echo_stack.redis.hget(keys.model_keys("echo").job(public_id.removeprefix("echo.")), "tenant") == "lab"
    colleague = echo_stack.make_key("--tenant", "lab")
    admin = echo_stack.make_key("--scope", "admin", "--scope", "inference")
    path, asked = f"/v1/jobs/{public_id}", (mine, colleague, admin, others)
    assert [get(echo_stack.port, path, authorization=f"Bearer {key}").status for key in asked] == [200, 200, 200, 404]
    cancelled = [
        post(echo_stack.port, {}, path=f"{path}/cancel", headers={"authorization": f"Bearer {key}"}).status
        for key in (others, mine)
    ]
    assert cancelled == [404, 200]


def test_without_redis_a_key_gets_503(folder: Path) -> None:
    with running_stack(folder) as stack:
        stack.server.kill()
        assert ask(stack, new_api_key()).status == 503
        assert ask(stack, "sk-fcq-no-key-of-ours").status == 401


def test_the_command_line_lists_what_a_key_may_do(stack: Stack) -> None:
    assert "No API keys" in key_command(stack, "ls").stderr
    assert listed(stack) == []
    options = ["--tenant", "lab", "--scope", "inference", "--model", "tiny", "--expires", "2099-01-01", "--weight", "3"]
    limits = ["--rpm", "60", "--tpm", "9000", "--parallel", "4", "--queued", "40", "--token-quota", "1.5m"]
    made = key_command(stack, "create", "--name", "ci", *options, *limits)
    assert "only time" in made.stderr
    [row] = listed(stack)
    assert row.pop("id").startswith("key_")
    assert row.pop("created").endswith("Z")
    assert row == {
        "name": "ci",
        "tenant": "lab",
        "scopes": ["inference"],
        "models": ["tiny"],
        "limits": {
            "requests_per_minute": 60,
            "tokens_per_minute": 9000,
            "parallel": 4,
            "queued": 40,
            "tokens": 1500000,
        },
        "tokens_used": 0,
        "tokens_left": 1500000,
        "weight": 3,
        "expires": "2099-01-01T00:00:00.000Z",
        "key_hint": f"sk-fcq-…{made.stdout.strip()[-4:]}",
        "state": "active",
    }
    head, line = key_command(stack, "ls").stdout.splitlines()
    assert head.split()[:3] == ["ID", "NAME", "TENANT"]
    assert "60 rpm · 9000 tpm · 4 run · 40 wait · 1500000 of 1500000 tokens left · weight 3" in line


def test_the_exit_code_says_what_was_wrong(stack: Stack, folder: Path) -> None:
    assert key_command(stack, "revoke", "nobody").returncode == 4
    for wrong in (["--scope", "root"], ["--tenant", "a b"], ["--expires", "never"], ["--rpm", "0"], ["--model", ""]):
        refused = key_command(stack, "create", "--name", "x", *wrong)
        assert refused.returncode == 2, refused
        assert "Traceback" not in refused.stderr
    assert key_command(stack, "create", "--name", " ").returncode == 2
    assert key_command(stack, "ls", FASTCHAT_Q_KEY_PEPPER="short").returncode == 2
    for _ in range(2):
        stack.make_key()
    twice = key_command(stack, "revoke", "test")
    assert (twice.returncode, twice.stdout) == (2, "")
    assert twice.stderr.count("key_") == 2
    away = fastchat_q("key", "ls", "--redis-url", "redis://u:secret@127.0.0.1:1/0", "--state-dir", str(folder))
    assert away.returncode == 3
    assert "not reachable" in away.stderr
    assert "secret" not in away.stderr


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://u:p@ss@h:1/0", "redis://u:***@h:1/0"),
        ("rediss://:p@h/0?ssl_ca_certs=/x", "rediss://:***@h/0?ssl_ca_certs=/x"),
        ("unix:///a/b?password=p&db=1", "unix:///a/b?password=***&db=1"),
        ("redis://u@h", "redis://u@h"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
