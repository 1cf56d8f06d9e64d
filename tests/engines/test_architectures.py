"""Every architecture says what `generate` says: alone, among others that join and leave, and when memory is short."""

import pytest
from fastchat_q.workers.engines.batching import kv, prefixes
from fastchat_q.workers.engines.batching.dense import Dense
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.batching.packed import Packed
from fastchat_q.workers.engines.batching.passes import RowByRow, Way
from fastchat_q.workers.engines.batching.scheduler import Pace
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conftest import Drive
from .driving import Driver, job
from .random_models import CONFIGS, WINDOW, loaded, random_model
from .scenes import generated, prompt_ids, question, watch

WAYS: dict[str, type[Way]] = {
    **dict.fromkeys(CONFIGS, Packed),
    **dict.fromkeys(("bloom", "falcon", "falcon with alibi", "deepseek_v3"), Dense),
    **dict.fromkeys(("qwen3_next", "jamba", "mamba", "mamba2"), Dense),
    "llama4": RowByRow,
}
ROWS = 8


def length(number: int) -> int:
    """Tokens to generate, in no order: 6 to 35."""
    return 6 + number * 11 % 30


class Scene:
    """A random model, and what `generate` says to each of the questions."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = name
        self.model: PreTrainedModel = random_model(name)
        self.tokenizer = tokenizer
        self.prompts = [prompt_ids(tokenizer, question(i)) for i in range(ROWS)]
        self.expected = [generated(self.model, self.prompts[i], length(i)) for i in range(ROWS)]
        assert len({token for ids in self.expected for token in ids}) > 10, "one that repeats itself proves little"
        assert max(map(len, self.prompts)) > 2 * WINDOW

    def engine(self, kv_bytes: int = 2**26) -> TransformersEngine:
        return TransformersEngine("m", 4, loaded(self.model, self.tokenizer), kv_bytes)

    def columns(self, count: int) -> int:
        """Bytes for so many tokens of two rows."""
        room = self.engine().way.room
        return count * room.per_column + 2 * room.per_row


@pytest.fixture(scope="module", params=CONFIGS)
def scene(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Scene:
    return Scene(request.param, tokenizer)


def join_and_leave(driver: Driver) -> list[tuple[int, ...]]:
    """Eight requests that come in four at a time, while others run and end; returns their tokens."""
    jobs = [job(f"j{i}", question(i), max_tokens=length(i)) for i in range(ROWS)]
    driver.submit(*jobs[:3])
    driver.wait_tokens("j2", 5)
    driver.submit(*jobs[3:5])
    driver.wait("j0", "j1")
    driver.submit(*jobs[5:])
    answers = driver.wait(*(one.id for one in jobs))
    assert {answer.finish_reason for answer in answers} == {"length"}
    return [answer.ids for answer in answers]


def test_greedy_answers_equal_generate_alone_and_while_others_join_and_leave(
    drive: Drive, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = scene.engine()
    assert type(engine.way) is WAYS[scene.name]
    driver = drive(engine)
    [alone] = driver.run(job("alone", question(2), max_tokens=length(2)))
    assert alone.ids == scene.expected[2]
    forwards = watch(scene.model, monkeypatch)
    assert join_and_leave(driver) == scene.expected
    assert forwards.tokens.count(1) < 20 or type(engine.way) is RowByRow, "rows decode together"


def test_prompts_in_pieces_and_reused_prefixes_change_nothing(
    drive: Drive, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "tokens", lambda self, decoding: 7)
    monkeypatch.setattr(prefixes, "BLOCK", 8)
    engine = scene.engine()
    driver = drive(engine)
    forwards = watch(scene.model, monkeypatch)
    assert join_and_leave(driver) == scene.expected
    if engine.way.splits_prompts:
        assert max(forwards.tokens) <= 7 + ROWS
    forwards.calls.clear()
    [again] = driver.run(job("again", question(2), max_tokens=length(2)))
    assert again.ids == scene.expected[2]
    if engine.way.shares_prefixes:
        assert sum(forwards.tokens) <= 8 + length(2), "all of the prompt but its last block was known"


def test_rows_that_give_their_memory_up_go_on_as_if_nothing_had_been(
    drive: Drive, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv, "SMALLEST", 16)
    longest = max(len(prompt) + length(i) for i, prompt in enumerate(scene.prompts))
    engine = scene.engine(scene.columns(longest * 2))
    assert join_and_leave(drive(engine)) == scene.expected
    if engine.way.room.per_column:
        assert engine.scheduler.preempted > 0
