"""Between a job's words and vLLM's: sampling parameters, guides, log probabilities, errors. It runs nothing."""

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from fastchat_q.errors import FastchatQError, InvalidRequestError, JobFailedError
from fastchat_q.events import Alternative, FinishReason, TokenLogprob
from fastchat_q.jobs import Guide, Job, Sampling

FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}
"""vLLM's finish reasons that are ends of an answer; what else it says (abort, error) is a failure."""
SEEDS = 2**63
NEXT_SEED = 0x9E3779B97F4A7C15
"""Odd, so that the seeds of a request that is resumed at different places differ."""


def sampling_params(sampling: Sampling, choice: int, max_tokens: int, generated: int) -> SamplingParams:
    """What vLLM is told for one choice.

    Args:
        max_tokens: of the whole answer.
        generated: tokens of it that are part of the prompt, because an earlier attempt made them.
    """
    greedy = sampling.temperature == 0
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=None if greedy else (sampling.seed + choice + generated * NEXT_SEED) % SEEDS,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        max_tokens=max_tokens - generated,
        min_tokens=max(0, min(sampling.min_tokens, max_tokens) - generated),
        logprobs=sampling.logprobs,
        structured_outputs=None if sampling.guide is None else _guide(sampling.guide),
        output_kind=RequestOutputKind.DELTA,
    )


def _guide(guide: Guide) -> StructuredOutputsParams:
    if guide.kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if guide.kind == "json_schema":
        return StructuredOutputsParams(json=guide.value)
    if guide.kind == "choice":
        return StructuredOutputsParams(choice=json.loads(guide.value))
    return StructuredOutputsParams(**{guide.kind: guide.value})


def continues(sampling: Sampling) -> bool:
    """Whether an answer can go on behind its first tokens as part of the prompt.

    vLLM follows a guide, and counts tokens for these penalties, from the end of the prompt on.
    """
    return sampling.guide is None and not sampling.presence_penalty and not sampling.frequency_penalty


def token_logprobs(
    ids: Sequence[int], positions: Any, count: int, decode: Callable[[list[int]], str]
) -> tuple[TokenLogprob, ...]:
    """vLLM's dicts of a token's id -> Logprob, one for each token, as ours."""
    made = []
    for token, position in zip(ids, positions, strict=True):
        said = {i: Alternative(i, one.decoded_token or decode([i]), one.logprob) for i, one in position.items()}
        likeliest = sorted((one.rank, i) for i, one in position.items() if one.rank is not None and one.rank <= count)
        chosen = said[token]
        made.append(TokenLogprob(token, chosen.token, chosen.logprob, tuple(said[i] for _, i in likeliest)))
    return tuple(made)


class ResumedText:
    """vLLM's own way from ids to text, begun in the middle: it has seen the tokens of an earlier attempt.

    What that attempt held back, half a character or what may become a stop string, is not lost.
    """

    def __init__(self, tokenizer: Any, sampling: Sampling, prompt: Sequence[int], prior: Sequence[int]) -> None:
        params = SamplingParams(
            stop=list(sampling.stop), min_tokens=sampling.min_tokens, output_kind=RequestOutputKind.DELTA
        )
        request: Any = SimpleNamespace(
            request_id="resumed", sampling_params=params, prompt_token_ids=list(prompt), prompt_embeds=None
        )
        self._text = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self.stopped = False
        for token in prior:
            self.stopped = self.stopped or self._text.update([token], False) is not None
        self._text.get_next_output_text(False, True)  # that has been sent

    def feed(self, ids: Sequence[int], ended: bool, by_token: bool) -> tuple[int, str]:
        """(how many of these ids count, the text that may be shown); ``stopped`` says if a stop string came.

        Args:
            ended: they are the last ones.
            by_token: the last of them ends the answer, and is not shown.
        """
        before = self._text.num_output_tokens()
        self.stopped = self._text.update(list(ids), by_token) is not None
        return self._text.num_output_tokens() - before, self._text.get_next_output_text(ended or self.stopped, True)


def job_error(error: Exception, job: Job) -> FastchatQError:
    """What an error of taking a request in means for its job."""
    if isinstance(error, FastchatQError):
        return error
    if isinstance(error, VLLMClientError | ValueError | TypeError):
        param = "response_format" if job.sampling.guide is not None else None
        return InvalidRequestError(f"vLLM refuses the request: {error}", param=param)
    said = f"{type(error).__name__}: {error}"
    return JobFailedError(f"The engine failed to take the request in: {said}", code="engine_error")
