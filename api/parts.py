"""How a log entry that is more than text becomes chunks, each with an id of its own that a reader can go on behind.

An entry brings the count of tokens from n - k to n, and so does each of its pieces with its own share. The first chunk
of a piece gets the id behind the one where the piece begins, the next one the id behind that, and the last the id where
the piece ends: no two events of a job have the same id, and a client that was cut off between two chunks of an entry
misses none and gets none twice. So a piece has no more chunks than tokens, and its last one takes in what is left over.
Otherwise each chunk says one thing of one choice, for there are clients that look at no more of it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fastchat_q.events import SPELT, Delta, Piece, TokenLogprob, ToolCallDelta, token_bytes

LEAST_LOGPROB = -9999.0
"""What stands for the logarithm of 0, which JSON cannot say; as in vLLM."""


class Chunk(NamedTuple):
    """The choices of one ``chat.completion.chunk``."""

    n: int
    """The id of its event."""
    choices: list[dict[str, Any]]


def chunks(delta: Delta) -> list[Chunk]:
    """The chunks of an entry; none if it says nothing."""
    found: list[Chunk] = []
    start = delta.n - delta.k
    for pieces, k in groups(delta.pieces):
        parts = [part for piece in pieces for part in _parts(piece)]
        alone = min(len(parts), k) - 1
        found += [Chunk(start + number, [part]) for number, part in enumerate(parts[: max(alone, 0)], 1)]
        start += k
        if parts:
            found.append(Chunk(start, _merged(parts[alone:])))
    return found


def is_inside(delta: Delta, n: int) -> bool:
    """Whether a reader that has the event n is to get a part of this entry: it has some of its chunks, not all."""
    return delta.n - delta.k < n < delta.n and not delta.is_plain and any(chunk.n == n for chunk in chunks(delta))


def message(piece: Piece) -> dict[str, Any]:
    """The message of a whole answer, from all pieces of a choice."""
    said: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None, "annotations": []}
    if piece.reasoning:
        said |= _thought(piece.reasoning)
    if piece.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in piece.tool_calls
        ]
        said["content"] = piece.text or None
    return said


def logprobs(found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """OpenAI's object for some tokens; None for none."""
    if not found:
        return None
    content = [
        _logprob(one.token, one.logprob) | {"top_logprobs": [_logprob(other.token, other.logprob) for other in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def groups(pieces: Sequence[Piece]) -> Iterable[tuple[list[Piece], int]]:
    """Pieces with the tokens that they count for; one that counts for none goes with a neighbour."""
    group: list[Piece] = []
    k = 0
    for piece in pieces:
        if k and piece.k:
            yield group, k
            group, k = [], 0
        group.append(piece)
        k += piece.k
    yield group, k


def _parts(piece: Piece) -> list[dict[str, Any]]:
    """What a piece says, one thing each, in the order in which models say it."""
    parts: list[dict[str, Any]] = []
    if piece.reasoning:
        parts.append(choice(piece.choice, _thought(piece.reasoning)))
    if piece.text:
        parts.append(choice(piece.choice, {"content": piece.text}))
    parts += [choice(piece.choice, {"tool_calls": [_call(call)]}) for call in piece.tool_calls]
    if piece.logprobs:
        if not parts:
            parts.append(choice(piece.choice, {"content": ""}))
        parts[-1]["logprobs"] = logprobs(piece.logprobs)
    if piece.finish:
        parts.append(choice(piece.choice, {}, piece.finish))
    return parts


def choice(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """A choice of a chunk."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _merged(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts that share a chunk, as one choice for each index."""
    if len(parts) == 1:
        return list(parts)
    by_index: dict[int, dict[str, Any]] = {}
    for part in parts:
        one = by_index.setdefault(part["index"], part)
        if one is part:
            continue
        calls = [*one["delta"].get("tool_calls", ()), *part["delta"].get("tool_calls", ())]
        one["delta"] |= part["delta"] | ({"tool_calls": calls} if calls else {})
        one["logprobs"] = one["logprobs"] or part["logprobs"]
        one["finish_reason"] = one["finish_reason"] or part["finish_reason"]
    return list(by_index.values())


def _thought(reasoning: str) -> dict[str, str]:
    """Under both names that clients look for: DeepSeek's, and the one that vLLM has since 0.17."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}


def _call(call: ToolCallDelta) -> dict[str, Any]:
    function = {"arguments": call.arguments} | ({"name": call.name} if call.name is not None else {})
    first = {"id": call.id, "type": "function"} if call.id is not None else {}
    return {"index": call.call, "function": function, **first}


def shown(token: str) -> str:
    r"""A token's text in chats and responses: ``\xf0\x9f`` for a part of a character, as OpenAI has it."""
    return token.removeprefix(SPELT) if token_bytes(token) != token.encode() else token


def _logprob(token: str, logprob: float) -> dict[str, Any]:
    """``bytes`` is null for a part of a character from an engine that does not tell its bytes."""
    known = token_bytes(token)
    return {
        "token": shown(token),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": None if known is None else list(known),
    }
