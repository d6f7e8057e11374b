"""The engine processes of ``llumnix profile``: what one of them cannot do is told in its own words."""

import pytest

from llumnix.bench.profile_processes import measure_engines
from llumnix.core.config import ClusterConfig, Config, EngineConfig, SwapConfig
from llumnix.core.errors import TransportError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_a_pool_too_small_to_time_copies_is_named() -> None:
    config = Config(
        engine=EngineConfig(device="cpu", kv_blocks=12, max_model_len=128, threads=1),
        swap=SwapConfig(host_share=0.0),
        cluster=ClusterConfig(instances=1),
    )
    with pytest.raises(TransportError, match="too small to time copies"):
        measure_engines(config, [], [], lambda done: None)
