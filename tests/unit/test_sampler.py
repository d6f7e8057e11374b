"""Sampling obeys its parameters, and its randomness is a function of seed and position alone."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from llumnix.core.sampling import SamplingParams
from llumnix.instance.request import Request
from llumnix.instance.sampler import GOLDEN, GROUP, MASK64, MIX_1, MIX_2, Sampler

EOS = 2
VOCAB = 3 * GROUP + 17  # several groups, the last one short


def request(tokens: list[int] | None = None, prompt_len: int | None = None, **settings: Any) -> Request:
    known = [1, 5, 9] if tokens is None else tokens
    sampling = SamplingParams(**{"max_tokens": 1000, "seed": 0} | settings)
    length = len(known) if prompt_len is None else prompt_len
    return Request("r", 0, "", sampling, 0, 0, "", 0.0, known, length)


def scores(seed: int, rows: int = 1, vocab: int = VOCAB, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def tokens_of(logits: Tensor, requests: list[Request]) -> list[int]:
    return [result.token for result in Sampler(frozenset({EOS})).sample(logits.clone(), requests)]


def draws(logits: Tensor, count: int, **settings: Any) -> Counter[int]:
    """``count`` draws from the same scores, in batches of one seed at many positions."""
    tokens: Counter[int] = Counter()
    for seed in range(-(-count // 500)):
        rows = min(500, count - 500 * seed)
        batch = [request([1] * (1 + row), seed=seed, **settings) for row in range(rows)]
        tokens.update(tokens_of(logits.expand(len(batch), -1), batch))
    return tokens


@pytest.mark.parametrize("vocab", [VOCAB, 16 * 50])
def test_greedy_takes_the_best(vocab: int) -> None:
    logits = scores(1, rows=4, vocab=vocab)
    greedy = [request(temperature=0.0, seed=row) for row in range(4)]
    assert tokens_of(logits, greedy) == logits.argmax(dim=-1).tolist()
    assert tokens_of(logits, [request(temperature=1e-30)] * 4) == logits.argmax(dim=-1).tolist()
    assert Sampler(frozenset()).sample(torch.empty(0, vocab), []) == []


def test_the_draw_follows_the_softmax() -> None:
    count, logits = 20_000, torch.full((1, VOCAB), -20.0)
    likely = [0, 1, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP, VOCAB - 1]
    logits[0, likely] = torch.tensor([0.0, 1.0, 0.5, -1.0, 1.5, 0.0, 1.0])
    wanted = torch.softmax(logits[0].double(), dim=-1)
    got = draws(logits, count)
    for token in likely:
        share = float(wanted[token])
        assert abs(got[token] / count - share) < 4 * math.sqrt(share * (1 - share) / count)


def test_temperature_sharpens_and_flattens() -> None:
    logits = torch.full((1, VOCAB), -100.0)
    logits[0, :2] = torch.tensor([1.0, 0.0])
    for temperature in (0.5, 2.0):
        share = draws(logits, 4000, temperature=temperature)[0] / 4000
        assert share == pytest.approx(1 / (1 + math.exp(-1 / temperature)), abs=0.03)


def test_noise_is_splitmix_by_seed_position_and_token() -> None:
    """The whole definition again, in Python integers: what a seed means must never change by accident."""

    def mix(value: int) -> int:
        value &= MASK64
        value = (value ^ value >> 30) * MIX_1 & MASK64
        value = (value ^ value >> 27) * MIX_2 & MASK64
        return value ^ value >> 31

    def noise(key: int, counter: int) -> float:
        return -math.log(-math.log(((mix(key + (counter + 1) * GOLDEN) >> 11) + 0.5) * 2.0**-53))

    logits = scores(3)
    weights = torch.cat([logits[0].double(), torch.full((4 * GROUP - VOCAB,), -math.inf).double()]).view(
        4, GROUP
    )
    mass = weights.logsumexp(dim=-1).tolist()
    for seed, position in ((0, 1), (1, 1), (2**63 - 1, 4000), (77, 12), (78, 12)):
        key = mix(mix(seed + GOLDEN) + (position + 1) * GOLDEN)
        group = max(range(4), key=lambda index: mass[index] + noise(key ^ 0x5851F42D4C957F2D, index))
        members = range(group * GROUP, min(VOCAB, (group + 1) * GROUP))
        token = max(members, key=lambda index: float(logits[0, index]) + noise(key, index))
        assert tokens_of(logits, [request([3] * position, seed=seed)]) == [token]


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = scores(4, rows=6)
    batch = [
        request([1, 2, 3], seed=5),
        request([1], seed=5, top_p=0.7),
        request([4] * 9, seed=6, top_k=20, temperature=1.3),
        request([4] * 9, seed=6, temperature=0.0),
        request([4, 4, 7], seed=7, min_p=0.05, frequency_penalty=0.5, prompt_len=1),
        request([4, 4, 7], seed=7, repetition_penalty=1.3, logprobs=3),
    ]
    together = tokens_of(logits, batch)
    assert together == [tokens_of(logits[row : row + 1], [batch[row]])[0] for row in range(6)]
    assert together == tokens_of(logits.flip(0), batch[::-1])[::-1]


def test_seed_and_position_matter_and_nothing_else() -> None:
    logits = torch.zeros(1, VOCAB)
    first = tokens_of(logits, [request([1, 2, 3], seed=5)])
    assert first == tokens_of(logits, [request([9, 8, 7], seed=5, prompt_len=1)])
    others = {
        tokens_of(logits, [request([1] * length, seed=seed)])[0]
        for length in range(1, 11)
        for seed in range(10)
    }
    assert len(others) > 80


def test_rounding_differences_rarely_change_a_draw() -> None:
    """Flat scores over many tokens, where an inverse-CDF draw would turn on the last bits."""
    vocab = 20_000
    logits, noise = scores(5, vocab=vocab, spread=0.5), scores(6, vocab=vocab, spread=0.003)
    batch = [request([1] * (1 + row)) for row in range(400)]
    before = tokens_of(logits.expand(400, -1), batch)
    after = tokens_of((logits + noise).expand(400, -1), batch)
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 8


def test_top_k_keeps_the_k_best_in_proportion() -> None:
    logits = scores(7)
    best = logits[0].topk(3)
    got = draws(logits, 3000, top_k=3)
    assert set(got) == set(best.indices.tolist())
    shares = torch.softmax(best.values, dim=-1).tolist()
    for token, share in zip(best.indices.tolist(), shares, strict=True):
        assert got[token] / 3000 == pytest.approx(share, abs=0.04)
    assert set(draws(logits, 50, top_k=1)) == {int(logits.argmax())}
    assert tokens_of(logits, [request(top_k=VOCAB + 5)]) == tokens_of(logits, [request()])


@pytest.mark.parametrize("vocab", [VOCAB, 16 * 300, 16 * 3000])
def test_a_truncated_draw_is_the_plain_draw_over_what_is_left(vocab: int) -> None:
    logits = scores(8, vocab=vocab)
    ranked = logits[0].sort(descending=True)
    shares = torch.softmax(ranked.values.double(), dim=-1).cumsum(dim=0)
    fits = {"top_k": 40, "min_p": 0.02, "top_p": 0.3}
    left = {
        "top_k": 40,
        "min_p": int((ranked.values >= ranked.values[0] + math.log(0.02)).sum()),
        "top_p": int((shares < 0.3).sum()) + 1,
    }
    for name, setting in fits.items():
        kept = torch.full_like(logits, -math.inf)
        kept[0, ranked.indices[: left[name]]] = ranked.values[: left[name]]
        for seed in range(20):
            cut = tokens_of(logits, [request(seed=seed, **{name: setting})])
            assert cut == tokens_of(kept, [request(seed=seed)]), (name, seed)


def test_top_p_keeps_the_fewest_that_hold_the_share() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [10, 300, 500, 700]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draws(logits, 500, top_p=0.3)) == {10}
    assert set(draws(logits, 500, top_p=0.5)) == {10, 300}
    assert set(draws(logits, 500, top_p=0.75)) == {10, 300, 500}
    assert set(draws(logits, 500, top_p=0.95)) == {10, 300, 500, 700}
    assert set(draws(logits, 500, top_p=1e-9)) == {10}


def test_top_p_over_a_flat_distribution_needs_many_tokens() -> None:
    vocab = 5000
    logits = -torch.arange(vocab)[None].float() * 1e-4  # slowly falling: order and count are exact
    shares = torch.softmax(logits[0].double(), dim=-1).cumsum(dim=-1)
    kept = int((shares < 0.6).sum()) + 1
    got = draws(logits, 2000, top_p=0.6)
    assert 0.98 * kept < max(got) < kept + 2  # float32 sums decide the last one
    assert kept > 1024


def test_min_p_drops_what_is_far_below_the_best() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [10, 300, 500]] = torch.tensor([0.6, 0.25, 0.15]).log()
    assert set(draws(logits, 300, min_p=0.5)) == {10}
    assert set(draws(logits, 300, min_p=0.4)) == {10, 300}
    assert set(draws(logits, 300, min_p=0.2)) == {10, 300, 500}


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [10, 300, 500]] = torch.tensor([0.4, 0.35, 0.25]).log()
    assert set(draws(logits, 300, top_k=2, top_p=0.5)) == {10}  # 0.4 of 0.75 is over half


def test_penalties_change_scores_as_defined() -> None:
    """Greedy over two candidates whose order a penalty turns."""

    def best(first: float, second: float, **settings: Any) -> int:
        logits = torch.full((1, VOCAB), -50.0)
        logits[0, 30], logits[0, 40] = first, second
        tokens, prompt_len = [30, 7, 40, 30, 30], 2
        return tokens_of(logits, [request(tokens, prompt_len, temperature=0.0, **settings)])[0]

    assert best(2.0, 1.9) == 30
    # Output: token 30 twice, token 40 once; prompt: token 30 once more.
    assert best(2.0, 1.9, frequency_penalty=0.05) == 30
    assert best(2.0, 1.9, frequency_penalty=0.2) == 40
    assert best(2.0, 1.9, presence_penalty=1.0) == 30  # both are present once
    assert best(2.0, 1.9, repetition_penalty=2.0) == 30  # both halve
    assert best(-1.0, -1.1, repetition_penalty=2.0) == 30  # both double


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_output_penalties_leave_the_prompt_alone(name: str) -> None:
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, 30], logits[0, 40] = 2.0, 1.9
    assert tokens_of(logits, [request([30, 7], 2, temperature=0.0, **{name: 1.0})]) == [30]
    assert tokens_of(logits, [request([30, 7], 0, temperature=0.0, **{name: 1.0})]) == [40]


def test_repetition_penalty_covers_prompt_and_output_once_each() -> None:
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, 30], logits[0, 40] = 2.0, 1.2
    repeated = [30, 30, 30]
    assert tokens_of(logits, [request(repeated, 3, temperature=0.0, repetition_penalty=1.5)]) == [30]
    assert tokens_of(logits, [request(repeated, 3, temperature=0.0, repetition_penalty=1.8)]) == [40]


def test_nothing_ends_a_request_before_min_tokens() -> None:
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, [EOS, 77, 30]] = torch.tensor([9.0, 8.0, 7.0])

    def best(output_len: int, **settings: Any) -> int:
        asked = request([1] * (3 + output_len), 3, temperature=0.0, min_tokens=2, **settings)
        return tokens_of(logits, [asked])[0]

    assert best(0) == best(1) == 77
    assert best(0, stop_token_ids=(77, VOCAB + 3)) == 30
    assert best(2, stop_token_ids=(77,)) == EOS
    assert best(0, ignore_eos=True) == EOS  # it would not end the request


def test_logprobs_are_the_models_own() -> None:
    logits = scores(8, rows=3)
    batch = [
        request([5, 5], 0, logprobs=3, temperature=0.3, frequency_penalty=2.0, min_tokens=4),
        request(temperature=0.0),
        request(logprobs=0, top_k=2),
    ]
    results = Sampler(frozenset({EOS})).sample(logits.clone(), batch)
    raw = torch.log_softmax(logits, dim=-1)
    first, third = results[0].logprob, results[2].logprob
    assert first is not None and third is not None and results[1].logprob is None
    best = raw[0].topk(3)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist())
    assert first.logprob == pytest.approx(float(raw[0, results[0].token]))
    assert third.top == () and third.logprob == pytest.approx(float(raw[2, results[2].token]))
