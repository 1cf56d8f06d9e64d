"""Images of the vLLM engine, with a real vLLM: `make test-vllm`."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastchat_q.workers.engines.base import Request

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Piece
from fastchat_q.jobs import Job, Message, Part

from .engines.driving import Answer, Driver
from .vllm_driving import EAGER, OPTIONS, SLOW, asks, llama, needs_vllm, running

pytestmark = [*SLOW, needs_vllm]

TINY = Path(__file__).parent.parent / "workers/engines/tiny/model"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small Idefics 3 with its processor, as transformers has it."""
    from transformers import AutoTokenizer

    from .engines import vision_models

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vision_models.COMMON, "head_dim", 32)  # vLLM has no kernel for CPUs with smaller heads
        return vision_models.seeing("idefics3", AutoTokenizer.from_pretrained(TINY))


@pytest.fixture(scope="module")
def driver(seeing: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    folder = tmp_path_factory.mktemp("eyes")
    seeing.model.float().save_pretrained(folder)
    seeing.processor.save_pretrained(folder)
    with running(
        replace(OPTIONS, model=str(folder), load=replace(OPTIONS.load, max_model_len=256), engine_arg=EAGER)
    ) as d:
        yield d


def looks(job_id: str, *numbers: int, **fields: Any) -> tuple[Job, Mapping[str, bytes]]:
    """A job about these images, and their bytes."""
    from .engines.vision_models import picture

    blobs = {hashlib.sha256(content).hexdigest(): content for content in map(picture, numbers)}
    parts = (*[Part(type="image", blob=blob) for blob in blobs], Part(type="text", text="What is this?"))
    messages = (Message(role="user", content=parts),)
    return asks(job_id, job_fields={"messages": messages}, **{"max_tokens": 12, **fields}), blobs


def look(driver: Driver, asked: tuple[Job, Mapping[str, bytes]], *prior: Piece) -> Answer:
    job, blobs = asked
    driver.take(Request(job, job.id, prior, blobs))
    [answer] = driver.wait(job.id)
    return answer


def generated(seeing: Any, asked: tuple[Job, Mapping[str, bytes]]) -> tuple[int, ...]:
    """What ``generate`` makes, greedily."""
    import torch
    from fastchat_q.workers.engines.processing.vision import decode

    job, blobs = asked
    parts = [{"type": "image", "image": decode(content)} for content in blobs.values()]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": job.messages[0].text}]}]
    inputs = seeing.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        made = seeing.model.float().generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return tuple(made[0, inputs["input_ids"].shape[1] :].tolist())


def test_an_answer_about_images_is_that_of_generate(driver: Driver, seeing: Any) -> None:
    assert "vision" in driver.engine.card.features
    seen = [looks("one", 0), looks("other", 1), looks("both", 0, 1)]
    answers = [look(driver, asked) for asked in seen]
    assert [answer.ids for answer in answers] == [generated(seeing, asked) for asked in seen]
    assert len({answer.ids for answer in answers}) == 3


def test_an_answer_about_an_image_is_resumed(driver: Driver) -> None:
    whole = look(driver, looks("whole", 2))
    rest = look(driver, looks("rest", 2), *whole.pieces[:5])
    assert rest.ids == whole.ids[5:]
    assert rest.usage == whole.usage


def test_an_image_that_cannot_be_decoded_fails_alone(driver: Driver) -> None:
    job, blobs = looks("broken", 3)
    answer = look(driver, (job, dict.fromkeys(blobs, b"no image")))
    assert answer.ended is not None
    assert isinstance(answer.ended.error, InvalidRequestError)
    assert len(look(driver, looks("after", 3)).ids) == 12


def test_a_model_that_takes_no_images_says_so(tmp_path: Path) -> None:
    with running(replace(OPTIONS, model=str(llama(tmp_path / "blind")), engine_arg=EAGER)) as driver:
        answer = look(driver, looks("blind", 0))
    assert answer.ended is not None
    assert isinstance(answer.ended.error, InvalidRequestError)
    assert "takes no images" in str(answer.ended.error)
