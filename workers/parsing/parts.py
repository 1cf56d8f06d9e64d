"""What a stretch of a model's text is."""

from typing import NamedTuple, Protocol

from fastchat_q.events import ToolCallDelta


class Parts(NamedTuple):
    """What a stretch of text is: content, reasoning, parts of tool calls."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    over: bool = False
    """The answer ends here, whatever the model would add: it has made the one call that it may make."""


class Parser(Protocol):
    """Tells reasoning and tool calls from content. Deterministic: resuming feeds it the same text again."""

    def feed(self, text: str) -> Parts:
        """What this text completes; it may hold back what is not clear yet."""

    def flush(self) -> Parts:
        """What it still holds back at the end."""
