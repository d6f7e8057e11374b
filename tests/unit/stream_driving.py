"""A stream table in the state a test needs, and what goes in and out of it."""

from math import inf

from toy_cluster import FRONTEND, MANAGER

from llumnix.api.backend import StreamCall
from llumnix.api.stream_state import Effect
from llumnix.api.streams import StreamTable
from llumnix.core.config import FrontendConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import FIRST_EPOCH, next_generation
from llumnix.core.messages.control import ClusterStatus, InstanceRole, InstanceState, InstanceStatus, Placed
from llumnix.core.messages.serving import FinishReason, TokenBatch, TokenDelta
from llumnix.core.sampling import SamplingParams

SECOND = next_generation(FIRST_EPOCH)


def table(**settings: object) -> StreamTable:
    return StreamTable("f0", FRONTEND, MANAGER, FrontendConfig(**settings))


def call(request_id: str = "r", max_tokens: int = 8) -> StreamCall:
    return StreamCall(request_id, (1, 2, 3), SamplingParams(max_tokens=max_tokens, seed=5), 2, 3, "tenant")


def entry(
    instance_id: str,
    incarnation: str = "p",
    state: InstanceState = InstanceState.SERVING,
    freeness: float = 8.0,
    role: InstanceRole = InstanceRole.NEUTRAL,
) -> InstanceStatus:
    return InstanceStatus(instance_id, incarnation, f"at-{instance_id}", state, freeness, role)


def status(*entries: InstanceStatus) -> ClusterStatus:
    return ClusterStatus(1, entries)


def batch(
    instance_id: str, epoch: int, first: int, *tokens: int, ends: FinishReason | None = None
) -> TokenBatch:
    return TokenBatch(instance_id, (TokenDelta("r", epoch, first, tokens, ends),))


def messages(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def streaming(*instances: str, **settings: object) -> StreamTable:
    """A table with one request on ``a``, and these instances known."""
    made = table(**settings)
    made.handle(status(*[entry(one) for one in instances]), 0.0)
    made.open(call(), 0.0)
    made.handle(Placed("r", "a", "at-a"), 0.0)
    return made


def next_effects(made: StreamTable) -> list[Effect]:
    """What the next deadline that means something brings; next_deadline may be early."""
    while not (effects := made.tick(made.next_deadline())):
        assert made.next_deadline() < inf
    return effects
