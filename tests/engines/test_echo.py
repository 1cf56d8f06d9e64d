"""The echo engine says the last user message again, word by word, and keeps the contract of every engine."""

import random

import pytest
from fastchat_q.workers.engines.base import Request
from fastchat_q.workers.engines.echo import EchoEngine

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Piece, Usage
from fastchat_q.jobs import Job, Message

from .conftest import Drive
from .driving import job


def echo(token_delay_s: float = 0.0) -> EchoEngine:
    return EchoEngine("echo", 64, token_delay_s)


def test_words_come_in_order_one_a_token(drive: Drive) -> None:
    [answer] = drive(echo()).run(job("a", "one two three"))
    assert answer.pieces == [Piece((0,), "one"), Piece((1,), " two"), Piece((2,), " three")]
    assert answer.finish_reason == "stop"
    assert answer.usage == Usage(3, 3)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "  leading",
        "trailing \n\n",
        " \n\t ",
        "a\n\nb\tc  d\n",
        "日本 語 😀 👩‍👩‍👧‍👦",
        "\u00a0non-breaking\u2003wide ",
        "x" * 5000,
    ],
)
def test_the_text_is_the_message_to_the_last_white_space(drive: Drive, text: str) -> None:
    [answer] = drive(echo()).run(job("a", text))
    assert answer.text == text


def test_random_white_space_survives(drive: Drive) -> None:
    choose = random.Random(0)
    texts = {f"r{i}": "".join(choose.choices("ab \n\t\r日", k=choose.randint(1, 40))) for i in range(100)}
    answers = drive(echo()).run(*(job(job_id, text) for job_id, text in texts.items()))
    assert [answer.text for answer in answers] == list(texts.values())


def test_it_repeats_the_last_user_message_of_a_conversation(drive: Drive) -> None:
    turns = [
        ("system", "be kind"),
        ("user", "first"),
        ("assistant", "first"),
        ("user", "the last one"),
        ("assistant", ""),
    ]
    messages = tuple(Message.model_validate({"role": role, "content": content}) for role, content in turns)
    [answer] = drive(echo()).run(Job(id="a", model="m", messages=messages))
    assert answer.text == "the last one"
    assert answer.usage == Usage(7, 3)


def test_a_message_without_words_is_refused_and_the_engine_goes_on(drive: Drive) -> None:
    [refused, served] = drive(echo()).run(job("a", ""), job("b", "hello"))
    assert refused.ended is not None
    assert isinstance(refused.ended.error, InvalidRequestError)
    assert refused.ended.error.param == "messages"
    assert served.text == "hello"


def test_max_tokens_ends_with_length(drive: Drive) -> None:
    [answer] = drive(echo()).run(job("a", "one two three", max_tokens=2))
    assert (answer.text, answer.finish_reason, answer.usage) == ("one two", "length", Usage(3, 2))


def test_ignoring_the_end_starts_over_until_max_tokens(drive: Drive) -> None:
    [answer] = drive(echo()).run(job("a", "one two", max_tokens=5, ignore_eos=True))
    assert answer.text == "one twoone twoone"
    assert answer.ids == (0, 1, 2, 3, 4)
    assert (answer.finish_reason, answer.usage) == ("length", Usage(2, 5))


def test_a_stop_string_over_several_words_is_never_shown(drive: Drive) -> None:
    [answer] = drive(echo()).run(job("a", "one two three four", stop=("o thr",)))
    assert (answer.text, answer.finish_reason) == ("one tw", "stop")
    assert len(answer.ids) == 3


def test_words_held_back_for_a_stop_string_come_out_at_the_end(drive: Drive) -> None:
    [answer] = drive(echo()).run(job("a", "one t", stop=("one two",)))
    assert answer.chunks == ["", "one t"]


def test_a_slow_engine_gives_each_row_its_first_word_at_once_and_then_keeps_turns(drive: Drive) -> None:
    driver = drive(echo(token_delay_s=0.05))
    driver.run(*(job(job_id, "one two three") for job_id in "abc"))
    assert driver.order == list("abcabcabc")


def test_a_request_that_comes_later_is_not_kept_waiting_by_earlier_ones(drive: Drive) -> None:
    driver = drive(echo(token_delay_s=0.05))
    driver.submit(job("a", "1 2 3 4 5 6 7 8"))
    driver.wait_tokens("a", 2)
    driver.submit(job("b", "1 2"))
    driver.wait("a", "b")
    assert driver.order.index("b") <= 4
    assert len(driver.order) - driver.order[::-1].index("b") < len(driver.order), "b ends first"


def test_64_rows_take_turns(drive: Drive) -> None:
    driver = drive(echo(token_delay_s=0.02))
    ids = [f"j{i}" for i in range(64)]
    text = " ".join(map(str, range(8)))
    answers = driver.run(*(job(job_id, text) for job_id in ids))
    assert [answer.text for answer in answers] == [text] * 64
    rounds = [driver.order[i : i + 64] for i in range(0, 512, 64)]
    assert all(sorted(one) == sorted(ids) for one in rounds)


@pytest.mark.parametrize(
    "one",
    [
        job("whole", "one two  three\n四 five "),
        job("stop", "one two three four five", stop=("three f",)),
        job("length", "one two three four", max_tokens=3),
        job("endless", "one two", max_tokens=5, ignore_eos=True),
        job("held", "one two three", stop=("three four",)),
    ],
    ids=lambda one: one.id,
)
def test_a_resumed_job_says_exactly_the_rest(drive: Drive, one: Job) -> None:
    driver = drive(echo())
    [whole] = driver.run(one)
    for cut in range(len(whole.ids) + 1):
        driver.resume(one, whole.ids[:cut])
        [rest] = driver.wait(one.id)
        assert rest.ids == whole.ids[cut:]
        assert rest.text == "".join(whole.chunks[cut:])
        assert rest.ended == whole.ended


def test_a_cancelled_request_falls_silent_and_the_others_do_not(drive: Drive) -> None:
    driver = drive(echo(token_delay_s=0.01))
    driver.submit(job("a", "1 2 3", max_tokens=10**6, ignore_eos=True), job("b", "one two three four"))
    driver.wait_tokens("a", 2)
    driver.engine.cancel("a")
    driver.engine.cancel("nobody")
    [b, c] = driver.run(job("c", "1 2 3 4 5 6 7 8")) + driver.wait("b")
    assert (b.text, c.text) == ("1 2 3 4 5 6 7 8", "one two three four")
    assert "a" not in driver.order[driver.order.index("c") :]


def test_a_request_cancelled_before_its_end_was_told_ends_without_one() -> None:
    engine = echo()
    engine.admit(Request(job("a", "one"), "a", (Piece((0,)),)))
    engine.drop("a")
    assert engine.step() == []
    assert engine.wait_s() is None
