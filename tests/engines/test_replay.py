"""An answer made anew is joined to what its client has, or refused: nothing twice, nothing that does not fit."""

import pytest
from fastchat_q.workers.engines.base import CannotResumeError
from fastchat_q.workers.engines.processing.replay import Replay

from fastchat_q.events import Alternative, Piece, TokenLogprob, ToolCallDelta


def replayed(prior: list[Piece], again: list[Piece]) -> list[Piece]:
    """What the client gets of the second answer."""
    got: list[Piece] = []
    replay = Replay(prior, got.append)
    for piece in again:
        replay.give(piece)
    replay.ended()
    return got


def text(*parts: str, **fields: int) -> list[Piece]:
    return [Piece(text=part, units=1, **fields) for part in parts]


@pytest.mark.parametrize("again", [("Hello", " wor", "ld!"), ("H", "ello wo", "rld!"), ("Hello world!",)])
def test_only_what_is_new_goes_out_however_it_is_cut(again: tuple[str, ...]) -> None:
    got = replayed(text("Hel", "lo w"), text(*again))
    assert "".join(piece.text for piece in got) == "orld!"


@pytest.mark.parametrize("again", [("Hello", " moon"), ("hello world",), ("Hell",), ()])
def test_another_beginning_or_a_shorter_answer_is_refused(again: tuple[str, ...]) -> None:
    with pytest.raises(CannotResumeError) as raised:
        replayed(text("Hello w"), text(*again))
    assert raised.value.code == "cannot_resume"


def test_nothing_of_an_answer_that_turns_out_different_goes_out() -> None:
    got: list[Piece] = []
    replay = Replay(text("one two"), got.append)
    replay.give(Piece(text="one ", units=1))
    with pytest.raises(CannotResumeError):
        replay.give(Piece(text="too three", units=1))
    assert got == []


def test_reasoning_and_content_are_compared_each_for_itself() -> None:
    prior = [Piece(reasoning="Let me ", units=1), Piece(reasoning="think.", units=1), Piece(text="4", units=1)]
    again = [Piece(reasoning="Let me think.", units=1), Piece(text="42", units=1)]
    assert replayed(prior, again) == [Piece(text="2", units=1)]
    with pytest.raises(CannotResumeError):
        replayed(prior, [Piece(reasoning="Let me think. More", units=1), Piece(text="42", units=1)])


def test_choices_do_not_mix_and_their_ends_come_once() -> None:
    prior = [*text("a", choice=0), *text("b", choice=1), Piece(choice=0, finish="stop", units=1)]
    again = [*text("b2", choice=1), *text("a", choice=0), Piece(choice=0, finish="stop", units=1)]
    again.append(Piece(choice=1, finish="length", units=1))
    got = replayed(prior, again)
    assert [(piece.choice, piece.text, piece.finish) for piece in got] == [(1, "2", None), (1, "", "length")]
    with pytest.raises(CannotResumeError):
        replayed(prior, [*text("b", choice=1), *text("aa", choice=0)])


def test_a_call_keeps_the_id_that_the_client_has() -> None:
    def call(*fields: object) -> Piece:
        return Piece(tool_calls=(ToolCallDelta(*fields),), units=1)  # type: ignore[arg-type]

    prior = [call(0, "", "call_1", "weather"), call(0, '{"city": "Os')]
    again = [call(0, '{"city": "Oslo"}', "call_9", "weather"), call(1, "{}", "call_10", "time")]
    assert replayed(prior, again) == [call(0, 'lo"}'), call(1, "{}", "call_10", "time")]
    with pytest.raises(CannotResumeError):
        replayed(prior, [call(0, '{"city": "Oslo"}', "call_9", "news")])


def test_log_probabilities_of_what_is_skipped_are_skipped() -> None:
    def token(word: str) -> TokenLogprob:
        return TokenLogprob(1, word, -0.5, (Alternative(1, word, -0.5),))

    prior = [Piece(text="a b", logprobs=(token("a"), token(" b")), units=1)]
    again = [Piece(text=f"{word}", logprobs=(token(word),), units=1) for word in ("a", " b", " c")]
    assert replayed(prior, again) == [again[2]]
