"""A request on its instance: what was asked, what was generated, which KV it holds.

Owned by the engine core; executors, samplers and the agent read it. Positions count prompt + output together.
``computed_tokens`` of those have their KV in ``blocks``; a running request that has prefilled always knows
exactly one token more than it has computed, the one sampled last. One that waits has computed none, wherever
its KV may have been copied to.
"""

from dataclasses import dataclass, field

from llumnix.core.messages.control import RequestRow, RequestStatus
from llumnix.core.messages.serving import RequestSpec, TokenLogprob
from llumnix.core.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """Mutable state of one request. ``kv_version`` changes each time its KV is given up or comes to lie
    elsewhere (preempted, admitted, dropped by the host), so that a migration in progress notices that what it
    copied no longer counts. ``charged``: its prompt is in its tenant's service already; what is computed
    again is no service. ``joined_tokens`` were computed when it joined the batch last. ``block_hashes``:
    chained hashes of its first full blocks, as far as anyone has asked (host_cache.py). ``logprobs``: those
    of the last tokens, if asked for; tokens that another instance generated have none here. With
    ``tokens_max`` tokens it ends; one that is ``plain`` ends by no token before (end tokens of the model
    aside), and wants no log probabilities."""

    request_id: str
    epoch: int
    frontend_address: str
    sampling: SamplingParams
    scheduling_priority: int
    execution_priority: int
    tenant: str
    arrived_at: float
    tokens: list[int]
    prompt_len: int
    adapter: str = ""
    status: RequestStatus = RequestStatus.WAITING
    computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    kv_version: int = 0
    preemptions: int = 0
    charged: bool = False
    joined_tokens: int = 0
    block_hashes: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens_max: int = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.tokens_max = self.prompt_len + sampling.max_tokens
        self.plain = not sampling.stop_token_ids and sampling.logprobs < 0

    @classmethod
    def from_spec(cls, spec: RequestSpec, now: float) -> "Request":
        """A fresh local request. ``now`` is this instance's clock; time already waited is carried over."""
        return cls(
            request_id=spec.request_id,
            epoch=spec.epoch,
            frontend_address=spec.frontend_address,
            sampling=spec.sampling,
            scheduling_priority=spec.scheduling_priority,
            execution_priority=spec.execution_priority,
            tenant=spec.tenant,
            arrived_at=now - spec.waited_s,
            tokens=[*spec.prompt_tokens, *spec.output_tokens],
            prompt_len=len(spec.prompt_tokens),
            adapter=spec.adapter,
            charged=bool(spec.output_tokens),
        )

    def to_spec(self, now: float) -> RequestSpec:
        """The request as it would travel now."""
        return RequestSpec(
            request_id=self.request_id,
            epoch=self.epoch,
            frontend_address=self.frontend_address,
            prompt_tokens=tuple(self.tokens[: self.prompt_len]),
            output_tokens=tuple(self.tokens[self.prompt_len :]),
            sampling=self.sampling,
            scheduling_priority=self.scheduling_priority,
            execution_priority=self.execution_priority,
            tenant=self.tenant,
            waited_s=max(0.0, now - self.arrived_at),
            adapter=self.adapter,
        )

    def sampled(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take in the next token."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)

    def row(self, instance_id: str, now: float) -> RequestRow:
        """The request as an administrator sees it."""
        return RequestRow(
            request_id=self.request_id,
            instance_id=instance_id,
            status=self.status,
            tenant=self.tenant,
            scheduling_priority=self.scheduling_priority,
            execution_priority=self.execution_priority,
            prompt_tokens=self.prompt_len,
            output_tokens=self.output_len,
            max_tokens=self.sampling.max_tokens,
            blocks=len(self.blocks),
            preemptions=self.preemptions,
            age_s=max(0.0, now - self.arrived_at),
            adapter=self.adapter,
        )

    @property
    def output_len(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def prefilled(self) -> bool:
        """Whether only the last known token is left to compute, so that the next step is a decode."""
        return self.output_len > 0 and self.computed_tokens == len(self.tokens) - 1
