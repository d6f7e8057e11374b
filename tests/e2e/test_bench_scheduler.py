"""The scheduler's benchmark runs: every request that goes by way of the real manager is answered."""

import pytest

from llumnix.bench.scheduler import run
from llumnix.bench.scheduler_end_to_end import run as end_to_end
from llumnix.bench.scheduler_loads import REQUEST_KINDS
from llumnix.core.config import SchedulerConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_every_request_by_way_of_the_manager_is_answered() -> None:
    row = end_to_end(SchedulerConfig(), 3, rate=50, seconds=0.4, seed=0)
    assert row.asked == row.answered > 5
    assert row.ttft_ms_p50 > 0 < row.direct_ttft_ms_p50


@pytest.mark.parametrize("requests", REQUEST_KINDS)
def test_decisions_reports_and_rounds_are_timed(requests: str) -> None:
    row = run(SchedulerConfig(), 5, requests, decisions=200, rounds=10, seed=0)
    assert row.instances == 5 and row.requests == requests
    assert 0 < row.dispatch_us_p50 <= row.dispatch_us_p99
    assert row.reports_per_s > 0 < row.round_ms_p50
