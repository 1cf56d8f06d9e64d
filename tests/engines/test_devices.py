"""Where weights go: amounts of memory, refusals of what is not there, and layers that lie on disk."""

from pathlib import Path

import pytest
import torch
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.loading import devices
from fastchat_q.workers.engines.loading.devices import free_memory, place
from fastchat_q.workers.engines.loading.model import Loaded, load

from fastchat_q.choices import LoadOptions
from fastchat_q.errors import ConfigurationError
from fastchat_q.sizes import parse_bytes

from .conftest import Drive
from .driving import job
from .test_quantization import QUESTIONS, answers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 * GIB), ("1.5 GiB", 3 * GIB // 2), ("800MB", 800_000_000), ("64kib", 65536), ("123", 123)],
)
def test_an_amount_of_memory_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_bytes(text, "--max-gpu-memory") == size


@pytest.mark.parametrize("text", ["", "lots", "20 G", "-1GiB", "1GiB2"])
def test_what_is_no_amount_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--max-gpu-memory .* is no amount of memory"):
        parse_bytes(text, "--max-gpu-memory")


@pytest.mark.parametrize(
    "options", [LoadOptions(num_gpus=2), LoadOptions(max_gpu_memory="1GiB"), LoadOptions(cpu_offload=True)]
)
def test_options_for_gpus_are_refused_on_a_cpu(options: LoadOptions) -> None:
    with pytest.raises(ConfigurationError, match="are for GPUs, and the device is the cpu"):
        place(CPU, options)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if PyTorch saw two GPUs with 8 GiB free, and 32 GiB of main memory: the real ones cannot be had in a test."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(
        devices, "free_memory", lambda d: devices.Place(str(d), (32 if d.type == "cpu" else 8) * GIB, 64 * GIB)
    )


@pytest.mark.usefixtures("two_gpus")
def test_a_single_gpu_takes_it_all_without_accelerates_hooks() -> None:
    found = place(CUDA, LoadOptions())
    assert found.arguments == {"device_map": {"": CUDA}}
    assert found.budgets == {"cuda:0": int(7.2 * GIB)}
    assert not found.spread


@pytest.mark.usefixtures("two_gpus")
def test_several_gpus_share_the_layers_and_main_memory_gets_none_unasked() -> None:
    found = place(CUDA, LoadOptions(num_gpus=2, max_gpu_memory="6GiB"))
    assert found.arguments == {"device_map": "auto", "max_memory": {0: 6 * GIB, 1: 6 * GIB, "cpu": 0}}
    assert found.budget == 12 * GIB
    offloaded = place(CUDA, LoadOptions(cpu_offload=True, max_cpu_memory="16GiB"))
    assert offloaded.arguments["max_memory"] == {0: int(7.2 * GIB), "cpu": 16 * GIB}
    with pytest.raises(ConfigurationError, match=r"--num-gpus 3: this machine shows 2"):
        place(CUDA, LoadOptions(num_gpus=3))


@pytest.mark.usefixtures("two_gpus")
def test_room_in_main_memory_is_refused_where_nothing_would_lie_in_it() -> None:
    with pytest.raises(ConfigurationError, match=r"--max-cpu-memory is for .*--cpu-offload"):
        place(CUDA, LoadOptions(max_cpu_memory="16GiB"))


def test_mps_is_one_gpu_and_no_more() -> None:
    assert devices.gpus(torch.device("mps"), 1) == ["mps"]
    with pytest.raises(ConfigurationError, match="--num-gpus 2: this machine shows 1"):
        devices.gpus(torch.device("mps"), 2)


def test_the_free_memory_of_this_machine_is_some_and_not_more_than_there_is() -> None:
    here = free_memory(CPU)
    assert 0 < here.free <= here.total


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The built-in model with 4 of its 6.5 MiB in memory, the rest read from disk in every forward pass."""
    folder = tmp_path_factory.mktemp("offload")
    return load("tiny", "cpu", "float32", LoadOptions(max_cpu_memory="4MiB", offload_dir=str(folder / "of" / "tiny")))


def test_layers_beyond_the_limit_lie_on_disk_and_the_model_still_answers(offloaded: Loaded) -> None:
    where = set(offloaded.model.hf_device_map.values())
    assert where == {"cpu", "disk"}
    assert offloaded.device == CPU
    in_memory = sum(p.numel() * p.element_size() for p in offloaded.model.parameters() if p.device.type != "meta")
    assert 0 < in_memory <= 4 * 2**20
    assert answers(offloaded) == list(QUESTIONS.values())


def test_the_engine_serves_a_model_that_lies_partly_on_disk(offloaded: Loaded, drive: Drive) -> None:
    driver = drive(TransformersEngine("tiny", 4, offloaded))
    said = driver.run(*(job(f"j{number}", question) for number, question in enumerate(QUESTIONS)))
    assert [answer.text for answer in said] == list(QUESTIONS.values())


def test_what_fits_nowhere_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"does not fit.*--offload-dir"):
        load("tiny", "cpu", "float32", LoadOptions(max_cpu_memory="4MiB"))


def test_pickled_and_offloaded_paths_do_not_need_the_folder_before(tmp_path: Path) -> None:
    place(CPU, LoadOptions(offload_dir=str(tmp_path / "a" / "b")))
    assert (tmp_path / "a" / "b").is_dir()
