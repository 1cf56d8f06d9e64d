"""vLLM's own way from ids to text, for answers that are read here token by token."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from ..processing.text import Detokenizer


class VllmText(Detokenizer):
    """It has seen the prompt, as vLLM's has: what its first token decodes to hangs on that.

    Args:
        silent: tokens that are left out; None: all special ones.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], silent: frozenset[int] | None = None) -> None:
        super().__init__(tokenizer.decode)
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, skip_special_tokens=silent is None)
        request: Any = SimpleNamespace(
            request_id="read here", sampling_params=params, prompt_token_ids=list(prompt), prompt_embeds=None
        )
        self._text = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self._silent = silent or frozenset()

    def feed(self, token_id: int) -> str:
        if token_id in self._silent:
            return ""
        self._text.update([token_id], False)
        text: str = self._text.get_next_output_text(False, True)
        return text

    def flush(self) -> str:
        """Nothing: vLLM leaves an incomplete character out."""
        return ""
