"""Images in messages: from data URLs to bytes that lie beside the job, under the name of their digest."""

import asyncio
import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from fastchat_q.errors import InvalidRequestError
from fastchat_q.images import KINDS, media_type
from fastchat_q.jobs import Job, Message, Part
from fastchat_q.settings import Settings

from .remote_images import Fetcher

DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)(?:;[\w=.+-]+)*?(?P<base64>;base64)?,", re.ASCII)


@dataclass(slots=True)
class Images:
    """Collects the images of one request, within its limits.

    Args:
        max_count: how many a request may have, repeated ones counted each time.
        max_bytes: of an image, decoded.
    """

    max_count: int = 16
    max_bytes: int = 20 * 1024 * 1024
    blobs: dict[str, bytes] = field(default_factory=dict)
    """By SHA-256 in hex."""
    named: dict[str, str] = field(default_factory=dict)
    """URLs of images that are yet to be fetched -> the parameter that names it first."""
    remote: bool = False
    """This server fetches images if they are named by URL."""
    url_bytes: int = 0
    """Bytes of the data URLs so far, as they came."""
    _count: int = 0

    @classmethod
    def within(cls, settings: Settings) -> Self:
        """None yet, with the limits of a server."""
        return cls(settings.max_images, settings.max_image_bytes, remote=settings.allow_remote_images)

    def add(self, url: str, param: str) -> str:
        """Takes an image in and returns its digest; ``param`` names it in errors.

        Raises:
            InvalidRequestError: it is no image in a data URL, too large, or one too many.
        """
        self._count_one(param)
        if self.remote and url[:8].lower() == "https://":
            self.named.setdefault(url, param)
            return _place(url)
        content = self._decode(url, param)
        self.url_bytes += len(url)
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def take(self, url: str | None, digest: str, known: Mapping[str, bytes], param: str) -> None:
        """Takes an image in that came with an earlier request, from its URL or from ``known``, by its digest.

        Raises:
            InvalidRequestError: it is one too many, or not fetched any more.
        """
        if url is not None:
            self.add(url, param)
            return
        self._count_one(param)
        self.blobs[digest] = known[digest]

    async def fetch(self, job: Job, fetcher: Fetcher) -> Job:
        """Fetches the images that are named by URL, and returns the job with their digests in their places.

        Raises:
            InvalidRequestError: one cannot be had.
        """
        if not self.named:
            return job
        fetched = await fetcher.fetch_all(self.named.items())
        digests = await asyncio.to_thread(lambda: {url: hashlib.sha256(fetched[url]).hexdigest() for url in fetched})
        self.blobs |= {digests[url]: content for url, content in fetched.items()}
        places = {_place(url): digest for url, digest in digests.items()}
        return job.model_copy(update={"messages": tuple([_filled(message, places) for message in job.messages])})

    def _count_one(self, param: str) -> None:
        self._count += 1
        if self._count > self.max_count:
            raise _refused(param, f"The request has more than {self.max_count} images", "too_many_images")

    def _decode(self, url: str, param: str) -> bytes:
        if not url.startswith("data:"):
            raise _refused(
                param,
                f"{url[:80]!r} is no data URL, and this server fetches nothing from elsewhere. Send the image itself: "
                "data:image/png;base64,..."
                if not self.remote
                else f"{url[:80]!r} is neither a data URL nor an https URL",
                "remote_url",
            )
        head = DATA_URL.match(url)
        if head is None or not head["type"].startswith("image/") or not head["base64"]:
            raise _refused(param, "The data URL does not begin with data:image/<type>;base64,", "invalid_image_url")
        size = (len(url) - head.end()) * 3 // 4
        if size > self.max_bytes + 2:
            raise _refused(param, f"The image has about {size} bytes, the limit is {self.max_bytes}", "image_too_large")
        try:
            content = base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise _refused(param, f"The data URL is not base64: {error}", "invalid_image_url") from error
        if not content:
            raise _refused(param, "The image is empty", "invalid_image_url")
        if media_type(content) is None:
            raise _refused(param, f"The image is not {KINDS}", "invalid_image")
        return content


def _place(url: str) -> str:
    """What stands for the digest of an image until it is fetched: it can be no other image's."""
    return f"url:{url}"


def _filled(message: Message, places: dict[str, str]) -> Message:
    if not message.images or not isinstance(message.content, tuple):
        return message
    parts = [Part(type=part.type, text=part.text, blob=places.get(part.blob, part.blob)) for part in message.content]
    return message.model_copy(update={"content": tuple(parts)})


def _refused(param: str, why: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid value for '{param}': {why.removesuffix('.')}.", param=param, code=code)
