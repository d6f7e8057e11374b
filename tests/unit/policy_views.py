"""Instance views for policy tests, scored by the real freeness."""

from llumnix.core.messages.control import InstanceRole, InstanceState
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.views import InstanceView, RequestView
from llumnix.policies.freeness import Load

HEADROOM = 32

EMPTY = InstanceView(
    instance_id="",
    role=InstanceRole.NEUTRAL,
    state=InstanceState.SERVING,
    capacity_blocks=100,
    used_blocks=0,
    head_blocks=0,
    waiting_blocks=0,
    running=0,
    waiting=0,
    execution_priorities=(),
    candidates=(),
    placed_blocks=0,
    placed_requests=0,
    arriving_blocks=0,
    leaving_blocks=0,
    migrating_in=0,
    migrating_out=0,
    step_s=0.05,
    reported_at=0.0,
    freeness=0.0,
    queue_freeness=0.0,
    headroom_blocks=HEADROOM,
)


def view(instance_id: str, **changes: object) -> InstanceView:
    """A view with these fields, its scores computed."""
    made = EMPTY._replace(instance_id=instance_id, **changes)  # type: ignore[arg-type]
    load = Load.of(made)
    return made._replace(freeness=load.freeness(HEADROOM), queue_freeness=load.queue_freeness(HEADROOM))


def running(instance_id: str, *blocks: int, **changes: object) -> InstanceView:
    """An instance that runs requests ``<id>0``, ``<id>1`` … of so many blocks, all of them movable."""
    candidates = tuple(
        MoveCandidate(f"{instance_id}{number}", count, 0, False) for number, count in enumerate(blocks)
    )
    values = {"used_blocks": sum(blocks), "running": len(blocks), "candidates": candidates, **changes}
    return view(instance_id, **values)


def request(blocks: int = 2) -> RequestView:
    """A request to be placed."""
    return RequestView("r", blocks, 16 * blocks - 1, 64, 0, 0, "")
