"""Events become OpenAI's ``text_completion`` objects, whole and in chunks."""

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from fastchat_q.events import Delta, End, Event, Piece, Result, TokenLogprob, merged, token_bytes

from .parts import LEAST_LOGPROB, groups
from .render import ENDING_IDS, View, usage


def completion(view: View, events: Sequence[Event], end: End) -> dict[str, Any]:
    """The ``text_completion`` object of a job that succeeded.

    Where more answers were made than are wanted, ``extra`` of the view has ``best_of`` and ``n``, those made and wanted
    for each prompt, and ``logprobs``, whether they are wanted too.
    """
    pieces = [piece for event in events if isinstance(event, Delta) for piece in event.pieces]
    said: dict[int, list[Piece]] = {}
    for piece in merged(pieces) if pieces else ():
        said.setdefault(piece.choice, []).append(piece)
    chosen = _best(view, said) if "best_of" in view.extra else range(view.n)
    shows_logprobs = view.extra.get("logprobs", True)
    return {
        "id": view.completion_id,
        "object": "text_completion",
        "created": view.created,
        "model": view.model,
        "choices": [_choice(i, said.get(made, ()), end.result, shows_logprobs) for i, made in enumerate(chosen)],
        "usage": usage(end.result),
        "system_fingerprint": None,
    }


def _best(view: View, said: dict[int, list[Piece]]) -> list[int]:
    """The answers that the model finds likeliest, by the mean of their tokens' log probabilities."""
    made, wanted = view.extra["best_of"], view.extra["n"]
    chosen: list[int] = []
    for first in range(0, view.n // wanted * made, made):
        chosen += sorted(range(first, first + made), key=lambda index: -_mean(said.get(index, ())))[:wanted]
    return chosen


def _mean(pieces: Iterable[Piece]) -> float:
    found = [max(one.logprob, LEAST_LOGPROB) for piece in pieces if not piece.echo for one in piece.logprobs]
    return sum(found) / len(found) if found else LEAST_LOGPROB


def _choice(index: int, pieces: Sequence[Piece], result: Result | None, shows_logprobs: bool) -> dict[str, Any]:
    finish = pieces[-1].finish if pieces else None
    return {
        "index": index,
        "text": "".join([piece.text for piece in pieces]),
        "logprobs": logprobs(pieces, Places()) if shows_logprobs else None,
        "finish_reason": finish or (result and result.finish_reason) or "stop",
    }


class Places:
    """Where the tokens of an answer stand in its text, in characters.

    They are reckoned from what the tokens are by themselves, special ones included, as in vLLM. A token that goes on
    with a character stands where that begins.
    """

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._place = 0

    def next(self, token: str) -> int:
        """The place of the next token."""
        raw = token_bytes(token)
        begins = raw is None or not raw or raw[0] & 0xC0 != 0x80
        if begins:  # what was incomplete before it remains so
            self._place += len(self._decoder.decode(b"", final=True))
        place = self._place
        self._place += len(token) if raw is None else len(self._decoder.decode(raw))
        return place


def logprobs(pieces: Iterable[Piece], places: Places) -> dict[str, Any] | None:
    """OpenAI's object of old for the tokens of some pieces; None for none.

    Of each token the alternatives are those that were asked for and itself.

    Args:
        places: behind the tokens of the answer before them; moves on.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for piece in pieces:
        for number, one in enumerate(piece.logprobs):
            tokens.append(one.token)
            offsets.append(places.next(one.token))
            if piece.echo and not number:  # nothing is before it that could make it likely
                values.append(None)
                top.append(None)
                continue
            values.append(max(one.logprob, LEAST_LOGPROB))
            top.append(_alternatives(one))
    if not tokens:
        return None
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _alternatives(one: TokenLogprob) -> dict[str, float]:
    """By their texts, and by their ids those that decode to the same as a likelier one."""
    found = {one.token: max(one.logprob, LEAST_LOGPROB)}
    for other in one.top:
        if other.id != one.id or other.token != one.token:
            taken = other.token in found and other.id >= 0
            name = f"token_id:{other.id}" if taken else other.token
            found[name] = max(other.logprob, found.get(name, LEAST_LOGPROB))
    return found


class TextWriter:
    """Writes one stream's server-sent events, with ids as `ChunkWriter` has them, from the first entry of the log on.

    A chunk holds what one piece of an entry says, text, log probabilities and finish reason together.

    Args:
        after: the id of the last event that the client has; None: it has none yet.
    """

    def __init__(self, view: View, after: int | None = None) -> None:
        self._head = orjson.dumps(
            {
                "id": view.completion_id,
                "object": "text_completion",
                "created": view.created,
                "model": view.model,
                "system_fingerprint": None,
            }
        )[:-1]
        self._view = view
        self._after = after
        self._n = view.n
        self._include_usage = view.include_usage
        self._usage_field = b',"usage":null' if view.include_usage else b""
        self._open = b"\ndata: " + self._head + b',"choices":[{"index":0,"text":'
        self._close = b',"logprobs":null,"finish_reason":null}]' + self._usage_field + b"}\n\n"
        self._places: dict[int, Places] = {}
        """Of each choice, behind the tokens that were told."""

    def role(self) -> bytes:
        """Nothing: a completion has no role."""
        return b""

    def events(self, events: Sequence[Event]) -> bytes:
        """The chunks of some events: text that came together goes out together."""
        last = events[-1]
        end = last if isinstance(last, End) else None
        deltas: Sequence[Delta] = events if end is None else events[:-1]  # type: ignore[assignment]
        if self._after is not None:
            deltas = self._lacking(deltas, self._after)
        said = [delta.pieces[0].text for delta in deltas if delta.is_plain]
        if len(said) < len(deltas):
            body = b"".join([self.events([delta]) if delta.is_plain else self._rich(delta) for delta in deltas])
        else:
            text, body = "".join(said), b""
            if text:
                body = b"id: %d" % deltas[-1].n + self._open + orjson.dumps(text) + self._close
        return body if end is None else body + self._end(end)

    def _lacking(self, deltas: Sequence[Delta], after: int) -> list[Delta]:
        """Those that the client lacks; of the others the tokens count, for the places of those behind them."""
        for delta in deltas:
            if delta.n <= after:
                for piece in delta.pieces:
                    self._logprobs(piece)
        return [delta for delta in deltas if delta.n > after]

    def _rich(self, delta: Delta) -> bytes:
        n, out = delta.n - delta.k, b""
        for pieces, k in groups(delta.pieces):
            n += k
            choices = [
                _chunk_choice(piece.choice, piece.text, self._logprobs(piece), piece.finish)
                for piece in pieces
                if piece.text or piece.logprobs or piece.finish
            ]
            if choices and n > (self._after or 0):
                out += b"id: %d\ndata: %b\n\n" % (n, self._chunk(choices))
        return out

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.logprobs:
            return None
        return logprobs([piece], self._places.setdefault(piece.choice, Places()))

    def _end(self, end: End) -> bytes:
        error = self._view.failure(end)
        if error is not None:
            return b"data: %b\n\n" % orjson.dumps(error.body())
        result, closing = end.result, []
        if self._n == 1:
            finish = result.finish_reason if result else None
            closing.append((end.n + 1, self._chunk([_chunk_choice(0, "", None, finish or "stop")])))
        if self._include_usage:
            closing.append((end.n + 2, self._head + b',"choices":[],"usage":' + orjson.dumps(usage(result)) + b"}"))
        closing.append((end.n + ENDING_IDS, b"[DONE]"))
        later = [(n, data) for n, data in closing if self._after is None or n > self._after]
        return b"".join([b"id: %d\ndata: %b\n\n" % one for one in later])

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return self._head + b',"choices":' + orjson.dumps(choices) + self._usage_field + b"}"


def _chunk_choice(index: int, text: str, found: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": found, "finish_reason": finish}
