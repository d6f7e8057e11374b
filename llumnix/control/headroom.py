"""How much of an instance is kept free beside requests of high execution priority, by what the cluster can
spare at the moment.

A full headroom keeps others off an instance almost entirely. That costs nobody much while the cluster has
memory to spare, and makes everybody queue when it has not. So headroom takes at most a share of what is free,
and shrinks as the cluster fills. Called by the cluster view before every round.
"""

from collections.abc import Iterable

from llumnix.control.instance_record import InstanceRecord
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState
from llumnix.policies.freeness import classes_above_normal


def affordable_blocks(config: SchedulerConfig, records: Iterable[InstanceRecord]) -> int | None:
    """Blocks of headroom that the cluster can spare for each (instance, execution priority above 0 running
    there); None: there is none to keep any for."""
    free = kept = 0
    for record in records:
        load = record.load
        if load is not None and record.state is InstanceState.SERVING:
            free += max(0, load.free_blocks)
            kept += classes_above_normal(load.priorities)
    return int(config.headroom_spare_share * free / kept) if kept else None


def full_blocks(config: SchedulerConfig, record: InstanceRecord) -> int:
    """Blocks of headroom on an instance where nothing else is short."""
    capacity = record.hello.kv_layout.blocks if record.load is None else record.load.capacity_blocks
    return int(config.headroom_share * capacity)
