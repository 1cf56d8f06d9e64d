"""Keeps vLLM's processes from outliving the worker whose they are: they would hold on to the device's memory.

vLLM calls `tether` in each of its processes, as a plugin (``vllm.general_plugins`` in pyproject.toml). Its own server
leaves its engine's process behind when it is killed with SIGKILL.
"""

import os
import threading
import time

OWNER = "FASTCHAT_Q_VLLM_OWNER"
"""Environment: the pid of the worker. Without it, vLLM is not ours."""
LOOK_S = 0.5


def own() -> None:
    """To be called in the worker's process before it starts vLLM's."""
    os.environ[OWNER] = str(os.getpid())


def tether() -> None:
    """Ends this process when the one that started it ends."""
    owner = os.environ.get(OWNER)
    if owner not in (None, str(os.getpid())):
        threading.Thread(target=_watch, args=(os.getppid(),), name="tether", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
