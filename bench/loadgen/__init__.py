"""Closed-loop load generator for the API on this host: how fast, how late, at what CPU cost.

It drives `POST /v1/chat/completions` over keep-alive HTTP/1.1 connections, one request in flight on each, and checks
that every answer is whole; its text only if it is told which one to expect. It sends every request alike (a prefix
cache will notice), and refuses to load any host but this one. The hot path is byte searches over each read, with no
JSON and no task per event, so that the generator is not what gets measured.

    config   what is asked, and the bytes of the request
    framing  where an answer ends
    answers  what a whole answer is
    client   connections and slots: the run
    cpu      CPU time of processes
    report   what a run came to, as figures and as text
"""

from .client import run
from .config import Config, ConfigError
from .report import Report, to_json, to_text

__all__ = ["Config", "ConfigError", "Report", "run", "to_json", "to_text"]
