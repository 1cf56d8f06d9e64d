"""How much memory a device has to spare."""

import os
from pathlib import Path

import torch

CPU_SHARE = 0.25
"""Of free main memory: the API, Redis and other workers may live on the same machine."""
DEVICE_SHARE = 0.8
"""Of free memory of an accelerator once the weights are there: the rest is for what a forward pass needs."""
LEAST_BYTES = 64 * 2**20
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""What the container may use, if there is one."""
USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def default_kv_bytes(device: torch.device) -> int:
    """Memory for keys and values when nobody said how much; taken only as requests need it."""
    if device.type == "cpu":
        return max(LEAST_BYTES, int(free_main_bytes() * CPU_SHARE))
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except (AttributeError, RuntimeError):  # not every backend says
        return max(LEAST_BYTES, int(free_main_bytes() * CPU_SHARE))
    return max(LEAST_BYTES, int(free * DEVICE_SHARE))


def free_main_bytes() -> int:
    """Main memory that this process could still take, as far as the system says."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = _read("/proc/meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, used in zip(LIMITS, USED, strict=True):
        most, now = _read(limit).strip(), _read(used).strip()
        if most.isdigit() and now.isdigit():
            free = min(free, max(0, int(most) - int(now)))
    return free


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
