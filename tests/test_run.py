"""``fastchat-q run`` and ``embed`` as people use them: in a real terminal, in pipes, and while servers die."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastchat_q.client import Server, ServerEvent, server_events
from fastchat_q.settings import Settings

from .servers import wait_until
from .stack import API_KEY, Stack, environment_of

CTRL_C, CTRL_D = "\x03", "\x04"
LONG = "word " * 400


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastchat_q.cli", *arguments]


def environment(stack: Stack) -> dict[str, str]:
    where = {"FASTCHAT_Q_BASE_URL": f"{stack.base}/v1", "FASTCHAT_Q_API_KEY": API_KEY}
    return environment_of({**where, "TERM": "xterm", "PYTHONUNBUFFERED": "1"})


def run(stack: Stack, *arguments: str, typed: str = "") -> "subprocess.CompletedProcess[str]":
    """The command in a pipe."""
    words = command(*arguments)
    return subprocess.run(words, input=typed, capture_output=True, text=True, env=environment(stack), timeout=60)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, stack: Stack, *arguments: str) -> None:
        self.screen = ""
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, command(*arguments), environment(stack))

    def types(self, text: str) -> None:
        """As a person does."""
        os.write(self._master, text.encode())

    def sees(self, pattern: str, timeout_s: float = 30.0) -> str:
        """Reads until the pattern is there; what came until its end, which is not looked at again."""
        deadline = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.screen, re.S)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} is not on the screen: {self.screen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._master, 65536).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"it ended without {pattern!r}: {self.screen!r}") from error
        seen, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return seen

    def ends(self, timeout_s: float = 20.0) -> int:
        """Its exit code."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # it has closed its side
                    self.screen += os.read(self._master, 65536).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"it goes on: {self.screen!r}")

    def close(self) -> None:
        """Ends it, however it is."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._master)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def opened(terminals: list[Terminal], stack: Stack, *arguments: str) -> Terminal:
    terminals.append(Terminal(stack, *arguments))
    return terminals[-1]


def test_a_prompt_is_answered_on_stdout_and_nothing_else(tiny_stack: Stack) -> None:
    ended = run(tiny_stack, "run", "tiny", "What is the capital of France?", "--temperature", "0")
    assert (ended.stdout, ended.stderr, ended.returncode) == ("The capital of France is Paris.\n", "", 0)


def test_what_is_piped_in_is_the_prompt_or_its_end(echo_stack: Stack) -> None:
    assert run(echo_stack, "run", "echo", typed="one\ntwo\n").stdout == "one\ntwo\n\n"
    assert run(echo_stack, "run", "echo", "say:", typed="one").stdout == "say:\n\none\n"


def test_json_is_the_answer_as_the_api_gives_it(tiny_stack: Stack) -> None:
    options = ("--system", "Be brief.", "--max-tokens", "3", "--temperature", "0", "--json")
    answer = json.loads(run(tiny_stack, "run", "tiny", "Hello!", *options).stdout)
    assert (answer["object"], answer["usage"]["completion_tokens"]) == ("chat.completion", 3)
    assert answer["choices"][0]["finish_reason"] == "length"


def test_failures_are_a_line_and_an_exit_code(echo_stack: Stack) -> None:
    def failed(*arguments: str) -> tuple[int, str]:
        ended = run(echo_stack, *arguments)
        assert ended.stdout == ""
        [line] = ended.stderr.splitlines()
        return ended.returncode, line

    code, line = failed("run", "ecco", "hi")
    assert (code, "'echo'" in line) == (4, True)
    code, line = failed("run", "echo", "hi", "--temperature", "3")
    assert (code, "temperature" in line) == (1, True)
    code, line = failed("run", "echo", "hi", "--api-key", "sk-wrong")
    assert (code, "--api-key" in line) == (1, True)
    code, line = failed("run", "echo", "hi", "--base-url", "http://127.0.0.1:9")
    assert (code, "fastchat-q up" in line) == (3, True)
    code, line = failed("run", "echo", "hi", "--base-url", "127.0.0.1")
    assert (code, "--base-url" in line) == (2, True)
    assert failed("run", "echo")[0] == 2
    assert failed("embed", "echo", "hi")[0] == 1


def test_a_conversation_remembers_until_it_is_cleared(tiny_stack: Stack, terminals: list[Terminal]) -> None:
    terminal = opened(terminals, tiny_stack, "run", "tiny", "--temperature", "0")
    terminal.sees(r">>> ")
    terminal.types("My name is Anna.\n")
    terminal.sees(r"Nice to meet you, Anna!")
    terminal.sees(r">>> ")
    terminal.types("What is my name?\n")
    terminal.sees(r"Your name is Anna")
    terminal.sees(r">>> ")
    terminal.types("/clear\n")
    terminal.sees(r"forgotten.*\s+>>> ")
    terminal.types("What is my name?\n")
    assert "Anna" not in terminal.sees(r"[.!?]\s+>>> ")
    terminal.types("/bye\n")
    assert terminal.ends() == 0


def test_commands_change_what_is_sent(scripted_stack: Stack, terminals: list[Terminal]) -> None:
    """The model `script` answers `job` with the job as its worker got it."""
    terminal = opened(terminals, scripted_stack, "run", "script")
    for line, answer in (
        ("/help", r"/system"),
        ("/system Be brief.", r"Set\."),
        ("/set temperature 0.25", r"temperature = 0\.25"),
        ("/set stop done", r'stop = "done"'),
        ("/set seed 5", r"seed = 5"),
        ("/set seed", r"as the model has it"),
        ("/set", r"temperature 0\.25"),
        ("/set messages []", r"cannot be set"),
        ("/nothing", r"no command"),
    ):
        terminal.sees(r">>> ")
        terminal.types(line + "\n")
        terminal.sees(answer)
    terminal.sees(r">>> ")
    terminal.types("job\n")
    said = re.search(r"\{.*\}", terminal.sees(r"\}\s+>>> "))
    assert said is not None
    job = json.loads(said[0])
    assert [turn["content"] for turn in job["messages"]] == ["Be brief.", "job"]
    assert (job["sampling"]["temperature"], job["sampling"]["stop"]) == (0.25, ["done"])
    terminal.types(CTRL_D)
    assert terminal.ends() == 0


def test_several_lines_are_one_prompt(echo_stack: Stack, terminals: list[Terminal]) -> None:
    terminal = opened(terminals, echo_stack, "run", "echo")
    terminal.sees(r">>> ")
    terminal.types('"""one\n')
    terminal.sees(r"\.\.\. ")
    terminal.types('two"""\n')
    terminal.sees(r'two"""\s+.*one\r\ntwo\r\n')


def test_ctrl_c_ends_the_answer_and_its_job_and_not_the_program(echo_stack: Stack, terminals: list[Terminal]) -> None:
    terminal = opened(terminals, echo_stack, "run", "echo")
    terminal.sees(r">>> ")
    terminal.types("/set max_tokens 50000\n")
    terminal.sees(r">>> ")
    terminal.types("/set ignore_eos true\n")
    terminal.sees(r">>> ")
    terminal.types("tick tock\n")
    terminal.sees(r"tock.*tock")
    wait_until(lambda: echo_stack.live("echo") == 1, "the job runs")
    terminal.types(CTRL_C)
    terminal.sees(r">>> ")
    wait_until(lambda: echo_stack.live("echo") == 0, "the job has ended", 3)
    terminal.types(CTRL_C)
    terminal.sees(r"Ctrl-D.*\s+>>> ")
    terminal.types("/set ignore_eos false\n")
    terminal.sees(r">>> ")
    terminal.types("again\n")
    terminal.sees(r"again\r\n.*again\r\n")
    terminal.types(CTRL_D)
    assert terminal.ends() == 0


def test_ctrl_c_at_a_single_prompt_is_exit_code_130(echo_stack: Stack, terminals: list[Terminal]) -> None:
    terminal = opened(terminals, echo_stack, "run", "echo", "--max-tokens", "50000", LONG)
    terminal.sees("word word")
    terminal.types(CTRL_C)
    assert terminal.ends() == 130
    wait_until(lambda: echo_stack.live("echo") == 0, "the job has ended", 3)


def test_who_waits_sees_the_place_in_the_queue(stack: Stack, terminals: list[Terminal]) -> None:
    stack.start_worker("--model", "echo", "--engine", "echo", "--slots", "1", "--token-delay-ms", "20")
    busy = opened(terminals, stack, "run", "echo", LONG)
    busy.sees("word word")
    terminal = opened(terminals, stack, "run", "echo", "short")
    terminal.sees(r"place 1 in the queue")
    busy.types(CTRL_C)
    assert busy.ends() == 130
    terminal.sees(r"short")
    assert terminal.ends() == 0


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_answer_goes_on_when_the_api_server_dies_and_comes_back(stack: Stack, form: str) -> None:
    stack.start_worker("--model", "echo", "--engine", "echo", "--token-delay-ms", "20")
    words = " ".join(f"w{n}" for n in range(200))
    flags = ["--json"] if form == "json" else []
    asked = subprocess.Popen(
        command("run", "echo", words, *flags),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(stack),
    )
    wait_until(lambda: stack.running("echo") == 1, "it is answered")
    time.sleep(0.5)  # in the middle of it
    stack.api.kill()
    stack.api = stack.start_api(stack.port)
    said, complaint = asked.communicate(timeout=60)
    assert (asked.returncode, complaint) == (0, "")
    assert (
        json.loads(said)["choices"][0]["message"]["content"] if form == "json" else said.removesuffix("\n")
    ) == words
    assert len(stack.records("echo")) == 1, "it is one job"


def test_control_characters_of_a_model_do_not_drive_the_terminal(echo_stack: Stack, terminals: list[Terminal]) -> None:
    terminal = opened(terminals, echo_stack, "run", "echo", "a\x1b[2Jb")
    terminal.sees(r"a\\x1b\[2Jb")


def test_vectors_are_lines_of_json_or_numbers(scripted_stack: Stack) -> None:
    first, second = map(json.loads, run(scripted_stack, "embed", "embedder", "one", "two").stdout.splitlines())
    assert (first["index"], first["text"], second["index"], second["text"]) == (0, "one", 1, "two")
    piped = run(scripted_stack, "embed", "embedder", "-", "--format", "tsv", typed="one\n\ntwo\n").stdout
    numbers = [[float(word) for word in line.split("\t")] for line in piped.splitlines()]
    assert numbers == [first["embedding"], second["embedding"]]
    document = json.loads(run(scripted_stack, "embed", "embedder", "one", "--json").stdout)
    assert document["data"] == [first]


def test_more_texts_than_a_request_takes_are_several_requests(scripted_stack: Stack) -> None:
    texts = [f"text {number}" for number in range(600)]
    rows = [json.loads(line) for line in run(scripted_stack, "embed", "embedder", *texts).stdout.splitlines()]
    assert [(row["index"], row["text"]) for row in rows] == list(enumerate(texts))


def test_events_are_read_whole_whatever_their_text_holds() -> None:
    stream = ': queued position=2 eta=1.5\n\nid: 1\ndata: {"a":"x\u2028y\x85z"}\n\n: ping\ndata: [DONE]\n\ndata: cut'
    raw = stream.encode()
    chunks = [raw[start : start + 3] for start in range(0, len(raw), 3)]
    assert list(server_events(iter(chunks))) == [
        ServerEvent(None, None, "queued position=2 eta=1.5"),
        ServerEvent("1", '{"a":"x\u2028y\x85z"}'),
        ServerEvent(None, None, "ping"),
        ServerEvent(None, "[DONE]"),
    ]


def test_the_key_of_the_state_directory_goes_to_its_own_server_only(tmp_path: Path) -> None:
    (tmp_path / "api_key").write_text("sk-fcq-secret\n")
    (tmp_path / "up.lock").write_text(f"pid {os.getpid()}, http://10.0.0.5:8123")
    settings = Settings(state_dir=tmp_path)
    assert Server.find(settings) == Server("http://10.0.0.5:8123", "sk-fcq-secret")
    assert Server.find(settings, "http://localhost:9000/v1/") == Server("http://localhost:9000", "sk-fcq-secret")
    assert Server.find(settings, "https://elsewhere.example/v1") == Server("https://elsewhere.example", None)
    assert Server.find(settings, "https://elsewhere.example", "k") == Server("https://elsewhere.example", "k")
    (tmp_path / "up.lock").write_text("pid 4194305, http://10.0.0.5:8123")  # no process has such an id
    assert Server.find(settings) == Server("http://127.0.0.1:8000", "sk-fcq-secret")
