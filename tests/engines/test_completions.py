"""Raw prompts through the engines: several in a job, told back with what the model thinks of them, and tokenized."""

from dataclasses import replace
from typing import Any

import orjson
import pytest
import torch
from fastchat_q.workers.engines.base import Engine
from fastchat_q.workers.engines.batching import engine as step_loop
from fastchat_q.workers.engines.batching.engine import TransformersEngine, build
from fastchat_q.workers.engines.batching.generate import GenerateEngine
from fastchat_q.workers.engines.batching.scheduler import Pace
from fastchat_q.workers.engines.loading.model import Loaded
from transformers import PreTrainedTokenizerBase

from fastchat_q.abilities import check_can_do
from fastchat_q.errors import ContextLengthError, FastchatQError, InvalidRequestError
from fastchat_q.events import Piece, Usage
from fastchat_q.jobs import Job, Message, Sampling

from .conftest import Drive
from .driving import Answer, Driver, job
from .random_models import loaded, random_model, random_t5
from .scenes import TALK, generated, prompt_ids, question

Prompt = str | tuple[int, ...]


def completion(job_id: str, *prompts: Prompt, echo: bool = False, **sampling: Any) -> Job:
    """A greedy completion of prompts."""
    how = Sampling(**{"temperature": 0.0, "max_tokens": 10, "ignore_eos": True, **sampling})
    return Job(id=job_id, model="m", kind="completion", inputs=prompts, sampling=how, echo=echo)


def of_choice(answer: Answer, index: int) -> tuple[int, ...]:
    return tuple(token for piece in answer.pieces if piece.choice == index for token in piece.ids)


def echoed(answer: Answer, index: int = 0) -> Piece:
    [found] = [piece for piece in answer.pieces if piece.echo and piece.choice == index]
    return found


def reference(model: Any, ids: list[int]) -> torch.Tensor:
    """Log probabilities (tokens - 1) of all tokens of a prompt but the first, by a plain forward pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def raw_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    assert isinstance(ids, list)
    return ids


def error_of(answer: Answer) -> FastchatQError:
    assert answer.ended is not None
    assert answer.ended.error is not None
    return answer.ended.error


@pytest.fixture(scope="module", params=["llama", "falcon", "jamba", "llama4"])
def either(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """One model for each way that rows can decode: packed, in a padded batch, with states, one by one."""
    return loaded(random_model(request.param), tokenizer)


@pytest.fixture
def running(drive: Drive, either: Loaded) -> Driver:
    return drive(TransformersEngine("m", 8, either))


def test_a_raw_prompt_is_completed_as_generate_does_beside_chats(running: Driver, either: Loaded) -> None:
    tokenizer = either.tokenizer
    texts = [question(i) for i in range(5)]
    running.submit(*(job(f"chat{i}", question(i), max_tokens=15, ignore_eos=True) for i in range(3)))
    [whole] = running.run(completion("j", *texts))
    chats = running.wait("chat0", "chat1", "chat2")  # the model is the engine's as long as something runs
    total = 0
    for index, text in enumerate(texts):
        ids = raw_ids(tokenizer, text)
        total += len(ids)
        assert of_choice(whole, index) == generated(either.model, ids, 10)
    assert whole.usage == Usage(total, 50)
    finishes = [(piece.choice, piece.finish) for piece in whole.pieces if piece.finish]
    assert sorted(finishes) == [(index, "length") for index in range(5)]
    for i, chat in enumerate(chats):
        assert chat.ids == generated(either.model, prompt_ids(tokenizer, question(i)), 15)
    [of_ids] = running.run(completion("ids", tuple(raw_ids(tokenizer, texts[2]))))
    assert of_ids.ids == of_choice(whole, 2)


def test_a_prompt_is_told_back_with_the_log_probabilities_of_a_plain_forward_pass(
    running: Driver, either: Loaded
) -> None:
    texts = [question(i) for i in (4, 9, 2)]
    [answer] = running.run(completion("j", *texts, echo=True, logprobs=3, n=2, temperature=0.7, seed=3))
    for index, text in enumerate(texts):
        ids = raw_ids(either.tokenizer, text)
        expected = reference(either.model, ids)
        for choice in (2 * index, 2 * index + 1):
            found = echoed(answer, choice)
            assert found.text == text
            assert [one.id for one in found.logprobs] == ids
            got = torch.tensor([one.logprob for one in found.logprobs[1:]])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            assert all(len(one.top) == 3 for one in found.logprobs[1:])
            assert all(one.top[0].logprob >= one.logprob - 1e-6 for one in found.logprobs[1:])
            assert len(of_choice(answer, choice)) == 10
    assert of_choice(answer, 0) != of_choice(answer, 1), "each choice draws its own"


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_log_likelihoods_are_had_without_an_answer(running: Driver, either: Loaded, max_tokens: int) -> None:
    prompts = [tuple(raw_ids(either.tokenizer, question(i))) for i in (3, 8)]
    [answer] = running.run(completion("j", *prompts, echo=True, logprobs=1, max_tokens=max_tokens))
    for index, ids in enumerate(prompts):
        found = echoed(answer, index)
        assert found.text == either.tokenizer.decode(list(ids))
        got = torch.tensor([one.logprob for one in found.logprobs[1:]])
        torch.testing.assert_close(got, reference(either.model, list(ids)), atol=1e-4, rtol=1e-4)
        assert len(of_choice(answer, index)) == max_tokens
    assert answer.usage == Usage(sum(map(len, prompts)), 2 * max_tokens)
    assert answer.finish_reason == "length"
    [alone] = running.run(completion("one", prompts[0], echo=True, logprobs=1, max_tokens=0))
    assert (alone.finish_reason, alone.ids) == ("length", ())
    assert alone.usage == Usage(len(prompts[0]), 0)


def test_a_prompt_in_chunks_beside_streams_has_the_same_log_probabilities(
    drive: Drive, tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "tokens", lambda self, decoding: 40)
    monkeypatch.setattr(step_loop, "NUMBERS", 24 * tiny.model.config.vocab_size)  # of 40 tokens 24 may be scored
    driver = drive(TransformersEngine("m", 4, tiny))
    driver.submit(job("stream", "tell me a story", max_tokens=400, ignore_eos=True))
    driver.wait_tokens("stream", 3)
    long, other = TALK * 4, TALK * 3
    first, second = driver.run(
        completion("a", long, other, echo=True, logprobs=2, max_tokens=3), completion("b", long, max_tokens=3)
    )
    assert driver.answer("stream").ended is None, "it went on beside"
    driver.engine.cancel("stream")
    [again] = driver.run(completion("c", long, echo=True, logprobs=2, max_tokens=3))
    for index, text in enumerate((long, other)):
        ids = raw_ids(tiny.tokenizer, text)
        assert len(ids) > 80, "in several chunks"
        got = torch.tensor([one.logprob for one in echoed(first, index).logprobs[1:]])
        torch.testing.assert_close(got, reference(tiny.model, ids), atol=1e-4, rtol=1e-4)
    assert of_choice(first, 0) == second.ids == generated(tiny.model, raw_ids(tiny.tokenizer, long), 3)
    assert [one.id for one in echoed(again).logprobs] == [one.id for one in echoed(first).logprobs], (
        "no prefix that is computed already stands in for them"
    )


def test_a_prompts_answer_does_not_hang_on_the_others(running: Driver) -> None:
    asked = {"temperature": 1.0, "seed": 5, "max_tokens": 12, "n": 2}
    [together] = running.run(completion("both", question(3), question(7), **asked))
    [alone] = running.run(completion("alone", question(7), **asked))
    assert of_choice(together, 2) == of_choice(alone, 0)
    assert of_choice(together, 3) == of_choice(alone, 1)


@pytest.mark.parametrize("echo", [True, False])
def test_a_completion_goes_on_where_it_was(running: Driver, echo: bool) -> None:
    asked: dict[str, Any] = {"echo": echo, "temperature": 1.0, "seed": 4, "max_tokens": 12, "logprobs": 1, "n": 2}
    [whole] = running.run(completion("j", question(3), question(6), **asked))
    for cut in (1, 9, len(whole.pieces) - 1, len(whole.pieces)):
        prior = whole.pieces[:cut]
        running.resume_behind(completion(f"j{cut}", question(3), question(6), **asked), prior)
        [rest] = running.wait(f"j{cut}")
        for index in range(4):
            had = tuple(token for piece in prior if piece.choice == index for token in piece.ids)
            assert had + of_choice(rest, index) == of_choice(whole, index)
            told = [piece for piece in (*prior, *rest.pieces) if piece.echo and piece.choice == index]
            assert len(told) == echo
        assert rest.usage == whole.usage


def test_what_told_its_prompt_and_had_no_more_to_say_just_ends(running: Driver) -> None:
    asked = completion("j", question(3), question(6), echo=True, logprobs=0, max_tokens=0)
    [whole] = running.run(asked)
    for cut in (1, 2):
        running.resume_behind(asked.model_copy(update={"id": f"j{cut}"}), whole.pieces[:cut])
        [rest] = running.wait(f"j{cut}")
        assert len(rest.pieces) == 2 - cut
        assert rest.usage == whole.usage


def test_a_first_word_keeps_its_space(drive: Drive, tiny: Loaded) -> None:
    """What a token decodes to hangs on the one before it where a tokenizer marks words by leading spaces."""

    class Marked:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

        def decode(self, ids: Any, **kwargs: Any) -> str:
            text: str = self.inner.decode(ids, **kwargs)
            return text.removeprefix(" ")  # as SentencePiece decodes

    text = "The capital of France is"
    plain = completion("a", text, max_tokens=8)
    [whole] = drive(TransformersEngine("m", 4, tiny)).run(plain)
    marked: Any = Marked(tiny.tokenizer)
    [other] = drive(TransformersEngine("m", 4, replace(tiny, tokenizer=marked))).run(plain)
    assert whole.text.startswith(" "), "else this says nothing"
    assert other.text == whole.text


def test_what_cannot_be_completed_says_why(drive: Drive, tiny: Loaded) -> None:
    driver = drive(TransformersEngine("m", 4, tiny))
    beyond, long = driver.run(completion("a", (5, 10**6)), completion("b", TALK * 400))
    assert (error_of(beyond).param, isinstance(error_of(beyond), InvalidRequestError)) == ("prompt", True)
    assert isinstance(error_of(long), ContextLengthError)
    assert error_of(long).param == "prompt"
    [bare] = driver.run(completion("c", ""))
    assert error_of(bare).param == "prompt" or bare.ids, "whether a text has a start token is the tokenizer's to say"


def test_an_encoder_decoder_completes_prompts_and_tells_them_back_without_scores(
    drive: Drive, tokenizer: PreTrainedTokenizerBase
) -> None:
    t5 = loaded(random_t5(), tokenizer)
    driver = drive(build("m", 4, t5))
    assert isinstance(driver.engine, GenerateEngine)
    [answer] = driver.run(completion("j", question(1), question(3), echo=True, max_tokens=6))
    for index, text in enumerate((question(1), question(3))):
        assert of_choice(answer, index) == generated(t5.model, raw_ids(tokenizer, text), 6)
        assert echoed(answer, index).text == text
    [nothing] = driver.run(completion("k", question(1), echo=True, max_tokens=0))
    assert (nothing.text, nothing.finish_reason) == (question(1), "length")
    with pytest.raises(InvalidRequestError, match="echo"):
        check_can_do(driver.engine.card, completion("l", "a", echo=True, logprobs=1))


# ---- tokens


def tokenize(job_id: str, text: str = "", **fields: Any) -> Job:
    given = {"inputs": (text,)} if text else {}
    return Job(id=job_id, model="m", kind="tokenize", **given, **fields)


def told(answer: Answer) -> tuple[tuple[int, ...], dict[str, Any]]:
    [piece] = answer.pieces
    found: dict[str, Any] = orjson.loads(piece.text)
    return piece.ids, found


@pytest.fixture(params=["steps", "generate"])
def any_engine(request: pytest.FixtureRequest, drive: Drive, tiny: Loaded) -> Driver:
    engine: Engine = TransformersEngine("m", 4, tiny) if request.param == "steps" else GenerateEngine("m", 4, tiny)
    return drive(engine)


def test_tokens_are_told_while_the_engine_is_busy(any_engine: Driver, tiny: Loaded) -> None:
    any_engine.submit(job("busy", max_tokens=100_000 if tiny.context_length is None else 900, ignore_eos=True))
    any_engine.wait_tokens("busy", 2)
    text = "Hello, wörld! 🦊"
    ids = tuple(raw_ids(tiny.tokenizer, text))
    [plain, strings, count] = any_engine.run(
        tokenize("a", text), tokenize("b", text, tells="strings"), tokenize("c", text, tells="count")
    )
    assert told(plain) == (ids, {"count": len(ids), "max_model_len": tiny.context_length})
    assert told(strings)[1]["token_strs"] == tiny.tokenizer.convert_ids_to_tokens(list(ids))
    assert told(count) == ((), {"count": len(ids), "max_model_len": tiny.context_length})
    [back] = any_engine.run(Job(id="d", model="m", kind="detokenize", inputs=(ids,)))
    assert back.text == tiny.tokenizer.decode(list(ids))
    assert any_engine.answer("busy").ended is None, "it was busy all the time"
    assert plain.usage is None


def test_messages_are_counted_as_the_prompt_that_a_chat_has(any_engine: Driver, tiny: Loaded) -> None:
    messages = (Message(role="system", content="Be brief."), Message(role="user", content=TALK))
    chat = Job(id="chat", model="m", messages=messages, sampling=Sampling(max_tokens=1, temperature=0))
    counted, answered, bare = any_engine.run(
        tokenize("a", messages=messages), chat, tokenize("b", messages=messages, generation_prompt=False)
    )
    assert answered.usage is not None
    assert told(counted)[1]["count"] == answered.usage.prompt_tokens
    assert told(bare)[1]["count"] < answered.usage.prompt_tokens
    assert told(counted)[0][: len(told(bare)[0])] == told(bare)[0]


def test_tokens_that_were_told_are_not_told_twice(any_engine: Driver) -> None:
    [whole] = any_engine.run(tokenize("a", "one two"))
    any_engine.resume_behind(tokenize("b", "one two"), whole.pieces)
    [rest] = any_engine.wait("b")
    assert rest.pieces == []
    assert rest.finish_reason == "stop"
