"""An executor without a model: what a step costs by formula, and tokens that follow from (seed, position).

Virtual time: the simulator asks ``cost_s`` and nobody waits. Real time: RealTimeSimulatedExecutor sleeps that
long. Tokens are bytes of printable text and never an end token, so lengths are what ``max_tokens`` says.
"""

from llumnix.core.config import EngineConfig
from llumnix.core.messages.control import KvLayout
from llumnix.core.messages.serving import TokenLogprob
from llumnix.instance.executor import SampledToken, StepPlan
from llumnix.instance.request import Request
from llumnix.instance.swap import Copier

EOS_TOKEN = 256
VOCAB_SIZE = 257
BLOCKS_DEFAULT = 1024
MAX_MODEL_LEN_DEFAULT = 8192

LETTERS = b"abcdefghijklmnopqrstuvwxyz    ,."
_SAMPLED = tuple(SampledToken(token) for token in range(VOCAB_SIZE))
_MASK = (1 << 64) - 1


def simulated_token(seed: int, position: int) -> int:
    """The token at ``position`` (prompt + output) of a request with ``seed``: the last mixing steps of
    splitmix64."""
    mixed = (seed * 0x9E3779B97F4A7C15 + position + 1) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return LETTERS[(mixed >> 32) % len(LETTERS)]


class SimulatedExecutor:
    """An Executor that computes nothing. A step costs ``simulated_step_ms`` and ``simulated_token_ms`` a
    token."""

    def __init__(self, config: EngineConfig) -> None:
        self._step_s = config.simulated_step_ms / 1e3
        self._token_s = config.simulated_token_ms / 1e3
        self._max_model_len = config.max_model_len or MAX_MODEL_LEN_DEFAULT
        self._kv_layout = KvLayout(
            blocks=config.kv_blocks or BLOCKS_DEFAULT,
            layers=1,
            kv_heads=1,
            block_size=config.block_size,
            head_dim=8,
            dtype="float32",
        )

    @property
    def kv_layout(self) -> KvLayout:
        return self._kv_layout

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset((EOS_TOKEN,))

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def copier(self) -> Copier | None:
        return None

    def cost_s(self, plan: StepPlan) -> float:
        """Seconds that a step takes; 0 for an empty one."""
        return self._step_s + self._token_s * plan.tokens if plan.chunks else 0.0

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        return [_sample(chunk.request) for chunk in plan.chunks if chunk.samples]


def _sample(request: Request) -> SampledToken:
    token = simulated_token(request.sampling.seed, len(request.tokens))
    alternatives = request.sampling.logprobs
    if alternatives < 0:
        return _SAMPLED[token]
    return SampledToken(token, TokenLogprob(0.0, ((token, 0.0),) if alternatives else ()))
