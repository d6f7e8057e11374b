"""What things cost in virtual time: steps and KV copies of one (model, device).

A step that decodes d requests with r tokens of context between them and prefills p tokens takes

    fixed_ms + max(weights_ms, token_ms * p) + attention_ms * a + request_ms * d + context_ms * r

and mixed_ms more if it does both, since two kinds of attention run and more rows pass through the layers.

The weights are read once a step; prefilling p tokens hides that behind computing once it takes longer.
``a`` is, over all prefill chunks from position s to e, the sum of e² - s²: attention's quadratic part.
That is a step's mean: ``decode_spread`` and ``prefill_spread`` say how single ones scatter around it
(spread.py; presets do not), and requests of others hold steps up: HOLD_UPS. Each preset says where its
numbers come from; none was fitted to what a simulation gave. ``llumnix profile`` (bench/profile.py) fits one
to an engine that runs.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import KvLayout
from llumnix.instance.executor import Chunk
from llumnix.sim.spread import SPREAD_RULE, Spread, is_spread

BLOCK_COPY_MIN_S = 1e-4
KINDS: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float), Spread: (tuple,)}
STEP_TERMS = ("fixed_ms", "weights_ms", "token_ms", "attention_ms", "request_ms", "context_ms", "mixed_ms")
KIND_NAMES: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    Spread: "a list of numbers",
}
HOLD_UPS = ("arrival_ms", "answer_ms", "end_ms")
SPREADS = ("decode_spread", "prefill_spread")


class FieldError(ConfigurationError):
    """A cost model's ``field`` makes no sense."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


class StepFeatures(NamedTuple):
    """What a step has to do: d, r, p and a of the module's formula."""

    decodes: int
    context: int
    prefill: int
    attended: int


def plan_features(chunks: tuple[Chunk, ...]) -> StepFeatures:
    """What the chunks of a plan have to do."""
    decodes = context = prefill = attended = 0
    for chunk in chunks:
        end = chunk.start + chunk.count
        if chunk.count == 1 and chunk.request.prefilled:
            decodes += 1
            context += end
        else:
            prefill += chunk.count
            attended += end * end - chunk.start * chunk.start
    return StepFeatures(decodes, context, prefill, attended)


@dataclass(frozen=True, slots=True)
class CostModel:
    """See the module. ``copy_ms`` per token of KV moved between instances; ``capacity_tokens`` of KV.
    ``serving_ms`` is what a request's first token takes beside the engine and the messages between processes:
    HTTP, checking, tokens to text. Frontend and manager want the processors that engines compute on: every
    step that is under way at an instance takes ``arrival_ms`` longer when a request arrives at the host,
    ``answer_ms`` when its answer begins, ``end_ms`` when it ends. The spreads are of steps that only decode
    and of those that prefill."""

    name: str
    source: str
    fixed_ms: float
    weights_ms: float
    token_ms: float
    attention_ms: float
    request_ms: float
    context_ms: float
    mixed_ms: float
    arrival_ms: float
    answer_ms: float
    end_ms: float
    decode_spread: Spread
    prefill_spread: Spread
    copy_ms: float
    serving_ms: float
    capacity_tokens: int
    max_model_len: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                value = getattr(self, name)
                raise FieldError(name, f"cost model {self.name}: {name} must be {allowed}, got {value!r}")

        for field in fields(self):
            value, kind = getattr(self, field.name), KINDS[field.type]
            need(isinstance(value, kind) and not isinstance(value, bool), field.name, KIND_NAMES[field.type])
        for name in (*STEP_TERMS, *HOLD_UPS, "copy_ms", "serving_ms"):
            need(0 <= getattr(self, name) < float("inf"), name, "at least 0 and finite")
        for name in SPREADS:
            need(is_spread(getattr(self, name)), name, SPREAD_RULE)
        need(self.least_step_s > 0, "weights_ms", "above 0 where fixed_ms is 0")
        for name in ("capacity_tokens", "max_model_len", "layers", "kv_heads", "head_dim"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(self.dtype in ("float32", "bfloat16", "float16"), "dtype", "float32, bfloat16 or float16")

    @property
    def least_step_s(self) -> float:
        """No step takes less."""
        least_ms = self.fixed_ms + self.weights_ms
        return least_ms * min((1.0, *self.decode_spread[:1], *self.prefill_spread[:1])) * 1e-3

    @property
    def scatters(self) -> bool:
        """Whether a step may take anything but the mean."""
        return bool(self.decode_spread or self.prefill_spread)

    def step_s(self, decodes: int, context: int, prefill: int, attended: int) -> float:
        """Seconds that a step takes on average; see the module."""
        compute_ms = self.token_ms * prefill
        base_ms = self.fixed_ms + (compute_ms if compute_ms > self.weights_ms else self.weights_ms)
        if prefill and decodes:
            base_ms += self.mixed_ms
        return (
            base_ms + self.attention_ms * attended + self.request_ms * decodes + self.context_ms * context
        ) * 1e-3

    def plan_s(self, chunks: tuple[Chunk, ...]) -> float:
        """Seconds that a plan takes on average; 0 for an empty one."""
        return self.step_s(*plan_features(chunks)) if chunks else 0.0

    def decode_steps(
        self,
        decodes: int,
        context: int,
        *,
        begin: float,
        until: float,
        most: int,
        slowness: float,
        factors: Sequence[float] = (),
    ) -> tuple[list[float], list[float]]:
        """Ends and durations, in seconds, of steps that only decode, from ``begin`` up to the first that ends
        at ``until`` or later: bit for bit those that ``step_s`` gives one by one. ``factors``: of the
        ``most`` steps, where they scatter."""
        base_ms = self.fixed_ms + self.weights_ms + self.request_ms * decodes
        context_ms = self.context_ms
        contexts = range(context, context + most * decodes, decodes)
        if factors:
            drawn = zip(contexts, factors, strict=True)
            durations = [
                (base_ms + context_ms * tokens) * 1e-3 * factor * slowness for tokens, factor in drawn
            ]
        else:
            least_s = (base_ms + context_ms * context) * 1e-3 * slowness  # none takes less than the first
            contexts = contexts[: int((until - begin) / least_s) + 2]
            durations = [(base_ms + context_ms * tokens) * 1e-3 * slowness for tokens in contexts]
        ends = list(accumulate(durations, initial=begin))[1:]
        steps = bisect_left(ends, until) + 1
        return ends[:steps], durations[:steps]

    def layout(self, block_size: int, capacity_tokens: int = 0) -> KvLayout:
        """The KV pool of one instance; 0 takes the model's own capacity. Raises ConfigurationError if that is
        less than a block."""
        blocks = (capacity_tokens or self.capacity_tokens) // block_size
        if not blocks:
            raise ConfigurationError(
                f"cost model {self.name}: capacity_tokens {self.capacity_tokens} is less than a block of "
                f"{block_size} tokens"
            )
        return KvLayout(
            blocks=blocks,
            layers=self.layers,
            kv_heads=self.kv_heads,
            block_size=block_size,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )

    def copy_s(self, blocks: int, block_size: int) -> float:
        """Seconds to read so many blocks from another instance."""
        return max(BLOCK_COPY_MIN_S, self.copy_ms * block_size * blocks * 1e-3)


LLAMA_7B_WEIGHT_BYTES = 13.48e9
LLAMA_7B_KV_BYTES = 524_288
STEP_MS_AT_8K, CONTEXT_AT_8K = 43.2, 8192
A10_BYTES_PER_MS = (LLAMA_7B_WEIGHT_BYTES + CONTEXT_AT_8K * LLAMA_7B_KV_BYTES) / STEP_MS_AT_8K

LLAMA_7B_A10 = CostModel(
    name="llama-7b-a10",
    source="Llumnix (OSDI'24), figure 10: prefill(n) = 0.21 n + 4.2e-6 n² ms; decode step = 43.2 + 0.27 d ms "
    "for d requests with 8k tokens between them, split by bytes read: 13.48 GB of weights, 512 KiB of KV per "
    "token; KV copy 0.2 ms per token; 13,616 tokens of KV",
    fixed_ms=0.0,
    weights_ms=LLAMA_7B_WEIGHT_BYTES / A10_BYTES_PER_MS,
    token_ms=0.21,
    attention_ms=4.2e-6,
    request_ms=0.27,
    context_ms=LLAMA_7B_KV_BYTES / A10_BYTES_PER_MS,
    mixed_ms=0.0,
    arrival_ms=0.0,
    answer_ms=0.0,
    end_ms=0.0,
    decode_spread=(),
    prefill_spread=(),
    copy_ms=0.2,
    serving_ms=0.0,
    capacity_tokens=13_616,
    max_model_len=13_616,
    layers=32,
    kv_heads=32,
    head_dim=128,
    dtype="float16",
)


def read_cost_model(path: Path) -> CostModel:
    """A cost model from a JSON file with CostModel's fields. Raises ConfigurationError naming file, line and
    field."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: a cost model is an object")
    names = {field.name for field in fields(CostModel)}
    for name in sorted(values.keys() - names):
        raise ConfigurationError(f"{path}: line {_line(text, name)}: unknown field {name}")
    for name in sorted(names - values.keys()):
        raise ConfigurationError(f"{path}: field {name} is missing")
    try:
        return CostModel(**{name: _unlisted(value) for name, value in values.items()})
    except FieldError as error:
        raise ConfigurationError(f"{path}: line {_line(text, error.field)}: {error}") from error


def _unlisted(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _line(text: str, name: str) -> int:
    """Where a field stands in the file, which names it once or more; the last one counts."""
    places = list(re.finditer(re.escape(json.dumps(name)) + r"\s*:", text))
    return text.count("\n", 0, places[-1].start()) + 1 if places else 1


def to_json(model: CostModel) -> str:
    """The file that read_cost_model takes."""
    return json.dumps(asdict(model), indent=2) + "\n"
