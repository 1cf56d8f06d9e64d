"""Where weights go: the device, how much memory it has, and how layers are spread over several."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from fastchat_q.choices import Device, LoadOptions
from fastchat_q.errors import ConfigurationError
from fastchat_q.sizes import parse_bytes

SHARE = 0.9
"""Of the free memory, for weights: the rest is for caches and for what forward passes need."""


@dataclass(frozen=True, slots=True)
class Place:
    """A memory that weights can lie in: ``cuda:0`` or ``cpu``."""

    name: str
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Placement:
    """How a model is put on devices."""

    device: torch.device
    arguments: Mapping[str, Any]
    """For ``from_pretrained``."""
    budgets: Mapping[str, int]
    """Bytes of weights that may lie in each place."""
    spread: bool
    """Over more than the one device, by accelerate."""
    to_disk: bool

    @property
    def budget(self) -> int:
        return sum(self.budgets.values())


def pick_device(device: Device) -> torch.device:
    """The torch device for a choice on the command line.

    Raises:
        ConfigurationError: the device is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return accelerator or torch.device("cpu")
    if device == "cpu" or (accelerator is not None and accelerator.type == device):
        return torch.device(device)
    have = f"only {accelerator.type} and cpu" if accelerator else "only the cpu"
    raise ConfigurationError(
        f"Device {device!r} is not available to this PyTorch ({torch.__version__}): it sees {have}."
    )


def place(device: torch.device, options: LoadOptions) -> Placement:
    """Where the weights may go.

    Raises:
        ConfigurationError: there are fewer GPUs than asked for, or an option that is for GPUs comes without one.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and (options.num_gpus or options.max_gpu_memory or options.cpu_offload):
        raise ConfigurationError(
            "--num-gpus, --max-gpu-memory and --cpu-offload are for GPUs, and the device is the cpu. "
            "--max-cpu-memory with --offload-dir keeps a part of the weights on disk."
        )
    if not on_cpu and options.max_cpu_memory is not None and not options.cpu_offload:
        raise ConfigurationError(
            "--max-cpu-memory is for weights in main memory, and all go to the GPU: add --cpu-offload, or leave it out."
        )
    asked = (options.num_gpus or 1) > 1 or options.max_gpu_memory or options.cpu_offload
    budgets: dict[str, int] = {}
    if not on_cpu:
        for name in gpus(device, options.num_gpus or 1):
            budgets[name] = min_of(options.max_gpu_memory, "--max-gpu-memory", free_memory(torch.device(name)).free)
    if on_cpu or options.cpu_offload:
        budgets["cpu"] = min_of(options.max_cpu_memory, "--max-cpu-memory", free_memory(torch.device("cpu")).free)
    if not asked and options.max_cpu_memory is None and options.offload_dir is None:
        return Placement(device, {"device_map": {"": device}}, budgets, spread=False, to_disk=False)
    memory: dict[int | str, int] = {_accelerate_name(name): size for name, size in budgets.items()}
    memory.setdefault("cpu", 0)  # else accelerate fills what is free there, unasked
    arguments: dict[str, Any] = {"device_map": "auto" if len(budgets) > 1 and not on_cpu else "sequential"}
    arguments["max_memory"] = memory
    if options.offload_dir is not None:
        Path(options.offload_dir).mkdir(parents=True, exist_ok=True)
        arguments["offload_folder"] = options.offload_dir
    return Placement(device, arguments, budgets, spread=True, to_disk=options.offload_dir is not None)


def gpus(device: torch.device, wanted: int) -> list[str]:
    """The names of the first so many accelerators. Raises ConfigurationError when there are fewer."""
    there = 1 if device.type == "mps" else torch.accelerator.device_count()
    if wanted > there:
        raise ConfigurationError(f"--num-gpus {wanted}: this machine shows {there} to PyTorch.")
    if device.type == "mps":
        return ["mps"]
    return [f"{device.type}:{index}" for index in range(wanted)]


def free_memory(device: torch.device) -> Place:
    """What is free on a device now. In a container that is what its limit leaves."""
    if device.type == "cpu":
        seen = psutil.virtual_memory()
        free, total = seen.available, seen.total
        if (limit := _container_limit()) is not None:
            total = min(total, limit[0])
            free = min(free, limit[0] - limit[1])
        return Place("cpu", max(0, free), total)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return Place("mps", total - torch.mps.driver_allocated_memory(), total)
    free, total = torch.accelerator.get_memory_info(device)
    return Place(str(device), free, total)


def all_memory(device: torch.device) -> list[Place]:
    """Every place on this machine that weights could lie in, the device's own kind first."""
    places = []
    if device.type != "cpu":
        count = 1 if device.type == "mps" else torch.accelerator.device_count()
        places = [free_memory(torch.device(name)) for name in gpus(device, count)]
    return [*places, free_memory(torch.device("cpu"))]


def min_of(limit: str | None, option: str, free: int) -> int:
    """The limit that was given, or else the greater part of what is free."""
    return parse_bytes(limit, option) if limit is not None else int(free * SHARE)


def set_threads(threads: int | None) -> None:
    """Fixes torch's CPU threads: its default of all cores collapses as soon as another process wants one."""
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) - 1))


def _accelerate_name(name: str) -> int | str:
    """accelerate numbers the accelerators."""
    return int(name.partition(":")[2]) if ":" in name else name


def _container_limit() -> tuple[int, int] | None:
    """(limit, used) in bytes of this process's control group, version 2; None without a limit."""
    try:
        group = Path("/proc/self/cgroup").read_text().partition("::")[2].split("\n")[0]
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        if not (folder / "memory.max").exists():  # in a container the group's own folder is the root
            folder = Path("/sys/fs/cgroup")
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        held = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        return int(limit), used - (int(held[1]) if held else 0)
    except (OSError, ValueError):
        return None
