"""A job's events as the blocks of Anthropic's messages: which block says what, and which event begins and ends it.

One machine for streams and for whole answers, so that both have the same blocks. It reads the log from its first entry,
and what it makes of an entry depends on the entries before alone: whoever reads the log again gets the same events.
"""

from typing import Any

from fastchat_q.events import Delta, Piece, ToolCallDelta

Said = dict[str, Any]
"""The data of an event."""


class Blocks:
    """The events of one message, entry by entry.

    Args:
        signature: what thoughts are signed with. Clients want one and send it back; it stands for nothing here.
        show_thinking: else thoughts are left empty, as in Anthropic's ``display: omitted``.
    """

    def __init__(self, signature: str, *, show_thinking: bool = True) -> None:
        self._signature = signature
        self._show_thinking = show_thinking
        self.index = -1
        """Of the block that is open, or was the last."""
        self.open: str | None = None
        """The type of the block that is open."""
        self._calls: dict[int, int] = {}
        """The answer's calls -> their blocks."""

    def events(self, delta: Delta) -> list[Said]:
        """What an entry makes."""
        return [event for piece in delta.pieces for event in self._of(piece)]

    def close(self) -> list[Said]:
        """What ends the block that is open, if there is one."""
        closing = []
        if self.open == "thinking":
            closing.append(self._delta({"type": "signature_delta", "signature": self._signature}))
        if self.open is not None:
            closing.append({"type": "content_block_stop", "index": self.index})
        self.open = None
        return closing

    def _of(self, piece: Piece) -> list[Said]:
        found = []
        if piece.reasoning:
            found += self._begin("thinking", {"thinking": "", "signature": ""})
            if self._show_thinking:
                found.append(self._delta({"type": "thinking_delta", "thinking": piece.reasoning}))
        if piece.text:
            found += self._begin("text", {"text": "", "citations": None})
            found.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.tool_calls:
            found += self._call(call)
        return found

    def _call(self, call: ToolCallDelta) -> list[Said]:
        begun: list[Said] = []
        if call.call not in self._calls:
            begun = self.close()  # of two calls in a row each has its own block
            begun += self._begin("tool_use", {"id": call.id or f"toolu_{call.call}", "name": call.name, "input": {}})
            self._calls[call.call] = self.index
        if call.arguments:
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            begun.append({"type": "content_block_delta", "index": self._calls[call.call], "delta": delta})
        return begun

    def _begin(self, kind: str, empty: dict[str, Any]) -> list[Said]:
        """A block of this type, unless it is open."""
        if self.open == kind:
            return []
        closing = self.close()
        self.open = kind
        self.index += 1
        return [
            *closing,
            {"type": "content_block_start", "index": self.index, "content_block": {"type": kind, **empty}},
        ]

    def _delta(self, delta: dict[str, Any]) -> Said:
        return {"type": "content_block_delta", "index": self.index, "delta": delta}


def collected(events: list[Said]) -> list[dict[str, Any]]:
    """The blocks that these events make, with the input of calls still as JSON text."""
    content: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            block = dict(event["content_block"])
            if block["type"] == "tool_use":
                block["input"] = ""
            content.append(block)
        elif event["type"] == "content_block_delta":
            block, delta = content[event["index"]], event["delta"]
            name = {"input_json_delta": "input"}.get(delta["type"], delta["type"].removesuffix("_delta"))
            block[name] += delta.get("partial_json", "") or delta.get(name, "")
    return content
