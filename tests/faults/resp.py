"""Where a RESP2 frame ends: all that the fault proxy must know of Redis' protocol."""


def frame_end(buffer: bytes | bytearray, start: int = 0) -> int | None:
    """Index behind the frame that begins at ``start``; None: it is not complete yet.

    Raises:
        ValueError: this is no RESP2.
    """
    line_end = buffer.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind, rest = buffer[start : start + 1], line_end + 2
    if kind in b"+-:":
        return rest
    if kind not in b"$*":
        raise ValueError(f"no RESP2 frame: {bytes(buffer[start : start + 20])!r}")
    size = int(buffer[start + 1 : line_end])
    if kind == b"$":
        end = rest + size + 2 if size >= 0 else rest
        return end if end <= len(buffer) else None
    for _ in range(size):
        inner = frame_end(buffer, rest)
        if inner is None:
            return None
        rest = inner
    return rest


def is_message(frame: bytes) -> bool:
    """Whether a frame from the server is a published message, which answers no request."""
    return frame.startswith(b"*3\r\n$7\r\nmessage\r\n")
