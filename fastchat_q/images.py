"""What an image is by its first bytes, whatever its sender calls it. It decodes nothing."""

MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
KINDS = "PNG, JPEG, GIF or WebP"


def media_type(content: bytes) -> str | None:
    """The media type of an image of a kind that models and servers take; None: it is no such image."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for magic, kind in MAGIC.items() if content.startswith(magic)), None)
