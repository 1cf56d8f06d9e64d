"""What a whole answer is: OpenAI's stream of chunks, or one JSON body. Its text is judged only if it is told."""

import json
import re

from .framing import BadAnswerError, excerpt

_DONE = b"data: [DONE]\n\n"
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_CONTENT = re.compile(rb'"content": ?"[^"]')
_ERROR = re.compile(rb'"error":\{[^\n]*')


class Answer:
    """One answer, counted while it comes. Counts are right, and the answer is whole, when `end` has returned.

    A content event is an SSE event with non-empty content: it may carry several tokens.
    """

    def __init__(self) -> None:
        self.tokens = 0  # usage.completion_tokens
        self.content_events = 0
        self.first_at_s: float | None = None  # of the content events
        self.gaps_s: list[float] = []  # between reads that brought content; within a read the gaps are 0

    def feed(self, body: bytes, now_s: float) -> None:
        """Take body bytes read at `now_s`. Raises BadAnswerError."""
        raise NotImplementedError

    def end(self) -> None:
        """The body has ended. Raises BadAnswerError if that is no whole answer."""
        raise NotImplementedError


class StreamAnswer(Answer):
    """An SSE stream, looked at in whole events: content, one finish, usage, `[DONE]`, and nothing after it.

    The searches are exact without parsing: inside a JSON string every quote is escaped and no line ends, so
    `"content":"` can only be a key. One spelling is known, this server's: compact JSON and LF. A stream in any other
    is refused for its missing finish.
    """

    def __init__(self) -> None:
        super().__init__()
        self._finishes = 0
        self._usages = 0
        self._done = False
        self._last_at_s = 0.0
        self._pending = b""  # the start of an event whose end has not come

    def feed(self, body: bytes, now_s: float) -> None:
        if self._pending:
            body = self._pending + body
        if body.endswith(b"\n\n"):
            self._pending = b""
        else:
            end = body.rfind(b"\n\n") + 2
            if end < 2:
                self._pending = body
                return
            self._pending = body[end:]
            body = body[:end]
        self._scan(body, now_s)

    def _scan(self, events: bytes, now_s: float) -> None:
        count = events.count
        content = count(b'"content":"') - count(b'"content":""')
        if content:
            if self.first_at_s is None:
                self.first_at_s = now_s
            else:
                self.gaps_s.append(now_s - self._last_at_s)
            self._last_at_s = now_s
            self.content_events += content
        plain = content and content == count(b"\n\n") and content == count(b'"finish_reason":null')
        if not plain or self._done:
            self._scan_rare(events)

    def _scan_rare(self, events: bytes) -> None:
        """Look for what ends a stream. Events that all are content and finish nothing are spared this."""
        if self._done:
            raise BadAnswerError(f"data after [DONE]: {excerpt(events)}")
        if error := _ERROR.search(events):
            raise BadAnswerError(f"error event: {excerpt(error[0])}")
        self._finishes += events.count(b'"finish_reason":"')
        for tokens in _COMPLETION_TOKENS.findall(events):
            self._usages += 1
            self.tokens = int(tokens)
        before, done, after = events.partition(_DONE)
        self._done = bool(done) and (not before or before.endswith(b"\n"))
        if self._done and after:
            raise BadAnswerError(f"data after [DONE]: {excerpt(after)}")

    def end(self) -> None:
        if self._done and self._finishes == 1 and self._usages == 1 and not self._pending:
            return
        found = f"{self.content_events} content events, {self._finishes} finish_reason, {self._usages} usage"
        done = "[DONE]" if self._done else "no [DONE]"
        raise BadAnswerError(f"stream ended with {found}, {done}; unfinished: {excerpt(self._pending)!r}")


class ExactAnswer(StreamAnswer):
    """An SSE stream that must have a certain text: its bytes are kept, and read once more, as JSON, at its end."""

    def __init__(self, expected: str) -> None:
        super().__init__()
        self._expected = expected
        self._bytes: list[bytes] = []

    def feed(self, body: bytes, now_s: float) -> None:
        self._bytes.append(body)
        super().feed(body, now_s)

    def end(self) -> None:
        super().end()
        lines = b"".join(self._bytes).split(b"\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        text = "".join(delta.get("content") or "" for delta in deltas)
        if text != self._expected:
            raise BadAnswerError(f"another text than expected: {excerpt(text.encode())}")


class PeerAnswer(Answer):
    """A stream of another server: JSON of any spelling, with or without usage, finish and `[DONE]`.

    It must have brought text, and nobody counts its tokens: it is taken to have as many as were asked for, which holds
    where nothing ends an answer earlier.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self._max_tokens = max_tokens
        self._last_at_s = 0.0
        self._tail = b""  # a key may be cut in two

    def feed(self, body: bytes, now_s: float) -> None:
        text = self._tail + body
        self._tail = text[-32:] if b"\n\n" not in text[-32:] else text[-32:].rpartition(b"\n\n")[2]
        text = text[: len(text) - len(self._tail)]
        if content := len(_CONTENT.findall(text)):
            if self.first_at_s is None:
                self.first_at_s = now_s
            else:
                self.gaps_s.append(now_s - self._last_at_s)
            self._last_at_s = now_s
            self.content_events += content

    def end(self) -> None:
        if not self.content_events:
            raise BadAnswerError(f"stream ended without text: {excerpt(self._tail)}")
        self.tokens = self._max_tokens


class WholeAnswer(Answer):
    """One body: a chat completion, or what comes with any status but 200."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self._status = status
        self._pieces: list[bytes] = []

    def feed(self, body: bytes, now_s: float) -> None:
        self._pieces.append(body)

    def end(self) -> None:
        text = b"".join(self._pieces)
        if self._status != 200:
            raise BadAnswerError(f"HTTP {self._status}: {excerpt(text)}")
        try:
            answer = json.loads(text)
            (choice,) = answer["choices"]
            found = choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadAnswerError(f"no chat completion ({type(error).__name__}: {error}): {excerpt(text)}") from error
        if [type(value) for value in found] != [str, str, int]:
            raise BadAnswerError(f"no content, finish_reason or completion_tokens: {excerpt(text)}")
        self.tokens = found[2]
