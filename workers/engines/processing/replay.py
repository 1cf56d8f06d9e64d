"""An answer that is made once more: what its client has already is skipped, if it is the same to the letter."""

from collections.abc import Iterable

from fastchat_q.events import Piece, ToolCallDelta

from ..async_engine import Give
from ..base import CannotResumeError


class Replay:
    """Between a server that begins an answer anew and a client that has its beginning.

    Compared is what is said, for each choice and each part of it: content, reasoning, names and arguments of calls. How
    it is cut into pieces does not matter, nor do the ids of calls, which servers draw at random: the client has the
    first ones.
    """

    def __init__(self, prior: Iterable[Piece], give: Give) -> None:
        self._give = give
        self._left: dict[int, dict[str, str]] = {}
        """What was said and has not come again: choice -> part -> text."""
        self._logprobs: dict[int, int] = {}
        self._finished: set[int] = set()
        self._begun: set[tuple[int, int]] = set()
        """Calls of which the client has id and name, as (choice, call)."""
        for piece in prior:
            self._expect(piece)

    def _expect(self, piece: Piece) -> None:
        left = self._left.setdefault(piece.choice, {})
        for part, said in _parts(piece):
            left[part] = left.get(part, "") + said
        self._logprobs[piece.choice] = self._logprobs.get(piece.choice, 0) + len(piece.logprobs)
        self._begun |= {(piece.choice, call.call) for call in piece.tool_calls}
        if piece.finish is not None:
            self._finished.add(piece.choice)

    def give(self, piece: Piece) -> None:
        """Passes on what is new of a piece.

        Raises:
            CannotResumeError: it is not what was said.
        """
        new = self._new_of(piece)
        if new is not None:
            self._give(new)

    def ended(self) -> None:
        """To be called at the end of the answer.

        Raises:
            CannotResumeError: it ends before what was said.
        """
        if any(text for left in self._left.values() for text in left.values()):
            raise CannotResumeError("it came out shorter")

    def _new_of(self, piece: Piece) -> Piece | None:
        said = {part: self._rest(piece.choice, part, text) for part, text in _parts(piece)}
        logprobs = piece.logprobs[self._skipped_logprobs(piece) :]
        finish = None if piece.choice in self._finished else piece.finish
        calls = self._new_calls(piece, said)
        new = piece._replace(
            text=said["text"], reasoning=said["reasoning"], tool_calls=calls, logprobs=logprobs, finish=finish
        )
        if not (new.said or calls or logprobs or finish):
            return None
        if any(self._left.get(piece.choice, {}).values()) or (piece.choice in self._finished and new.said):
            raise CannotResumeError("it came out differently")
        return new

    def _rest(self, choice: int, part: str, text: str) -> str:
        left = self._left.get(choice, {})
        expected = left.get(part, "")
        common = min(len(expected), len(text))
        if expected[:common] != text[:common]:
            raise CannotResumeError("it came out differently")
        if common:
            left[part] = expected[common:]
        return text[common:]

    def _skipped_logprobs(self, piece: Piece) -> int:
        skipped = min(self._logprobs.get(piece.choice, 0), len(piece.logprobs))
        if skipped:
            self._logprobs[piece.choice] -= skipped
        return skipped

    def _new_calls(self, piece: Piece, said: dict[str, str]) -> tuple[ToolCallDelta, ...]:
        """Parts of calls with what is new of them; those of which nothing is are left out."""
        calls: list[ToolCallDelta] = []
        for call in piece.tool_calls:
            arguments = said[f"arguments {call.call}"]
            if (piece.choice, call.call) not in self._begun:
                calls.append(call._replace(arguments=arguments))
            elif arguments:
                calls.append(ToolCallDelta(call.call, arguments))
        return tuple(calls)


def _parts(piece: Piece) -> Iterable[tuple[str, str]]:
    """What a piece says, part by part."""
    yield "text", piece.text
    yield "reasoning", piece.reasoning
    for call in piece.tool_calls:
        yield f"name {call.call}", call.name or ""
        yield f"arguments {call.call}", call.arguments
