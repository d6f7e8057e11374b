"""The contract between the engine core, which decides what a step computes, and what computes it.

A plan is made and carried out within one step of one thread; the executor reads requests and never changes
them.
"""

from dataclasses import dataclass
from typing import Protocol

from llumnix.core.messages.control import KvLayout
from llumnix.core.messages.serving import TokenLogprob
from llumnix.instance.request import Request
from llumnix.instance.swap import Copier, SwapJob


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute positions ``start … start + count - 1`` of a request (decode: count 1). Its ``blocks`` already
    cover them. ``samples``: the chunk ends at the last known token, so the next one is to be sampled."""

    request: Request
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Decodes come first, then prefill chunks. Empty: nothing to compute. ``jobs`` are begun, in
    this order, before the step computes. The jobs ``wait_for``, begun in this plan or earlier, must have
    ended before it does, because the step writes what they read or reads what they write."""

    chunks: tuple[Chunk, ...]
    jobs: tuple[SwapJob, ...] = ()
    wait_for: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen for one sampling chunk. ``logprob`` only if its request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


class Executor(Protocol):
    """Runs the model. Owns the KV pool's memory; block ids index its first dimension."""

    @property
    def kv_layout(self) -> KvLayout: ...

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def copier(self) -> Copier | None:
        """What swaps KV blocks to host memory and back; None: nothing does."""
        ...

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """Compute a plan; one result per sampling chunk, in the plan's order. When it returns, nothing of the
        plan is under way any more, on a GPU either: other threads and streams copy its KV."""
        ...
