"""Every setting of a cluster, as one frozen tree. The only place where defaults live.

A component is handed its own leaf and nothing else. Flags and TOML files are derived from this tree
(core/config_source.py); each field's ``help`` is what ``--help`` prints. Values are checked on construction,
so a configuration that exists is a valid one.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from llumnix.core.errors import ConfigurationError

LORA_MODULES_MAX = 128
TENSOR_PARALLEL_MAX = 64
TENANT_WEIGHTS_MAX = 1000


def setting(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with its default, its help text and, if given, the only values allowed."""
    return field(default=default, metadata={"help": help_text, "choices": choices})


class Leaf:
    """Shared checks of every configuration leaf: choices hold, numbers are finite and not below zero."""

    def __post_init__(self) -> None:
        for name, spec in self.__dataclass_fields__.items():  # type: ignore[attr-defined]
            value, choices = getattr(self, name), spec.metadata.get("choices")
            if choices and value not in choices:
                raise ConfigurationError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            if isinstance(value, float) and not isfinite(value):
                raise ConfigurationError(f"{name} must be finite, got {value}")
            if isinstance(value, int | float) and value < 0:
                raise ConfigurationError(f"{name} must not be negative, got {value}")

    def need(self, ok: bool, name: str, allowed: str) -> None:
        """Raise ConfigurationError naming the setting unless ``ok``."""
        if not ok:
            raise ConfigurationError(f"{name} must be {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class EngineConfig(Leaf):
    """One instance's engine."""

    kind: str = setting("torch", "which engine runs the model", ("torch", "vllm", "simulated"))
    model: str = setting("smollm2", "a folder in Hugging Face form, a hub id, or the alias smollm2")
    device: str = setting("auto", "where the model runs", ("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto", "number format of weights and KV", ("auto", "float32", "bfloat16", "float16")
    )
    block_size: int = setting(16, "tokens per KV block")
    kv_blocks: int = setting(0, "KV blocks per instance; 0 sizes the pool by kv_gib")
    kv_gib: float = setting(1.0, "GiB of KV per instance on a CPU; on a GPU see gpu_memory_share")
    gpu_memory_share: float = setting(0.9, "share of a GPU's memory for weights and KV together")
    max_model_len: int = setting(0, "longest prompt + output in tokens; 0 takes the model's own")
    step_tokens_max: int = setting(
        512, "most tokens computed in one step (decodes first, then prefill chunks)"
    )
    prefill: str = setting(
        "mixed", "with the decodes of a step, or in steps of their own, decodes waiting", ("mixed", "alone")
    )
    batch_max: int = setting(64, "most requests running at once on one instance")
    waiting_max: int = setting(1024, "most requests waiting at one instance before it refuses more")
    threads: int = setting(0, "compute threads per instance on a CPU; 0 shares the cores evenly")
    engine_args: str = setting(
        "", "vllm engine: arguments for vLLM itself, key=value; in a file several are separated by semicolons"
    )
    tensor_parallel: int = setting(
        1, "vllm engine: devices that each instance spans, on one host, each with a share of every layer"
    )
    staging_gib: float = setting(
        0.5, "vllm engine: GiB of host memory through which the KV of moving requests passes"
    )
    lora_modules: str = setting(
        "",
        "vllm engine: a LoRA adapter as name=folder, offered as a model of that name; in a file several are "
        "separated by semicolons",
    )
    simulated_step_ms: float = setting(20.0, "simulated engine: time of a decode step")
    simulated_token_ms: float = setting(0.05, "simulated engine: added time per token in a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(
            self.block_size in (1, 2, 4, 8, 16, 32, 64, 128, 256), "block_size", "a power of two up to 256"
        )
        self.need(self.step_tokens_max >= 1, "step_tokens_max", "at least 1")
        self.need(self.batch_max >= 1, "batch_max", "at least 1")
        self.need(self.waiting_max >= 1, "waiting_max", "at least 1")
        self.need(0 < self.gpu_memory_share <= 1, "gpu_memory_share", "above 0 and at most 1")
        self.need(self.staging_gib > 0, "staging_gib", "above 0")
        self.need(1 <= self.tensor_parallel <= TENSOR_PARALLEL_MAX, "tensor_parallel", "within 1 and 64")
        if self.tensor_parallel > 1 and self.kind != "vllm":
            raise ConfigurationError(
                f"tensor_parallel needs engine vllm: engine {self.kind} runs on one device"
            )
        if parse_lora_modules(self.lora_modules) and self.kind != "vllm":
            raise ConfigurationError(f"lora_modules need engine vllm: engine {self.kind} has no adapters")
        self.need(self.kv_blocks > 0 or self.kv_gib > 0, "kv_gib", "above 0 when kv_blocks is 0")


def parse_lora_modules(text: str) -> dict[str, str]:
    """``lora_modules`` as folder by name. Raises ConfigurationError naming the part that is wrong."""
    folders: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, _, folder = (piece.strip() for piece in part.partition("="))
        if not name or not folder:
            raise ConfigurationError(f"lora_modules: {part!r} is not name=folder")
        if name in folders:
            raise ConfigurationError(f"lora_modules: {name!r} is named twice")
        folders[name] = folder
    if len(folders) > LORA_MODULES_MAX:
        raise ConfigurationError(f"lora_modules: more than {LORA_MODULES_MAX} adapters")
    return folders


@dataclass(frozen=True)
class SwapConfig(Leaf):
    """How one instance swaps KV between its device and host memory (FastSwitch, arXiv 2411.18424). The parts
    can be turned off one by one, for comparison."""

    host_share: float = setting(
        0.25,
        "share of the memory free at the start that a host's instances may come to use together for KV "
        "swapped out or kept for later, each at most as much as its KV pool has; 0: none",
    )
    host_gib: float = setting(
        0.0, "GiB of host memory per instance for such KV, taken at the start; 0 goes by host_share"
    )
    host_blocks: int = setting(0, "KV blocks in host memory per instance; 0 sizes the pool by host_gib")
    block_groups: bool = setting(True, "give out KV blocks in runs that lie together; off: wherever they are")
    swap_copies: str = setting(
        "auto",
        "copies per swap: one per run of blocks, through a staging buffer, one per block, or one per block, "
        "layer, keys and values; auto takes the cheaper of run and staging as measured at the start",
        ("auto", "run", "staging", "block", "piece"),
    )
    swap_async: bool = setting(True, "swap while the batch computes; off: the batch waits for every copy")
    swap_reuse: bool = setting(True, "keep host copies after a swap-in and after a request's end")
    swap_ahead: bool = setting(True, "copy full blocks of likely victims out before they must go")
    rerank_frequency: float = setting(
        0.0, "how often, per step, waiting requests of higher rank displace running ones; 0 never does"
    )
    rerank_by: str = setting(
        "tenants",
        "what ranks requests of equal priority: their tenants' service, or a random or Markov trace (tests)",
        ("tenants", "random", "markov"),
    )
    swap_step_mib: float = setting(0.0, "most MiB begun to be swapped per step and direction; 0 is no limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.rerank_frequency <= 1, "rerank_frequency", "within 0 and 1")
        self.need(self.host_share <= 1, "host_share", "within 0 and 1")

    @property
    def sized(self) -> bool:
        """Whether the host pool has a size that does not depend on the machine."""
        return self.host_blocks > 0 or self.host_gib > 0


@dataclass(frozen=True)
class MigrationConfig(Leaf):
    """How requests move between instances."""

    transport: str = setting(
        "auto", "how KV travels; auto takes the fastest that works", ("auto", "inprocess", "shm", "zmq")
    )
    stages_max: int = setting(8, "copy stages before the request is taken out of its batch regardless")
    outgoing_max: int = setting(4, "migrations out of one instance at a time")
    incoming_max: int = setting(4, "migrations into one instance at a time")
    answer_timeout_s: float = setting(
        5.0, "how long the source waits for the target before it gives up or asks"
    )
    reservation_s: float = setting(15.0, "how long a target keeps blocks for a silent source")
    bandwidth_mib_s: float = setting(0.0, "most MiB of KV per second read by one instance; 0 is no limit")
    copy_share: float = setting(
        0.02,
        "share of the time that copying KV between two memories of one host may take, so that steps on the "
        "same cores lose no more; 1 is as fast as it goes",
    )
    hold_share: float = setting(
        0.5, "share of one of its steps a target waits for a request announced to arrive; 0 never waits"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.stages_max >= 0, "stages_max", "0 (stop the request, then copy) or more")
        self.need(self.outgoing_max >= 1, "outgoing_max", "at least 1")
        self.need(self.incoming_max >= 1, "incoming_max", "at least 1")
        self.need(self.answer_timeout_s > 0, "answer_timeout_s", "above 0")
        self.need(self.reservation_s > self.answer_timeout_s, "reservation_s", "above answer_timeout_s")
        self.need(0 < self.copy_share <= 1, "copy_share", "above 0 and at most 1")
        self.need(self.hold_share <= 1, "hold_share", "within 0 and 1")


@dataclass(frozen=True)
class SchedulerConfig(Leaf):
    """The global scheduler in the manager."""

    dispatch_policy: str = setting("affinity", "where new requests go: a policy's name or module:Class")
    pairing_policy: str = setting(
        "freeness",
        "which instances exchange requests: a name or module:Class; with none nothing moves by itself",
    )
    selection_policy: str = setting("cheapest", "which request an instance gives away first")
    preemption_policy: str = setting(
        "cheapest", "how a request gives way where there is host memory for KV: swap, recompute, the cheapest"
    )
    round_interval_s: float = setting(0.25, "time between rescheduling rounds")
    low_freeness: float = setting(
        4.0, "instances below this many free blocks per running request give requests away"
    )
    high_freeness: float = setting(8.0, "instances above this many free blocks per running request take them")
    rest_s: float = setting(2.0, "how long a request that just moved is left where it is")
    room_patience_s: float = setting(
        60.0,
        "how long the head of a queue may wait while free blocks of its instance make room for other heads; "
        "after that room is made for it first",
    )
    headroom_share: float = setting(
        0.87, "share of an instance's KV kept free beside requests of each execution priority above 0"
    )
    headroom_spare_share: float = setting(
        0.5, "most of what is free in the cluster that headroom takes; the less is free, the less is kept"
    )
    moves_per_round_max: int = setting(16, "most migrations begun in one round")
    moves_per_instance_max: int = setting(
        4, "most migrations out of or into one instance that rounds keep running"
    )
    silent_after_s: float = setting(3.0, "reports overdue by this make an instance SILENT")
    relief_policy: str = setting(
        "cheapest",
        "whether a request moves before blocks run out: cheapest, none or module:Class; pairing_policy none "
        "turns this off too",
    )
    roles_policy: str = setting(
        "disaggregate", "how requests pass from prefill to decode instances: a name or module:Class"
    )
    adapter_share: float = setting(
        0.5,
        "share of the freest instance's freeness that dispatch gives up for one that has the request's LoRA "
        "adapter at hand; 0 only breaks ties",
    )
    placement_memory_s: float = setting(3.0, "how long a placement no report has confirmed still counts")
    queue_blocks_factor: float = setting(
        4.0, "queued demand, in multiples of an instance's KV, at which it is full"
    )
    scaling_policy: str = setting(
        "none", "when instances are added and removed: none, demand, freeness or module:Class"
    )
    scale_low_freeness: float = setting(10.0, "freeness: mean below which an instance is added")
    scale_high_freeness: float = setting(60.0, "freeness: mean above which one is drained and stopped")
    scale_cooldown_s: float = setting(
        30.0,
        "freeness: least time between two changes; demand: how long fewer must be enough before one stops",
    )
    scale_spare: float = setting(
        1.0, "demand: memory kept free, in typical changes of what is wanted within scale_horizon_s"
    )
    scale_horizon_s: float = setting(
        30.0, "demand: how far ahead to look: about what an instance takes to start"
    )
    scale_instances_min: int = setting(1, "fewest instances that scaling leaves")
    scale_instances_max: int = setting(8, "most instances that scaling asks for")
    tenant_weights: str = setting(
        "", "shares of the cluster by tenant, as name=weight,…; a tenant not named has weight 1"
    )
    tenant_input_weight: float = setting(1.0, "what a prompt token counts in a tenant's service")
    tenant_output_weight: float = setting(2.0, "what a generated token counts in a tenant's service")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.round_interval_s > 0, "round_interval_s", "above 0")
        self.need(self.high_freeness >= self.low_freeness, "high_freeness", "at least low_freeness")
        self.need(self.headroom_share <= 1, "headroom_share", "within 0 and 1")
        self.need(self.headroom_spare_share <= 1, "headroom_spare_share", "within 0 and 1")
        self.need(self.silent_after_s > 0, "silent_after_s", "above 0")
        self.need(
            self.tenant_input_weight + self.tenant_output_weight > 0,
            "tenant_output_weight",
            "above 0 where tenant_input_weight is 0",
        )
        self.need(self.adapter_share <= 1, "adapter_share", "within 0 and 1")
        parse_weights(self.tenant_weights)
        self.need(
            self.scale_high_freeness > self.scale_low_freeness,
            "scale_high_freeness",
            "above scale_low_freeness",
        )
        self.need(1 <= self.scale_horizon_s <= 3600, "scale_horizon_s", "within 1 and 3600")
        self.need(
            1 <= self.scale_instances_min <= self.scale_instances_max,
            "scale_instances_min",
            "within 1 and scale_instances_max",
        )


def parse_weights(text: str) -> dict[str, float]:
    """``tenant_weights`` by tenant. Raises ConfigurationError naming the part that is wrong."""
    weights: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        tenant, equals, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not equals or not tenant.strip() or not 0 < weight < float("inf"):
            raise ConfigurationError(f"tenant_weights: {part!r} is not name=weight with a weight above 0")
        if tenant.strip() in weights:
            raise ConfigurationError(f"tenant_weights: {tenant.strip()!r} is named twice")
        weights[tenant.strip()] = weight
    if len(weights) > TENANT_WEIGHTS_MAX:
        raise ConfigurationError(f"tenant_weights: more than {TENANT_WEIGHTS_MAX} tenants")
    return weights


@dataclass(frozen=True)
class FrontendConfig(Leaf):
    """The HTTP frontend."""

    host: str = setting(
        "127.0.0.1", "address the API listens on; beyond loopback admin calls need admin_token"
    )
    port: int = setting(8000, "port of the API; 0 picks a free one")
    admin_token: str = setting("", "bearer token of admin calls")
    served_model_name: str = setting(
        "", "name under which the API offers the model; empty takes engine.model"
    )
    requests_max: int = setting(4096, "requests in flight before new ones get 429")
    body_bytes_max: int = setting(16 << 20, "largest accepted request body in bytes")
    choices_max: int = setting(16, "largest n of one call")
    place_timeout_s: float = setting(1.0, "wait for the manager before placing by the last view")
    silent_probe_s: float = setting(2.0, "a stream this long without news is asked after")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.port <= 65535, "port", "at most 65535")
        self.need(self.requests_max >= 1, "requests_max", "at least 1")
        self.need(self.choices_max >= 1, "choices_max", "at least 1")
        self.need(self.place_timeout_s > 0, "place_timeout_s", "above 0")
        self.need(self.silent_probe_s > 0, "silent_probe_s", "above 0")


@dataclass(frozen=True)
class ClusterConfig(Leaf):
    """What Ray starts, and where."""

    instances: int = setting(2, "instances to start with")
    instances_max: int = setting(1024, "most instances scale may ask for")
    prefill_instances: int = setting(0, "how many of them have the role prefill: they take new requests")
    decode_instances: int = setting(
        0, "how many of them have the role decode: they take requests whose prefill has ended"
    )
    ray_address: str = setting("", "Ray cluster to join; empty starts one on this machine")
    bind_host: str = setting("127.0.0.1", "address the message bus listens on, on every host")
    report_interval_s: float = setting(0.02, "least time between two load reports of an instance")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(1 <= self.instances <= self.instances_max, "instances", "within 1 and instances_max")
        self.need(
            self.prefill_instances + self.decode_instances <= self.instances,
            "instances",
            "at least prefill_instances + decode_instances, which are among them",
        )


@dataclass(frozen=True)
class Config:
    """The whole tree."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
