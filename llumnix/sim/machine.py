"""What all instances of a simulation share: clock, wire, records, settings, and what steps and copies cost.

Made once by the simulation; instances take from it what is theirs alone: a copier, and how their steps
scatter.
"""

from llumnix.core.config import EngineConfig, MigrationConfig, SwapConfig
from llumnix.core.views import SelectionPolicy
from llumnix.instance.model_limits import ModelLimits
from llumnix.sim.checks import OwnerCheck
from llumnix.sim.clock import Clock
from llumnix.sim.cost import CostModel
from llumnix.sim.links import Links
from llumnix.sim.network import Network
from llumnix.sim.record import Recorder
from llumnix.sim.spread import Scatter
from llumnix.sim.swap import VirtualCopier, host_link
from llumnix.sim.tokens import EOS_TOKEN, VOCAB_SIZE


class Machine:
    """See the module."""

    def __init__(
        self,
        *,
        clock: Clock,
        network: Network,
        links: Links,
        recorder: Recorder,
        owners: OwnerCheck,
        cost: CostModel,
        engine: EngineConfig,
        swap: SwapConfig,
        migration: MigrationConfig,
        selection: SelectionPolicy,
        report_interval_s: float,
        manager_address: str,
        quiet: bool,
        seed: int,
    ) -> None:
        self.clock, self.network, self.links = clock, network, links
        self.recorder, self.owners, self.cost = recorder, owners, cost
        self.engine, self.swap = engine, swap
        self.migration, self.selection = migration, selection
        self.report_interval_s, self.manager_address, self.quiet = report_interval_s, manager_address, quiet
        self.layout = cost.layout(engine.block_size, engine.kv_blocks * engine.block_size)
        longest = engine.max_model_len or cost.max_model_len
        self.limits = ModelLimits(
            capacity_blocks=self.layout.blocks,
            block_size=engine.block_size,
            max_model_len=min(longest, cost.max_model_len, self.layout.blocks * engine.block_size),
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset((EOS_TOKEN,)),
            block_bytes=self.layout.block_bytes,
        )
        self.committed = 0
        self._seed = seed

    def scatter(self, address: str) -> Scatter | None:
        """For the steps of the instance there. None: they take what the cost model says."""
        cost = self.cost
        if not cost.scatters:
            return None
        return Scatter(cost.decode_spread, cost.prefill_spread, self._seed, address)

    def copier(self) -> VirtualCopier | None:
        """For one instance's host memory; None: it has none."""
        if not self.swap.sized:
            return None
        clock = self.clock
        return VirtualCopier(host_link(self.cost.name), self.layout, self.swap, now=lambda: clock.now)
