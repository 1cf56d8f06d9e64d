"""Fixtures of the engine tests: one torch thread, the built-in model loaded once, engines that are always stopped."""

from collections.abc import Callable, Iterator

import pytest
import torch
from fastchat_q.workers.engines.base import Engine
from fastchat_q.workers.engines.loading import model as loading
from transformers import PreTrainedTokenizerBase

from .driving import Driver

Drive = Callable[[Engine], Driver]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """More threads than free cores make torch's small operations slower, not faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> loading.Loaded:
    """The built-in model on the CPU."""
    return loading.load("tiny", device="cpu")


@pytest.fixture(scope="session")
def tokenizer(tiny: loading.Loaded) -> PreTrainedTokenizerBase:
    """The built-in model's byte-level tokenizer."""
    return tiny.tokenizer


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Starts engines, and stops them when the test is over."""
    drivers: list[Driver] = []

    def start(engine: Engine) -> Driver:
        drivers.append(Driver(engine))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.engine.stop()
        assert driver.engine.failure is None, "the engine's loop died"
