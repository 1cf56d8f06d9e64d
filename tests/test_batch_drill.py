"""A small batch drill; ``make batch-drill`` is the large one."""

import pytest

from .batch_drill import Drill
from .stack import Stack


@pytest.mark.timeout(300)
def test_a_batch_outlives_api_orchestrator_and_workers_that_are_killed_in_turn(stack: Stack) -> None:
    drill = Drill(stack, lines=1000, num_kills=6, slots=4)
    drill.run()
    assert dict(drill.killed) == {"orchestrator": 2, "worker": 2, "api": 2}
    assert len(set(drill.sizes)) > 3, "it was looked at while it ran"
