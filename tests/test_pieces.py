"""What tokens say: how pieces look in the log, how they join, and how they come back to a log that lost them."""

from fastchat_q.api.stream import JobStream, Submission

from fastchat_q.events import (
    LOG_OF_0,
    Alternative,
    Delta,
    Piece,
    TokenLogprob,
    ToolCallDelta,
    decode_delta,
    encode_payload,
    merged,
)
from fastchat_q.queue import Terms

from .protocol import MODEL, job

CALL = ToolCallDelta(0, '{"city":', "call_1", "weather")
RICH = Piece(
    (5, 6),
    "é\n",
    choice=1,
    reasoning="hm",
    tool_calls=(CALL,),
    logprobs=(TokenLogprob(5, "é", -0.5, (Alternative(5, "é", -0.5), Alternative(7, "x", LOG_OF_0))),),
    finish="tool_calls",
)
EMBEDDING = Piece(vector="AAAA", units=1)


def test_every_field_of_a_piece_comes_back_from_the_log() -> None:
    for pieces in ((Piece((1,), "a"),), (RICH,), (Piece((1,), "a"), RICH, EMBEDDING)):
        k = sum(piece.k for piece in pieces)
        assert decode_delta(9, k, encode_payload(pieces)) == Delta(9, k, pieces)


def test_plain_tokens_cost_two_fields_and_no_list() -> None:
    assert encode_payload([Piece((7, 8), "ab")]) == b'{"t":[7,8],"s":"ab"}'


def test_a_piece_without_ids_counts_by_its_units() -> None:
    assert (Piece((1, 2)).k, EMBEDDING.k, Piece(text="chunk", units=1).k) == (2, 1, 1)


def test_pieces_of_one_choice_become_one_and_choices_stay_apart() -> None:
    first, second = Piece((1,), "a"), Piece((2,), "b")
    assert merged([first, second]) == (Piece((1, 2), "ab"),)
    assert merged([first, RICH, second]) == (Piece((1, 2), "ab"), RICH)


def test_fragments_of_one_tool_call_become_one() -> None:
    rest = Piece((7,), tool_calls=(ToolCallDelta(0, '"Rome"}'), ToolCallDelta(1, "{}", "call_2", "time")))
    [whole] = merged([Piece((4,), tool_calls=(CALL,)), rest])
    assert whole.tool_calls == (CALL._replace(arguments='{"city":"Rome"}'), ToolCallDelta(1, "{}", "call_2", "time"))


def stream_that_received(*deltas: Delta) -> JobStream:
    one = job()
    stream = JobStream(MODEL, one.id, 0, Submission(one, Terms()), 0.0, lambda _: None)
    for delta in deltas:
        assert stream.feed(delta)
    return stream


DELTAS = [Delta(2, 2, (Piece((1, 2), "ab"),)), Delta(4, 2, (RICH,)), Delta(5, 1, (Piece((9,), "z"),))]


def test_a_stream_gives_back_to_the_log_exactly_what_it_had_received() -> None:
    stream = stream_that_received(*DELTAS)
    for logged in range(len(DELTAS) + 1):
        entries = stream.entries(DELTAS[:logged])
        assert entries is not None
        assert [decode_delta(*entry) for entry in entries] == DELTAS[logged:]


def test_plain_entries_that_were_cut_otherwise_are_continued_in_the_middle() -> None:
    stream = stream_that_received(DELTAS[0])
    whole = [Delta(1, 1, (Piece((1,), "a"),)), Delta(3, 2, (Piece((2, 3), "bc"),))]
    assert stream.ahead(whole) == [Delta(3, 1, (Piece((3,), "c"),))]


def test_entries_that_are_more_than_text_are_continued_only_where_one_ends() -> None:
    stream = stream_that_received(*DELTAS[:1])
    assert stream.ahead(DELTAS) == DELTAS[1:]
    assert stream.ahead([Delta(1, 1, DELTAS[0].pieces), Delta(4, 3, (RICH,))]) is None


def test_another_course_is_told_from_the_same_one() -> None:
    stream = stream_that_received(*DELTAS)
    assert stream.ahead([Delta(2, 2, (Piece((1, 3), "ac"),))]) is None
    assert stream.entries([Delta(2, 2, (Piece((1, 3), "ac"),))]) is None
