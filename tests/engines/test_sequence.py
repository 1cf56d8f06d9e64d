"""A row says what its tokens mean, ends where its parameters say, and does the same when its tokens come again."""

from typing import Any

import pytest
from fastchat_q.workers.engines.base import Output
from fastchat_q.workers.engines.processing.sequence import Language, Picked, Sequence
from fastchat_q.workers.parsing import Parts
from transformers import PreTrainedTokenizerBase

from fastchat_q.errors import InvalidRequestError
from fastchat_q.events import Piece, TokenLogprob, ToolCallDelta, Usage

from .rows import language_of, row


@pytest.fixture(scope="module")
def speaks(tokenizer: PreTrainedTokenizerBase) -> Language:
    return language_of(tokenizer)


def letters(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """One token a letter."""
    return [token for letter in text for token in tokenizer.encode(letter, add_special_tokens=False)]


def say(one: Sequence, tokens: list[int]) -> list[Output]:
    """Feeds tokens until the row ends."""
    outputs = []
    for token in tokens:
        outputs.append(one.accept(Picked(token)))
        if outputs[-1].ended is not None:
            break
    return outputs


def text_of(outputs: list[Output]) -> str:
    return "".join(piece.text for output in outputs for piece in output.pieces)


def reason_of(outputs: list[Output]) -> str | None:
    return outputs[-1].ended.finish_reason if outputs[-1].ended is not None else None


@pytest.mark.parametrize("stop", ["END", "ND", "x E", "D!"])
def test_a_stop_string_is_found_across_tokens_and_not_shown(
    speaks: Language, tokenizer: PreTrainedTokenizerBase, stop: str
) -> None:
    text = "some x END! and more"
    outputs = say(row(speaks, stop=("never", stop)), letters(tokenizer, text))
    assert text_of(outputs) == text[: text.index(stop)]
    assert reason_of(outputs) == "stop"
    assert outputs[-1].ended is not None
    assert outputs[-1].ended.usage == Usage(0, text.index(stop) + len(stop))


def test_stop_strings_count_from_min_tokens_on(speaks: Language, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = letters(tokenizer, "a.b.c.d.")
    assert text_of(say(row(speaks, stop=(".",), min_tokens=5), tokens)) == "a.b.c"
    assert text_of(say(row(speaks, stop=(".",), min_tokens=6), tokens)) == "a.b.c"
    assert text_of(say(row(speaks, stop=(".",), min_tokens=7), tokens)) == "a.b.c.d"


@pytest.mark.parametrize(
    ("parameters", "ends"),
    [({}, True), ({"ignore_eos": True}, False), ({"ignore_eos": True, "stop_token_ids": (2,)}, True)],
    ids=str,
)
def test_the_end_token_ends_unless_it_is_ignored(speaks: Language, parameters: dict[str, Any], ends: bool) -> None:
    outputs = say(row(speaks, **parameters), [2])
    assert reason_of(outputs) == ("stop" if ends else None)


def test_a_stop_token_ends_without_being_shown_and_counts(speaks: Language, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = letters(tokenizer, "abc")
    outputs = say(row(speaks, stop_token_ids=(tokens[2],)), tokens)
    assert text_of(outputs) == "ab"
    assert reason_of(outputs) == "stop"
    assert outputs[-1].pieces[0].ids == (tokens[2],)


def test_a_bias_or_a_stop_on_a_token_that_the_model_has_not_is_refused(speaks: Language) -> None:
    for token in (-1, speaks.vocabulary):
        with pytest.raises(InvalidRequestError, match=f"token {token}") as refused:
            row(speaks, logit_bias={5: 1.0, token: 1.0})
        assert refused.value.param == "logit_bias"
        with pytest.raises(InvalidRequestError, match=f"token {token}") as refused:
            row(speaks, stop_token_ids=(5, token))
        assert refused.value.param == "stop_token_ids"


def test_pieces_carry_choice_and_logprobs(speaks: Language, tokenizer: PreTrainedTokenizerBase) -> None:
    [token] = letters(tokenizer, "a")
    logprob = TokenLogprob(token, "a", -0.5)
    output = row(speaks, n=3, choice=2).accept(Picked(token, logprob))
    assert output.pieces == (Piece((token,), "a", choice=2, logprobs=(logprob,)),)


class Halves:
    """A parser: what comes before a bar is reasoning, after a star a tool call; it holds back one letter."""

    def __init__(self) -> None:
        self.seen = ""
        self.told = 0

    def feed(self, text: str) -> Parts:
        self.seen += text
        return self._tell(len(self.seen) - 1)

    def flush(self) -> Parts:
        return self._tell(len(self.seen))

    def _tell(self, end: int) -> Parts:
        new, start = self.seen[self.told : max(end, 0)], self.told
        self.told = max(end, 0)
        kinds = ["reasoning" if "|" not in self.seen[: start + i] else "text" for i in range(len(new))]
        reasoning = "".join(letter for letter, kind in zip(new, kinds, strict=True) if kind == "reasoning")
        rest = "".join(letter for letter, kind in zip(new, kinds, strict=True) if kind == "text")
        calls = (ToolCallDelta(0, "{}", "id", "name"),) if "*" in rest else ()
        return Parts(rest, reasoning, calls)


def test_a_parser_tells_the_parts_and_is_flushed_at_the_end(
    speaks: Language, tokenizer: PreTrainedTokenizerBase
) -> None:
    outputs = say(row(speaks, parser=Halves()), [*letters(tokenizer, "why|so"), 2])
    assert "".join(piece.reasoning for output in outputs for piece in output.pieces) == "why|"
    assert text_of(outputs) == "so"
    assert reason_of(outputs) == "stop"


@pytest.mark.parametrize("text", ["|*", "|*a"])
def test_an_answer_that_calls_a_tool_ends_for_that_reason(
    speaks: Language, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assert reason_of(say(row(speaks, parser=Halves()), [*letters(tokenizer, text), 2])) == "tool_calls"
    assert reason_of(say(row(speaks, parser=Halves(), limit=len(text)), letters(tokenizer, text))) == "length"


def test_the_same_tokens_give_the_same_pieces(speaks: Language, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.encode("Hello 😀 wörld, this is it", add_special_tokens=False)
    first, second = (row(speaks, stop=("this is not",), parser=Halves()) for _ in range(2))
    assert say(first, tokens) == say(second, tokens)
