"""Requests coming, growing, being swapped out and in, and ending, against a real block manager: how long are
the runs that a swap copies once the pool has been full for long?

No time and no model: one tick is one decode step of everybody. The pool is refilled to ``fill`` of its blocks
every tick. Lengths are lognormal with the means of ShareGPT's single turns (ANCHORS: prompt 306, output 500
tokens). Used by the swap benchmark and by a test.
"""

from dataclasses import dataclass
from math import log
from random import Random

from llumnix.instance.block_manager import BlockManager
from llumnix.instance.free_runs import runs_of

PROMPT_TOKENS_MEAN = 306
OUTPUT_TOKENS_MEAN = 500
SIGMA = 1.0
SWAPS_PER_REQUEST = 2.0
SWAPPED_MIN = 8


@dataclass(slots=True)
class ChurnRequest:
    """One request: tokens it has, and those it ends with."""

    request_id: str
    tokens: int
    ends_at: int


@dataclass(frozen=True, slots=True)
class ChurnResult:
    """``swaps`` moved ``blocks`` blocks in ``runs`` runs while the pool was ``fill`` full on average and
    ``resident`` requests held blocks. ``run_squares`` is the sum of the runs' squared lengths."""

    swaps: int
    blocks: int
    runs: int
    run_squares: int
    fill: float
    resident: float

    @property
    def mean_run(self) -> float:
        """Blocks per copy."""
        return self.blocks / max(1, self.runs)

    @property
    def mean_run_of_a_block(self) -> float:
        """Length of the run that a block lies in, over blocks."""
        return self.run_squares / max(1, self.blocks)


class BlockChurn:
    """See the module. ``hints``: the block manager is told how much a request is likely to grow (the mean
    output, which an engine learns from those that ended)."""

    def __init__(
        self, blocks: BlockManager, *, seed: int, fill: float = 0.9, block_size: int = 16, hints: bool = True
    ) -> None:
        self._blocks = blocks
        self._rng = Random(seed)
        self._fill = fill
        self._size = block_size
        self._hints = hints
        self._running: dict[str, ChurnRequest] = {}
        self._swapped: list[ChurnRequest] = []
        self._made = 0
        self._next = self._new()

    def run(self, ticks: int, warm_up: int) -> ChurnResult:
        """Churn for ``warm_up`` ticks, then for ``ticks`` that count."""
        for _ in range(warm_up):
            self.tick()
        swaps, filled, resident = 0, 0.0, 0
        lengths: list[int] = []
        for _ in range(ticks):
            for blocks in self.tick():
                swaps += 1
                lengths += (length for _, length in runs_of(blocks))
            filled += self._blocks.owned_blocks / self._blocks.capacity
            resident += len(self._running)
        squares = sum(length * length for length in lengths)
        return ChurnResult(swaps, sum(lengths), len(lengths), squares, filled / ticks, resident / ticks)

    def tick(self) -> list[list[int]]:
        """One step; the blocks of every request swapped out in it."""
        out: list[list[int]] = []
        chance = SWAPS_PER_REQUEST / OUTPUT_TOKENS_MEAN
        for request in list(self._running.values()):
            request.tokens += 1
            if request.tokens >= request.ends_at:
                self._leave(request)
            elif self._rng.random() < chance or not self._grow(request):
                out.append(list(self._blocks.table(request.request_id)))
                self._leave(request)
                self._swapped.append(request)
        room = int(self._fill * self._blocks.capacity)
        while True:
            request = self._swapped[0] if len(self._swapped) > SWAPPED_MIN else self._next
            if self._blocks.owned_blocks + -(-request.tokens // self._size) > room:
                break
            if request is self._next:
                self._next = self._new()
            else:
                self._swapped.pop(0)
            self._running[request.request_id] = request
            self._grow(request)
        return out

    def _leave(self, request: ChurnRequest) -> None:
        del self._running[request.request_id]
        self._blocks.free(request.request_id)

    def _grow(self, request: ChurnRequest) -> bool:
        held = len(self._blocks.table(request.request_id)) if self._blocks.holds(request.request_id) else 0
        missing = -(-request.tokens // self._size) - held
        expected = OUTPUT_TOKENS_MEAN // self._size if self._hints else 0
        return missing <= 0 or self._blocks.grow(request.request_id, missing, expected)

    def _new(self) -> ChurnRequest:
        self._made += 1
        prompt, output = self._length(PROMPT_TOKENS_MEAN), self._length(OUTPUT_TOKENS_MEAN)
        return ChurnRequest(f"r{self._made}", prompt, prompt + output)

    def _length(self, mean: int) -> int:
        return max(1, round(self._rng.lognormvariate(log(mean) - SIGMA**2 / 2, SIGMA)))
