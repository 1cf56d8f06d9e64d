"""The commands of the person on call, on a real Redis and with real workers: jobs, dead, queue."""

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner
from ulid import ULID

from fastchat_q import keys
from fastchat_q.cli import app
from fastchat_q.connection import connect
from fastchat_q.events import Result, Usage
from fastchat_q.jobs import Job
from fastchat_q.queue import Claim, Finish, Queue, Terms
from fastchat_q.records import ATTEMPTS_KEPT, read_record
from fastchat_q.registry import ModelCard, Registration, Registry
from fastchat_q.tokens import append

from .stack import RedisServer, Stack, wait_until

MODEL = "org/Some-Model"
SLUG = keys.slug(MODEL)
NAMES = keys.model_keys(MODEL)
DONE = Result("stop", Usage(3, 2))
FAILED = Result(error={"message": "no memory", "type": "server_error", "code": "oom", "param": None, "status": 500})
RECORD_KEYS = {
    *("id", "object", "model", "state", "lane", "tenant", "position", "eta_s", "standing", "retry_at", "tokens"),
    *("worker", "created_at", "started_at", "ended_at", "start_by", "deadline", "attempts", "deaths", "retries"),
    *("reason", "error", "usage", "finish_reason"),
}


@pytest.fixture
async def queue(redis: "Redis") -> Queue:
    await redis.zadd(keys.MODELS, {MODEL: round(time.time() * 1000)})
    return Queue(redis)


async def put(queue: Queue, lane: str = "hi", model: str = MODEL, **terms: Any) -> str:
    job_id = str(ULID())
    message = {"role": "user", "content": "a secret prompt"}
    job = Job.model_validate({"id": job_id, "model": model, "lane": lane, "messages": [message]})
    await queue.enqueue(job, Terms(**terms))
    return job_id


async def take(queue: Queue, model: str = MODEL, worker: str = "w1") -> Claim:
    lanes = [(lane, 1) for lane in keys.LANES]
    [claim] = (await queue.claim(model, worker, running=0, lanes=lanes, nonce=str(ULID()))).claims
    return claim


async def put_dead(redis: "Redis", queue: Queue, model: str = MODEL, **terms: Any) -> str:
    """A job whose tries were all in vain."""
    job_id = await put(queue, model=model, **terms)
    for _ in range(4):
        await append(redis, model, [], [Finish(await take(queue, model), 0, "retry", "oom", FAILED)])
    return job_id


async def fastchat_q(server: RedisServer, *arguments: str, **environment: str) -> tuple[int, str, str]:
    return await asyncio.to_thread(command, server, *arguments, **environment)


async def as_json(server: RedisServer, *arguments: str) -> Any:
    code, out, err = await fastchat_q(server, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def command(server: RedisServer, *arguments: str, **environment: str) -> tuple[int, str, str]:
    given = {"FASTCHAT_Q_REDIS_URL": server.url, **environment}
    done = CliRunner().invoke(app, arguments, env=given)
    return done.exit_code, done.stdout, done.stderr


def public(job_id: str) -> str:
    return f"{SLUG}.{job_id}"


async def test_jobs_are_listed_running_first_then_the_lines_in_the_order_of_service(
    redis_server: RedisServer, queue: Queue
) -> None:
    runs = await put(queue, tenant="acme")
    await take(queue)
    batch, first, second = await put(queue, "lo"), await put(queue), await put(queue)
    listing = await as_json(redis_server, "jobs", "ls")
    assert [job["id"] for job in listing["data"]] == [public(i) for i in (runs, first, second, batch)]
    assert [job["position"] for job in listing["data"]] == [None, 1, 2, 3]
    assert set(listing["data"][0]) == RECORD_KEYS
    assert not listing["truncated"]
    assert [job["id"] for job in (await as_json(redis_server, "jobs", "ls", "--tenant", "acme"))["data"]] == [
        public(runs)
    ]
    short = await as_json(redis_server, "jobs", "ls", "--state", "queued", "--limit", "2", "--model", SLUG)
    assert [job["id"] for job in short["data"]] == [public(first), public(second)]
    assert short["truncated"]
    code, out, _ = await fastchat_q(redis_server, "jobs", "ls")
    head, *rows = out.splitlines()
    assert code == 0
    assert head.split() == ["ID", "MODEL", "STATE", "LANE", "TENANT", "PLACE", "TOKENS", "AGE", "ATTEMPT", "WORKER"]
    assert len({row.index("hi") for row in rows if "hi" in row}) == 1
    assert rows[0].endswith("w1")


async def test_jobs_beside_the_line_are_listed_as_parked_and_delayed(
    redis: "Redis", redis_server: RedisServer, queue: Queue
) -> None:
    await put(queue, tenant="a", max_parallel=1)
    running = await take(queue)
    parked = await put(queue, tenant="a", max_parallel=1)
    await queue.claim(MODEL, "w2", running=0, lanes=[("hi", 1)], nonce="n")
    delayed = await put(queue, tenant="b")
    held = await take(queue, worker="w2")
    await append(redis, MODEL, [], [Finish(held, 0, "retry", "oom", FAILED, backoff_s=60)])
    rows = (await as_json(redis_server, "jobs", "ls"))["data"]
    assert [(row["id"], row["standing"]) for row in rows] == [
        (public(running.job_id), None),
        (public(delayed), "delayed"),
        (public(parked), "parked"),
    ]
    assert rows[1]["retry_at"].endswith("Z")
    status = (await as_json(redis_server, "queue", "ls"))["data"][0]
    assert (status["parked"], status["delayed"], status["running"], status["live"]) == (1, 1, 1, 3)
    for standing, job_id in (("parked", parked), ("delayed", delayed)):
        [only] = (await as_json(redis_server, "jobs", "ls", "--state", standing))["data"]
        assert only["id"] == public(job_id)


async def test_a_job_is_shown_with_its_attempts_and_its_prompt_only_when_asked(
    redis: "Redis", redis_server: RedisServer, queue: Queue
) -> None:
    job_id = await put(queue, tenant="evil\x1b[31m")
    await queue.release(MODEL, [await take(queue, worker="w-one")])
    await take(queue, worker="w-two")
    code, out, _ = await fastchat_q(redis_server, "jobs", "show", job_id)
    assert code == 0
    assert "w-one" in out
    assert "released" in out
    assert "secret" not in out
    assert "\x1b" not in out
    shown = await as_json(redis_server, "jobs", "show", public(job_id))
    assert set(shown) == RECORD_KEYS
    assert [(a["attempt"], a["worker"], a["outcome"]) for a in shown["attempts"]] == [
        (1, "w-one", "released"),
        (2, "w-two", None),
    ]
    whole = await as_json(redis_server, "jobs", "show", job_id, "--spec")
    assert whole["spec"]["messages"][0]["content"] == "a secret prompt"


async def test_a_record_tells_place_estimate_and_outcome(redis: "Redis", queue: Queue) -> None:
    running, waiting = await put(queue), await put(queue, "lo")
    await redis.hset(NAMES.stat, "service_ms", "2000.5")  # type: ignore[misc]
    claim = await take(queue)
    record = await read_record(redis, SLUG, waiting)
    assert record is not None
    assert (record.model, record.place.position, record.place.eta_s) == (MODEL, 1, None)
    await Registry(redis).announce(Registration.of_this_process("w1", ModelCard(MODEL, "echo", None, 0), 4))
    estimates = []
    for mode in ("", "paused"):
        await redis.set(NAMES.mode, mode)
        seen = await read_record(redis, SLUG, waiting)
        estimates.append(seen and seen.place.eta_s)
    assert estimates == [0.5, None], "a job of 2 s before it is served, four at a time"
    await append(redis, MODEL, [], [Finish(claim, 0, "succeeded", "stop", DONE)])
    ended = await read_record(redis, MODEL, running)
    assert ended is not None
    shown = ended.to_dict()
    assert shown["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (shown["state"], shown["finish_reason"], shown["error"]) == ("succeeded", "stop", None)
    assert ended.created_ms <= (ended.started_ms or 0) <= (ended.ended_ms or 0) <= ended.read_ms
    assert await read_record(redis, MODEL, str(ULID())) is None


async def test_the_history_of_many_attempts_does_not_mix_them_up(redis: "Redis", queue: Queue) -> None:
    job_id = await put(queue)
    for count in range(ATTEMPTS_KEPT + 1):
        await queue.release(MODEL, [await take(queue, worker=f"w{count + 1}")])
        await asyncio.sleep(0.002)  # attempts are told apart by the millisecond
    await take(queue, worker="last")
    record = await read_record(redis, MODEL, job_id)
    assert record is not None
    assert [a.number for a in record.attempts] == list(range(3, ATTEMPTS_KEPT + 3))
    assert (record.attempts[-1].worker, record.attempts[-1].outcome) == ("last", None)
    assert {a.outcome for a in record.attempts[:-1]} == {"released"}


async def test_cancel_says_the_state_before_and_what_was_not_found(redis_server: RedisServer, queue: Queue) -> None:
    running, waiting = await put(queue), await put(queue)
    await take(queue)
    code, out, _ = await fastchat_q(redis_server, "jobs", "cancel", running, public(waiting))
    assert code == 0
    assert out.splitlines() == [
        f"{public(running)} cancelled (was running)",
        f"{public(waiting)} cancelled (was queued)",
    ]
    code, _, err = await fastchat_q(redis_server, "jobs", "cancel", running)
    assert (code, "ended already: cancelled" in err) == (1, True)
    code, out, err = await fastchat_q(redis_server, "jobs", "cancel", "nonsense", "--json")
    assert code == 4
    assert json.loads(out)["data"] == [{"id": "nonsense", "before": "none", "cancelled": False}]
    assert "fastchat-q jobs ls" in err


async def test_dead_jobs_are_listed_newest_first_shown_retried_and_dropped(
    redis: "Redis", redis_server: RedisServer, queue: Queue
) -> None:
    older, newer = await put_dead(redis, queue), await put_dead(redis, queue)
    listing = (await as_json(redis_server, "dead", "ls"))["data"]
    assert [job["id"] for job in listing] == [public(newer), public(older)]
    assert set(listing[0]) == {*RECORD_KEYS, "died_at", "last_worker"}
    assert (listing[0]["retries"], listing[0]["last_worker"], listing[0]["error"]["code"]) == (4, "w1", "oom")
    code, out, _ = await fastchat_q(redis_server, "dead", "show", older, "--spec")
    assert (code, "secret" in out, "retry oom" in out) == (0, True, True)
    assert (await as_json(redis_server, "dead", "retry", older))["data"] == [{"id": public(older), "retried": True}]
    record = await read_record(redis, MODEL, older)
    assert record is not None
    assert (record.state, record.attempt, record.attempts, record.retries, record.deaths) == ("queued", 0, (), 0, 0)
    code, _, err = await fastchat_q(redis_server, "dead", "retry", older)
    assert (code, "no dead job" in err) == (4, True)
    code, _, err = await fastchat_q(redis_server, "dead", "show", older)
    assert (code, "it is queued" in err) == (4, True)
    code, _, err = await fastchat_q(redis_server, "dead", "drop", "--all", "--model", MODEL)
    assert (code, "--yes" in err) == (2, True)
    await as_json(redis_server, "dead", "drop", "--all", "--model", MODEL, "--yes")
    assert (await as_json(redis_server, "dead", "ls"))["data"] == []
    assert await read_record(redis, MODEL, newer) is None


async def test_all_dead_jobs_of_a_model_are_retried_even_one_that_is_forgotten(
    redis: "Redis", redis_server: RedisServer, queue: Queue
) -> None:
    ids = {public(await put_dead(redis, queue)) for _ in range(3)}
    await redis.delete(keys.MODELS)
    done = (await as_json(redis_server, "dead", "retry", "--all", "--model", MODEL))["data"]
    assert {row["id"] for row in done} == ids
    assert await redis.xlen(NAMES.dead) == 0
    assert await redis.zcard(NAMES.waiting("hi")) == 3


def editor(folder: Path, script: str) -> str:
    """A program that is called like an editor."""
    path = folder / "editor"
    path.write_text(f"#!{sys.executable}\nimport sys\npath = sys.argv[1]\ntext = open(path).read()\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def mend(err: str, spec: str) -> str:
    """Writes a good spec into the file that a refused edit left behind, for its owner alone; returns its path."""
    kept = Path(err.partition("Your text is in ")[2].partition(".json")[0] + ".json")
    assert kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0
    kept.write_text(spec.replace("a secret", "a mended"))
    return str(kept)


async def test_an_edited_spec_replaces_the_dead_jobs(
    redis: "Redis", redis_server: RedisServer, queue: Queue, folder: Path
) -> None:
    job_id = await put_dead(redis, queue)
    program = editor(folder, "open(path, 'w').write(text.replace('a secret', 'an edited'))")
    code, _, err = await fastchat_q(
        redis_server, "dead", "retry", job_id, "--edit", EDITOR=program, VISUAL="", TMPDIR=str(folder)
    )
    assert code == 0, err
    record = await read_record(redis, MODEL, job_id, whole=True)
    assert record is not None
    assert Job.from_spec(record.spec or b"").messages[0].content == "an edited prompt"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("text + '}'", "spec"),
        ("text.replace('a secret', 'X').replace('org/Some', 'org/Other')", "model: cannot be changed"),
        ("text.replace('\"role\"', '\"rule\"')", "messages.0"),
    ],
)
async def test_a_bad_edit_is_refused_with_its_reason_and_its_text_is_kept(
    redis: "Redis", redis_server: RedisServer, queue: Queue, folder: Path, change: str, says: str
) -> None:
    job_id = await put_dead(redis, queue)
    program = editor(folder, f"open(path, 'w').write({change})")
    code, _, err = await fastchat_q(redis_server, "dead", "retry", job_id, "--edit", EDITOR=program, VISUAL="")
    assert (code, says in err) == (1, True), err
    record = await read_record(redis, MODEL, job_id, whole=True)
    assert record is not None
    assert record.state == "dead"
    kept = mend(err, (record.spec or b"").decode())
    code, _, err = await fastchat_q(redis_server, "dead", "retry", public(job_id), "--spec", kept)
    assert code == 0, err
    os.unlink(kept)
    mended = await read_record(redis, MODEL, job_id, whole=True)
    assert mended is not None
    assert b"a mended prompt" in (mended.spec or b"")


async def test_an_edit_without_a_change_retries_nothing(
    redis: "Redis", redis_server: RedisServer, queue: Queue
) -> None:
    job_id = await put_dead(redis, queue)
    code, _, err = await fastchat_q(redis_server, "dead", "retry", job_id, "--edit", EDITOR="true", VISUAL="")
    assert (code, "Nothing was changed" in err) == (1, True)
    assert await redis.hget(NAMES.job(job_id), "state") == b"dead"  # type: ignore[misc]


async def test_a_queue_is_told_in_figures(redis: "Redis", redis_server: RedisServer, queue: Queue) -> None:
    await put(queue)
    await append(redis, MODEL, [], [Finish(await take(queue), 0, "succeeded", "stop", DONE)])
    await put(queue)
    await put(queue, "lo")
    [status] = (await as_json(redis_server, "queue", "ls"))["data"]
    assert (status["model"], status["slug"], status["mode"]) == (MODEL, SLUG, "open")
    assert status["waiting"] == {"hi": 1, "lo": 1, "sus": 0}
    assert status["ended"] == {"cancelled": 0, "dead": 0, "expired": 0, "failed": 0, "succeeded": 1}
    assert status["oldest_wait_s"] >= 0
    assert (status["workers"], status["slots"], status["eta_s"]) == (0, 0, None)
    code, out, _ = await fastchat_q(redis_server, "queue", "ls", "--model", MODEL)
    assert code == 0
    assert len({len(line.split()) for line in out.splitlines()}) == 1


@pytest.mark.parametrize(
    "arguments", [("jobs", "ls", "--model", "no"), ("queue", "pause", "no"), ("dead", "ls", "--model", "no")]
)
@pytest.mark.usefixtures("queue")
async def test_a_model_that_nobody_knows_is_exit_code_4(redis_server: RedisServer, arguments: tuple[str, ...]) -> None:
    code, _, err = await fastchat_q(redis_server, *arguments)
    assert code == 4
    assert MODEL in err


@pytest.mark.parametrize("arguments", [("dead", "retry"), ("dead", "retry", "--all"), ("jobs", "ls", "--state", "odd")])
@pytest.mark.usefixtures("redis")
async def test_a_wrong_use_is_exit_code_2(redis_server: RedisServer, arguments: tuple[str, ...]) -> None:
    assert (await fastchat_q(redis_server, *arguments))[0] == 2


def test_redis_that_is_away_is_exit_code_3_without_its_password() -> None:
    arguments = [sys.executable, "-m", "fastchat_q.cli", "queue", "ls", "--json"]
    url = {"FASTCHAT_Q_REDIS_URL": "redis://:hush@127.0.0.1:1/0"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env={**os.environ, **url}, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "not reachable" in done.stderr
    assert "hush" not in done.stderr


def test_a_paused_queue_keeps_jobs_until_it_is_resumed_and_a_drained_one_finishes_them(stack: Stack) -> None:
    stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", "20", "--slots", "1")
    assert command(stack.server, "queue", "pause", "echo")[0] == 0
    answers: list[str | None] = []

    def ask(text: str) -> None:
        message: Any = {"role": "user", "content": text}
        with stack.client() as client:
            answer = client.chat.completions.create(model="echo", messages=[message])
        answers.append(answer.choices[0].message.content)

    threads = [threading.Thread(target=ask, args=("one two three four " * 5,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: stack.live("echo") == 3, "three jobs wait")
    listing = json.loads(command(stack.server, "queue", "ls", "--json")[1])["data"][0]
    assert (listing["mode"], listing["running"], listing["waiting"]["hi"]) == ("paused", 0, 3)
    assert (listing["workers"], listing["slots"]) == (1, 1)
    code, out, _ = command(stack.server, "queue", "resume", "echo")
    assert (code, "was paused" in out) == (0, True)
    wait_until(lambda: stack.running("echo") == 1, "a job runs")
    code, out, err = command(stack.server, "queue", "drain", "echo", "--timeout-s", "0", "--wait")
    assert (code, "are left after 0 s" in err) == (1, True)
    with pytest.raises(openai.InternalServerError) as refused:
        ask("no")
    assert (refused.value.status_code, refused.value.code) == (503, "queue_draining")
    code, out, err = command(stack.server, "queue", "drain", "echo", "--wait", "--json")
    assert code == 0
    drained = json.loads(out)
    assert (drained["mode"], drained["mode_before"], drained["live"]) == ("draining", "draining", 0)
    assert drained["ended"]["succeeded"] == 3
    assert "wait" in err
    for thread in threads:
        thread.join(30)
    assert len(answers) == 3
    assert command(stack.server, "queue", "resume", "echo")[0] == 0
    ask("again")


def test_a_dead_job_that_is_retried_succeeds(stack: Stack) -> None:
    async def die() -> str:
        redis = connect(stack.server.url)
        try:
            return await put_dead(redis, Queue(redis), "echo", detached=True)
        finally:
            await redis.aclose()

    job_id = asyncio.run(die())
    stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", "0")
    code, _, err = command(stack.server, "dead", "retry", job_id)
    assert code == 0, err
    name = keys.model_keys("echo").job(job_id)
    wait_until(lambda: stack.redis.hget(name, "state") == "succeeded", "the job succeeds")
    shown = json.loads(command(stack.server, "jobs", "show", f"echo.{job_id}", "--json")[1])
    assert (shown["retries"], shown["deaths"], len(shown["attempts"])) == (0, 0, 1)
    assert shown["usage"]["completion_tokens"] > 0
