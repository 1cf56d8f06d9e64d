"""Between a job's words and vLLM's: sampling parameters, guides, log probabilities, errors. It runs nothing."""

from collections.abc import Callable, Sequence
from typing import Any

from llguidance.gbnf_to_lark import is_lark_syntax
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from fastchat_q.errors import FastchatQError, InvalidRequestError, JobFailedError
from fastchat_q.events import Alternative, FinishReason, TokenLogprob
from fastchat_q.jobs import Sampling

FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}
"""vLLM's finish reasons that are ends of an answer; what else it says (abort, error) is a failure."""
SEEDS = 2**63
LARK = "%llguidance {}"
"""The first line of a grammar that says which kind it is of."""
NEXT_SEED = 0x9E3779B97F4A7C15
"""Odd, so that the seeds of a request that is resumed at different places differ."""


def sampling_params(
    sampling: Sampling,
    choice: int,
    max_tokens: int,
    generated: int,
    grammar: str | None = None,
    text: bool = True,
    scored: bool = False,
) -> SamplingParams:
    """What vLLM is told for one choice.

    Args:
        max_tokens: of the whole answer.
        generated: tokens of it that are part of the prompt, because an earlier attempt made them.
        grammar: Lark, of its guide.
        text: vLLM makes the text, and ends it at a stop string; else only ids are wanted.
        scored: the log probabilities of the prompt are wanted too.
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
        stop=list(sampling.stop) if text else [],
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        max_tokens=max(1, max_tokens - generated),
        min_tokens=max(0, min(sampling.min_tokens, max_tokens) - generated),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.logprobs if scored else None,
        structured_outputs=None if grammar is None else _following(grammar),
        detokenize=text,
        output_kind=RequestOutputKind.DELTA,
    )


def _following(grammar: str) -> StructuredOutputsParams:
    """vLLM takes a grammar whose first rule it does not know at once for one of another kind, unless it is told."""
    return StructuredOutputsParams(grammar=grammar if is_lark_syntax(grammar) else f"{LARK}\n{grammar}")


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


def job_error(error: Exception) -> FastchatQError:
    """What an error of taking a request in means for its job."""
    if isinstance(error, FastchatQError):
        return error
    if isinstance(error, VLLMClientError | ValueError | TypeError):
        return InvalidRequestError(f"vLLM refuses the request: {error}")
    said = f"{type(error).__name__}: {error}"
    return JobFailedError(f"The engine failed to take the request in: {said}", code="engine_error")
