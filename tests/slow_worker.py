"""A worker that loads echo models on demand, as processes: ``python -m tests.slow_worker URL POLICY MODEL…``.

A MODEL is ``name:seconds of loading``. POLICY is JSON, or null for an ordinary worker of one model; its
``load_stall_s`` is how long a load may say nothing. A model with the name of a file in the working folder cannot be
loaded: the file says why.
"""

import json
import sys
import time
from pathlib import Path

from fastchat_q.workers import ondemand, parent
from fastchat_q.workers.engine_process import EngineProcess
from fastchat_q.workers.engines.echo import EchoEngine
from fastchat_q.workers.main import serve
from fastchat_q.workers.ondemand import Policy
from fastchat_q.workers.progress import Progress
from fastchat_q.workers.worker import Limits

from fastchat_q import logs
from fastchat_q.registry import ModelCard

STEPS = 20


def load(name: str, seconds: float) -> EchoEngine:
    progress = Progress()
    for step in range(STEPS):
        progress(step / STEPS, "shards")
        time.sleep(seconds / STEPS)
    why = Path(name)
    if why.exists():
        print(f"fastchat-q: {why.read_text()}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    return EchoEngine(name, 4, 0.02)


def main() -> None:
    """With ``--id ID`` the process of one model, else the supervisor."""
    url, policy, *rest = sys.argv[1:]
    logs.configure()
    if "--id" in rest:
        name, _, seconds = rest[0].rpartition(":")
        serve(load(name, float(seconds)), Limits(drain_s=3), url, rest[-1])
        return
    terms = json.loads(policy)
    load_stall_s = (terms or {}).pop("load_stall_s", 600)
    processes = [process(url, policy, model, load_stall_s) for model in rest]
    if terms is None:
        parent.run(processes[0], url)
    else:
        ondemand.run(processes, Policy(**terms), url)


def process(url: str, policy: str, model: str, load_stall_s: float) -> EngineProcess:
    command = [sys.executable, "-m", "tests.slow_worker", url, policy, model]
    card = ModelCard(model.rpartition(":")[0], "slow", None, int(time.time()))
    return EngineProcess(lambda run_id: [*command, "--id", run_id], {}, card, 4, 3, 30, load_stall_s)


if __name__ == "__main__":
    main()
