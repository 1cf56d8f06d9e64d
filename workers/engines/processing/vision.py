"""What a model sees: images of a request, decoded within limits and prepared by the model's own processor."""

import io
import warnings
from collections.abc import Mapping
from typing import Any

import structlog
import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils.chat_template_utils import _get_template_variables  # private: what a template reads

from fastchat_q.errors import InvalidRequestError
from fastchat_q.jobs import Job

log = structlog.get_logger()

MAX_PIXELS = 2**25
"""Of an image: 100 MB decoded. A file of a few kilobytes can claim to be a thousand times as large."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
NOT_INPUTS = frozenset(("input_ids", "attention_mask"))
QUESTION = "What is this?"
SIZE = (48, 40)

Inputs = dict[str, torch.Tensor]


def decode(content: bytes) -> Image.Image:
    """An image in RGB; of several frames, the first.

    Raises:
        InvalidRequestError: it is damaged, of another kind, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of odd metadata
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise _refused(f"has {width} x {height} pixels, the limit is {MAX_PIXELS}", "image_too_large")
                return _on_white(image)
    except Image.DecompressionBombError as error:  # Pillow's own limit is higher, and comes first
        raise _refused(f"has too many pixels, the limit is {MAX_PIXELS}", "image_too_large") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise _refused(f"cannot be decoded: {type(error).__name__}", "invalid_image") from error


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB. What is transparent has no colour of its own, and would show what its encoder left there."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        below = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(below, layer).convert("RGB")
    return image.convert("RGB")


def _refused(why: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(f"An image of the request {why}.", param="messages", code=code)


class Sight:
    """A model's processor: from messages with images to token ids and what its forward pass takes beside them."""

    def __init__(self, processor: Any, template: str, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            template: the chat template, which must write the model's placeholders.
            dtype: of the model.
            device: where its inputs go.
        """
        self._processor = processor
        self._template = template
        self._dtype, self._device = dtype, device
        self._sanitizes = True
        self._names: frozenset[str] = frozenset(_get_template_variables(template))

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Mapping[str, Any]
    ) -> tuple[list[int], Inputs]:
        """Token ids with a placeholder for each piece of an image, and the other inputs.

        Args:
            options: those that the template does not read are left out: the processor would take them as its own.
        """
        if not self._sanitizes:
            self._refuse_control_tokens([messages, tools, options])
        going_on = bool(options.get("continue_final_message"))
        encoded = self._processor.apply_chat_template(
            messages,
            chat_template=self._template,
            tools=tools,
            continue_final_message=going_on,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=self._sanitizes,
            **{
                "add_generation_prompt": not going_on,
                **{name: value for name, value in options.items() if name in self._names},
            },
        )
        inputs = {
            name: self._placed(value)
            for name, value in encoded.items()
            if name not in NOT_INPUTS and isinstance(value, torch.Tensor)
        }
        ids: list[int] = encoded["input_ids"][0].tolist()
        return ids, inputs

    def example(self) -> tuple[list[int], Inputs]:
        """The prompt of a question about an image made up here."""
        noise = torch.randint(0, 256, (SIZE[1], SIZE[0], 3), generator=torch.Generator().manual_seed(0))
        image = Image.fromarray(noise.to(torch.uint8).numpy())
        parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        asked = [{"role": "user", "content": parts}]
        try:
            ids, inputs = self.prompt(asked, None, {})
        except ValueError:  # such as Idefics 3's, which asks its tokenizer for places in the text
            self._sanitizes = False
            ids, inputs = self.prompt(asked, None, {})
        if "pixel_values" not in inputs:
            raise ValueError("its processor makes no pixel values")
        return ids, inputs

    def _refuse_control_tokens(self, value: Any) -> None:
        """Raises InvalidRequestError if a user typed one that this processor cannot take as plain text."""
        if isinstance(value, str):
            for token in self._processor.tokenizer._get_control_tokens(self._template):  # private, as in rendering.py
                if token in value:
                    raise InvalidRequestError(
                        f"With images, this model's messages may not hold its control token {token!r}.",
                        param="messages",
                        code="control_token",
                    )
        elif isinstance(value, Mapping):
            for name, one in value.items():
                self._refuse_control_tokens([name, one])
        elif isinstance(value, list | tuple):
            for one in value:
                self._refuse_control_tokens(one)

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._device, self._dtype if value.is_floating_point() else None)


def images(job: Job, blobs: Mapping[str, bytes]) -> dict[str, Image.Image]:
    """The images of a job, decoded, by blob.

    Raises:
        InvalidRequestError: one is not there, or cannot be decoded.
    """
    found = {}
    for blob in job.blobs:
        if blob not in blobs:
            raise _refused("is not there any more", "part_lost")
        found[blob] = decode(blobs[blob])
    return found


@torch.inference_mode()
def sight_of(processor: Any, template: Any, model: Any, device: torch.device) -> Sight | None:
    """The sight of a model; None, with a word in the log, if its processor or its template cannot do it.

    It is tried: a feature that a model has on paper only would fail with the first request.
    """
    if processor is None or not isinstance(template, str):
        return None
    try:
        sight = Sight(processor, template, model.dtype, device)
        ids, inputs = sight.example()
        model(input_ids=torch.tensor([ids], device=device), **inputs)
    except Exception as error:  # somebody else's processor and template raise what they like
        log.warning("images are not taken", model=type(model).__name__, why=f"{type(error).__name__}: {error}")
        return None
    return sight
