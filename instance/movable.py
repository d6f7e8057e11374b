"""What is told of a request that could move: which KV of it lies where, and what of that stays as it is.

In device blocks while it has any. Without any, what its host copy has of it, all of which stays as it is,
since nothing computes it; an older copy of a part of it counts as much as that of a swapped-out request.
Called by the engine core.
"""

from llumnix.instance.engine import MovableState
from llumnix.instance.request import Request
from llumnix.instance.switching import Switching


def movable_state(request: Request, switching: Switching, block_size: int) -> MovableState:
    """For a request that is held and not arriving from the host."""
    known_tokens, kv_version = len(request.tokens), request.kv_version
    if request.blocks:
        filled = -(-request.computed_tokens // block_size)
        return MovableState(
            waiting=False,
            blocks=tuple(request.blocks[:filled]),
            full_blocks=request.computed_tokens // block_size,
            computed_tokens=request.computed_tokens,
            known_tokens=known_tokens,
            kv_version=kv_version,
        )
    copy = switching.host.find(request.request_id)
    tokens = 0 if copy is None else switching.host.usable_tokens(copy, request)
    if copy is None or not tokens:
        return MovableState(True, (), 0, 0, known_tokens, kv_version)
    blocks = tuple(switching.host.table(copy)[: -(-tokens // block_size)])
    lagging = switching.fills(copy)
    return MovableState(
        waiting=False,
        blocks=blocks,
        full_blocks=0 if lagging else tokens // block_size,
        computed_tokens=tokens,
        known_tokens=known_tokens,
        kv_version=kv_version,
        lagging=lagging,
        swapped=True,
        recompute_s=switching.recompute_s(tokens),
    )


def host_blocks(request: Request, switching: Switching, block_size: int) -> int:
    """How many blocks of host memory would go along with a waiting request."""
    copy = switching.host.find(request.request_id)
    return 0 if copy is None else -(-switching.host.usable_tokens(copy, request) // block_size)
