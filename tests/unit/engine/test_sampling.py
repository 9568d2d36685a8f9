"""Next tokens and log-probabilities against values worked out by hand."""

import math
from collections import Counter

import pytest
import torch

from engine.sampling import SamplingParams, choose, generator, logprobs

CPU = torch.device("cpu")
PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
LOGITS = torch.tensor([PROBABILITIES]).log() + 3.0


def draw(count: int, **params: float) -> Counter[int]:
    wanted = SamplingParams(max_tokens=1, **params)  # type: ignore[arg-type]
    random = generator(11, CPU)
    return Counter(choose(LOGITS, [wanted], [random])[0] for _ in range(count))


def test_greedy_takes_the_most_likely() -> None:
    rows = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 1.0]])
    params = SamplingParams(max_tokens=1, temperature=0.0)
    assert choose(rows, [params, params], [None, None]) == [1, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    weights = [p ** (1 / temperature) for p in PROBABILITIES]
    wanted = [w / sum(weights) for w in weights]
    seen = draw(4000, temperature=temperature)
    for token, probability in enumerate(wanted):
        # five standard deviations of a binomial share
        slack = 5 * math.sqrt(probability * (1 - probability) / 4000)
        assert abs(seen[token] / 4000 - probability) < slack


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert set(draw(400, top_p=0.5)) == {0}
    assert set(draw(400, top_p=0.51)) == {0, 1}
    assert set(draw(400, top_p=0.8)) == {0, 1}
    assert set(draw(800, top_p=0.94)) == {0, 1, 2}


def test_top_k_keeps_k() -> None:
    assert set(draw(400, top_k=2)) == {0, 1}
    assert set(draw(400, top_k=1)) == {0}
    assert set(draw(800, top_k=99)) == {0, 1, 2, 3}


def test_seed_repeats_and_does_not_depend_on_the_neighbours() -> None:
    params = SamplingParams(max_tokens=1)
    torch.manual_seed(0)
    rows = torch.randn(3, 50)

    def drawn(batch: torch.Tensor, seeds: list[int]) -> list[list[int]]:
        randoms = [generator(seed, CPU) for seed in seeds]
        return [choose(batch, [params] * len(seeds), list(randoms)) for _ in range(10)]

    together = drawn(rows, [1, 2, 3])
    alone = drawn(rows[1:2], [2])
    assert [step[1] for step in together] == [step[0] for step in alone]
    assert together == drawn(rows, [1, 2, 3])
    assert [step[1] for step in together] != [step[0] for step in drawn(rows[1:2], [9])]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    scored = logprobs(torch.cat([LOGITS, LOGITS, LOGITS]), [2, 0, 3], [2, 0, 1])
    assert [one.token for one in scored] == [2, 0, 3]
    assert [one.logprob for one in scored] == pytest.approx([math.log(0.15), math.log(0.5), math.log(0.05)])
    assert [token for token, _ in scored[0].top] == [0, 1]
    assert [value for _, value in scored[0].top] == pytest.approx([math.log(0.5), math.log(0.3)])
    assert scored[1].top == []
    assert scored[2].top[0][0] == 0


def test_many_rows_are_scored_like_few() -> None:
    torch.manual_seed(1)
    rows = torch.randn(300, 40)
    tokens = [i % 40 for i in range(300)]
    scored = logprobs(rows, tokens, [1] * 300)
    wanted = rows.log_softmax(-1)[range(300), tokens]
    assert [one.logprob for one in scored] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert [one.top[0][0] for one in scored] == rows.argmax(-1).tolist()


def test_nothing_to_score() -> None:
    assert logprobs(torch.empty(0, 4), [], []) == []
