"""vLLM's engine in this process: putting requests in, taking them out, stepping it, and asking what it holds.

The only place that calls vLLM's engine. Used by VllmEngine (vllm_engine.py), whose thread it runs on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus as VllmStatus

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError, TransportError
from llumnix.core.messages.control import KvLayout
from llumnix.core.messages.serving import FinishReason, TokenLogprob
from llumnix.instance.kv_pool import GIB, KvPool
from llumnix.instance.model_limits import ModelLimits
from llumnix.instance.request import Request
from llumnix.instance.vllm_arrivals import Arrivals
from llumnix.instance.vllm_exchange import Exchange, Import, offer, withdraw
from llumnix.instance.vllm_holds import Hold, Holds
from llumnix.instance.vllm_launch import start_vllm, unshared
from llumnix.instance.vllm_lora import LoraRequests
from llumnix.instance.vllm_model import end_tokens
from llumnix.instance.vllm_ranks import Ranks
from llumnix.instance.vllm_sampling import vllm_params

WARM_UP_LENGTHS = (3, 5)
REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(slots=True, eq=False)
class Entered:
    """A request that vLLM holds. ``live`` is vLLM's own object for it. ``importing``: its KV is in the pool
    and vLLM has not taken it in yet; ``hold``: what goes before that KV is in these blocks until then."""

    request: Request
    name: str
    vllm_id: str
    live: Any
    importing: bool
    hold: Hold
    preemptions: int = 0

    @property
    def running(self) -> bool:
        """Whether it is in vLLM's batch."""
        return bool(self.live.status == VllmStatus.RUNNING)

    @property
    def computed(self) -> int:
        """How many of its tokens have KV in vLLM."""
        return int(self.live.num_computed_tokens) if self.running else 0


@dataclass(frozen=True, slots=True)
class Produced:
    """New tokens of a request. ``logprobs`` is empty or as long as ``tokens``."""

    entered: Entered
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    reason: FinishReason | None


class VllmCore:
    """See the module. ``limits`` count in our block size. Raises ConfigurationError if vLLM does not
    start."""

    def __init__(self, config: EngineConfig, pool_name: str) -> None:
        self._pool_name = pool_name
        self._staging_gib = config.staging_gib
        self.exchange = Exchange(self._make_pool)
        offer(pool_name, self.exchange)
        degree = config.tensor_parallel
        self._ranks = Ranks(self.exchange, pool_name, degree) if degree > 1 else None
        self._vllm = self._start(config)
        try:
            lora = self._vllm.vllm_config.lora_config
            self._lora = LoraRequests(config, int(lora.max_loras) if lora is not None else 0)
            self._lora.prepare(self._vllm.add_lora, self._vllm.remove_lora)
        except ConfigurationError:
            self.close()
            raise
        if self._ranks is not None:
            self._ranks.started()
        self.holds = Holds(self.exchange)
        self.arrivals = Arrivals(self.exchange, self.holds)
        self.entered: dict[str, Entered] = {}
        self._by_name: dict[str, Entered] = {}
        self._names = 0
        self._salted = unshared(config)
        self._eos = end_tokens(self._vllm.vllm_config.model_config.model)
        self.block_size = self.exchange.copier.shape.block_size
        self._blocks = self.exchange.copier.shape.blocks - 1  # vLLM never gives out one of them
        size = config.block_size
        longest = int(self._vllm.vllm_config.model_config.max_model_len)
        self.limits = ModelLimits(
            capacity_blocks=self._blocks * self.block_size // size,
            block_size=size,
            block_bytes=self.exchange.pool.layout.block_bytes,
            max_model_len=min(longest, self._blocks * self.block_size),
            vocab_size=int(self._vllm.vllm_config.model_config.get_vocab_size()),
            eos_token_ids=self._eos,
            adapters=self._lora.names,
            greedy_only=self._vllm.vllm_config.speculative_config is not None,
        )
        self.batch_max = int(self._vllm.vllm_config.scheduler_config.max_num_seqs)
        if self._ranks is not None:
            self._warm_up()

    def _start(self, config: EngineConfig) -> Any:
        try:
            return start_vllm(config, self._pool_name)
        except ConfigurationError as error:
            withdraw(self._pool_name)
            if self._ranks is not None:
                self._ranks.close()
                if self._ranks.failure:
                    raise ConfigurationError(f"vLLM did not start: {self._ranks.failure}") from error
            raise

    def _warm_up(self) -> None:
        """Ranks compile a little in their first steps, for seconds, and anew for one token, a few, and any
        number: have that done before anybody waits."""
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
        for length in WARM_UP_LENGTHS:
            self._vllm.add_request(f"warm-up-{length}", tokens_input([0] * length), params)
            while self._vllm.has_unfinished_requests():
                self._vllm.step()

    def close(self) -> None:
        """Shut vLLM down and give the pool up."""
        if self._ranks is not None:
            self._ranks.expect_end()
        self._vllm.engine_core.shutdown()
        if self._ranks is not None:
            self._ranks.close()
        withdraw(self._pool_name)
        self.exchange.pool.close()

    def check(self) -> None:
        """Raises TransportError if vLLM has lost a rank, and with it everything."""
        if self._ranks is not None and self._ranks.lost:
            raise TransportError(self._ranks.lost)

    # Requests.

    def enter(self, request: Request, brought: Import | None = None, hold: Hold | None = None) -> Entered:
        """Give vLLM a request, and what is ``brought`` of its KV, in pool blocks that must stay until
        ``importing`` has ended; what goes before is held."""
        self._names += 1
        name = str(self._names)
        vllm_id = self._vllm.add_request(
            name,
            tokens_input(list(request.tokens), cache_salt=name if self._salted else None),
            vllm_params(request, self._eos, self.limits.vocab_size),
            arrival_time=request.arrived_at,
            lora_request=self._lora.request(request.adapter),
            priority=-request.execution_priority,
        )
        live = self.exchange.live[vllm_id]
        entered = Entered(request, name, vllm_id, live, brought is not None, hold or Hold())
        if brought is not None:
            self.exchange.imports[vllm_id] = brought
        self.entered[request.request_id] = self._by_name[name] = entered
        return entered

    def arrive(
        self, request: Request, pool_blocks: tuple[int, ...], computed: int, migration_id: str
    ) -> None:
        """Give vLLM a request with KV of ``computed`` tokens that a migration has brought: into
        ``pool_blocks``, and some of it into vLLM's own already."""
        brought = Import(pool_blocks, self.arrivals.present(migration_id), computed)
        entered = self.enter(request, brought)
        entered.hold = self.arrivals.join(migration_id, computed, entered.live)

    def block_hashes(self, tokens: Sequence[int], adapter: str) -> list[Any]:
        """What vLLM's prefix cache would know the full blocks of these tokens by, in order: with this LoRA
        adapter, for vLLM hashes it too. None if no request may find another's blocks."""
        hasher = self._vllm.engine_core.engine_core.request_block_hasher
        if self._salted or hasher is None or not tokens:
            return []
        params, lora = SamplingParams(max_tokens=1), self._lora.request(adapter)
        probe = VllmRequest("", list(tokens), params, None, lora_request=lora, block_hasher=hasher)
        return list(probe.block_hashes)

    def leave(self, entered: Entered, keep_tokens: int = 0) -> Hold:
        """Take a request out of vLLM, which frees its blocks there; those of its first ``keep_tokens``, which
        end a block, are held on."""
        kept = self.exchange.blocks_of(entered.vllm_id)[: keep_tokens // self.block_size]
        hold = self.holds.hold([self.exchange.block_pool.blocks[block] for block in kept])
        self._vllm.abort_request([entered.name])
        self._forget(entered)
        return hold

    def step(self) -> list[Produced]:
        """One step of vLLM."""
        if self._held_tokens:
            self._yield_blocks()
        torch.get_num_threads()  # has this thread go by the number set, which vLLM's kernels insist on
        produced = []
        for output in self._vllm.step():
            entered = self._by_name.get(output.request_id)
            if entered is None:
                continue
            completion = output.outputs[0]
            reason = REASONS.get(completion.finish_reason, FinishReason.ABORT) if output.finished else None
            logprobs = tuple(_logprobs(completion, entered.request.sampling.logprobs))
            produced.append(Produced(entered, tuple(completion.token_ids), logprobs, reason))
            if reason is not None:
                self._forget(entered)
        return produced

    @property
    def scheduled_tokens(self) -> int:
        """Tokens computed in the last step."""
        return self.exchange.scheduled_tokens

    def taken_in(self) -> list[Entered]:
        """Requests whose KV vLLM has taken in since this was last asked."""
        done = [one for one in self.entered.values() if one.importing and one.running]
        for one in done:
            self._imported(one)
        return done

    def preempted(self) -> list[Entered]:
        """Requests whose KV vLLM has given up since this was last asked."""
        hit = [one for one in self.entered.values() if one.live.num_preemptions > one.preemptions]
        for one in hit:
            one.preemptions = one.live.num_preemptions
        return hit

    # LoRA adapters.

    def adapters_loaded(self) -> set[str]:
        """Those in vLLM's memory now."""
        return self._lora.loaded(self._vllm.list_loras()) if self._lora.names else set()

    def has_slot_for(self, adapter: str) -> bool:
        """Whether a request with this adapter can join the batch beside the adapters there."""
        return self._lora.has_slot_for(adapter, (one.request.adapter for one in self.entered.values()))

    # Room, in tokens that whole blocks of vLLM hold.

    @property
    def used_tokens(self) -> int:
        """What vLLM has given out to requests."""
        return (self._blocks - self.exchange.free_blocks()) * self.block_size - self._held_tokens

    @property
    def caches(self) -> bool:
        """Whether a request that comes, or comes back, can find leading blocks in vLLM's prefix cache."""
        return self.exchange.block_pool.enable_caching and not self._salted

    @property
    def kept_tokens_max(self) -> int:
        """Of how many tokens vLLM's prefix cache can have the KV beside what requests hold."""
        return self.exchange.free_blocks() * self.block_size if self.caches else 0

    def free_tokens(self) -> int:
        """What is left once everything that vLLM holds has its known tokens computed. What migrations hold is
        left too: arrivals are counted by their reservations, and what has left goes first."""
        coming = sum(self._missing(one) for one in self.entered.values())
        return (self.exchange.free_blocks() - coming) * self.block_size + self._held_tokens

    def rounded(self, tokens: int) -> int:
        """Tokens that the blocks for so many hold."""
        return -(-tokens // self.block_size) * self.block_size

    def _missing(self, entered: Entered) -> int:
        """Blocks that vLLM has yet to give a request for its known tokens."""
        has = len(self.exchange.blocks_of(entered.vllm_id))
        return max(0, -(-len(entered.request.tokens) // self.block_size) - has)

    @property
    def _held_tokens(self) -> int:
        """What the blocks hold that migrations keep from being free, and no request has."""
        return (self.arrivals.blocks + self.holds.alone) * self.block_size

    def _yield_blocks(self) -> None:
        """See to it that migrations keep no blocks which requests of vLLM may need in this step: first those
        that are merely loaded later without them."""
        found = (self._missing(one) - len(one.hold.blocks) for one in self.entered.values())
        wanted = sum(max(1, missing) for missing in found)
        if self.exchange.free_blocks() < wanted:
            self.arrivals.yield_blocks()
        if self.exchange.free_blocks() < wanted:
            self.holds.let_all_go()

    def _forget(self, entered: Entered) -> None:
        self._imported(entered)
        self.exchange.live.pop(entered.vllm_id, None)
        del self._by_name[entered.name]
        del self.entered[entered.request.request_id]

    def _imported(self, entered: Entered) -> None:
        entered.importing = False
        self.holds.let_go(entered.hold)
        self.exchange.imports.pop(entered.vllm_id, None)

    def _make_pool(self, layout: KvLayout) -> KvPool:
        """The pool that peers read and requests come in through, of ``staging_gib``, in host memory."""
        block_bytes = replace(layout, blocks=1).block_bytes
        blocks = int(self._staging_gib * GIB) // block_bytes
        if blocks < 1:
            told = f"staging_gib {self._staging_gib:g}, not enough for one KV block of {block_bytes} bytes"
            raise ConfigurationError(told)
        return KvPool(replace(layout, blocks=blocks), self._pool_name, torch.device("cpu"))


def _logprobs(completion: Any, most: int) -> Iterator[TokenLogprob]:
    """vLLM's log probabilities of new tokens: of the chosen one, which it always reports, and of the ``most``
    likeliest."""
    for token, row in zip(completion.token_ids, completion.logprobs or ()):
        ranked = sorted(row.items(), key=lambda item: item[1].rank)
        top = tuple((other, one.logprob) for other, one in ranked if one.rank <= most)
        yield TokenLogprob(row[token].logprob, top)
