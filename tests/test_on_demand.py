"""Models that are loaded when a job for them comes: real workers in processes of their own, behind a real API."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastchat_q import keys
from fastchat_q.cli_common import parse_duration
from fastchat_q.errors import ConfigurationError

from .http_client import Connection, Reply, get, post
from .stack import Process, Stack, wait_until

ON_DEMAND: dict[str, float] = {}
"""The policy as it is by default."""
WORDS = [f"w{number}" for number in range(60)]
SOON_S = 60.0


def slow_worker(stack: Stack, *models: str, policy: dict[str, float] | None = ON_DEMAND) -> Process:
    """An on-demand worker of echo models; ``models`` are ``name:seconds of loading``."""
    log = stack.folder / f"slow-{len(stack.processes)}.log"
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    arguments = (stack.server.url, json.dumps(policy), *models)
    process = Process(
        log, *arguments, module="tests.slow_worker", prefix=("env", "-C", str(stack.folder)), **environment
    )
    stack.processes.append(process)
    names = {model.rpartition(":")[0] for model in models}
    wait_until(lambda: not process.alive or names <= listed(stack).keys(), "its models are offered", SOON_S)
    assert process.alive, process.output()
    return process


def listed(stack: Stack) -> dict[str, str]:
    """What the API lists: model -> state."""
    return {model["id"]: model["state"] for model in get(stack.port, "/v1/models").json()["data"]}


def entries(stack: Stack, model: str) -> list[dict[str, str]]:
    """The registry's entries of a model."""
    found = [stack.redis.hgetall(name) for name in stack.redis.scan_iter(keys.worker("*"))]
    return [entry for entry in found if entry and json.loads(entry["card"])["name"] == model]


def pid_of(stack: Stack, model: str) -> int:
    """The process that serves a model; its first heartbeat may come after its first job."""

    def serving() -> list[int]:
        return [int(entry["pid"]) for entry in entries(stack, model) if entry["state"] == "serving"]

    wait_until(serving, f"{model} is served")
    [pid] = serving()
    return pid


def loading_pid(worker: Process) -> int:
    """The only child of an on-demand worker."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    wait_until(lambda: children.read_text().split(), "it loads a model")
    [pid] = children.read_text().split()
    return int(pid)


def until_state(stack: Stack, model: str, state: str) -> None:
    wait_until(lambda: listed(stack).get(model) == state, f"{model} is {state}: {listed(stack)}", SOON_S)


def body(model: str, words: list[str] = WORDS, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": " ".join(words)}], **fields}


def begin(stack: Stack, model: str, words: list[str] = WORDS, **fields: Any) -> Connection:
    """A request whose answer is read later."""
    connection = Connection(stack.port)
    connection.socket.settimeout(SOON_S)
    connection.send(body(model, words, **fields))
    return connection


def ask(stack: Stack, model: str, words: list[str] = WORDS) -> Reply:
    return begin(stack, model, words).reply()


def said(reply: Reply) -> list[str]:
    assert reply.status == 200, reply.body
    answer: str = reply.json()["choices"][0]["message"]["content"]
    return answer.split()


def test_the_first_request_loads_its_model_and_the_second_finds_it_loaded(stack: Stack) -> None:
    slow_worker(stack, "a:2", "b:2")
    assert listed(stack) == {"a": "idle", "b": "idle"}
    assert get(stack.port, "/readyz").json() == {"status": "ready", "models": ["a", "b"]}
    stream = begin(stack, "a", stream=True)
    assert stream.head()[0] == 200
    events = stream.events()
    assert re.match(r": queued position=1", next(events)), "its place, while the model is loaded"
    until_state(stack, "a", "loading")
    [entry] = entries(stack, "a")
    assert entry["state"] == "loading"
    wait_until(lambda: 0 < float(entries(stack, "a")[0]["progress"]) < 1, "it says how far it is")
    assert entries(stack, "a")[0]["phase"] == "shards"
    text = "".join(re.findall(r'"content":"([^"]*)"', "".join(events)))
    assert text.split() == WORDS
    pid = pid_of(stack, "a")
    assert said(ask(stack, "a", ["x", "y"])) == ["x", "y"]
    assert pid_of(stack, "a") == pid
    assert listed(stack) == {"a": "serving", "b": "idle"}


def test_a_model_that_is_not_used_is_unloaded_and_its_process_gone(stack: Stack) -> None:
    slow_worker(stack, "a:0.2", policy={"keep_alive_s": 2})
    for _ in range(2):
        assert said(ask(stack, "a", ["x"])) == ["x"]
        pid = pid_of(stack, "a")
        until_state(stack, "a", "idle")
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "its memory is free")


def test_jobs_that_come_and_go_between_two_looks_keep_a_model_loaded(stack: Stack) -> None:
    slow_worker(stack, "a:0.2", policy={"keep_alive_s": 2})
    assert said(ask(stack, "a", ["x"])) == ["x"]
    pid = pid_of(stack, "a")
    for _ in range(40):
        assert said(ask(stack, "a", ["x"])) == ["x"]
        signal.sigtimedwait([], 0.1)
    assert pid_of(stack, "a") == pid


def test_a_model_gives_its_room_to_another_one_when_it_has_nothing_to_do(stack: Stack) -> None:
    slow_worker(stack, "a:0.2", "b:0.2", "c:0.2", policy={"max_loaded": 2})
    for model in ("a", "b", "a", "c"):
        assert said(ask(stack, model, ["x"])) == ["x"]
        signal.sigtimedwait([], 1.1)  # longer than one look: who was used last is told by looks
    assert listed(stack) == {"a": "serving", "b": "idle", "c": "serving"}, "b was used the longest ago"


def test_a_running_job_ends_before_its_model_is_unloaded(stack: Stack) -> None:
    slow_worker(stack, "a:0.2", "b:0.2", policy={"turn_s": 0.5})
    running = begin(stack, "a", [f"w{number}" for number in range(100)])
    wait_until(lambda: stack.running("a"), "it runs")
    assert said(ask(stack, "b", ["x"])) == ["x"]
    assert said(running.reply()) == [f"w{number}" for number in range(100)]
    [record] = stack.records("a")
    assert stack.redis.hmget(record, "attempt", "deaths") == ["1", "0"]


def test_a_model_that_always_has_work_yields_after_its_turn_and_loses_no_token(stack: Stack) -> None:
    """Its drain is shorter than the job: the job goes on when its model is loaded again."""
    slow_worker(stack, "a:0.2", "b:0.2", policy={"turn_s": 1})
    long = [f"w{number}" for number in range(400)]
    running = begin(stack, "a", long)
    wait_until(lambda: stack.running("a"), "it runs")
    assert said(ask(stack, "b", ["x"])) == ["x"]
    assert said(running.reply()) == long
    [record] = stack.records("a")
    assert stack.redis.hmget(record, "attempt", "deaths") == ["2", "0"]


def test_a_model_whose_loading_is_killed_is_loaded_again_for_the_jobs_that_wait(stack: Stack) -> None:
    worker = slow_worker(stack, "a:3")
    waiting = begin(stack, "a", ["x"])
    os.kill(loading_pid(worker), signal.SIGKILL)
    assert said(waiting.reply()) == ["x"]


def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason_and_tried_again_later(stack: Stack) -> None:
    slow_worker(stack, "a:0.2", "b:0.2")
    (stack.folder / "a").write_text("the disk is on fire")
    waiting, streaming = begin(stack, "a"), begin(stack, "a", stream=True)
    told = waiting.reply()
    assert (told.status, told.error()["code"]) == (503, "load_failed")
    assert "exit code 2: the disk is on fire" in told.error()["message"]
    reply = streaming.reply()
    assert b"the disk is on fire" in reply.body
    wait_until(lambda: "a" not in listed(stack), "the API knows")
    refused = ask(stack, "a")
    assert (refused.status, refused.error()["code"]) == (503, "load_failed")
    assert 1 <= int(refused.headers["retry-after"]) <= 6
    assert "the disk is on fire" in refused.error()["message"]
    assert stack.live("a") == 0
    assert said(ask(stack, "b", ["x"])) == ["x"], "another model is not touched by it"
    (stack.folder / "a").unlink()
    until_state(stack, "a", "idle")
    assert said(ask(stack, "a", ["x"])) == ["x"]


def test_a_load_that_hangs_is_ended_and_the_next_model_has_its_room(stack: Stack) -> None:
    worker = slow_worker(stack, "a:9999", "b:0.1", policy={"load_stall_s": 3})
    hanging = begin(stack, "a", ["x"])
    until_state(stack, "a", "loading")
    pid = loading_pid(worker)
    assert said(ask(stack, "b", ["x"])) == ["x"]
    told = hanging.reply()
    assert (told.status, told.error()["code"]) == (503, "load_failed")
    assert "no progress in loading for 3 s" in told.error()["message"]
    assert not Path(f"/proc/{pid}").exists()
    assert not stack.redis.exists(keys.model_keys("a").load), "another worker may load it"


def test_a_load_that_is_slow_but_gets_on_is_left_alone(stack: Stack) -> None:
    slow_worker(stack, "a:24", policy={"load_stall_s": 3})  # says how far it is every 1.2 s
    assert said(ask(stack, "a", ["x"])) == ["x"]


def test_the_backoff_of_a_model_that_cannot_be_loaded_grows(stack: Stack) -> None:
    worker = slow_worker(stack, "a:0.1")
    (stack.folder / "a").write_text("no")
    for backoff in (5, 15):
        until_state(stack, "a", "idle")
        assert ask(stack, "a").status == 503
        wait_until(lambda b=backoff: f"tried_again_in_s={b}" in plain(worker), f"{backoff} s", 10)


def plain(worker: Process) -> str:
    """Its log without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", worker.output()).replace(".0", "")


def test_a_served_model_that_crashes_is_loaded_again_and_the_others_are_left_alone(stack: Stack) -> None:
    slow_worker(stack, "a:0.2", "b:0.2", policy={"max_loaded": 2})
    assert said(ask(stack, "b", ["x"])) == ["x"]
    other = pid_of(stack, "b")
    running = begin(stack, "a", [f"w{number}" for number in range(150)])
    wait_until(lambda: stack.running("a"), "it runs")
    os.kill(pid_of(stack, "a"), signal.SIGKILL)
    assert said(running.reply()) == [f"w{number}" for number in range(150)]
    assert pid_of(stack, "b") == other


def test_a_worker_that_is_told_to_stop_ends_its_jobs_first_and_leaves_nothing(stack: Stack) -> None:
    worker = slow_worker(stack, "a:0.2", "b:5", policy={"max_loaded": 2})
    running = begin(stack, "a", [f"w{number}" for number in range(100)])
    wait_until(lambda: stack.running("a"), "it runs")
    waiting = begin(stack, "b", ["x"])
    until_state(stack, "b", "loading")
    worker.signal(signal.SIGTERM)
    assert said(running.reply()) == [f"w{number}" for number in range(100)]
    assert worker.wait() == 0
    assert list(stack.redis.scan_iter(keys.worker("*"))) == []
    assert list(stack.redis.scan_iter(keys.EVERY_MODEL.load.replace("{", "[{]"))) == []
    assert stack.live("b") == 1, "it waits for the next worker"
    waiting.close()


def test_of_two_workers_one_loads_a_model_for_one_job(stack: Stack) -> None:
    workers = [slow_worker(stack, "a:2"), slow_worker(stack, "a:2")]
    for _ in range(3):
        assert said(ask(stack, "a", ["x"])) == ["x"]
    assert sum(worker.output().count("serving") for worker in workers) == 1
    assert len([entry for entry in entries(stack, "a") if entry["state"] == "serving"]) == 1


def test_a_second_worker_helps_when_the_first_one_has_no_slot_left(stack: Stack) -> None:
    for _ in range(2):
        slow_worker(stack, "a:0.2")
    long = [f"w{number}" for number in range(800)]
    running = [begin(stack, "a", long) for _ in range(6)]
    wait_until(lambda: stack.running("a") == 6, "all run: four here and two there", SOON_S)
    for connection in running:
        connection.close()


def test_jobs_wait_when_one_worker_cannot_load_a_model_and_another_one_might(stack: Stack) -> None:
    (stack.folder / "a").write_text("no room")
    first = slow_worker(stack, "a:0.1")
    os.kill(first.pid, signal.SIGSTOP)
    second = slow_worker(stack, "a:0.1")
    waiting = begin(stack, "a", ["x"])
    wait_until(lambda: "no room" in second.output(), "the second one failed", SOON_S)
    (stack.folder / "a").unlink()
    os.kill(first.pid, signal.SIGCONT)
    assert said(waiting.reply()) == ["x"]
    assert "no room" not in first.output()


def test_jobs_wait_while_an_ordinary_worker_loads_its_model_for_the_first_time(stack: Stack) -> None:
    worker = slow_worker(stack, "a:3", policy=None)
    assert listed(stack) == {"a": "loading"}
    assert get(stack.port, "/readyz").status == 503, "nothing is served yet, and it does not come and go on demand"
    wait_until(lambda: 0 < get(stack.port, "/v1/models/a").json()["progress"] < 1, "it says how far it is")
    assert said(ask(stack, "a", ["x"])) == ["x"]
    assert worker.stop() == 0


def test_a_paused_queue_loads_nothing(stack: Stack) -> None:
    slow_worker(stack, "a:0.1")
    stack.redis.set(keys.model_keys("a").mode, "paused")
    waiting = begin(stack, "a", ["x"])
    wait_until(lambda: stack.live("a") == 1, "it is accepted")
    signal.sigtimedwait([], 2)
    assert listed(stack)["a"] == "idle"
    stack.redis.delete(keys.model_keys("a").mode)
    assert said(waiting.reply()) == ["x"]


def test_the_command_line_loads_tiny_and_an_echo_model_on_demand(stack: Stack) -> None:
    """The real thing: torch is loaded in a child, and gone with it."""
    tiny = stack.start("tiny", "worker", "--model", "tiny", "--on-demand", "--keep-alive", "3", "--threads", "1")
    echo = stack.start("echo", "worker", "--models", "one,two=tiny", "--engine", "echo", "--keep-alive", "0")
    wait_until(lambda: listed(stack).keys() >= {"tiny", "one", "two"}, "all are offered", SOON_S)
    assert listed(stack) == {"tiny": "idle", "one": "idle", "two": "idle"}
    answer = post(stack.port, body("tiny", ["Who", "are", "you?"], max_tokens=4))
    assert answer.status == 200
    assert answer.json()["usage"]["completion_tokens"] == 4
    for model in ("one", "two"):
        assert said(ask(stack, model, ["x"])) == ["x"]
    for model in ("tiny", "one", "two"):
        until_state(stack, model, "idle")
    assert (tiny.stop(), echo.stop()) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model", "a", "--model", "a"), "Several models are called a"),
        (("--model", "a", "--models", "b,x=a,x=b"), "Several models are called x"),
        (("--model", "a", "--model", "b", "--name", "c"), "--name is for one model"),
        (("--models", "a,b", "--keep-alive", "soon"), "is no duration"),
        (("--models", "a,b", "--no-supervise"), "--no-supervise is for one model"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    stack_free: Callable[..., Process], arguments: tuple[str, ...], complaint: str
) -> None:
    process = stack_free(*arguments)
    assert process.wait() == 2
    assert complaint in process.output()


@pytest.fixture
def stack_free(folder: Path) -> Callable[..., Process]:
    """``fastchat-q worker …`` with no server anywhere."""
    return lambda *arguments: Process(folder / "log", "worker", "--engine", "echo", *arguments)


def test_durations_are_read_as_ollama_does() -> None:
    assert [parse_duration(words) for words in ("0", "90", "5m", "1h30m", "500ms", "-1", "-5m")] == [
        0, 90, 300, 5400, 0.5, float("inf"), float("inf")
    ]  # fmt: skip
    for words in ("", "5 m", "m", "1x", "5m3"):
        with pytest.raises(ConfigurationError):
            parse_duration(words)
