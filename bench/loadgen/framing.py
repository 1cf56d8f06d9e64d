"""HTTP/1.1 answers cut out of a connection's bytes, by httptools (llhttp, strict). Not what they say."""

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

EXCERPT_CHARS = 300


class BadAnswerError(Exception):
    """The server's bytes break HTTP or SSE, or are no whole answer: the request counts as failed."""


def excerpt(text: bytes) -> str:
    """The start of some bytes, on one line."""
    return " ".join(text[:EXCERPT_CHARS].decode("utf-8", "backslashreplace").split())


class Framing:
    """The answer that is coming on one connection; its `on_…` methods are the parser's callbacks."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append
        self._parser = HttpResponseParser(self)
        self.start()

    def start(self) -> None:
        """Await an answer: a request is being sent."""
        self.status = 0  # 0 until the head is here
        self.keep_alive = False
        self.done = False
        self._begun = 0

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.keep_alive = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        self.done = True

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`. Raises BadAnswerError for what is not HTTP, or goes beyond one answer."""
        self._pieces.clear()
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            after = "after the end of the answer" if self.done else "not HTTP"
            raise BadAnswerError(f"{after} ({error}): {excerpt(data)}") from error
        if self._begun > 1:
            raise BadAnswerError(f"a second answer that nothing asked for: {excerpt(data)}")
        return b"".join(self._pieces)
