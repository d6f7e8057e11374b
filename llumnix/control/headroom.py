"""How much of an instance is kept free beside requests of high execution priority, by what the cluster can
spare at the moment.

A full headroom keeps others off an instance almost entirely. That costs nobody much while the cluster has
memory to spare, and makes everybody queue when it has not. So headroom takes at most a share of what is free,
and shrinks as the cluster fills. A little of it on every instance would keep nobody off any: so few instances
get it in full, as far as it goes. Dispatch finds them the freest for urgent requests, and pairing brings them
those that run elsewhere. Called by the cluster view before every round.
"""

from collections.abc import Iterable

from llumnix.control.instance_record import InstanceRecord
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceState
from llumnix.policies.freeness import classes_above_normal


def shares(config: SchedulerConfig, records: Iterable[InstanceRecord]) -> list[tuple[InstanceRecord, int]]:
    """Blocks of headroom for each execution priority above 0, by instance: first those that run requests of
    such priorities and have most headroom already, so that it stays where it is, then those that run most of
    them, then by id. The others are told what is left, in case such a request comes."""
    present = list(records)
    left = int(config.headroom_spare_share * sum(_free_blocks(record) for record in present))
    found = []
    for record in sorted(present, key=_order):
        classes = _classes(record)
        blocks = min(full_blocks(config, record), left // max(1, classes))
        left -= blocks * classes
        found.append((record, blocks))
    return found


def full_blocks(config: SchedulerConfig, record: InstanceRecord) -> int:
    """Blocks of headroom on an instance where nothing else is short."""
    capacity = record.hello.kv_layout.blocks if record.load is None else record.load.capacity_blocks
    return int(config.headroom_share * capacity)


def _free_blocks(record: InstanceRecord) -> int:
    serves = record.load is not None and record.state is InstanceState.SERVING
    return max(0, record.load.free_blocks) if serves and record.load is not None else 0


def _classes(record: InstanceRecord) -> int:
    """How many execution priorities above 0 run where headroom is of use: not where nothing may go."""
    serves = record.load is not None and record.state is InstanceState.SERVING
    return classes_above_normal(record.load.priorities) if serves and record.load is not None else 0


def _urgent(record: InstanceRecord) -> int:
    """How many requests of an execution priority above 0 run."""
    if record.load is None or record.state is not InstanceState.SERVING:
        return 0
    return sum(running for priority, running in record.load.priorities if priority > 0)


def _order(record: InstanceRecord) -> tuple[int, int, str]:
    urgent = _urgent(record)
    return -record.headroom_blocks if urgent else 0, -urgent, record.instance_id
