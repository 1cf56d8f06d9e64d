"""The processes of a run: started, hit by the nemesis, and started again. Only they are ever signalled."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import redis as sync_redis

from fastchat_q import keys
from fastchat_q.supervisor import die_with_parent
from tests.servers import RedisServer, free_port, wait_until
from tests.stack import API_KEY, STARTUP_S, answers, environment_of, make_key

from . import MODEL
from .report import Report
from .worker import MUTANT

ROOT = Path(__file__).parents[2]
API_SERVERS = 2
WORKERS = 4
SUPERVISED = 2
"""So many of the workers run their engine in a child process of its own."""
SLOTS = 8
TENANTS = {"capped": (1, "--parallel", "3"), "heavy": (2, "--weight", "4")}
"""Tenants beside that of the bootstrap key: how many of five clients are theirs, and the limits of their keys."""
DRAIN_S = 2
KEPT_S = 120
"""How long records of every kind are kept after their end: long enough for the observer."""
RESTART_S = (0.2, 1.5)
"""A process that ended is started again after such a time."""
STARTING_S = 10.0
"""A process that is terminated so early may not have come to handle the signal yet."""
LAST_WORDS = 2000
LOG_LINE = re.compile(r"\[(warning|error) *\] (.*?)(?= \w+=|$)", re.MULTILINE)
TRACEBACK = "Traceback (most recent call last)"


@dataclass(slots=True)
class Member:
    """One process and its successors."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    port: int = 0
    supervised: bool = False
    """Its engine is a child of it."""
    excused: bool = False
    """It was told to end: exit code 0 is right."""
    impaired: bool = False
    """The nemesis is at it."""
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)
    started: float = 0.0

    def start(self) -> None:
        """Starts it; the kernel ends it with this process."""
        self.excused, self.started = False, time.monotonic()
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment_of(self.environment),
                preexec_fn=die_with_parent(os.getpid()),
            )

    @property
    def alive(self) -> bool:
        """Whether it runs (or is stopped)."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Its pid, or that of the run before."""
        return self.process.pid if self.process is not None else 0

    def signal(self, number: int) -> None:
        """Sends a signal, if it is there."""
        if self.process is not None and self.alive:
            self.process.send_signal(number)

    def engine(self) -> "psutil.Process | None":
        """The process that does the work: a supervisor's child, else itself; None: between two runs."""
        try:
            process = psutil.Process(self.pid)
            return next(iter(process.children()), None) if self.supervised else process
        except psutil.NoSuchProcess:
            return None

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-LAST_WORDS:]


class Fleet:
    """One Redis, API servers, workers. `keep` starts again what ended."""

    def __init__(self, folder: Path, rng: random.Random, report: Report, mutant: str | None) -> None:
        self.folder, self._rng, self._report = folder, rng, report
        self.redis = RedisServer(folder)
        common = {"FASTCHAT_Q_REDIS_URL": self.redis.url, "FASTCHAT_Q_STATE_DIR": str(folder)}
        served = {**common, "FASTCHAT_Q_API_KEY": API_KEY, "FASTCHAT_Q_RESULT_TTL_S": str(KEPT_S)}
        working = {**common, **({MUTANT: mutant} if mutant else {})}
        self.apis = [self._api(i, served) for i in range(API_SERVERS)]
        self.workers = [self._worker(i, working) for i in range(WORKERS)]
        self.bearers = [API_KEY] * 2
        """The keys of the clients: of the bootstrap key's tenant, and of those of `TENANTS`."""
        self._restarts: dict[str, float] = {}

    @property
    def members(self) -> list[Member]:
        """API servers and workers."""
        return [*self.apis, *self.workers]

    def start(self) -> None:
        """Starts everything; returns when it serves."""
        for name, (share, *limits) in TENANTS.items():
            self.bearers += [make_key(self.redis.url, self.folder, "--name", name, "--tenant", name, *limits)] * share
        for member in self.members:
            member.start()
        for api in self.apis:
            wait_until(partial(answers, f"http://127.0.0.1:{api.port}/healthz"), f"{api.name} answers", STARTUP_S)
        client = self.redis.client()
        wait_until(lambda: _serving(client) == WORKERS, "all workers serve", STARTUP_S)
        client.close()

    async def keep(self) -> None:
        """Starts again what ended, for ever; who ends by himself violates."""
        while True:
            for member in self.members:
                if not member.alive:
                    self._look_after(member)
            await asyncio.sleep(0.05)

    def read_logs(self) -> None:
        """Counts the warnings and errors in the members' logs; a traceback violates."""
        for member in self.members:
            log = member.log.read_text(errors="replace")
            for level, what in LOG_LINE.findall(log):
                self._report.count("log", f"{level}: {what}")
            at = log.find(TRACEBACK)
            if at >= 0:
                self._report.violate(
                    "a traceback in a log", member.name, log[max(0, at - LAST_WORDS) :][: 2 * LAST_WORDS]
                )

    def close(self) -> None:
        """Ends everything for good."""
        for member in self.members:
            member.signal(signal.SIGCONT)
            member.signal(signal.SIGKILL)
            if member.process is not None:
                member.process.wait()
        self.redis.process.send_signal(signal.SIGCONT)
        self.redis.kill()

    def _look_after(self, member: Member) -> None:
        due = self._restarts.get(member.name)
        if due is None:
            code = member.process.poll() if member.process is not None else None
            self._report.note(f"{member.name} pid={member.pid} ended with {code}")
            young = time.monotonic() - member.started < STARTING_S
            fine = (0, -signal.SIGTERM) if young else (0,)
            if code != -signal.SIGKILL and not (member.excused and code in fine):
                self._report.violate(f"a process ended with exit code {code}", member.name, member.last_words())
            self._restarts[member.name] = time.monotonic() + self._rng.uniform(*RESTART_S)
        elif time.monotonic() >= due:
            del self._restarts[member.name]
            member.start()
            self._report.note(f"{member.name} pid={member.pid} started")

    def _api(self, index: int, environment: dict[str, str]) -> Member:
        port = free_port()
        command = [sys.executable, "-m", "fastchat_q.cli", "serve", "--port", str(port), "--drain-s", str(DRAIN_S)]
        return Member(f"api-{index}", command, environment, self.folder / f"api-{index}.log", port)

    def _worker(self, index: int, environment: dict[str, str]) -> Member:
        arguments = ["--model", MODEL, "--engine", "echo", "--slots", str(SLOTS), "--drain-s", str(DRAIN_S)]
        supervised = index < SUPERVISED
        command = [sys.executable, "-m", "tests.chaos.worker", "worker", *arguments]
        command += [] if supervised else ["--no-supervise"]
        log = self.folder / f"worker-{index}.log"
        return Member(f"worker-{index}", command, environment, log, supervised=supervised)


def _serving(client: "sync_redis.Redis") -> int:
    """Workers whose engine serves."""
    return sum(client.hget(name, "state") == "serving" for name in client.scan_iter(keys.worker("*")))
