"""Batches: how fast a full one goes through, that memory stays flat, and what interactive traffic feels of it.

Real processes: an embedded Redis, an API server, an orchestrator, echo workers.
"""

import argparse
import asyncio
import functools
import json
import math
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import redis as sync_redis
from processes import CLI, Front, front, machine, models, started, wait

MODEL = "echo"
QUANTILES = (("p50", 0.5), ("p95", 0.95))
STEP = 5_000
"""Memory is looked at whenever so many further lines are done."""
MB = 1024 * 1024


def main() -> None:
    """Prints a report; with --json also into a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--words", type=int, default=4, help="of each question, and so of each answer")
    parser.add_argument("--max-tokens", type=int, help="of each answer; with many words: long lines, short answers")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ttft-s", type=float, default=30.0, help="seconds of interactive traffic, each way; 0: none")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"command": " ".join(["bench/batches.py", *sys.argv[1:]]), "machine": machine()}
    if options.lines:
        with stack(options.slots, 0, options.workers) as system:
            report["throughput"] = throughput(system, options.lines, options.words, options.max_tokens)
    if options.ttft_s:
        with stack(64, 20, 1) as system:
            report["interactive"] = interactive(system, options.ttft_s)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


class System:
    """A stack with batches."""

    def __init__(self, base: Front, processes: dict[str, int]) -> None:
        self.front, self.base = base, f"http://127.0.0.1:{base.port}"
        self.processes = processes
        self.redis = sync_redis.Redis.from_url(base.url)

    def request(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """The JSON of an answer."""
        request = urllib.request.Request(self.base + path, body, {"content-type": kind}, method=method)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def upload(self, content: bytes) -> str:
        """The id of a file with purpose ``batch``."""
        edge = "fqbench"
        head = (
            f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{edge}\r\n'
            'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        )
        body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
        return str(self.request("POST", "/v1/files", body, f"multipart/form-data; boundary={edge}")["id"])

    def create(self, file_id: str) -> str:
        """The id of a batch of chats."""
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return str(self.request("POST", "/v1/batches", json.dumps(body).encode())["id"])

    def memory(self) -> dict[str, float]:
        """Resident MB of each process, and what Redis says that it uses."""
        found = {name: round(_rss(pid) / MB, 1) for name, pid in self.processes.items()}
        return found | {"redis_used": round(self.redis.info("memory")["used_memory"] / MB, 1)}

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each process so far."""
        return {name: _cpu(pid) for name, pid in self.processes.items()}


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _rss(pid: int) -> int:
    return sum(process.memory_info().rss for process in _tree(pid))


def _cpu(pid: int) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _tree(pid))


@contextmanager
def stack(slots: int, delay_ms: int, workers: int) -> Iterator[System]:
    """All processes, ready."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fqb")))
        os.environ["FASTCHAT_Q_STATE_DIR"] = str(folder)
        base = stack.enter_context(front(folder))
        processes = {"api": base.api_pid, "redis": base.redis_pid}
        for number in range(workers):
            flags = ("--slots", str(slots), "--token-delay-ms", str(delay_ms), "--no-supervise")
            processes[f"worker-{number}"] = stack.enter_context(base.worker(MODEL, *flags)).pid
        command = (*CLI, "orchestrator", "--redis-url", base.url)
        processes["orchestrator"] = stack.enter_context(started(*command, log=folder / "orchestrator.log")).pid
        wait(lambda: MODEL in models(base.port), "the worker")
        time.sleep(2)
        yield System(base, processes)


def chats(lines: int, words: int, max_tokens: int | None = None) -> bytes:
    """An input."""
    question = " ".join(f"word{n}" for n in range(words))
    request: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": question}]}
    if max_tokens is not None:
        request["max_tokens"] = max_tokens
    rows = (
        {"custom_id": f"r-{n}", "method": "POST", "url": "/v1/chat/completions", "body": request} for n in range(lines)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def throughput(system: System, lines: int, words: int, max_tokens: int | None) -> dict[str, Any]:
    """One batch from the upload to its files."""
    content = chats(lines, words, max_tokens)
    samples: list[dict[str, Any]] = [{"lines": 0, **system.memory()}]
    peak: dict[str, float] = {}
    cpu = system.cpu()
    began = time.monotonic()
    file_id = system.upload(content)
    uploaded = time.monotonic()
    batch_id = system.create(file_id)
    created = time.monotonic()
    validated = 0.0
    while True:
        batch = system.request("GET", f"/v1/batches/{batch_id}")
        done = batch["request_counts"]["completed"] + batch["request_counts"]["failed"]
        if batch["in_progress_at"] and not validated:
            validated = time.monotonic()
        now = system.memory()
        peak = {name: max(size, peak.get(name, 0)) for name, size in now.items()}
        if done // STEP > samples[-1]["lines"] // STEP:
            samples.append({"lines": done, "s": round(time.monotonic() - created, 1), **now})
        if batch["status"] not in ("validating", "in_progress", "finalizing"):
            break
        time.sleep(0.2)
    ended = time.monotonic()
    assert batch["status"] == "completed", batch
    assert batch["request_counts"] == {"total": lines, "completed": lines, "failed": 0}, batch
    with urllib.request.urlopen(f"{system.base}/v1/files/{batch['output_file_id']}/content", timeout=120) as answer:
        ids = [json.loads(line)["custom_id"] for line in answer]
    assert len(ids) == len(set(ids)) == lines
    spent = {name: round(seconds - cpu[name], 2) for name, seconds in system.cpu().items()}
    return {
        "lines": lines,
        "input_mb": round(len(content) / MB, 1),
        "upload_s": round(uploaded - began, 2),
        "create_s": round(created - uploaded, 3),
        "validated_s": round(validated - created, 2),
        "finished_s": round(ended - created, 2),
        "lines_per_s": round(lines / (ended - created)),
        "cpu_s": spent,
        "memory_mb": samples,
        "peak_mb": peak,
    }


def interactive(system: System, seconds: float) -> dict[str, Any]:
    """Time to first token of streams that come one after the other, without a batch and beside a full one, by turns."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    asyncio.run(ttft(system, 2.0))
    for _ in range(2):
        found["without"] += asyncio.run(ttft(system, seconds / 2))
        path = f"/v1/batches/{system.create(system.upload(chats(50_000, 20)))}"
        wait(functools.partial(under_way, system, path), "a line")
        found["with"] += asyncio.run(ttft(system, seconds / 2))
        assert under_way(system, path)
        system.request("POST", f"{path}/cancel")
        wait(functools.partial(cancelled, system, path), "its end")
    report: dict[str, Any] = {
        key: {"streams": len(times), **{f"{name}_ms": round(_quantile(times, at) * 1000, 1) for name, at in QUANTILES}}
        for key, times in found.items()
    }
    for name, at in QUANTILES:
        report[f"{name}_ratio"] = round(_quantile(found["with"], at) / _quantile(found["without"], at), 2)
    return report


def under_way(system: System, path: str) -> bool:
    """Whether a batch has answers and no end."""
    batch = system.request("GET", path)
    return bool(batch["status"] == "in_progress" and batch["request_counts"]["completed"])


def cancelled(system: System, path: str) -> bool:
    """Whether a batch was stopped."""
    return bool(system.request("GET", path)["status"] == "cancelled")


def _quantile(times: list[float], at: float) -> float:
    return sorted(times)[math.ceil(at * len(times)) - 1]


async def ttft(system: System, seconds: float) -> list[float]:
    """Seconds from the request to the first text, of four clients that ask again and again."""
    until = time.monotonic() + seconds

    async def client() -> list[float]:
        times = []
        while time.monotonic() < until:
            times.append(await one(system.front.port))
            await asyncio.sleep(0.05)
        return times

    return [at for times in await asyncio.gather(*(client() for _ in range(4))) for at in times]


async def one(port: int) -> float:
    """One stream, read to its end; seconds to the first text."""
    body = json.dumps(
        {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "one two three four five six"}]}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, first = time.monotonic(), 0.0
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    while line := await reader.readline():
        if not first and b'"content":"' in line and b'"content":""' not in line:
            first = time.monotonic() - began
    writer.close()
    assert first, "no token"
    return first


if __name__ == "__main__":
    main()
