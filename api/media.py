"""Images in messages: from data URLs to bytes that lie beside the job, under the name of their digest."""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastchat_q.errors import InvalidRequestError
from fastchat_q.images import KINDS, media_type

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
    fetched: Mapping[str, bytes] = field(default_factory=dict)
    """By URL: images that were fetched."""
    remote: bool = False
    """This server fetches images if they are named by URL."""
    url_bytes: int = 0
    """Bytes of the data URLs so far, as they came."""
    _count: int = 0

    def add(self, url: str, param: str) -> str:
        """Takes an image in and returns its digest; ``param`` names it in errors.

        Raises:
            InvalidRequestError: it is no image in a data URL, too large, or one too many.
        """
        self._count += 1
        if self._count > self.max_count:
            raise _refused(param, f"The request has more than {self.max_count} images", "too_many_images")
        content = self.fetched.get(url)
        if content is None:
            content = self._decode(url, param)
            self.url_bytes += len(url)
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

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


def _refused(param: str, why: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid value for '{param}': {why.removesuffix('.')}.", param=param, code=code)
