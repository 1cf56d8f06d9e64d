"""The command line: `python bench/loadgen …`, or `python -m loadgen …` where bench/ is on sys.path.

    python bench/loadgen --model tiny --concurrency 64 --requests 2000 --max-tokens 64 --pids api=4711,worker=4712

Exit status: 0 if every request ended ok, 1 if not, 2 if the run could not start.
"""

import sys
from pathlib import Path

if not __package__:  # run as a folder, which puts the folder itself on sys.path, not the one that it lies in
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import asyncio
import json
import os
from typing import Any

import uvloop

from loadgen import Config, ConfigError, run, to_json, to_text

PROMPT = "the quick brown fox jumps over a lazy dog while rain falls on the old roof and nobody looks up"


def name_pids(text: str) -> dict[str, int]:
    """`name=pid[,name=pid...]`, names distinct. Raises ValueError."""
    pairs = [part.split("=") for part in text.split(",")]
    pids = {name: int(pid) for name, pid in pairs}
    if len(pids) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} gives a name twice")
    return pids


def json_object(text: str) -> dict[str, Any]:
    """Raises ValueError or TypeError for any other text."""
    return dict(json.loads(text))


def _parser() -> argparse.ArgumentParser:
    """Every option but --json-out is named after the field of Config that it sets."""
    parser = argparse.ArgumentParser(prog="loadgen", description="Closed-loop load on the API server of this host.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="loopback only (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: $OPENAI_API_KEY")
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=1, help="requests in flight (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=100, help="requests in all (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens per answer (default: %(default)s)")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)r")
    parser.add_argument("--extra", type=json_object, default={}, help="""e.g. '{"ignore_eos": true}'""")
    parser.add_argument("--pids", type=name_pids, default={}, help="name=pid[,name=pid...] whose CPU time to read")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for one request (default: %(default)s)")
    parser.add_argument("--json-out", type=Path, help="write the report there as well")
    return parser


def main() -> int:
    """Read the options, run, and tell."""
    parser = _parser()
    options = vars(parser.parse_args())
    json_out: Path | None = options.pop("json_out")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(run(Config(**options)))
    except ConfigError as error:
        parser.error(str(error))
    print(to_text(report))
    if json_out is not None:
        json_out.write_text(to_json(report) + "\n")
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
