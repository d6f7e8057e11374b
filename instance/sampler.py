"""Chooses the next token of each request from the model's scores.

The order is fixed: raw log probabilities are noted first (what ``logprobs`` reports is the model's own
distribution, before everything else), then forbidden tokens and penalties, then temperature, then min-p,
top-k and top-p, each over what the one before left; then the draw.

**Randomness is a function of (seed, position) only**, so a request that moved, was preempted or is continued
after a crash gets the tokens it would have got, in any batch and on any device. And the draw must not turn on
rounding: scores differ in their last bits between batches. Both follow from the Gumbel-max trick (the highest
of score + Gumbel noise is a draw from the softmax, and small changes of scores rarely change the winner) with
noise from a counter-based hash. Hashing a whole vocabulary per token would cost more than the rest of the
step, so the draw has two levels, exactly equal in distribution: first a group of neighbouring tokens by the
groups' log-sum-exp, then a token within it.

Ending a request at end tokens, stop tokens or lengths is the engine core's job. Called by executors.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from llumnix.core.messages.serving import TokenLogprob
from llumnix.core.sampling import GREEDY_BELOW, LOGPROBS_OFF, SamplingParams
from llumnix.instance.executor import SampledToken
from llumnix.instance.request import Request

GROUP: Final = (
    256  # tokens per group of the two-level draw; part of what a seed means, so never to be changed
)
CANDIDATES: Final = (256, 2048)  # likeliest tokens looked at for truncation before all are sorted
STRIPE: Final = 16  # tokens that are compared as one when looking for the likeliest
NO_LIMIT: Final = 1 << 60
MINUS_INF: Final = float("-inf")
MASK64: Final = (1 << 64) - 1

# splitmix64 (Steele, Lea and Flood 2014)
GOLDEN: Final = 0x9E3779B97F4A7C15
MIX_1: Final = 0xBF58476D1CE4E5B9
MIX_2: Final = 0x94D049BB133111EB
GROUP_STREAM: Final = 0x5851F42D4C957F2D  # keeps the groups' noise apart from the tokens'


class Sampler:
    """Stateless between calls. ``eos_token_ids`` are needed to keep them back until ``min_tokens``."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = tuple(sorted(eos_token_ids))

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """One token per row of ``logits``, float32 ``[requests, vocab]``, which may be overwritten. The token
        takes position ``len(request.tokens)``."""
        if not requests:
            return []
        params = [request.sampling for request in requests]
        reported = [row for row, param in enumerate(params) if param.logprobs != LOGPROBS_OFF]
        raw = torch.log_softmax(logits[reported], dim=-1) if reported else None
        self._forbid(logits, requests)
        _penalize(logits, requests)
        random = [row for row, param in enumerate(params) if param.temperature >= GREEDY_BELOW]
        if len(random) == len(params):
            chosen = _choose(logits, requests)
        else:
            chosen = _likeliest(logits)
            if random:
                chosen[random] = _choose(logits[random], [requests[row] for row in random])
        results = [SampledToken(token) for token in chosen.tolist()]
        if raw is not None:
            for row, logprob in zip(reported, _report(raw, chosen[reported], [params[r] for r in reported])):
                results[row] = SampledToken(results[row].token, logprob)
        return results

    def _forbid(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Nothing that would end a request may come before its ``min_tokens``."""
        rows: list[int] = []
        tokens: list[int] = []
        for row, request in enumerate(requests):
            params = request.sampling
            if request.output_len < params.min_tokens:
                ending = params.stop_token_ids if params.ignore_eos else (*self._eos, *params.stop_token_ids)
                known = [token for token in ending if 0 <= token < logits.shape[1]]
                rows += [row] * len(known)
                tokens += known
        if rows:
            logits[rows, tokens] = MINUS_INF


def _penalize(logits: Tensor, requests: Sequence[Request]) -> None:
    """Repetition penalty over prompt and output (Keskar et al. 2019), presence and frequency over the
    output."""
    repeated, counted = [], []
    for row, request in enumerate(requests):
        params = request.sampling
        if params.repetition_penalty != 1.0:
            repeated.append((row, request.tokens))
        if params.presence_penalty or params.frequency_penalty:
            counted.append((row, request.tokens[request.prompt_len :]))
    if not repeated and not counted:
        return

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(request.sampling, name) for request in requests], device=logits.device)

    if repeated:
        rows, tokens, _ = _occurrences(repeated, logits)
        penalty, scores = column("repetition_penalty")[rows], logits[rows, tokens]
        logits[rows, tokens] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if counted:
        rows, tokens, counts = _occurrences(counted, logits)
        logits[rows, tokens] -= column("presence_penalty")[rows] + column("frequency_penalty")[rows] * counts


def _occurrences(histories: list[tuple[int, list[int]]], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct (row, token) pairs of some rows' histories, and how often each occurs."""
    vocab = logits.shape[1]
    keys = torch.cat([torch.tensor(tokens, dtype=torch.int64) + row * vocab for row, tokens in histories])
    distinct, counts = torch.unique(keys.to(logits.device), return_counts=True)
    return distinct // vocab, distinct % vocab, counts


def _choose(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Temperature, the truncations on the rows that want any, and the draw, int64 ``[rows]``. Overwrites."""
    params = [request.sampling for request in requests]
    logits /= torch.tensor([param.temperature for param in params], device=logits.device)[:, None]
    cut = [row for row, param in enumerate(params) if param.top_k or param.min_p > 0.0 or param.top_p < 1.0]
    if len(cut) == len(params):
        return _draw_truncated(logits, requests, CANDIDATES)
    if not cut:
        return _draw(logits, requests)
    whole = sorted(set(range(len(params))) - set(cut))
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    chosen[cut] = _draw_truncated(logits[cut], [requests[row] for row in cut], CANDIDATES)
    chosen[whole] = _draw(logits[whole], [requests[row] for row in whole])
    return chosen


def _draw_truncated(logits: Tensor, requests: Sequence[Request], candidates: tuple[int, ...]) -> Tensor:
    """A draw from what min-p, top-k and top-p leave of each row. Each of them keeps a first part of the
    tokens in order of score, so the likeliest few are enough wherever the cut turns out to lie among them;
    other rows look at the next number of ``candidates``, in the end at all."""
    vocab = logits.shape[1]
    count = min(candidates[0], vocab) if candidates else vocab
    scores, tokens = _best(logits, count)
    keep = _kept_counts(scores, logits, [request.sampling for request in requests])
    beyond = torch.arange(count, device=logits.device) >= keep
    chosen = _draw_among(scores.masked_fill(beyond, MINUS_INF), tokens, vocab, requests)
    open_rows = [row for row, number in enumerate(keep[:, 0].tolist()) if number == count < vocab]
    if open_rows:
        rest = [requests[row] for row in open_rows]
        chosen[open_rows] = _draw_truncated(logits[open_rows], rest, candidates[1:])
    return chosen


def _best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest scores of each row in falling order, and their tokens. They lie in the ``count``
    stripes of highest maximum, so only these are sorted; a stripe is every so manieth token."""
    rows, vocab = logits.shape
    stripes = vocab // STRIPE
    if vocab % STRIPE or count >= stripes:
        best = logits.topk(count, dim=-1)
        return best.values, best.indices
    likely = logits.view(rows, STRIPE, stripes).amax(dim=1).topk(count, dim=-1, sorted=False).indices
    members = torch.arange(STRIPE, device=logits.device)[:, None] * stripes
    tokens = (likely[:, None] + members).view(rows, STRIPE * count)
    best = logits.gather(1, tokens).topk(count, dim=-1)
    return best.values, tokens.gather(1, best.indices)


def _likeliest(logits: Tensor) -> Tensor:
    """What argmax over the last dimension gives, several times faster on a CPU: first the best stripe, then
    the best within it. Of equal scores any may win."""
    rows, vocab = logits.shape
    if vocab % STRIPE:
        return logits.argmax(dim=-1)
    striped = logits.view(rows, STRIPE, vocab // STRIPE)
    stripe = striped.amax(dim=1).argmax(dim=-1)
    members = striped[torch.arange(rows, device=logits.device), :, stripe]
    return members.argmax(dim=-1) * striped.shape[2] + stripe


def _kept_counts(best: Tensor, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """How many of the likeliest tokens remain, int64 ``[rows, 1]``; the number of candidates if the cut may
    lie beyond them. ``best`` are their scores in falling order."""
    count = best.shape[1]
    min_p = torch.tensor([param.min_p for param in params], device=best.device)[:, None]
    top_k = torch.tensor([param.top_k or NO_LIMIT for param in params], device=best.device)[:, None]
    top_p = torch.tensor(
        [param.top_p if param.top_p < 1.0 else NO_LIMIT for param in params], device=best.device
    )
    keep = (best >= best[:, :1] + min_p.log()) & (torch.arange(count, device=best.device) < top_k)
    # Where top-p takes its share of all tokens, their whole mass counts, which costs a look at every score.
    shares_all = any(param.top_p < 1.0 and not param.top_k and param.min_p == 0.0 for param in params)
    total = logits.logsumexp(dim=-1, keepdim=True) if shares_all else best[:, :1]
    mass = (best - total).exp() * keep
    before = mass.cumsum(dim=-1) - mass
    # What min-p and top-k left is the whole that top-p takes its share of.
    cut = (min_p > 0.0) | (top_k < NO_LIMIT)
    whole = torch.where(cut, mass.sum(dim=-1, keepdim=True), 1.0)
    inside = (keep & (before < top_p[:, None] * whole)).sum(dim=-1, keepdim=True)
    return torch.where(cut & keep[:, -1:], count, inside)


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """A draw from each row's softmax, int64 ``[rows]``. See the module."""
    rows, vocab = logits.shape
    groups = -(-vocab // GROUP)
    grouped = torch.nn.functional.pad(logits, (0, groups * GROUP - vocab), value=MINUS_INF)
    grouped = grouped.view(rows, groups, GROUP)
    keys = [_key(request.sampling.seed, len(request.tokens)) for request in requests]
    group_noise = _gumbel([key ^ GROUP_STREAM for key in keys], torch.arange(groups, device=logits.device))
    group = (grouped.logsumexp(dim=-1) + group_noise).argmax(dim=-1)
    members = group[:, None] * GROUP + torch.arange(GROUP, device=logits.device)
    within = grouped[torch.arange(rows, device=logits.device), group] + _gumbel(keys, members)
    return group * GROUP + within.argmax(dim=-1)


def _draw_among(scores: Tensor, tokens: Tensor, vocab: int, requests: Sequence[Request]) -> Tensor:
    """The same draw where only ``tokens`` ``[rows, count]`` of a row have ``scores``, and all others none."""
    keys = [_key(request.sampling.seed, len(request.tokens)) for request in requests]
    groups = torch.arange(-(-vocab // GROUP), device=scores.device)
    group_noise = _gumbel([key ^ GROUP_STREAM for key in keys], groups)
    mass = (scores - scores[:, :1]).double().exp()
    held = torch.zeros(len(keys), len(groups), dtype=torch.float64, device=scores.device)
    group = (held.scatter_add_(1, tokens // GROUP, mass).log() + group_noise).argmax(dim=-1, keepdim=True)
    elsewhere = tokens // GROUP != group
    noisy = (scores + _gumbel(keys, tokens)).masked_fill(elsewhere, MINUS_INF)
    return tokens.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0]


def _gumbel(keys: list[int], counters: Tensor) -> Tensor:
    """Gumbel noise, float64 ``[rows, counters]``, from each row's key and the counters, int64 ``[counters]``
    or ``[rows, counters]``."""
    key = torch.tensor([_signed(key) for key in keys], device=counters.device)[:, None]
    mixed = _mix(key + (counters + 1) * _signed(GOLDEN))
    uniform = (_shift_right(mixed, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _key(seed: int, position: int) -> int:
    """One 64-bit key per (seed, position)."""
    return _mix_int(_mix_int(seed + GOLDEN) + (position + 1) * GOLDEN)


def _mix_int(value: int) -> int:
    """splitmix64's finalizer on a Python integer's low 64 bits."""
    value &= MASK64
    value = ((value ^ (value >> 30)) * MIX_1) & MASK64
    value = ((value ^ (value >> 27)) * MIX_2) & MASK64
    return value ^ (value >> 31)


def _mix(value: Tensor) -> Tensor:
    """The same on int64, whose products wrap around."""
    value = (value ^ _shift_right(value, 30)) * _signed(MIX_1)
    value = (value ^ _shift_right(value, 27)) * _signed(MIX_2)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _report(raw: Tensor, chosen: Tensor, params: Sequence[SamplingParams]) -> list[TokenLogprob]:
    """Log probabilities of the chosen tokens and of each row's likeliest ones."""
    most = min(max(param.logprobs for param in params), raw.shape[1])
    best = raw.topk(most, dim=-1)
    own = raw.gather(1, chosen[:, None])[:, 0].tolist()
    return [
        TokenLogprob(logprob, tuple(zip(tokens[: param.logprobs], values[: param.logprobs])))
        for logprob, tokens, values, param in zip(own, best.indices.tolist(), best.values.tolist(), params)
    ]
