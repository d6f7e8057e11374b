"""The published experiments, as sets of runs.

Each preset is a list of cases: a workload and a configuration, by a name that says which policy it is. Cases
of one preset share workloads and seeds. The cluster is the paper's: 16 instances of LLaMA-7B on A10, block
size 16, queues without bounds, whole prompts in steps of their own as its engine had them. What the paper
does not say is taken from its public artifact (AlibabaPAI/llumnix at 92f6f9d, folder artifact/): the rates
of S-L and L-S, trace and rate of the priority experiment, the tokens of a step, and the KV blocks left of
an A10 once the engine has kept room for a prefill of that many (792 for 12,000: vllm/simulator/profiling.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llumnix.core.config import ClusterConfig, Config, EngineConfig, FrontendConfig, SchedulerConfig
from llumnix.core.errors import ConfigurationError
from llumnix.policies.registry import dispatch_policy, pairing_policy, selection_policy
from llumnix.sim.cost import LLAMA_7B_A10, CostModel
from llumnix.sim.workload import Mix, Synthetic, Workload

PAPER_RATES: dict[str, tuple[float, ...]] = {
    "S-S": (32, 33, 34, 35, 36),
    "M-M": (7.4, 7.5, 7.6, 7.7, 7.8),
    "L-L": (2.6, 2.7, 2.8, 2.9, 3.0),
    "S-L": (4.1, 4.2, 4.3, 4.4),
    "L-S": (16, 18, 20, 22),
}
"""Rates of figure 11; those of S-L and L-S are the artifact's."""

UNBOUNDED = 1_000_000
PAPER_STEP_TOKENS, PAPER_KV_BLOCKS = 12_000, 792
REPORT_INTERVAL_S = 0.25
PAPER_CONFIG = Config(
    engine=EngineConfig(
        kind="simulated",
        step_tokens_max=PAPER_STEP_TOKENS,
        kv_blocks=PAPER_KV_BLOCKS,
        prefill="alone",
        batch_max=256,
        waiting_max=UNBOUNDED,
    ),
    scheduler=SchedulerConfig(queue_blocks_factor=float(UNBOUNDED)),
    frontend=FrontendConfig(requests_max=UNBOUNDED),
    cluster=ClusterConfig(instances=16, report_interval_s=REPORT_INTERVAL_S),
)

GENERIC_CONFIG = Config(
    engine=EngineConfig(kind="simulated"), cluster=ClusterConfig(report_interval_s=REPORT_INTERVAL_S)
)
"""Where runs by options start: the defaults of serve, but for the rarer load reports."""

POLICIES: dict[str, tuple[str, str]] = {
    "round-robin": ("round-robin", "none"),
    "load": ("load", "none"),
    "llumnix-dispatch": ("freeness", "none"),
    "llumnix": ("freeness", "freeness"),
}
"""Names of policies side by side: (dispatch, pairing)."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a preset."""

    policy: str
    config: Config
    cost: CostModel
    workload: Workload
    seed: int = 0


def with_policy(config: Config, policy: str) -> Config:
    """A configuration under one of POLICIES, or under ``dispatch/pairing`` by their own names."""
    pair = POLICIES.get(policy) or tuple(policy.split("/"))
    if len(pair) != 2:
        known = ", ".join(POLICIES)
        raise ConfigurationError(
            f"unknown policy {policy!r}; there are {known}, or DISPATCH/PAIRING, each a name or module:Class"
        )
    scheduler = replace(config.scheduler, dispatch_policy=pair[0], pairing_policy=pair[1])
    dispatch_policy(scheduler)  # a name that means nothing is refused before anything runs
    pairing_policy(scheduler)
    selection_policy(scheduler)
    return replace(config, scheduler=scheduler)


def serving(
    traces: Sequence[str],
    rates: Sequence[float],
    policies: Sequence[str],
    *,
    count: int,
    seed: int,
    config: Config,
    cvs: Sequence[float] = (),
) -> list[Case]:
    """``osdi24-serving``: every trace at every rate under every policy; Poisson arrivals unless told."""
    cases = []
    for trace in traces or ("S-S", "M-M", "L-L"):
        if trace not in PAPER_RATES:
            raise ConfigurationError(f"unknown trace {trace!r}; there are {', '.join(PAPER_RATES)}")
        for rate in rates or PAPER_RATES[trace]:
            for cv in cvs or (1.0,):
                workload = Synthetic(trace, rate, count, seed, cv=cv)
                cases += [
                    Case(policy, with_policy(config, policy), LLAMA_7B_A10, workload, seed)
                    for policy in policies or POLICIES
                ]
    return cases


PRIORITY_TRACE, PRIORITY_RATE, PRIORITY_CVS, HIGH_SHARE = "S-S", 26.0, (2.0, 4.0, 6.0, 8.0), 0.1
IGNORED = ", priorities ignored"


def priorities(
    traces: Sequence[str],
    rates: Sequence[float],
    policies: Sequence[str],
    *,
    count: int,
    seed: int,
    config: Config,
    cvs: Sequence[float] = (),
) -> list[Case]:
    """``osdi24-priorities``: bursty arrivals, a tenth of high priority; priorities used, and ignored."""
    cases = []
    for trace in traces or (PRIORITY_TRACE,):
        for rate in rates or (PRIORITY_RATE,):
            for cv in cvs or PRIORITY_CVS:
                mix = Mix(high_share=HIGH_SHARE)
                workload = Synthetic(trace, rate, count, seed, cv=cv, mix=mix)
                blind = replace(workload, mix=replace(mix, high_priority=0))
                for policy in policies or ("llumnix",):
                    ours = with_policy(config, policy)
                    cases.append(Case(policy, ours, LLAMA_7B_A10, workload, seed))
                    cases.append(Case(policy + IGNORED, ours, LLAMA_7B_A10, blind, seed))
    return cases


SCALED_RATE, SCALED_CVS, SCALED_START, SCALED_MAX = 2.0, (1.0, 4.0), 4, 16
SCALED_LOWS, SCALED_BAND, SCALED_SPARES = (10.0, 30.0, 60.0, 120.0), 50.0, (0.0, 1.0, 2.0, 4.0)


def autoscaling(
    traces: Sequence[str],
    rates: Sequence[float],
    policies: Sequence[str],
    *,
    count: int,
    seed: int,
    config: Config,
    cvs: Sequence[float] = (),
) -> list[Case]:
    """``osdi24-autoscaling``: the number of instances follows the load, up to 16; with and without moves,
    scaled as the paper does and by demand, each with several settings, so that policies can be compared at
    equal latency (savings.py)."""
    cluster = replace(config.cluster, instances=SCALED_START)
    scaled = replace(config.scheduler, scale_instances_max=SCALED_MAX)
    ways = [
        *(
            replace(
                scaled,
                scaling_policy="freeness",
                scale_low_freeness=low,
                scale_high_freeness=low + SCALED_BAND,
            )
            for low in SCALED_LOWS
        ),
        *(replace(scaled, scaling_policy="demand", scale_spare=spare) for spare in SCALED_SPARES),
    ]
    return [
        Case(
            policy,
            with_policy(replace(config, cluster=cluster, scheduler=way), policy),
            LLAMA_7B_A10,
            Synthetic(trace, rate, count, seed, cv=cv),
            seed,
        )
        for trace in traces or ("L-L",)
        for rate in rates or (SCALED_RATE,)
        for cv in cvs or SCALED_CVS
        for way in ways
        for policy in policies or ("load", "llumnix")
    ]
