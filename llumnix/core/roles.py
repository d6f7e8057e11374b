"""What roles mean for a request, and which role an instance starts in. Used by policies, by those who start
instances, and by the simulator."""

from llumnix.core.config import ClusterConfig
from llumnix.core.messages.control import InstanceRole


def starting_role(cluster: ClusterConfig, instance_id: str) -> InstanceRole:
    """Of the instances i0, i1 …, the first are to prefill, the next to decode, as many as configured; the
    others, those added later among them, are neutral."""
    digits = instance_id.removeprefix("i")
    number = int(digits) if digits.isascii() and digits.isdecimal() else cluster.instances
    if number < cluster.prefill_instances:
        return InstanceRole.PREFILL
    if number < cluster.prefill_instances + cluster.decode_instances:
        return InstanceRole.DECODE
    return InstanceRole.NEUTRAL


def suits(role: InstanceRole, waiting: bool) -> bool:
    """Whether a request that waits for its prefill, or decodes, belongs on an instance of this role."""
    return role is InstanceRole.NEUTRAL or (role is InstanceRole.PREFILL) == waiting
