"""Tokens are drawn from the distribution that the parameters say, by a row's own state and nothing else."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from fastchat_q.workers.engines.batching.sampling import (
    CANDIDATES,
    IMPOSSIBLE,
    MORE_CANDIDATES,
    Sampler,
    _edit,
    uniform,
)
from fastchat_q.workers.engines.processing.sequence import NO_NUMBER, Picked, Sequence
from fastchat_q.workers.engines.processing.text import TokenTexts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastchat_q.errors import JobFailedError
from fastchat_q.jobs import Sampling

from .rows import NamedTokens, language, pick, row

EXTREMES = (-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1)
PROMPT = [3, 9, 9, 17, 40]
SAID = [5, 9, 5, 5, 21, 0]
WIDE = 6 * CANDIDATES
"""A vocabulary that needs a second look when logits are flat."""
WIDEST = MORE_CANDIDATES + 1001
"""One that needs a full sort."""


def random_logits(rows: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    return torch.randn(rows, vocabulary, generator=generator) * spread  # (rows, vocabulary) float32


def changed(logits: torch.Tensor, sampling: Sampling, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Bias and penalties by an independent hand, on logits (vocabulary)."""
    scores = logits.double().clone()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    if sampling.repetition_penalty != 1 and prompt + ids:
        penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        scores = penalty(torch.tensor([prompt + ids]), scores[None])[0]
    counts = np.bincount(np.asarray(ids, dtype=int), minlength=len(logits))
    scores -= torch.from_numpy(counts * sampling.frequency_penalty + (counts > 0) * sampling.presence_penalty)
    return scores


def warped(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What transformers' own classes leave of scores (vocabulary), in vLLM's order."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return chain(torch.zeros(1, 1, dtype=torch.long), scores[None])[0]


def chi_square_limit(freedom: int) -> float:
    """The value that chance exceeds once in 10,000 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def assert_drawn_from(tokens: list[int], probabilities: torch.Tensor) -> None:
    """The tokens are draws of this distribution: none that is impossible, the others as often as they should."""
    count, seen = len(tokens), np.bincount(tokens, minlength=len(probabilities))
    expected = probabilities.double().numpy() * count
    assert not seen[expected == 0].any(), "a token was drawn that the parameters rule out"
    common = expected >= 5
    pairs = [*zip(seen[common], expected[common], strict=True)]
    if (rest := expected[~common].sum()) >= 5:
        pairs.append((seen[~common].sum(), rest))
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in pairs)
    assert statistic <= (chi_square_limit(len(pairs) - 1) if len(pairs) > 1 else 1e-9)


ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.5},
    "hot": {"temperature": 1.9},
    "top_p": {"top_p": 0.7},
    "narrow top_p": {"top_p": 0.2},
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "top_k of more than there are": {"top_k": 10**6},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "presence": {"presence_penalty": 1.5},
    "negative presence": {"presence_penalty": -1.0},
    "frequency": {"frequency_penalty": 0.8},
    "repetition": {"repetition_penalty": 1.8},
    "repetition below 1": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": {2: 4.0, 9: -100.0, 30: 2.5}},
}
COMBINED: dict[str, dict[str, Any]] = {
    "top_k and top_p": {"top_k": 12, "top_p": 0.8, "temperature": 1.3},
    "min_p and top_p": {"min_p": 0.05, "top_p": 0.8, "temperature": 1.5},
    "all penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "all of it": {
        "temperature": 1.4,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {9: 3.0, 17: 1.0, 33: -2.0},
    },
}


def assert_draws_follow_the_reference(parameters: dict[str, Any], vocabulary: int, count: int = 3000) -> None:
    logits = random_logits(1, vocabulary, spread=1.2)
    speaks = language(vocabulary)
    rows = [row(speaks, prompt=PROMPT, ids=SAID, seed=seed, **parameters) for seed in range(count)]
    sampling = rows[0].sampling
    wanted = warped(changed(logits[0], sampling, PROMPT, SAID), sampling).softmax(-1)
    assert_drawn_from(pick(logits.expand(count, -1), rows), wanted)


@pytest.mark.parametrize("parameters", [*ALONE.values(), *COMBINED.values()], ids=[*ALONE, *COMBINED])
def test_draws_follow_the_distribution_of_the_reference(parameters: dict[str, Any]) -> None:
    assert_draws_follow_the_reference(parameters, 50)


MANY_KEPT = [
    {"top_p": 0.9},
    {"top_k": 400},
    {"min_p": 0.02},
    {"min_p": 0.01, "top_p": 0.9},
    {"top_k": 300, "top_p": 0.8},
]


@pytest.mark.parametrize("parameters", MANY_KEPT, ids=str)
def test_draws_from_more_tokens_than_the_candidates_follow_it_too(parameters: dict[str, Any]) -> None:
    assert_draws_follow_the_reference(parameters, WIDE)


@pytest.mark.parametrize("parameters", [{}, {"top_p": 0.99}, {"min_p": 1e-5, "top_k": 5000}], ids=str)
def test_draws_from_more_tokens_than_a_second_look_sees_follow_it_too(parameters: dict[str, Any]) -> None:
    assert_draws_follow_the_reference(parameters, WIDEST, count=800)


@pytest.mark.parametrize("parameters", [{}, {"top_p": 0.8}, {"top_k": 5}], ids=str)
def test_positions_and_choices_draw_like_seeds(parameters: dict[str, Any]) -> None:
    logits = random_logits(1, 50, spread=1.2)
    speaks = language(50)
    rows = [row(speaks, ids=[0] * (i % 50), choice=i // 50, seed=11, **parameters) for i in range(3000)]
    wanted = warped(logits[0].double(), rows[0].sampling).softmax(-1)
    assert_drawn_from(pick(logits.expand(3000, -1), rows), wanted)


def test_the_test_of_a_distribution_notices_a_small_difference() -> None:
    logits = random_logits(1, 50, spread=1.2)
    rows = [row(language(50), seed=seed, temperature=1.2) for seed in range(3000)]
    with pytest.raises(AssertionError):
        assert_drawn_from(pick(logits.expand(3000, -1), rows), logits[0].softmax(-1))


probability = st.floats(0.01, 1.0)
sampled_parameters = st.fixed_dictionaries(
    {"temperature": st.floats(0.1, 2.0)},
    optional={"top_k": st.integers(1, 40), "top_p": probability, "min_p": st.floats(0.001, 1.0)},
)
penalties = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 5),
        "logit_bias": st.dictionaries(st.integers(0, 299), st.floats(-100, 100), max_size=8),
    },
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(parameters=sampled_parameters, number=st.integers(0, 10**6), spread=st.sampled_from([0.3, 1.0, 4.0]))
def test_the_tokens_that_can_be_drawn_are_those_of_the_reference(
    parameters: dict[str, Any], number: int, spread: float
) -> None:
    """Every kept token is reached: a draw exactly at the middle of its share of [0, 1) gives it."""
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(1, 40, generator=generator) * spread
    sampling = Sampling(**parameters)
    wanted = warped(logits[0].double(), sampling).softmax(-1)
    likely = wanted > 1e-5
    middles = (wanted.cumsum(-1) - wanted / 2)[likely]
    rows = [row(language(40), **parameters) for _ in middles]
    tokens = pick_at(middles.tolist(), logits.expand(len(rows), -1), rows)
    assert tokens == likely.nonzero()[:, 0].tolist()


def pick_at(uniforms: list[float], logits: torch.Tensor, rows: list[Sequence]) -> list[int]:
    """The next tokens if chance says these numbers."""
    with pytest.MonkeyPatch.context() as patch:
        numbers = iter(uniforms)
        patch.setattr("fastchat_q.workers.engines.batching.sampling.uniform", lambda *_: next(numbers))
        return pick(logits, rows)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    parameters=penalties,
    prompt=st.lists(st.integers(0, 299), max_size=400),
    ids=st.lists(st.integers(0, 299), max_size=400),
)
def test_bias_and_penalties_change_logits_as_the_reference_does(
    parameters: dict[str, Any], prompt: list[int], ids: list[int]
) -> None:
    logits = random_logits(2, 300)
    edited = logits.clone()
    one = row(language(300), prompt=prompt, ids=ids, **parameters)
    _edit(edited, [row(language(300)), one])
    assert torch.equal(edited[0], logits[0]), "a neighbour without parameters"
    torch.testing.assert_close(edited[1].double(), changed(logits[1], one.sampling, prompt, ids), rtol=1e-5, atol=1e-4)


any_row = st.builds(
    dict,
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 3),
    said=st.lists(st.integers(0, 299), max_size=20),
    parameters=st.builds(
        lambda *some: {name: value for one in some for name, value in one.items()},
        st.one_of(st.just({"temperature": 0.0}), st.just({}), sampled_parameters),
        st.one_of(st.just({}), penalties),
        st.fixed_dictionaries({}, optional={"logprobs": st.integers(0, 20), "min_tokens": st.integers(0, 30)}),
    ),
)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    some=st.lists(any_row, min_size=2, max_size=12),
    vocabulary=st.sampled_from([300, WIDE, WIDEST]),
    number=st.integers(0, 10**6),
)
def test_a_row_draws_the_same_alone_and_beside_any_neighbours(
    some: list[dict[str, Any]], vocabulary: int, number: int
) -> None:
    spread = 3.0 if vocabulary == 300 else 0.2
    logits = torch.randn(len(some), vocabulary, generator=torch.Generator().manual_seed(number)) * spread
    logits[:, 100:110] = logits[:, 99:100]  # ties
    speaks, sampler = language(vocabulary, [7]), Sampler(TokenTexts(NamedTokens()))
    rows = [
        row(speaks, prompt=[1, 2, 3], ids=one["said"], seed=one["seed"], choice=one["choice"], **one["parameters"])
        for one in some
    ]
    together = sampler.pick(logits.clone(), rows)
    assert [
        picked for i, one in enumerate(rows) for picked in sampler.pick(logits[i : i + 1].clone(), [one])
    ] == together


def test_temperature_0_takes_the_most_likely_token_beside_sampled_rows() -> None:
    logits = random_logits(32, 600, spread=0.5)
    rows = [row(language(600), temperature=float(i % 2), top_p=(0.3, 0.99, 1.0)[i % 3], seed=i) for i in range(32)]
    tokens = pick(logits, rows)
    assert tokens[::2] == logits[::2].argmax(-1).tolist()
    assert tokens[1::2] != logits[1::2].argmax(-1).tolist()
    assert pick(logits[::2], rows[::2]) == tokens[::2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-30, 1e-9, 1e-4])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_temperature_close_to_0_is_as_good_as_greedy(temperature: float, top_p: float) -> None:
    logits = random_logits(8, 400)
    rows = [row(language(400), temperature=temperature, top_p=top_p, seed=i) for i in range(8)]
    assert pick(logits, rows) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", [1e-300, 1e-46, 1e-12, 1e-3])
def test_a_tiny_top_p_equals_greedy(top_p: float) -> None:
    logits = random_logits(16, 600, spread=1.0)
    rows = [row(language(600), temperature=1.5, top_p=top_p, seed=i) for i in range(16)]
    assert pick(logits, rows) == logits.argmax(-1).tolist()


def test_greedy_rows_feel_bias_and_penalties() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    speaks = language(4)
    assert pick(logits, [row(speaks, temperature=0, logit_bias={0: 5})]) == [0]
    assert pick(logits, [row(speaks, temperature=0, ids=[2], presence_penalty=1.5)]) == [3]
    assert pick(logits, [row(speaks, temperature=0, ids=[2, 2, 3], frequency_penalty=1.1)]) == [1]
    assert pick(logits, [row(speaks, temperature=0, prompt=[2, 3], repetition_penalty=4)]) == [1]


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    one = row(language(4), temperature=0, prompt=[2] * 50, presence_penalty=2, frequency_penalty=2)
    assert pick(logits, [one]) == [2]


@pytest.mark.parametrize("seed", EXTREMES)
def test_uniform_is_a_pure_function_into_0_to_1(seed: int) -> None:
    values = [uniform(seed, position) for position in range(2000)]
    assert values == [uniform(seed, position) for position in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) > 1990
    assert abs(sum(values) / 2000 - 0.5) < 0.03


def test_uniform_differs_between_seeds_and_choices() -> None:
    firsts = {uniform(seed, 0) for seed in (*EXTREMES, *range(2, 1000))}
    assert len(firsts) == len(EXTREMES) + 998
    assert len({uniform(0, 0, choice) for choice in range(128)}) == 128


def test_the_first_choice_of_several_is_the_answer_of_one_and_the_others_are_not() -> None:
    logits = random_logits(20, 300)
    speaks = language(300)
    alone = [pick(logits[i : i + 1], [row(speaks, seed=4, ids=[0] * i)])[0] for i in range(20)]
    of_several = [[row(speaks, seed=4, n=3, ids=[0] * i, choice=choice) for i in range(20)] for choice in range(3)]
    first, second, third = [pick(logits, rows) for rows in of_several]
    assert first == alone
    assert len({tuple(first), tuple(second), tuple(third)}) == 3


def test_the_largest_number_stays_below_1_in_float32_and_draws_a_token_that_can_be_drawn() -> None:
    largest = uniform(1, 12_859_770)  # found by search: of the 53 bits the first 25 are ones
    assert 1 - 2**-24 <= float(torch.tensor(largest)) < 1
    logits = torch.tensor([[0.0, 0.0, -200.0]])
    assert pick_at([largest], logits, [row(language(3))]) == [1]
    assert pick_at([largest], logits, [row(language(3), top_k=2)]) == [1]
    assert pick_at([largest], logits.flip(-1), [row(language(3), top_p=0.999999)]) == [2]


@pytest.mark.parametrize("seed", EXTREMES)
def test_every_64_bit_seed_draws(seed: int) -> None:
    logits = random_logits(50, 300)
    rows = [row(language(300), temperature=0.8, top_p=0.9, seed=seed, ids=[0] * i) for i in range(50)]
    tokens = pick(logits, rows)
    assert tokens == pick(logits, rows)
    assert all(0 <= token < 300 for token in tokens)


def test_a_row_inside_the_candidates_is_right_beside_one_that_is_not() -> None:
    flat, peaked = torch.zeros(1000), torch.zeros(1000)
    peaked[700], peaked[30] = 20.0, 19.0
    logits = torch.stack([flat, peaked]).repeat(300, 1)
    tokens = pick(logits, [row(language(1000), top_p=0.99, seed=seed) for seed in range(600)])
    assert set(tokens[1::2]) == {700, 30}
    assert tokens[1::2].count(700) / 300 == pytest.approx(0.731, abs=0.08)
    assert len(set(tokens[::2])) > 200


@pytest.mark.parametrize("parameters", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}], ids=str)
def test_tokens_of_equal_logits_stay_together(parameters: dict[str, Any]) -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, 2.0, 0.0]])
    tokens = pick(logits.expand(300, -1), [row(language(5), seed=seed, **parameters) for seed in range(300)])
    assert set(tokens) == {0, 2, 3}


def test_tokens_that_the_model_rules_out_are_never_drawn() -> None:
    logits = torch.full((400, 2000), -torch.inf)
    logits[:, [3, 1500]] = 0.0
    some = [{}, {"top_p": 0.99}, {"top_k": 50}, {"min_p": 0.1}, {"top_k": 900, "top_p": 0.9999}]
    rows = [row(language(2000), seed=i, **some[i % len(some)]) for i in range(400)]
    assert set(pick(logits, rows)) == {3, 1500}


@pytest.mark.parametrize("vocabulary", [CANDIDATES // 2, WIDE, WIDEST])
@pytest.mark.parametrize(
    "parameters",
    [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.999, "logprobs": 3}],
)
@pytest.mark.parametrize("spoilt", ["one NaN", "all NaN", "all -inf", "one inf"])
def test_a_row_that_has_no_numbers_gets_no_token_and_its_neighbours_get_theirs(
    vocabulary: int, parameters: dict[str, Any], spoilt: str
) -> None:
    logits = random_logits(3, vocabulary, 0.1)
    rows = [row(language(vocabulary), **parameters, seed=i) for i in range(3)]
    before = pick(logits, rows)
    value = torch.nan if "NaN" in spoilt else torch.inf
    if spoilt.startswith("one"):
        logits[1, 7] = value
    else:
        logits[1] = value if "NaN" in spoilt else -value
    assert pick(logits, rows) == [before[0], NO_NUMBER, before[2]]
    with pytest.raises(JobFailedError, match="not finite"):
        rows[1].accept(Picked(NO_NUMBER))
    assert rows[1].ids == []


def test_min_tokens_keeps_every_end_away_until_then() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]]).expand(2, -1)
    speaks = language(4, [1])
    rows = [
        row(speaks, temperature=0, min_tokens=3, stop_token_ids=(2,), ids=[0, 0]),
        row(speaks, temperature=0, min_tokens=3, stop_token_ids=(2,), ids=[0, 0, 0]),
    ]
    assert pick(logits, rows) == [3, 1]


def with_logprobs(logits: torch.Tensor, rows: list[Sequence]) -> list[Picked]:
    return Sampler(TokenTexts(NamedTokens())).pick(logits.clone(), rows)


@pytest.mark.parametrize("vocabulary", [12, 50, WIDE])
def test_logprobs_are_those_of_the_raw_distribution(vocabulary: int) -> None:
    logits = random_logits(6, vocabulary, spread=0.3)
    parameters = [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 2.0, "logit_bias": {4: 100.0}},
        {"presence_penalty": 2.0, "repetition_penalty": 3.0, "top_k": 3},
    ]
    rows = [row(language(vocabulary), ids=[4, 4], seed=3, logprobs=5, **some) for some in parameters]
    rows += [row(language(vocabulary)), row(language(vocabulary), logprobs=0)]
    raw = logits.log_softmax(-1)
    picks = with_logprobs(logits, rows)
    assert picks[4].logprobs is None
    assert picks[5].logprobs is not None
    assert picks[5].logprobs.top == ()
    for i, picked in enumerate(picks[:4]):
        assert picked.logprobs is not None
        assert picked.logprobs.id == picked.token
        assert picked.logprobs.token == f"t{picked.token} "
        assert picked.logprobs.logprob == pytest.approx(float(raw[i, picked.token]), abs=1e-5)
        best = raw[i].sort(descending=True)
        assert [one.id for one in picked.logprobs.top] == best.indices[:5].tolist()
        assert [one.logprob for one in picked.logprobs.top] == pytest.approx(best.values[:5].tolist(), abs=1e-5)
    assert picks[2].token == 4


def test_asking_for_logprobs_changes_no_token() -> None:
    logits = random_logits(60, WIDE, spread=0.3)
    some = [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 4}]
    plain = [row(language(WIDE), seed=i, **some[i % 4]) for i in range(60)]
    asking = [row(language(WIDE), seed=i, logprobs=20, **some[i % 4]) for i in range(60)]
    assert pick(logits, asking) == pick(logits, plain)


def test_a_logprob_of_nothing_is_a_number_that_json_knows() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    [picked] = with_logprobs(logits, [row(language(3), temperature=0, logprobs=3)])
    assert picked.logprobs is not None
    assert picked.logprobs.top[2].logprob == IMPOSSIBLE


def toy_model(ids: list[int]) -> torch.Tensor:
    """Logits (1, 60) that hang on the last token, so that answers differ early if they differ at all."""
    generator = torch.Generator().manual_seed(ids[-1] if ids else 1000)
    return torch.randn(1, 60, generator=generator)


def answer(one: Sequence, count: int) -> list[int]:
    sampler = Sampler(TokenTexts(NamedTokens()))
    while len(one.ids) < count:
        one.accept(sampler.pick(toy_model(one.ids), [one])[0])
    return one.ids


@pytest.mark.parametrize("parameters", [*ALONE.values(), *COMBINED.values()], ids=[*ALONE, *COMBINED])
def test_a_resumed_answer_is_the_uninterrupted_one(parameters: dict[str, Any]) -> None:
    speaks = language(60, [59])
    whole = answer(row(speaks, prompt=PROMPT, seed=5, min_tokens=100, **parameters), 80)
    for cut in random.Random(1).sample(range(80), 4):
        again = row(speaks, prompt=PROMPT, seed=5, min_tokens=100, **parameters)
        for token in whole[:cut]:
            again.accept(Picked(token))
        assert answer(again, 80) == whole
