"""The executor that computes with torch: one model, one KV pool, one step at a time.

A step's plan becomes one flat batch (decodes first, then prefill chunks), one pass through the decoder, the
logits of those rows only that sample, and one call of the sampler. Built and driven by one thread; the pool's
memory may be read by copy threads and peer processes meanwhile.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llumnix.core.config import EngineConfig, SwapConfig
from llumnix.core.errors import ConfigurationError, InvariantError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.executor import Chunk, SampledToken, StepPlan
from llumnix.instance.kv_pool import DTYPES, KvPool, pool_blocks
from llumnix.instance.model_loader import read_model_folder, resolve_model
from llumnix.instance.models.config import ModelConfig
from llumnix.instance.models.decoder import Decoder, DecoderWeights, FlatBatch, PrefillSpan
from llumnix.instance.models.weights import load_weights, random_weights
from llumnix.instance.sampler import Sampler
from llumnix.instance.swap_copier import SwapCopier
from llumnix.instance.swap_space import SwapSpace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model whose weights lie ready on ``device`` in ``dtype``."""

    config: ModelConfig
    weights: DecoderWeights
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_folder(cls, engine: EngineConfig) -> "LoadedModel":
        """The model that the engine's configuration names."""
        folder = read_model_folder(resolve_model(engine.model))
        device, dtype = _placement(engine, folder.config)
        weights = load_weights(folder.path, folder.config, dtype, device)
        return cls(folder.config, weights, folder.eos_token_ids, device, dtype)

    @classmethod
    def random(cls, config: ModelConfig, engine: EngineConfig, seed: int) -> "LoadedModel":
        """A model of this shape with random weights and no end tokens."""
        device, dtype = _placement(engine, config)
        return cls(config, random_weights(config, dtype, device, seed), frozenset(), device, dtype)


class TorchExecutor:
    """See Executor. ``pool_name`` names the shared memory of the KV pool, one per instance."""

    def __init__(
        self,
        config: EngineConfig,
        pool_name: str,
        model: LoadedModel | None = None,
        swap: SwapConfig | None = None,
    ) -> None:
        """Find and load the model that ``config`` names unless one is given, then allocate the pools. Raises
        ConfigurationError. Sets torch's thread count for the whole process if ``config`` does. Without
        ``swap`` there is no host pool."""
        if config.threads:
            torch.set_num_threads(config.threads)
        model = model or LoadedModel.from_folder(config)
        self._model = model
        max_len = model.config.usable_len(config.max_model_len)
        layout = _layout(config, model)
        held = layout.blocks * layout.block_size
        if config.max_model_len > held:
            raise ConfigurationError(
                f"max_model_len {config.max_model_len} is over the pool's {held} tokens (kv_blocks, kv_gib)"
            )
        self._max_model_len = min(max_len, held)
        self._decoder = Decoder(model.config, model.weights, self._max_model_len)
        self._sampler = Sampler(model.eos_token_ids)
        self.pool = KvPool(layout, pool_name, model.device)
        self.swap_space = SwapSpace.beside(self.pool, swap)
        log.info("model on %s, KV pool %s", model.device, layout)

    @classmethod
    def from_random(
        cls,
        model: ModelConfig,
        config: EngineConfig,
        *,
        seed: int,
        pool_name: str,
        swap: SwapConfig | None = None,
    ) -> "TorchExecutor":
        """An executor for benchmarks, without a folder: random weights, no end tokens. ``config.model`` is
        not looked at."""
        return cls(config, pool_name, LoadedModel.random(model, config, seed), swap)

    @property
    def kv_layout(self) -> KvLayout:
        return self.pool.layout

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._model.eos_token_ids

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @property
    def host_pool(self) -> KvPool | None:
        """Where KV is swapped to; None: nowhere."""
        return None if self.swap_space is None else self.swap_space.pool

    @property
    def copier(self) -> SwapCopier | None:
        return None if self.swap_space is None else self.swap_space.copier

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
            if hidden.is_cuda:  # sampling would have waited; copiers and readers count on what a step wrote
                torch.cuda.current_stream(hidden.device).synchronize()
            return []
        sampling = hidden if len(rows) == hidden.shape[0] else hidden[rows]
        logits = self._decoder.logits(sampling)
        with _without_torch_threads():
            return self._sampler.sample(logits, requests)

    def close(self) -> None:
        """Give the KV pools up."""
        if self.swap_space is not None:
            self.swap_space.close()
        self.pool.close()

    def _flatten(self, chunks: Sequence[Chunk]) -> FlatBatch:
        decodes = 0
        while decodes < len(chunks) and chunks[decodes].count == 1:
            decodes += 1  # a prefill chunk of one token is computed like a decode
        total = sum(chunk.count for chunk in chunks)
        tokens, positions, slots = (np.empty(total, dtype=np.int64) for _ in range(3))
        decoding = chunks[:decodes]
        tables = self._block_tables(decoding)  # checks that every request has its blocks
        tokens[:decodes] = [chunk.request.tokens[chunk.start] for chunk in decoding]
        positions[:decodes] = [chunk.start for chunk in decoding]
        slots[:decodes] = [self._slot(chunk) for chunk in decoding]
        spans = []
        begin = decodes
        for chunk in chunks[decodes:]:
            end, stop = begin + chunk.count, chunk.start + chunk.count
            blocks = self._blocks(chunk)
            tokens[begin:end] = chunk.request.tokens[chunk.start : stop]
            positions[begin:end] = np.arange(chunk.start, stop)
            size = self.kv_layout.block_size
            slots[begin:end] = (
                blocks[positions[begin:end] // size] * np.int64(size) + positions[begin:end] % size
            )
            spans.append(PrefillSpan(begin, end, chunk.start, self._upload(blocks)))
            begin = end
        return FlatBatch(
            tokens=self._upload(tokens),
            positions=self._upload(positions),
            slots=self._upload(slots),
            decodes=decodes,
            block_tables=self._upload(tables),
            context_lens=self._upload(np.array([chunk.start + 1 for chunk in decoding], dtype=np.int32)),
            prefills=tuple(spans),
        )

    def _slot(self, chunk: Chunk) -> int:
        """Where the KV of a chunk of one token goes."""
        size = self.kv_layout.block_size
        return chunk.request.blocks[chunk.start // size] * size + chunk.start % size

    def _blocks(self, chunk: Chunk) -> NDArray[np.int32]:
        """The blocks that hold a chunk and everything before it."""
        needed = -(-(chunk.start + chunk.count) // self.kv_layout.block_size)
        held = chunk.request.blocks
        if len(held) < needed:
            raise InvariantError(
                f"{chunk.request.request_id} has {len(held)} blocks where a step needs {needed}"
            )
        return np.array(held[:needed], dtype=np.int32)

    def _block_tables(self, chunks: Sequence[Chunk]) -> NDArray[np.int32]:
        rows = [self._blocks(chunk) for chunk in chunks]
        tables = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int32)
        for row, blocks in enumerate(rows):
            tables[row, : len(blocks)] = blocks
        return tables

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._model.device)


@contextmanager
def _without_torch_threads() -> Iterator[None]:
    """Let torch compute in this thread alone for a while. Its other threads would look out for more work for
    milliseconds after, on the cores that the kernels' threads need for the next step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _placement(engine: EngineConfig, model: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """Device and number format of a model's weights."""
    kind = engine.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda was asked for, but torch sees no GPU")
    return torch.device(kind), DTYPES[model.dtype if engine.dtype == "auto" else engine.dtype]


def _layout(engine: EngineConfig, model: LoadedModel) -> KvLayout:
    """The KV pool's shape, as large as configuration and memory allow."""
    shape = model.config
    dtype = next(name for name, known in DTYPES.items() if known is model.dtype)
    one = KvLayout(1, shape.layers, shape.kv_heads, engine.block_size, shape.head_dim, dtype)
    return replace(one, blocks=pool_blocks(engine, one.block_bytes, model.device))
