"""Long prompts are rendered beside the steps: streams go on meanwhile, and what becomes of them is as of short ones."""

import threading
from typing import Any

import pytest
from fastchat_q.workers.engines.base import Request
from fastchat_q.workers.engines.batching import intake
from fastchat_q.workers.engines.batching.engine import TransformersEngine
from fastchat_q.workers.engines.batching.generate import GenerateEngine
from fastchat_q.workers.engines.loading.model import Loaded
from fastchat_q.workers.engines.processing.rendering import Renderer

from fastchat_q.errors import ContextLengthError, InvalidRequestError
from fastchat_q.jobs import Job, Message

from .conftest import Drive
from .driving import job
from .scenes import TALK, question

LONG = (TALK * 20_000)[: 2**20 - 2**10]
"""About what the largest body may hold."""


class Gate:
    """Holds up the rendering of long prompts until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        render = Renderer.prompt

        def prompt(renderer: Renderer, one: Job) -> list[int]:
            if sum(len(message.text) for message in one.messages) > intake.LONG_PROMPT:
                assert self.opened.wait(60)
            return render(renderer, one)

        monkeypatch.setattr(Renderer, "prompt", prompt)


def test_a_stream_goes_on_while_a_mebibyte_is_rendered(drive: Drive, tiny: Loaded) -> None:
    driver = drive(TransformersEngine("tiny", 4, tiny))
    driver.submit(job("stream", "tell me a story", max_tokens=900, ignore_eos=True))
    driver.wait_tokens("stream", 3)
    driver.order.clear()
    [refused] = driver.run(job("long", LONG))
    assert refused.ended is not None
    assert isinstance(refused.ended.error, ContextLengthError)
    assert driver.order.count("stream") >= 10, "steps between its coming and its refusal"


def test_neighbours_of_all_lengths_run_while_a_prompt_is_rendered(
    drive: Drive, tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    driver = drive(TransformersEngine("tiny", 4, tiny))
    driver.submit(job("long", LONG))
    [free] = driver.run(job("free", max_tokens=20, ignore_eos=True))
    assert len(free.ids) == 20
    assert not driver.answer("long").outputs
    gate.opened.set()
    driver.wait("long")


def test_a_request_can_be_dropped_while_its_prompt_is_rendered(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    engine = TransformersEngine("m", 2, tiny)
    for name in ("rendered", "waits"):
        engine.admit(Request(job(name, LONG), name))
    assert engine.wait_s()
    assert engine.step() == []
    for name in ("rendered", "waits"):
        engine.drop(name)
    assert engine.wait_s() is None
    gate.opened.set()


def test_a_long_prompt_that_the_template_refuses_fails_alone(
    drive: Drive, tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = "{{ raise_exception('roles must alternate') if messages | length > 1 }}<|im_start|>"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", picky)
    both = (Message(role="user", content=LONG), Message(role="user", content="y"))
    two = Job(id="a", model="m", messages=both)
    refused, served = drive(TransformersEngine("tiny", 4, tiny)).run(two, job("b", max_tokens=2))
    assert refused.ended is not None
    assert isinstance(refused.ended.error, InvalidRequestError)
    assert "roles must alternate" in refused.ended.error.message
    assert served.ended is not None
    assert served.ended.error is None


@pytest.mark.parametrize("kind", [TransformersEngine, GenerateEngine])
def test_what_is_rendered_aside_is_answered_and_resumed_as_what_is_not(
    kind: Any, drive: Drive, tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [job(f"j{number}", question(number), max_tokens=8, n=1 + number % 2, seed=3) for number in range(4)]
    driver = drive(kind("tiny", 4, tiny))
    expected = [answer.ids for answer in driver.run(*asked)]
    monkeypatch.setattr(intake, "LONG_PROMPT", 0)
    aside = [one.model_copy(update={"id": f"{one.id}-aside"}) for one in asked]
    assert [answer.ids for answer in driver.run(*aside)] == expected
    resumed = asked[0].model_copy(update={"id": "resumed"})
    driver.resume(resumed, expected[0][:3])
    [rest] = driver.wait("resumed")
    assert rest.ids == expected[0][3:]
