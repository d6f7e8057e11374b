"""What an engine core must know of its model and KV pool, and which requests those rule out for good."""

from dataclasses import dataclass
from math import isfinite

from llumnix.core.config import EngineConfig
from llumnix.core.messages.serving import RequestSpec
from llumnix.core.sampling import GREEDY_ONLY
from llumnix.instance.executor import Executor


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """``max_model_len`` is the least of what model, settings and KV pool allow, so that every request within
    it can run to its end, if need be alone. ``block_bytes`` are those of a KV block, ``adapters`` the LoRA
    adapters by name. ``greedy_only``: the engine cannot draw tokens that would be the same elsewhere."""

    capacity_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    block_bytes: int
    adapters: frozenset[str] = frozenset()
    greedy_only: bool = False

    @classmethod
    def of(cls, executor: Executor, config: EngineConfig) -> "ModelLimits":
        """The limits of what an executor runs under these settings."""
        layout = executor.kv_layout
        return cls(
            capacity_blocks=layout.blocks,
            block_size=layout.block_size,
            max_model_len=min(
                executor.max_model_len,
                config.max_model_len or executor.max_model_len,
                layout.blocks * layout.block_size,
            ),
            vocab_size=executor.vocab_size,
            eos_token_ids=executor.eos_token_ids,
            block_bytes=layout.block_bytes,
        )

    def fault(self, spec: RequestSpec) -> str | None:
        """Why a request can never run here; None: it can. O(tokens)."""
        if not spec.prompt_tokens:
            return "the prompt is empty"
        for tokens in (spec.prompt_tokens, spec.output_tokens):
            if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
                return f"a token id is outside the vocabulary of {self.vocab_size}"
        prompt_len, max_tokens = len(spec.prompt_tokens), spec.sampling.max_tokens
        if prompt_len + max_tokens > self.max_model_len:
            return (
                f"prompt of {prompt_len} tokens and max_tokens of {max_tokens} are together over "
                f"the {self.max_model_len} tokens that fit here"
            )
        if len(spec.output_tokens) >= max_tokens:
            return f"all of its max_tokens of {max_tokens} are generated already"
        if not isfinite(spec.waited_s):  # queues are sorted by arrival
            return f"waited_s must be a finite number, got {spec.waited_s}"
        if self.greedy_only and not spec.sampling.greedy:
            return GREEDY_ONLY
        return None
