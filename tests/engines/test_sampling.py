"""Draws follow the distribution that was asked for, and hang on nothing but the row itself."""

import random
from dataclasses import replace

import pytest
import torch
from fastchat_q.workers.engines.sampling import CANDIDATES, Draw, sample, uniform

EXTREMES = (-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1)
MIXED = (0.35, 0.25, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01)
"""A small vocabulary's probabilities, in no order of token ids once shuffled."""


def draw(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, position: int = 0) -> Draw:
    return Draw(temperature, top_p, seed, position)


def random_logits(rows: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    return torch.randn(rows, vocabulary, generator=generator) * spread  # (rows, vocabulary) float32


def shuffled_mixed() -> list[float]:
    probabilities = list(MIXED)
    random.Random(3).shuffle(probabilities)
    return probabilities


def frequencies(probabilities: list[float], one: Draw, count: int) -> list[float]:
    """How often each token is drawn at the positions 0 to count."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    tokens = sample(logits, [replace(one, position=position) for position in range(count)])
    return [tokens.count(token) / count for token in range(len(probabilities))]


def test_temperature_0_takes_the_most_likely_token() -> None:
    logits = random_logits(16, 100)
    assert sample(logits, [draw(temperature=0, seed=i) for i in range(16)]) == logits.argmax(-1).tolist()


def test_temperature_0_takes_the_most_likely_token_beside_sampled_rows() -> None:
    logits = random_logits(32, 600, spread=0.5)
    draws = [draw(temperature=float(i % 2), top_p=(0.3, 0.99, 1.0)[i % 3], seed=i) for i in range(32)]
    tokens = sample(logits, draws)
    assert tokens[::2] == logits[::2].argmax(-1).tolist()
    assert tokens[1::2] != logits[1::2].argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-30, 1e-9, 1e-4])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_temperature_close_to_0_is_as_good_as_greedy(temperature: float, top_p: float) -> None:
    logits = random_logits(8, 400)
    draws = [draw(temperature, top_p, seed=i) for i in range(8)]
    assert sample(logits, draws) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("seed", EXTREMES)
def test_uniform_is_a_pure_function_into_0_to_1(seed: int) -> None:
    values = [uniform(seed, position) for position in range(2000)]
    assert values == [uniform(seed, position) for position in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) > 1990
    assert abs(sum(values) / 2000 - 0.5) < 0.03


def test_uniform_differs_between_seeds() -> None:
    firsts = {uniform(seed, 0) for seed in (*EXTREMES, *range(2, 1000))}
    assert len(firsts) == len(EXTREMES) + 998


def test_the_largest_number_stays_below_1_in_float32_and_draws_a_token_that_can_be_drawn() -> None:
    one = draw(seed=1, position=12_859_770)  # found by search: of the 53 bits the first 25 are ones
    assert 1 - 2**-24 <= float(torch.tensor(uniform(one.seed, one.position))) < 1
    logits = torch.tensor([0.0, 0.0, -200.0]).expand(1, -1)
    assert sample(logits, [one]) == [1]
    assert sample(logits, [replace(one, top_p=0.4)]) == [0]


@pytest.mark.parametrize("seed", EXTREMES)
def test_every_64_bit_seed_draws(seed: int) -> None:
    logits = random_logits(50, 300)
    draws = [draw(0.8, 0.9, seed, position) for position in range(50)]
    tokens = sample(logits, draws)
    assert tokens == sample(logits, draws)
    assert all(0 <= token < 300 for token in tokens)


@pytest.mark.parametrize("vocabulary", [50, 2000])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_row_draws_the_same_alone_and_beside_any_neighbours(vocabulary: int, spread: float) -> None:
    kinds = [(0.0, 1.0), (1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.3, 0.5), (1.0, 0.99), (2.0, 0.999), (1.0, 1e-6)]
    logits = random_logits(48, vocabulary, spread)
    choose = random.Random(vocabulary)
    draws = [draw(*choose.choice(kinds), seed=choose.randrange(2**63), position=i) for i in range(48)]
    alone = [sample(logits[i : i + 1], [draws[i]])[0] for i in range(48)]
    assert sample(logits, draws) == alone
    for _ in range(30):
        rows = choose.sample(range(48), choose.randint(2, 20))
        assert sample(logits[rows], [draws[i] for i in rows]) == [alone[i] for i in rows]


def test_frequencies_match_the_probabilities() -> None:
    probabilities = shuffled_mixed()
    count = 5000
    seen = frequencies(probabilities, draw(seed=5), count)
    chi_square = sum((s - p) ** 2 / p for s, p in zip(seen, probabilities, strict=True)) * count
    assert chi_square < 24.3, "the 0.1 % limit for 7 degrees of freedom"


def test_temperature_flattens_and_sharpens_as_its_formula_says() -> None:
    probabilities = shuffled_mixed()
    for temperature in (0.5, 2.0):
        powers = [p ** (1 / temperature) for p in probabilities]
        seen = frequencies(probabilities, draw(temperature, seed=6), 5000)
        assert seen == pytest.approx([power / sum(powers) for power in powers], abs=0.03)


@pytest.mark.parametrize(("top_p", "size"), [(0.3, 1), (0.5, 2), (0.74, 3), (0.9, 5), (0.995, 8)])
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p: float, size: int) -> None:
    probabilities = shuffled_mixed()
    nucleus = set(sorted(range(8), key=lambda token: -probabilities[token])[:size])
    seen = frequencies(probabilities, draw(top_p=top_p, seed=7), 5000)
    assert {token for token in range(8) if seen[token]} == nucleus
    mass = sum(probabilities[token] for token in nucleus)
    assert [seen[token] for token in nucleus] == pytest.approx([probabilities[t] / mass for t in nucleus], abs=0.03)


@pytest.mark.parametrize("top_p", [1e-300, 1e-46, 1e-12, 1e-3])
def test_a_tiny_top_p_equals_greedy(top_p: float) -> None:
    logits = random_logits(16, 600, spread=1.0)
    draws = [draw(1.5, top_p, seed=i) for i in range(16)]
    assert sample(logits, draws) == logits.argmax(-1).tolist()


def test_a_nucleus_larger_than_the_candidates_is_sampled_whole() -> None:
    vocabulary, count = 4 * CANDIDATES, 3000
    logits = torch.linspace(0.5, 0, vocabulary).expand(count, -1)  # flat: its nucleus is nearly everything
    tokens = sample(logits, [draw(top_p=0.9, seed=8, position=position) for position in range(count)])
    probabilities = logits[0].softmax(-1)
    size = int((probabilities.cumsum(-1) < 0.9).sum()) + 1
    assert CANDIDATES < size < vocabulary
    assert max(tokens) < size
    beyond = sum(token >= CANDIDATES for token in tokens) / count
    assert beyond == pytest.approx(1 - float(probabilities[:CANDIDATES].sum()) / 0.9, abs=0.03)


def test_a_row_inside_the_candidates_is_right_beside_one_that_is_not() -> None:
    flat, peaked = torch.zeros(1000), torch.zeros(1000)
    peaked[700], peaked[30] = 20.0, 19.0
    logits = torch.stack([flat, peaked]).repeat(300, 1)
    tokens = sample(logits, [draw(top_p=0.99, seed=9, position=position) for position in range(600)])
    assert set(tokens[1::2]) == {700, 30}
    assert tokens[1::2].count(700) / 300 == pytest.approx(0.731, abs=0.08)
    assert len(set(tokens[::2])) > 200


def test_a_vocabulary_smaller_than_the_candidates_is_no_special_case() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    assert sample(logits, [draw(top_p=0.999, seed=1)])[0] in {0, 1, 2}
