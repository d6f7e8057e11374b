"""Promises checked from outside, with books of their own: apart from the code that keeps them.

One owner per epoch: a request is decoded by one process at most in each epoch. Complete and in order: a
client's tokens are those that (seed, position) give, each once. After healing everything has finished,
nothing is held anywhere, and every block is accounted for.
"""

from collections import OrderedDict
from collections.abc import Iterable

from llumnix.core.errors import InvariantError
from llumnix.instance.agent import Agent
from llumnix.instance.engine import StepResult
from llumnix.instance.engine_core import EngineCore
from llumnix.sim.tokens import tokens_of

EPOCHS_MAX = 200_000


class OwnerCheck:
    """Who decoded each request in each epoch, the latest EPOCHS_MAX of them."""

    def __init__(self) -> None:
        self._owners: OrderedDict[tuple[str, int], str] = OrderedDict()

    def decoded(self, address: str, result: StepResult) -> None:
        """A process has made tokens. Raises InvariantError if another has in the same epoch."""
        for deltas in result.deltas.values():
            for delta in deltas:
                key = (delta.request_id, delta.epoch)
                owner = self._owners.setdefault(key, address)
                if owner != address:
                    raise InvariantError(
                        f"{delta.request_id} decoded by {owner} and {address} in epoch {delta.epoch}"
                    )
        while len(self._owners) > EPOCHS_MAX:
            self._owners.popitem(last=False)


def check_tokens(request_id: str, seed: int, start: int, first_index: int, tokens: tuple[int, ...]) -> None:
    """Raise InvariantError unless these are the tokens from output ``first_index`` on."""
    if bytes(tokens) != tokens_of(seed, start + first_index, len(tokens)):
        raise InvariantError(f"{request_id} was given wrong tokens from {first_index} on")


def check_idle(instances: Iterable[tuple[str, EngineCore, Agent]]) -> None:
    """Raise InvariantError unless the instances hold nothing any more."""
    for address, engine, agent in instances:
        engine.check()
        agent.check()
        load = engine.load()
        if load.swap is not None and load.swap.host_leased:
            raise InvariantError(f"{address} still keeps {load.swap.host_leased} host blocks for a migration")
        held = (load.running, load.waiting, load.used_blocks, load.reserved_blocks)
        if any(held) or engine.rows(address, 0.0) or agent.migrating:
            raise InvariantError(
                f"{address} still holds {load.running} running and {load.waiting} waiting requests, "
                f"{load.used_blocks} blocks owned and {load.reserved_blocks} reserved"
            )
