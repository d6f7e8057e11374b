"""The executor that computes with torch: one model, one KV pool, one step at a time.

A step's plan becomes one flat batch (decodes first, then prefill chunks), one pass through the decoder, the
logits of those rows only that sample, and one call of the sampler. Built and driven by one thread; the pool's
memory may be read by copy threads and peer processes meanwhile.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError, InvariantError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.executor import Chunk, SampledToken, StepPlan
from llumnix.instance.kv_pool import DTYPES, KvPool, pool_blocks
from llumnix.instance.model_loader import read_model_folder, resolve_model
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.models.decoder import Decoder, DecoderWeights, FlatBatch, PrefillSpan
from llumnix.instance.models.weights import load_weights, random_weights
from llumnix.instance.sampler import Sampler

log = logging.getLogger(__name__)


class TorchExecutor:
    """See Executor. ``pool_name`` names the shared memory of the KV pool, one per instance."""

    def __init__(self, config: EngineConfig, pool_name: str) -> None:
        """Find, read and check the model, then allocate the pool. Raises ConfigurationError."""
        folder = read_model_folder(resolve_model(config.model))
        device, dtype = _prepare(config, folder.config)
        weights = load_weights(folder.path, folder.config, dtype, device)
        self._set_up(config, folder.config, weights, folder.eos_token_ids, pool_name)

    @classmethod
    def from_random(
        cls, model: ModelConfig, config: EngineConfig, *, seed: int, pool_name: str
    ) -> "TorchExecutor":
        """A model of this shape with random weights and no end tokens, for benchmarks; ``config.model`` is
        not looked at."""
        executor = cls.__new__(cls)
        device, dtype = _prepare(config, model)
        executor._set_up(config, model, random_weights(model, dtype, device, seed), frozenset(), pool_name)
        return executor

    def _set_up(
        self,
        config: EngineConfig,
        model: ModelConfig,
        weights: DecoderWeights,
        eos_token_ids: frozenset[int],
        pool_name: str,
    ) -> None:
        self._device, dtype = _prepare(config, model)
        max_len = model.usable_len(config.max_model_len)
        one = KvLayout(1, model.layers, model.kv_heads, config.block_size, model.head_dim, _dtype_name(dtype))
        blocks = pool_blocks(config, one.block_bytes, self._device)
        held = blocks * config.block_size
        if config.max_model_len > held:
            raise ConfigurationError(
                f"max_model_len {config.max_model_len} exceeds the KV pool's {held} tokens (kv_blocks, kv_gib)"
            )
        self._model = model
        self._eos_token_ids = eos_token_ids
        self._max_model_len = min(max_len, held)
        self._decoder = Decoder(model, weights, self._max_model_len)
        self._sampler = Sampler(eos_token_ids)
        layout = KvLayout(blocks, one.layers, one.kv_heads, one.block_size, one.head_dim, one.dtype)
        self.pool = KvPool(layout, pool_name, self._device)
        log.info(
            "model on %s in %s, %d KV blocks of %d tokens", self._device, one.dtype, blocks, one.block_size
        )

    @property
    def kv_layout(self) -> KvLayout:
        return self.pool.layout

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """See Executor."""
        if not plan.chunks:
            return []
        hidden = self._decoder.hidden(self._flatten(plan.chunks), self.pool.tensor)
        rows, requests, row = [], [], -1
        for chunk in plan.chunks:
            row += chunk.count
            if chunk.samples:
                rows.append(row)
                requests.append(chunk.request)
        if not rows:
            return []
        sampling = hidden if len(rows) == hidden.shape[0] else hidden[rows]
        return self._sampler.sample(self._decoder.logits(sampling), requests)

    def close(self) -> None:
        """Give the KV pool up."""
        self.pool.close()

    def _flatten(self, chunks: Sequence[Chunk]) -> FlatBatch:
        decodes = 0
        while decodes < len(chunks) and chunks[decodes].count == 1:
            decodes += 1  # a prefill chunk of one token is computed like a decode
        total = sum(chunk.count for chunk in chunks)
        tokens, positions, slots = (np.empty(total, dtype=np.int64) for _ in range(3))
        spans = []
        begin = 0
        for index, chunk in enumerate(chunks):
            end, stop = begin + chunk.count, chunk.start + chunk.count
            blocks = np.array(chunk.request.blocks, dtype=np.int32)
            tokens[begin:end] = chunk.request.tokens[chunk.start : stop]
            positions[begin:end] = np.arange(chunk.start, stop)
            slots[begin:end] = self._slots(positions[begin:end], blocks)
            if index >= decodes:
                spans.append(PrefillSpan(begin, end, chunk.start, self._upload(blocks)))
            begin = end
        lens = np.array([chunk.start + 1 for chunk in chunks[:decodes]], dtype=np.int32)
        return FlatBatch(
            tokens=self._upload(tokens),
            positions=self._upload(positions),
            slots=self._upload(slots),
            decodes=decodes,
            block_tables=self._upload(self._block_tables(chunks[:decodes])),
            context_lens=self._upload(lens),
            prefills=tuple(spans),
        )

    def _slots(self, positions: NDArray[Any], blocks: NDArray[Any]) -> NDArray[Any]:
        size = self.pool.layout.block_size
        if positions[-1] // size >= len(blocks):
            raise InvariantError(f"position {positions[-1]} lies beyond the request's {len(blocks)} blocks")
        slots: NDArray[Any] = blocks[positions // size].astype(np.int64) * size + positions % size
        return slots

    def _block_tables(self, chunks: Sequence[Chunk]) -> NDArray[Any]:
        size = self.pool.layout.block_size
        needed = [chunk.start // size + 1 for chunk in chunks]
        tables = np.zeros((len(chunks), max(needed, default=0)), dtype=np.int32)
        for row, (chunk, count) in enumerate(zip(chunks, needed, strict=True)):
            tables[row, :count] = chunk.request.blocks[:count]
        return tables

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _prepare(config: EngineConfig, model: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """Device and number format, with compute threads set."""
    if config.threads:
        torch.set_num_threads(config.threads)
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda was asked for, but torch sees no GPU")
    return torch.device(kind), DTYPES[model.dtype if config.dtype == "auto" else config.dtype]


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)
