"""Images over HTTP: from the official client's data URL to a model's answer, with the bytes beside the queue."""

import base64
import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastchat_q import keys

from .engines.vision_models import picture, seeing
from .http_client import post
from .stack import Stack, running_stack, wait_until
from .streams import open_stream, stream_text

MODEL = "eyes"
TINY = Path(__file__).parent.parent / "workers/engines/tiny/model"


def url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def asking(*pictures: bytes, text: str = "What is this?", **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url(content)}} for content in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, **fields}


def blob(content: bytes) -> str:
    return keys.model_keys(MODEL).blob(hashlib.sha256(content).hexdigest())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA as a folder with its processor, as it would come from a hub."""
    folder = tmp_path_factory.mktemp("eyes")
    model, processor = seeing("llava", AutoTokenizer.from_pretrained(TINY))
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eyes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose worker serves it."""
    with running_stack(tmp_path_factory.mktemp("stack")) as stack:
        serve(stack, checkpoint)
        yield stack


def serve(stack: Stack, checkpoint: Path) -> Any:
    return stack.start_worker("--model", str(checkpoint), "--name", MODEL, "--threads", "1", "--device", "cpu")


def test_the_official_client_gets_an_answer_about_its_images(eyes: Stack) -> None:
    client = eyes.client()
    [card] = [one for one in client.models.list() if one.id == MODEL]
    assert "vision" in (card.model_extra or {})["features"]
    answers = [client.chat.completions.create(**asking(picture(number))) for number in (0, 1, 0)]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[2] != texts[1], "the answer is about the image"
    two = client.chat.completions.create(**asking(picture(0), picture(1)))
    assert two.usage is not None
    assert answers[0].usage is not None
    assert two.usage.prompt_tokens == answers[0].usage.prompt_tokens + 16, "an image has 16 tokens"
    plain = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    assert plain.choices[0].message.content is not None


def test_redis_holds_an_image_once_beside_the_jobs_and_not_for_ever(eyes: Stack) -> None:
    content = picture(2)
    client = eyes.client()
    ids = [client.chat.completions.with_raw_response.create(**asking(content)).headers["x-job-id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert list(eyes.redis.scan_iter(keys.model_keys(MODEL).blob("*"))).count(blob(content)) == 1
    assert eyes.redis.strlen(blob(content)) == len(content)
    assert 3500 < eyes.redis.ttl(blob(content)) <= 3660, "its job's deadline and a minute"
    encoded = base64.b64encode(content).decode()[:40]
    for name in eyes.job_keys(MODEL):
        if eyes.redis.type(name) == "hash":
            assert encoded not in json.dumps(eyes.redis.hgetall(name))
    eyes.redis.expire(blob(content), 100)
    client.chat.completions.create(**asking(content))
    assert eyes.redis.ttl(blob(content)) > 3500, "the next job keeps it"


def test_the_job_record_names_the_digest_and_a_lost_image_is_an_honest_error(eyes: Stack) -> None:
    content = picture(3)
    eyes.redis.set(keys.model_keys(MODEL).mode, "paused")
    try:
        connection, public_id = open_stream(eyes.port, {**asking(content), "stream": True})
        record = eyes.redis.hgetall(keys.model_keys(MODEL).job(public_id.rpartition(".")[2]))
        assert hashlib.sha256(content).hexdigest() in record["spec"]
        assert len(record["spec"]) < 1000
        assert eyes.redis.delete(blob(content)) == 1
    finally:
        eyes.redis.delete(keys.model_keys(MODEL).mode)
    said = "".join(connection.events())
    connection.hang_up()
    assert "part_lost" in said
    assert eyes.client().chat.completions.create(**asking(content)).choices, "the worker lives"


def test_a_waiting_job_and_its_image_are_stored_again_after_redis_lost_them(eyes: Stack) -> None:
    content = picture(4)
    [expected] = eyes.client().chat.completions.create(**asking(content)).choices
    eyes.redis.set(keys.model_keys(MODEL).mode, "paused")
    connection, _ = open_stream(eyes.port, {**asking(content), "stream": True})
    wait_until(lambda: eyes.live(MODEL) == 1, "it waits")
    eyes.redis.flushall()  # the pause as well
    assert "".join(stream_text(connection)) == expected.message.content
    assert eyes.redis.strlen(blob(content)) == len(content)
    # Until its next heartbeat the worker is nowhere in Redis: only what the API remembers of it would answer.
    wait_until(lambda: eyes.registered(eyes.processes[-1].pid), "the worker registers again")
    wait_until(lambda: post(eyes.port, asking(content)).status == 200, "the model is there again")


def test_images_that_cannot_be_taken_are_400_and_say_which(eyes: Stack) -> None:
    cases = [
        (asking(*[picture(0)] * 17), "too_many_images", "messages[0].content[16].image_url.url"),
        (asking(b"%PDF-1.7"), "invalid_image", "messages[0].content[0].image_url.url"),
        (asking(picture(0), picture(1)[:70]), "invalid_image", "messages"),
    ]
    for body, code, param in cases:
        reply = post(eyes.port, body)
        assert (reply.status, reply.error()["code"], reply.error()["param"]) == (400, code, param)
    remote = asking()
    remote["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})
    assert post(eyes.port, remote).error()["code"] == "remote_url"


def test_a_large_body_is_for_images_alone(eyes: Stack) -> None:
    large = picture(0) + bytes(3 * 1024 * 1024)  # decoders stop at the end of the image
    assert post(eyes.port, asking(large)).status == 200
    for body in (asking(text="x" * 2_000_000), asking(text="data:image/png;base64," + "A" * 2_000_000)):
        reply = post(eyes.port, body)
        assert (reply.status, reply.error()["code"]) == (413, "request_too_large")
    reply = post(eyes.port, asking(picture(0) + bytes(21 * 1024 * 1024)))
    assert (reply.status, reply.error()["code"]) == (400, "image_too_large")


def test_an_image_that_redis_has_no_memory_for_is_503(eyes: Stack) -> None:
    before = eyes.redis.config_get("maxmemory")["maxmemory"]
    eyes.redis.config_set("maxmemory", str(eyes.redis.info("memory")["used_memory"]))
    try:
        reply = post(eyes.port, asking(picture(1) + bytes(500_000)))
        assert (reply.status, reply.error()["code"]) == (503, "queue_unavailable")
        assert "memory is full" in reply.error()["message"]
    finally:
        eyes.redis.config_set("maxmemory", before)


def test_an_answer_about_an_image_goes_on_behind_a_kill(checkpoint: Path, stack: Stack) -> None:
    worker = serve(stack, checkpoint)
    body = asking(picture(0), max_tokens=300, ignore_eos=True)
    fields = {**body, "extra_body": {"ignore_eos": True}}
    del fields["ignore_eos"]
    expected = stack.client().chat.completions.create(**fields).choices[0].message.content
    with stack.client().chat.completions.create(**fields, stream=True) as stream:
        chunks = iter(stream)
        said = [next(chunks).choices[0].delta.content or "" for _ in range(3)]
        worker.signal(signal.SIGKILL)
        serve(stack, checkpoint)
        said += [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == expected


def test_a_forwarded_image_is_seen_upstream(checkpoint: Path, eyes: Stack, stack: Stack) -> None:
    flags = ("--engine", "openai", "--base-url", f"{eyes.base}/v1", "--api-key-env", "UPSTREAM_KEY")
    stack.start_worker("--model", MODEL, "--name", "far", *flags, UPSTREAM_KEY=eyes.client().api_key)
    for number in (0, 1):
        body = asking(picture(number))
        direct = eyes.client().chat.completions.create(**body)
        far = stack.client().chat.completions.create(**{**body, "model": "far"})
        assert far.choices[0].message.content == direct.choices[0].message.content
        assert far.usage == direct.usage
