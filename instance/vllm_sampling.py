"""Our sampling inside vLLM: what a request's parameters become there, and the logits processor (vLLM's public
extension point) that chooses its tokens.

vLLM's own sampler draws from a generator with state that cannot travel, and counts penalties from where a
request was added. Ours is a function of the request and the position, so a request that moves, or goes
between vLLM and our engine, gets the tokens it would have got. Hence vLLM decodes greedily throughout: for a
request that samples or has penalties the processor leaves one finite score, that of the token our sampler
chose. Log probabilities are the model's own, as vLLM notes them before any processor. Plain greedy requests
never come here. Every row of a partial prefill is sampled too, and thrown away by vLLM.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from vllm import SamplingParams as VllmSamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from llumnix.core.sampling import LOGPROBS_OFF, SamplingParams
from llumnix.instance.request import Request
from llumnix.instance.sampler import Sampler

OURS = "llumnix"


def vllm_params(request: Request, eos_token_ids: frozenset[int], vocab_size: int) -> VllmSamplingParams:
    """What vLLM is told of a request whose known tokens it gets as a prompt. It takes no stop tokens outside
    the vocabulary, which never come anyway."""
    sampling, generated = request.sampling, request.output_len
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos_token_ids)
    ends = {token for token in ends if token < vocab_size}
    ours = {"sampling": asdict(sampling), "prompt_len": request.prompt_len}
    return VllmSamplingParams(
        temperature=0.0,
        max_tokens=sampling.max_tokens - generated,
        # Until then vLLM keeps back the model's end tokens too, even if nothing ends this request.
        min_tokens=max(0, sampling.min_tokens - generated) if ends else 0,
        ignore_eos=True,  # the model's end tokens are among the stop tokens if they count
        stop_token_ids=sorted(ends),
        logprobs=None if sampling.logprobs == LOGPROBS_OFF else sampling.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if sampling.greedy else {OURS: ours},
    )


class _Row:
    """A request in vLLM's batch: ``request`` as our sampler knows it, its tokens followed in ``outputs``,
    vLLM's live list of what was generated here."""

    def __init__(self, request: Request, outputs: list[int]) -> None:
        self._request = request
        self._outputs = outputs
        self._before = len(request.tokens)

    def request(self) -> Request:
        known = len(self._request.tokens) - self._before
        self._request.tokens.extend(self._outputs[known:])
        return self._request


class LlumnixLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """See the module. vLLM makes one per engine and tells it of every change of its batch."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        self._sampler = Sampler(frozenset())  # vLLM itself keeps ends back until min_tokens

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, outputs in batch_update.added:
            self._rows.pop(index, None)
            ours = (params.extra_args or {}).get(OURS)
            if ours is not None:
                self._rows[index] = _Row(_request(ours, prompt or []), outputs)
        for first, second, direction in batch_update.moved:
            moving, other = self._rows.pop(first, None), self._rows.pop(second, None)
            if moving is not None:
                self._rows[second] = moving
            if other is not None and direction is MoveDirectionality.SWAP:
                self._rows[first] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._rows:
            return logits
        rows = sorted(self._rows)
        chosen = self._sampler.sample(logits[rows], [self._rows[row].request() for row in rows])
        logits[rows] = float("-inf")
        logits[rows, [one.token for one in chosen]] = 0.0
        return logits


def _request(ours: dict[str, Any], tokens: list[int]) -> Request:
    """The request as our sampler needs it. Its min_tokens are vLLM's business."""
    fields = dict(_tuples(ours["sampling"]))
    sampling = SamplingParams(**{**fields, "min_tokens": 0, "logprobs": LOGPROBS_OFF})
    return Request(
        request_id="",
        epoch=0,
        frontend_address="",
        sampling=sampling,
        scheduling_priority=0,
        execution_priority=0,
        tenant="",
        arrived_at=0.0,
        tokens=list(tokens),
        prompt_len=ours["prompt_len"],
    )


def _tuples(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        yield name, tuple(value) if isinstance(value, list) else value
