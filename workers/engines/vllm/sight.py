"""Images for vLLM: its own processor prepares them, and gives each its places in a prompt that was rendered here."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from PIL import Image
from vllm.inputs import TokensPrompt

from fastchat_q.errors import InvalidRequestError
from fastchat_q.jobs import Job, Message, Part

from ..processing.rendering import Renderer
from ..processing.vision import QUESTION, SIZE, images

log = structlog.get_logger()

Seen = Mapping[str, Any]
"""A prompt as vLLM takes it."""


class VllmSight:
    """
    Args:
        frontend: vLLM's ``llm.renderer``.
    """

    def __init__(self, frontend: Any) -> None:
        self._frontend = frontend

    async def seen(self, job: Job, prompt: list[int], blobs: Mapping[str, bytes]) -> Seen:
        """A rendered prompt, in which each image has one placeholder, with its images.

        Raises:
            InvalidRequestError: an image cannot be decoded.
        """
        pictures = await asyncio.to_thread(images, job, blobs)
        return await self.joined(prompt, [pictures[blob] for message in job.messages for blob in message.images])

    async def joined(self, prompt: list[int], pictures: Sequence[Image.Image]) -> Seen:
        """The same of images that are decoded. It runs on a thread of vLLM's."""
        given = TokensPrompt(prompt_token_ids=prompt, multi_modal_data={"image": list(pictures)})
        seen: Seen = await self._frontend.process_for_engine_async(given, time.time())
        return seen


def sight_of(frontend: Any, config: Any, renderer: Renderer) -> VllmSight | None:
    """The sight of a model; None, with a word in the log, if it cannot see. To be called outside of an event loop.

    It is tried: vLLM's processor, the chat template and this build need not fit together.

    Args:
        frontend: vLLM's ``llm.renderer``.
        config: vLLM's, of the model.
    """
    if not config.is_multimodal_model:
        return None
    sight = VllmSight(frontend)
    parts = (Part(type="image", blob="example"), Part(type="text", text=QUESTION))
    try:
        prompt = renderer.prompt(Job(id="example", model=config.model, messages=(Message(role="user", content=parts),)))
        seen = asyncio.run(sight.joined(prompt, [Image.new("RGB", SIZE)]))
        if seen["type"] != "multimodal":
            raise InvalidRequestError(f"vLLM made a prompt of type {seen['type']} of an image")
    except Exception as error:  # somebody else's processor and template raise what they like
        log.warning("images are not taken", model=config.model, why=f"{type(error).__name__}: {error}")
        return None
    return sight
