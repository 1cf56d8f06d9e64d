"""The endpoints whose requests are jobs, as a table: for requests that come otherwise than by HTTP, as in batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from fastchat_q.settings import Settings

from . import chat, completions, embeddings, response_request
from .asked import Asked
from .completions import CompletionRequest
from .embeddings import EmbeddingRequest
from .guard import check_rest
from .problems import invalid_request, most_specific
from .response_request import ResponseRequest
from .schemas import ChatRequest


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of them."""

    body: type[BaseModel]
    asked: Callable[[Any, Settings, int], Asked]
    """From a parsed body, the settings and the bytes of the body."""
    takes_images: bool = True

    def parse(self, body: Any, settings: Settings, size: int) -> Asked:
        """What a decoded body asks for.

        Raises:
            InvalidRequestError: as over HTTP.
            RequestTooLargeError: as over HTTP.
        """
        try:
            parsed = self.body.model_validate(body)
        except ValidationError as error:
            raise invalid_request(most_specific(error.errors())) from None
        if not self.takes_images:  # the others know which of the bytes are images
            check_rest(size, 0, settings.max_body_bytes)
        return self.asked(parsed, settings, size)


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(ChatRequest, chat.asked),
    "/v1/completions": Endpoint(
        CompletionRequest, lambda body, settings, size: completions.asked(body, settings), False
    ),
    "/v1/embeddings": Endpoint(EmbeddingRequest, lambda body, settings, size: embeddings.asked(body, settings), False),
    "/v1/responses": Endpoint(ResponseRequest, response_request.asked_in_batch),
}
