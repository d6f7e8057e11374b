"""The part of Llumnix that vLLM calls: an out-of-tree KV connector (vLLM's public extension point), which
lets the adapter read vLLM's blocks and hands vLLM the KV of requests that came from elsewhere.

vLLM makes one object per side. The scheduler's side says how many tokens of a new request need not be
computed and notes where vLLM puts them; the worker's side fills them in before the step that needs them.
Everything else goes through the exchange (vllm_exchange.py). Under tensor parallelism there is a worker's
side in the process of each rank, for the KV there (vllm_rank.py). Named in KVTransferConfig by
vllm_launch.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.kv_pool import DTYPES
from llumnix.instance.vllm_exchange import BLOCK_SIZE, EXCHANGE, Exchange, Load, find
from llumnix.instance.vllm_layout import BlockShape, KvCopier, learn_packing
from llumnix.instance.vllm_rank import Rank, joined

WorkerSide = Exchange | Rank
"""Who the worker's side answers to: the engine in this process, or the instance whose rank this one is."""


@dataclass
class LoadOrders(KVConnectorMetadata):  # type: ignore[misc]
    """What the worker's side has to fill in before this step."""

    loads: list[Load] = field(default_factory=list)


class LlumnixConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See the module."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self._side: WorkerSide
        if ranks > 1 and role is KVConnectorRole.WORKER:
            self._side = joined()
        else:
            self._side = self._exchange = find(extra[EXCHANGE])
        self._block_size = int(extra[BLOCK_SIZE])
        self._loads: list[Load] = []

    @property
    def requires_kv_delivery(self) -> bool:
        """No: what vLLM gives up is simply computed again."""
        return False

    # The scheduler's side.

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._exchange.block_pool = kv_cache_manager.block_pool
        self._exchange.free_blocks = kv_cache_manager.block_pool.get_num_free_blocks

        def blocks_of(vllm_id: str) -> Sequence[int]:
            blocks: list[int] = kv_cache_manager.get_block_ids(vllm_id)[0]
            return blocks

        self._exchange.blocks_of = blocks_of

    def on_new_request(self, request: Any) -> None:
        self._exchange.live[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        waiting = self._exchange.imports.get(request.request_id)
        if waiting is None or num_computed_tokens < waiting.first:
            return 0, False
        return max(0, waiting.tokens - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        waiting = self._exchange.imports.get(request.request_id)
        if num_external_tokens > 0 and waiting is not None:
            whole = tuple(blocks.get_block_ids()[0])
            behind = whole[waiting.first // self._exchange.copier.shape.block_size :]
            end = waiting.tokens - waiting.first
            self._loads.append(Load(waiting.pool_blocks, behind, end - num_external_tokens, end))

    def build_connector_meta(self, scheduler_output: Any) -> LoadOrders:
        self._exchange.scheduled_tokens = scheduler_output.total_num_scheduled_tokens
        loads, self._loads = self._loads, []
        return LoadOrders(loads)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self._exchange.live.pop(request.request_id, None)
        return False, None

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM has its KV: learn how it lies there, and make the pool."""
        names = sorted(kv_caches, key=_layer_number)
        shape, dtype = self._shape()
        attention = get_layers_from_vllm_config(self._vllm_config, Attention, names)
        probed = attention[names[0]]
        layers = [kv_caches[name] for name in names]

        def write(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
            probed.impl.do_kv_cache_update(probed, key, value, layers[0], slots)

        if any(layer.shape != layers[0].shape or layer.stride() != layers[0].stride() for layer in layers):
            raise ConfigurationError("the KV of vLLM's layers differs in shape, which cannot be moved")
        packings = learn_packing(layers[0], shape, write)
        layout = KvLayout(
            blocks=0,
            layers=len(layers),
            kv_heads=self._all_kv_heads(shape.kv_heads),
            block_size=self._block_size,
            head_dim=shape.head_dim,
            dtype=dtype,
        )
        self._side.know(layout, KvCopier(layers, packings, shape))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LoadOrders)
        with torch.inference_mode():
            for load in metadata.loads:
                self._side.take_in(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: start_load_kv does it all."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved on the way: the adapter copies between steps."""

    def wait_for_save(self) -> None:
        """Likewise."""

    def _all_kv_heads(self, mine: int) -> int:
        """Of the model, of whose KV heads this process has so many."""
        if isinstance(self._side, Exchange):
            return mine
        total = int(self._vllm_config.model_config.get_total_num_kv_heads())
        if self._side.heads(total).count != mine:
            raise ConfigurationError(f"vLLM deals out the model's {total} KV heads in an unknown way")
        return total

    def _shape(self) -> tuple[BlockShape, str]:
        groups = self._kv_cache_config.kv_cache_groups
        spec = groups[0].kv_cache_spec
        if len(groups) != 1 or type(spec) is not FullAttentionSpec:
            raise ConfigurationError(
                "only models in which every layer attends to all tokens can be moved between vLLM engines"
            )
        dtype = str(spec.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ConfigurationError(f"KV of type {dtype} cannot be moved; there are {', '.join(DTYPES)}")
        blocks = int(self._kv_cache_config.num_blocks)
        return BlockShape(blocks, spec.block_size, spec.num_kv_heads, spec.head_size), dtype


def _layer_number(name: str) -> tuple[int, ...]:
    """``model.layers.11.self_attn.attn`` after ``model.layers.2.…``."""
    return tuple(int(number) for number in re.findall(r"\d+", name))
