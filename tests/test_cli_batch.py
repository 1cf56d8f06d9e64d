"""``fastchat-q batch`` in front of real processes."""

import errno
import json
import os
import pty
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest

from fastchat_q import client
from fastchat_q.cli_batch import _Asking, _target

from .batches import jsonl, line, parsed
from .conftest import shared_stack
from .servers import wait_until
from .stack import API_KEY, Stack, environment_of

Done = subprocess.CompletedProcess[str]


class FullAtFirst(BaseHTTPRequestHandler):
    """An API server that has no room for the first upload, after it has read it."""

    protocol_version = "HTTP/1.1"
    uploads: list[bytes]

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/v1/files":
            self.uploads.append(body)
            if len(self.uploads) == 1:
                return self._answer(503, {"error": {"message": "full"}})
        return self._answer(200, {"id": "file-1" if self.path == "/v1/files" else "batch_1"})

    def _body(self) -> bytes:
        if "content-length" in self.headers:
            return self.rfile.read(int(self.headers["content-length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, found: dict[str, object]) -> None:
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@contextmanager
def full_at_first() -> Iterator[tuple[str, list[bytes]]]:
    """Its address, and what is uploaded to it."""
    uploads: list[bytes] = []
    handler = type("Handler", (FullAtFirst,), {"uploads": uploads})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", uploads
        finally:
            server.shutdown()
            thread.join()


def alone(
    *words: str, url: str = "http://127.0.0.1:9", given: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs ``fastchat-q batch`` without a stack."""
    environment = environment_of({"FASTCHAT_Q_BASE_URL": url, "FASTCHAT_Q_API_KEY": API_KEY})
    command_ = [sys.executable, "-m", "fastchat_q.cli", "batch", *words]
    return subprocess.run(command_, capture_output=True, env=environment, timeout=60, input=given)


@pytest.fixture(scope="module")
def served() -> Iterator[Stack]:
    """A stack with an echo worker and an orchestrator."""
    with shared_stack("--model", "echo", "--engine", "echo", "--token-delay-ms", "1") as stack:
        stack.start("orchestrator", "orchestrator")
        yield stack


def command(stack: Stack, *words: str) -> tuple[list[str], dict[str, str]]:
    environment = environment_of({"FASTCHAT_Q_BASE_URL": stack.base, "FASTCHAT_Q_API_KEY": API_KEY})
    return [sys.executable, "-m", "fastchat_q.cli", "batch", *words], environment


def batch(stack: Stack, *words: str) -> Done:
    """Runs ``fastchat-q batch`` to its end."""
    line_, environment = command(stack, *words)
    return subprocess.run(line_, capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """A file of five requests."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl(line(n, f"text {n}") for n in range(5)))
    return path


def test_a_file_is_done_and_its_answers_are_printed(served: Stack, requests: Path, tmp_path: Path) -> None:
    made = batch(served, "create", str(requests), "--metadata", "run=first", "--wait", "--json")
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert (found["status"], found["metadata"]) == ("completed", {"run": "first"})
    assert found["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    assert found["endpoint"] == "/v1/chat/completions", "what the first line says"
    printed = batch(served, "results", found["id"])
    assert {one["custom_id"] for one in parsed(printed.stdout.encode())} == {f"line-{n}" for n in range(5)}
    target = tmp_path / "out.jsonl"
    assert batch(served, "results", found["id"], "-o", str(target)).returncode == 0
    assert target.read_text() == printed.stdout
    none = batch(served, "results", found["id"], "--errors")
    assert (none.returncode, none.stdout) == (0, "")
    assert "has no errors" in none.stderr
    shown = batch(served, "status", found["id"]).stdout
    assert "5 done, 0 failed, 5 in all" in shown
    assert found["output_file_id"] in shown
    assert any(row.split()[:2] == [found["id"], "completed"] for row in batch(served, "ls").stdout.splitlines())


def test_a_file_can_be_asked_of_another_model_than_its_lines_say(served: Stack, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_bytes(jsonl(line(n, "ünïcode \u2028 text", model="gpt-9") for n in range(3)).rstrip(b"\n"))
    made = batch(served, "create", str(path), "--model", "echo", "--wait", "--json")
    assert made.returncode == 0, made.stderr
    answers = parsed(batch(served, "results", json.loads(made.stdout)["id"]).stdout.encode())
    assert [one["response"]["body"]["choices"][0]["message"]["content"] for one in answers] == [
        "ünïcode \u2028 text"
    ] * 3


@pytest.mark.parametrize("model", [(), ("--model", "echo")], ids=["as it is", "for a model"])
def test_a_file_that_is_sent_again_is_whole(model: tuple[str, ...], requests: Path) -> None:
    with full_at_first() as (url, uploads):
        made = alone("create", str(requests), *model, url=url)
    assert made.returncode == 0, made.stderr
    first, second = (parsed(upload[upload.index(b'{"') : upload.rindex(b"}") + 1] + b"\n") for upload in uploads)
    assert len(first) == 5
    assert second == first


def test_lines_that_are_no_requests_are_sent_as_they_are() -> None:
    """The server says what is wrong with them, and where: their numbers stay as well."""
    wrong = [b'{"body": {"x": "\\ud800"}}', b"", b'{"body": {"x": 1, "x": 2}}', b"[" * 100_000, b"nonsense"]
    given = b"\n".join([*wrong, b'{"body":{"model":"a"}}'])
    sent = _Asking(BytesIO(given), "b")
    assert b"".join(iter(sent.read, b"")).splitlines() == [*wrong, b'{"body":{"model":"b"}}']


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_requests_can_come_through_a_pipe(name: str, requests: Path) -> None:
    """Blank lines before the first request are none, as for the server."""
    given = b"\n \n" + requests.read_bytes()
    with full_at_first() as (url, uploads):
        made = alone("create", name, url=url, given=given)
    assert made.returncode == 0, made.stderr
    assert made.stdout == b"batch_1\n"
    assert all(given in upload for upload in uploads)
    assert len(uploads) == 2


def test_results_have_their_name_when_they_are_whole(served: Stack, requests: Path, tmp_path: Path) -> None:
    made = batch(served, "create", str(requests), "--wait", "--json")
    name = json.loads(made.stdout)["id"]
    full = batch(served, "results", name, "-o", "/dev/full")
    assert full.returncode == 1
    assert full.stderr == "fastchat-q: /dev/full: No space left on device.\n"
    words, environment = command(served, "results", name)
    with Path("/dev/full").open("wb") as stdout:
        piped = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert (piped.returncode, piped.stderr) == (1, "fastchat-q: stdout: No space left on device.\n")
    target = tmp_path / "kept" / "out.jsonl"
    assert "No such file" in batch(served, "results", name, "-o", str(target)).stderr
    target.parent.mkdir()
    target.write_text("old")
    with pytest.raises(ConnectionError):
        cut_off(target)
    assert [(path.name, path.read_text()) for path in target.parent.iterdir()] == [("out.jsonl", "old")]
    assert batch(served, "results", name, "-o", str(target)).returncode == 0
    assert len(parsed(target.read_bytes())) == 5


def cut_off(target: Path) -> None:
    """Results whose server goes in the middle."""
    with _target(target) as opened:
        opened.write(b"half")
        opened.flush()
        assert target.read_text() == "old"
        raise BrokenPipeError(errno.EPIPE, "cut off")


def test_more_batches_than_fit_on_a_page_are_seen_page_by_page(served: Stack, requests: Path) -> None:
    older, newer = (batch(served, "create", str(requests)).stdout.strip() for _ in range(2))
    first = batch(served, "ls", "--limit", "1")
    assert newer in first.stdout
    assert first.stderr == f"There are more. See further with --after {newer}.\n"
    second = batch(served, "ls", "--limit", "1", "--after", newer)
    assert older in second.stdout


def test_a_server_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hung:
        closing = threading.Timer(8, hung.close)
        closing.start()
        began = time.monotonic()
        with (
            client.Api(client.Server(f"http://127.0.0.1:{hung.getsockname()[1]}")) as api,
            pytest.raises(client.HungUpError),
        ):
            api.get("/v1/batches")
        closing.cancel()
    assert time.monotonic() - began < 6


def test_what_is_wrong_with_a_file_is_said_with_its_line(served: Stack, requests: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"custom_id": "a"}\n')
    refused = batch(served, "create", str(bad))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no request with a url" in refused.stderr
    bad.write_bytes(requests.read_bytes() + b"nonsense\n")
    failed = batch(served, "create", str(bad), "--wait")
    assert failed.returncode == 1
    assert "failed" in failed.stdout
    assert "line 6: " in failed.stdout
    assert batch(served, "create", str(tmp_path / "none.jsonl")).returncode == 2
    assert batch(served, "create", str(requests), "--metadata", "word").returncode == 2
    assert batch(served, "status", "batch_nope").returncode == 4
    away = subprocess.run(
        [*command(served, "ls")[0], "--base-url", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        env=command(served)[1],
        timeout=60,
    )
    assert away.returncode == 3
    assert len(away.stderr.splitlines()) == 1


def test_a_batch_that_runs_shows_what_is_there_and_can_be_cancelled(served: Stack, tmp_path: Path) -> None:
    path = tmp_path / "slow.jsonl"
    quick, slow = line(0, "a"), line(1, "b " * 60_000)  # at 1 ms a token it takes a minute
    path.write_bytes(jsonl([quick, slow]))
    made = batch(served, "create", str(path))
    assert made.returncode == 0, made.stderr
    name = made.stdout.strip()
    wait_until(lambda: "line-0" in batch(served, "results", name).stdout, "the first answer is there")
    running = batch(served, "results", name)
    assert [one["custom_id"] for one in parsed(running.stdout.encode())] == ["line-0"]
    assert "1 of 2 requests" in running.stderr
    assert batch(served, "cancel", name).returncode == 0
    watched = batch(served, "status", name, "--watch", "--json")
    assert watched.returncode == 1, "it was not completed"
    assert json.loads(watched.stdout)["status"] == "cancelled"
    assert "line-0" in batch(served, "results", name).stdout


def test_a_terminal_gets_a_bar_that_outlives_an_api_server(served: Stack, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_bytes(jsonl(line(n, "c " * 2000) for n in range(100)))
    words, environment = command(served, "create", str(path), "--wait")
    master, slave = pty.openpty()
    process = subprocess.Popen(words, stdout=slave, stderr=slave, stdin=slave, env={**environment, "TERM": "xterm"})
    os.close(slave)
    seen = ""
    killed = False
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 65536).decode(errors="replace")
            except OSError:  # it has ended
                break
        if "/100" in seen and not killed:
            served.api.kill()
            served.api = served.start_api(served.port)
            killed = True
    os.close(master)
    assert process.wait(10) == 0, seen
    assert killed
    assert "━" in seen
    assert "100 done, 0 failed, 100 in all" in seen
