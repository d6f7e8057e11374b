"""What the operator wants of single instances: that one is emptied, or takes requests again, or works in
another role.

A wish is told at once and, as messages may be lost, again with every heartbeat while the instance's reports
show that it has not heard; it outlives the instance's process, and a restarted manager learns it from hellos
and reports. Called by the global scheduler only.
"""

from llumnix.control.cluster_view import ClusterView
from llumnix.control.effects import Logged
from llumnix.control.instance_record import InstanceRecord
from llumnix.core.admin import Refusal
from llumnix.core.effects import Send
from llumnix.core.messages.control import InstanceRole, SetDraining, SetRole
from llumnix.core.messages.load import LoadReport

Orders = list[Send | Logged]


class Wishes:
    """See the module."""

    def __init__(self, cluster: ClusterView) -> None:
        self._cluster = cluster

    def set_draining(self, instance_id: str, on: bool) -> Orders | Refusal:
        """Empty an instance and give it nothing new, or take it back. Repeating an order changes nothing."""
        record = self._alive(instance_id)
        if isinstance(record, Refusal) or record.draining == on:
            return record if isinstance(record, Refusal) else []
        record.draining = on
        self._cluster.refresh(record)
        kind, text = ("draining", "is being emptied") if on else ("resumed", "takes requests again")
        return [
            Send(record.hello.address, SetDraining(on)),
            Logged(kind, f"{instance_id} {text}", {"instance": instance_id}),
        ]

    def set_role(self, instance_id: str, role: InstanceRole) -> Orders | Refusal:
        """Let an instance work in another role. What no longer suits it moves away by and by."""
        record = self._alive(instance_id)
        if isinstance(record, Refusal) or record.role is role:
            return record if isinstance(record, Refusal) else []
        was, record.role = record.role, role
        self._cluster.refresh(record)
        fields: dict[str, str | int | float | bool] = {"instance": instance_id, "role": role.value}
        return [
            Send(record.hello.address, SetRole(role)),
            Logged("role_changed", f"{instance_id} was {was.value} and is {role.value}", fields),
        ]

    def greet(self, record: InstanceRecord) -> list[Send]:
        """What a process that has just said hello has to know."""
        sends = [Send(record.hello.address, SetDraining(True))] if record.draining else []
        if record.role is not record.hello.role:
            sends.append(Send(record.hello.address, SetRole(record.role)))
        return sends

    def remind(self, record: InstanceRecord, report: LoadReport) -> list[Send]:
        """Say again what an instance shows not to have heard."""
        sends = []
        if report.draining != record.draining:
            sends.append(Send(record.hello.address, SetDraining(record.draining)))
        if report.role is not record.role:
            sends.append(Send(record.hello.address, SetRole(record.role)))
        return sends

    def retire(self, instance_id: str) -> None:
        """It has been emptied in order to stop: whoever gets its id next begins without its wishes."""
        record = self._cluster.get(instance_id)
        if record is not None:
            record.draining, record.role = False, record.hello.role
            self._cluster.refresh(record)

    def _alive(self, instance_id: str) -> InstanceRecord | Refusal:
        record = self._cluster.get(instance_id)
        if record is None:
            return Refusal(f"there is no instance {instance_id}")
        return Refusal(f"{instance_id} is down") if record.down else record
