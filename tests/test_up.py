"""``fastchat-q up`` as a person runs it: one command, real children, real signals."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import redis as sync_redis

from .http_client import get
from .servers import CHOSEN, SINGLE, RedisServer, free_port, wait_until
from .stack import Process, answers

START_S = 60.0


class Up:
    """One run of ``up`` on a state directory."""

    def __init__(self, folder: Path, *arguments: str, port: int | None = None, **environment: str) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.state_dir = folder / "state"
        flags = ["--state-dir", str(self.state_dir), "--port", str(self.port), *arguments]
        values = {"FASTCHAT_Q_REDIS_SERVER": str(CHOSEN.binary()), **environment}
        self.process = Process(folder / f"up-{self.port}-{time.monotonic_ns()}.log", "up", *flags, **values)

    def ready(self) -> "Up":
        """Waits for the line that comes last."""
        wait_until(lambda: not self.process.alive or "Ctrl-C" in self.output(), "everything is up", START_S)
        assert self.process.alive, self.output()
        return self

    def output(self) -> str:
        return self.process.output()

    def children(self) -> dict[str, psutil.Process]:
        """The child processes by name."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                words = child.cmdline()
            except psutil.Error:
                continue  # it is just ending
            if words and re.search("(valkey|redis)-server", words[0]):
                found["redis"] = child
            elif "fastchat_q.cli" in words and words[3] != "up":  # between fork and exec it still looks like its parent
                found[words[3]] = child
        return found

    def client(self) -> openai.OpenAI:
        key = (self.state_dir / "api_key").read_text().strip()
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def ups() -> Iterator[list[Up]]:
    started: list[Up] = []
    yield started
    for up in started:
        if up.process.alive:
            children = psutil.Process(up.process.pid).children(recursive=True)
            up.process.kill()
            for child in children:
                child.wait(10)


def start(ups: list[Up], folder: Path, *arguments: str, port: int | None = None, **environment: str) -> Up:
    up = Up(folder, *arguments, port=port, **environment)
    ups.append(up)
    return up


ECHO = ("--engine", "echo", "--model", "echo")


def test_up_prints_what_is_ready_and_a_curl_line_that_works_when_pasted(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO).ready()
    output = up.output()
    for part in ("redis", "api", "worker", "orchestrator"):
        assert re.search(rf"^✔ {part} .* s$", output, re.M), output
    [curl] = re.findall(r"curl .*", output)
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, check=True, timeout=30).stdout
    assert answer.endswith("data: [DONE]\n\n")
    key_file = up.state_dir / "api_key"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert key_file.read_text().strip() in output


def test_several_models_are_loaded_when_they_are_asked_for(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, "--engine", "echo", "--model", "one", "--models", "two=x,three").ready()
    assert re.search(r"^✔ worker +one, two, three .* s$", up.output(), re.M), up.output()
    with up.client() as client:
        states = {model.id: model.to_dict()["state"] for model in client.models.list()}
        assert states == dict.fromkeys(("one", "two", "three"), "idle")
        for model in ("two", "one"):
            messages = [{"role": "user", "content": "still here"}]
            answer = client.chat.completions.create(model=model, messages=messages)  # type: ignore[arg-type]
            assert answer.choices[0].message.content == "still here"
    assert len(up.children()["worker"].children()) == 1, "one at a time"


def test_the_default_model_answers_through_the_official_client(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder).ready()
    with up.client() as client:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        stream = client.chat.completions.create(model="tiny", messages=messages, stream=True, temperature=0)  # type: ignore[arg-type]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "The capital of France is Paris."


def test_a_model_for_embeddings_answers_the_curl_line_and_the_official_client(ups: list[Up], folder: Path) -> None:
    from .engines.random_encoders import checkpoint

    checkpoint(folder / "bert", "bert", pooling="mean_tokens")
    up = start(ups, folder, "--engine", "embeddings", "--model", str(folder / "bert")).ready()
    [curl] = re.findall(r"curl .*", up.output())
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, check=True, timeout=30).stdout
    with up.client() as client:
        again = client.embeddings.create(model="bert", input="Who are you?", encoding_format="float")
    assert json.loads(answer)["data"][0]["embedding"] == again.data[0].embedding
    assert len(again.data[0].embedding) == 32


def test_ctrl_c_drains_and_leaves_nothing_running(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO).ready()
    children = list(up.children().values())
    assert len(children) == 4
    with up.client() as client:
        words = " ".join(f"w{n}" for n in range(60))
        messages = [{"role": "user", "content": words}]
        stream = client.chat.completions.create(model="echo", messages=messages, stream=True)  # type: ignore[arg-type]
        text = next(stream).choices[0].delta.content or ""
        up.process.signal(signal.SIGINT)
        text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == words, "a running stream may end"
    assert up.process.wait() == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert "Stopped" in up.output()


def test_it_goes_on_when_nobody_reads_its_output_any_more(folder: Path) -> None:
    port = free_port()
    flags = [*ECHO, "--port", str(port), "--state-dir", str(folder / "state")]
    command = [sys.executable, "-m", "fastchat_q.cli", "up", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert b"redis" in process.stdout.readline()
        process.stdout.close()  # as in: fastchat-q up | head -1
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), "it serves all the same", START_S)
        finally:
            process.send_signal(signal.SIGHUP)  # a closed terminal ends it as Ctrl-C does
            assert process.wait(30) == 0


def test_a_proxy_in_the_environment_does_not_keep_it_from_seeing_its_api(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO, http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9").ready()
    assert "✔ api" in up.output()


def test_an_ipv6_address_is_printed_as_a_url_takes_it(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO, "--host", "::1").ready()
    assert f"http://[::1]:{up.port}/v1" in up.output()


def test_a_second_up_on_the_same_state_says_so_and_harms_nothing(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO).ready()
    second = start(ups, folder, *ECHO)
    assert second.process.wait() == 2
    assert f"already runs on {up.state_dir} (pid {up.process.pid}, http://127.0.0.1:{up.port})" in second.output()
    assert up.client().models.list().data[0].id == "echo"


def test_kill_9_of_up_leaves_no_orphan_that_blocks_the_next_up(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO).ready()
    children = list(up.children().values())
    up.process.kill()
    again = start(ups, folder, *ECHO, port=up.port).ready()
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert again.client().models.list().data[0].id == "echo"


def test_an_orphaned_embedded_server_is_ended_by_the_next_up(ups: list[Up], folder: Path) -> None:
    """As on systems without a parent-death signal: the server outlives its up."""
    state_dir = folder / "state"
    (state_dir / "redis").mkdir(parents=True)
    orphan = RedisServer(state_dir / "redis", SINGLE)
    (state_dir / "redis.sock").symlink_to(orphan.socket)
    with orphan.client() as client:
        client.set("kept", "yes")
    up = start(ups, folder, *ECHO).ready()
    assert orphan.process.wait(30) == 0
    with sync_redis.Redis.from_url(f"unix://{up.state_dir}/redis.sock", decode_responses=True) as client:
        assert client.get("kept") == "yes", "its data is taken over"


@pytest.mark.parametrize("part", ["redis", "serve", "worker", "orchestrator"])
def test_a_child_that_is_killed_comes_back(ups: list[Up], folder: Path, part: str) -> None:
    up = start(ups, folder, *ECHO).ready()
    victim = up.children()[part]
    victim.kill()
    wait_until(lambda: (heir := up.children().get(part)) and heir.pid != victim.pid, f"{part} runs again")
    assert "ended (killed by SIGKILL (out of memory?)); starts again in 0.5 s" in up.output()
    wait_until(lambda: get(up.port, "/readyz").status == 200 if answers_at(up.port) else False, "ready again")
    messages = [{"role": "user", "content": "still here"}]
    with up.client() as client:
        wait_until(lambda: completes(client, messages), "a chat completes")


def test_a_crash_of_the_engine_is_said_with_its_reason(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO).ready()
    [engine] = up.children()["worker"].children()
    engine.kill()
    wait_until(
        lambda: "✘ worker        echo: killed by SIGKILL (out of memory?); starts again" in up.output(), "it is said"
    )
    wait_until(lambda: up.children()["worker"].children(), "it runs again")


def answers_at(port: int) -> bool:
    return answers(f"http://127.0.0.1:{port}/healthz")


def completes(client: openai.OpenAI, messages: list[dict[str, str]]) -> bool:
    try:
        answer = client.chat.completions.create(model="echo", messages=messages)  # type: ignore[arg-type]
    except openai.APIError:
        return False
    return answer.choices[0].message.content == "still here"


def test_data_survives_a_restart_and_the_key_stays(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO).ready()
    key = (up.state_dir / "api_key").read_text()
    with sync_redis.Redis.from_url(f"unix://{up.state_dir}/redis.sock") as client:
        client.set("kept", "yes")
    assert up.process.stop() == 0
    again = start(ups, folder, *ECHO).ready()
    assert (again.state_dir / "api_key").read_text() == key
    with sync_redis.Redis.from_url(f"unix://{up.state_dir}/redis.sock") as client:
        assert client.get("kept") == b"yes"


def test_the_key_can_be_set_in_the_environment(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO, FASTCHAT_Q_API_KEY="sk-my-own-key-for-this").ready()
    assert up.client().api_key == "sk-my-own-key-for-this"
    assert up.client().models.list().data


def test_an_existing_server_is_used_and_its_settings_are_checked_aloud(
    ups: list[Up], folder: Path, redis_server: RedisServer
) -> None:
    with redis_server.client() as client:
        client.config_set("appendonly", "no")
        client.config_set("maxmemory", "0")
        try:
            up = start(ups, folder, *ECHO, "--redis-url", redis_server.url, **redis_server.environment()).ready()
        finally:
            client.config_set("appendonly", "yes")
    assert "! redis         appendonly is no: a restart of Redis loses every accepted job" in up.output()
    assert "redis" not in up.children()
    assert up.client().models.list().data[0].id == "echo"


def test_a_server_that_evicts_is_refused(ups: list[Up], folder: Path, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            up = start(ups, folder, *ECHO, "--redis-url", redis_server.url, **redis_server.environment())
            assert up.process.wait() == 2
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "0")
    assert "maxmemory-policy is allkeys-lru" in up.output()


def test_a_taken_port_is_said_at_once(ups: list[Up], folder: Path) -> None:
    first = start(ups, folder, *ECHO).ready()
    (folder / "other").mkdir()
    second = start(ups, folder / "other", *ECHO, port=first.port)
    assert second.process.wait() == 2
    assert f"Cannot listen on 127.0.0.1:{first.port}" in second.output()
    server = Process(folder / "serve", "serve", "--port", str(first.port), "--state-dir", str(folder / "other"))
    assert server.wait() == 2
    assert server.output().count("\n") == 1, "one line, no traceback"


def test_beyond_loopback_keys_cannot_be_switched_off(ups: list[Up], folder: Path) -> None:
    for command in ("up", "serve"):
        process = Process(folder / command, command, "--host", "0.0.0.0", "--no-auth", "--state-dir", str(folder))
        assert process.wait() == 2
        assert "--no-auth on 0.0.0.0" in process.output()


def test_on_loopback_no_auth_asks_for_no_key(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO, "--no-auth").ready()
    assert get(up.port, "/v1/models", authorization=None).status == 200


def test_a_model_that_cannot_be_loaded_is_said_and_the_rest_runs(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, "--model", str(folder / "no-such-model"))
    wait_until(lambda: "✘ worker" in up.output(), "the worker's failure is shown", START_S)
    assert re.search(r"✘ worker .*exit code 2.*no-such-model.*cannot be loaded", up.output())
    wait_until(lambda: answers_at(up.port), "the API answers")
    assert get(up.port, "/readyz").status == 503
    up.process.signal(signal.SIGINT)
    assert up.process.wait() == 0


def test_a_deep_state_directory_still_gets_a_socket(ups: list[Up], folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    up = start(ups, deep, *ECHO).ready()
    assert up.client().models.list().data[0].id == "echo"


def test_redis_commands_reach_the_server_of_the_state_directory(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO).ready()
    up.client().chat.completions.create(model="echo", messages=[{"role": "user", "content": "a b"}])
    environment = {**os.environ, "PATH": ""}  # no redis-cli: our own prompt
    command = [sys.executable, "-m", "fastchat_q.cli", "redis", "--state-dir", str(up.state_dir)]
    ran = subprocess.run([*command, "PING"], capture_output=True, text=True, env=environment, timeout=30)
    assert (ran.stdout, ran.returncode) == ('"PONG"\n', 0)
    ran = subprocess.run(
        [*command, "XINFO", "GROUPS", "fq:{echo}:s:hi"], capture_output=True, text=True, env=environment
    )
    assert '"pending"' in ran.stdout
    ran = subprocess.run([*command, "NONSENSE"], capture_output=True, text=True, env=environment, timeout=30)
    assert (ran.returncode, ran.stdout[:7]) == (1, "(error)")
    watching = subprocess.Popen([*command, "PSUBSCRIBE", "fq:inbox:*"], stdout=subprocess.PIPE, env=environment)
    assert watching.stdout is not None
    with watching.stdout as out:
        assert [b"psubscribe" in out.readline(), out.readline(), out.readline()][0]
        up.client().chat.completions.create(model="echo", messages=[{"role": "user", "content": "seen"}])
        assert any(b"seen" in out.readline() for _ in range(8))
    watching.send_signal(signal.SIGINT)
    watching.wait(30)
    ran = subprocess.run(command, input="GET nothing\nexit\n", capture_output=True, text=True, env=environment)
    assert "(nil)" in ran.stdout


def test_a_job_in_redis_is_readable_with_plain_commands(ups: list[Up], folder: Path) -> None:
    up = start(ups, folder, *ECHO).ready()
    up.client().chat.completions.create(model="echo", messages=[{"role": "user", "content": "é b"}])
    with sync_redis.Redis.from_url(f"unix://{up.state_dir}/redis.sock", decode_responses=True) as client:
        [name] = client.keys("fq:{echo}:j:*")
        record = client.hgetall(name)
        assert (record["state"], record["n"], record["attempt"]) == ("succeeded", "2", "1")
        assert json.loads(record["result"])["finish_reason"] == "stop"
        entries = client.xrange(name.replace(":j:", ":t:"))
        assert "".join(json.loads(fields["d"])["s"] for _, fields in entries) == "é b"
