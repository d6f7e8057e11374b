"""What a frontend shows of instances for Prometheus."""

from dataclasses import fields

from llumnix.api.metrics import SWAP_GAUGES, ApiMetrics
from llumnix.core.admin import InstanceRow
from llumnix.core.messages.control import InstanceRole, InstanceState
from llumnix.core.messages.load import SwapTotals


def row(instance_id: str, swap: SwapTotals | None) -> InstanceRow:
    return InstanceRow(
        instance_id=instance_id,
        incarnation="i",
        role=InstanceRole.NEUTRAL,
        state=InstanceState.SERVING,
        model="m",
        address="a",
        capacity_blocks=1,
        used_blocks=0,
        running=0,
        waiting=0,
        migrating_in=0,
        migrating_out=0,
        freeness=1.0,
        step_ms=0.0,
        tokens_total=0,
        preemptions_total=0,
        report_age_s=0.0,
        pid=1,
        swap=swap,
    )


def test_swapping_is_shown_for_instances_that_have_host_memory() -> None:
    names = [field.name for field in fields(SwapTotals)]
    assert list(SWAP_GAUGES) == names
    totals = SwapTotals(**{name: place for place, name in enumerate(names)})
    page = ApiMetrics(lambda: 0.0).page([row("a", totals), row("b", None)]).decode()
    for place, name in enumerate(names):
        assert f'llumnix_instance_swap_{name}{{instance="a"}} {place}.0' in page
    assert 'llumnix_instance_swap_errors{instance="b"}' not in page
    assert 'llumnix_instance_running{instance="b"}' in page
