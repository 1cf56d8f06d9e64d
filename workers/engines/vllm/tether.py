"""Keeps vLLM's processes from outliving the worker whose they are: they would hold on to the device's memory.

vLLM calls `tether` in each of its processes, as a plugin (``vllm.general_plugins`` in pyproject.toml). By itself it
leaves its engine's process behind when the front end is killed with SIGKILL.
"""

import os
import threading
import time
from importlib.metadata import entry_points

import structlog

log = structlog.get_logger()

PLUGIN, GROUP = "fastchat-q", "vllm.general_plugins"
CHOSEN = "VLLM_PLUGINS"
"""Environment, vLLM's: the plugins that it takes; without it, all."""
OWNER = "FASTCHAT_Q_VLLM_OWNER"
"""Environment: the pid of the worker. Without it, vLLM is not ours."""
LOOK_S = 0.5


def own() -> None:
    """To be called in the worker's process before it starts vLLM's."""
    os.environ[OWNER] = str(os.getpid())
    if CHOSEN in os.environ and PLUGIN not in os.environ[CHOSEN].split(","):
        os.environ[CHOSEN] += f",{PLUGIN}"
    if PLUGIN not in entry_points(group=GROUP).names:  # an installation from before there was one
        log.warning("vLLM's processes would outlive a killed worker: install fastchat-q again", missing=GROUP)


def tether() -> None:
    """Ends this process when the one that started it ends."""
    owner = os.environ.get(OWNER)
    if owner not in (None, str(os.getpid())):
        threading.Thread(target=_watch, args=(os.getppid(),), name="tether", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
