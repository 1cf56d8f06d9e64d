"""The worker's arithmetic: slots and lanes, silence, and what an error within a step means."""

import errno
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastchat_q.workers.engines.base import OUT_OF_MEMORY
from fastchat_q.workers.engines.echo import EchoEngine
from fastchat_q.workers.engines.trouble import job_error
from fastchat_q.workers.slots import GROW_S, LO_FIRST_EVERY, Slots
from fastchat_q.workers.watch import EngineHungError, Watch

from fastchat_q.errors import RetryableError


def test_interactive_jobs_are_served_first_and_a_quarter_of_the_slots_is_theirs() -> None:
    assert Slots(16, 0.25).offer([]) == [("hi", 16), ("lo", 12)]
    assert Slots(16, 0.25).offer(["lo"] * 10 + ["hi"] * 2) == [("hi", 4), ("lo", 2)]
    assert Slots(16, 0.25).offer(["lo"] * 12) == [("hi", 4)]
    assert Slots(16, 0.25).offer(["hi"] * 16) == []


def test_a_single_slot_serves_both_lanes() -> None:
    assert Slots(1, 0.25).offer([]) == [("hi", 1), ("lo", 1)]


def test_batch_jobs_come_first_now_and_then() -> None:
    slots = Slots(4, 0.25)
    first = [slots.offer([])[0][0] for _ in range(2 * LO_FIRST_EVERY)]
    assert first == (["hi"] * (LO_FIRST_EVERY - 1) + ["lo"]) * 2


def test_a_turn_of_the_batch_lane_is_not_spent_while_it_may_take_nothing() -> None:
    slots = Slots(4, 0.25)
    for _ in range(LO_FIRST_EVERY - 1):
        slots.offer([])
    slots.offer(["lo"] * 3)
    assert slots.offer([])[0] == ("lo", 3)


def test_an_eighth_of_the_slots_is_headroom_but_one_of_four_and_none_of_fewer() -> None:
    assert [Slots(most, 0.25, 0.125).headroom for most in (1, 3, 4, 8, 15, 16, 64)] == [0, 0, 1, 1, 1, 2, 8]
    assert Slots(64, 0.25, 0.0).headroom == 0


def test_slots_shrink_when_memory_is_out_and_come_back_one_by_one() -> None:
    slots = Slots(16, 0.25)
    slots.shrink(running=10, failed=1, now=0)
    assert slots.now == 9
    slots.shrink(running=9, failed=9, now=0)
    assert slots.now == 5
    slots.grow(GROW_S - 1)
    assert slots.now == 5
    slots.grow(GROW_S)
    slots.grow(GROW_S + 1)
    assert slots.now == 6
    slots.shrink(running=1, failed=1, now=0)
    assert slots.now == 1


def test_out_of_memory_is_the_workers_trouble_and_not_the_jobs() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    errors = [real.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
    errors += [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("unable to mmap: Cannot allocate memory (12)"),
    ]
    for error in [*errors, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")]:
        found = job_error(error)
        assert isinstance(found, RetryableError)
        assert found.code == OUT_OF_MEMORY


def test_a_device_that_still_works_gets_the_job_again_and_other_errors_are_the_jobs_own() -> None:
    assert isinstance(job_error(RuntimeError("CUDA error: invalid configuration argument")), RetryableError)
    own = job_error(ValueError("nonsense"))
    assert not isinstance(own, RetryableError)
    assert own.code == "engine_error"


def test_a_silent_job_has_longer_than_an_engine_that_makes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("fastchat_q.workers.watch.time.monotonic", lambda: now[0])
    engine = EchoEngine("echo", 1, 0)
    watch = Watch(engine, stall_s=600, hung_s=60)
    silent: Any = SimpleNamespace(ticket="J1 1", emitted=False, given_at=0.0, given_at_step=0)

    def pass_s(seconds: int, resting: bool) -> None:
        engine.resting = resting  # an engine that waits for another server makes steps that bring nothing
        engine.steps += seconds if resting else 0
        for _ in range(seconds):
            now[0] += 1
            watch.tick()

    pass_s(599, resting=True)
    assert not watch.stalled(silent)
    watch.check_engine()
    pass_s(2, resting=True)
    assert watch.stalled(silent)
    pass_s(61, resting=False)
    with pytest.raises(EngineHungError, match="60 s"):
        watch.check_engine()
