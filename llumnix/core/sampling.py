"""How the next token of a request is chosen: the part of a request that never changes while it moves.

Called by the frontend, which fills and validates it, and by samplers, which obey it. Randomness is a function
of (seed, position) alone, so the same parameters give the same tokens on any instance and in any batch.
"""

from dataclasses import dataclass

from llumnix.core.errors import ConfigurationError

LOGPROBS_OFF = -1
LOGPROBS_MAX = 20
SEED_MAX = 2**63 - 1
STOP_TOKENS_MAX = 64
GREEDY_BELOW = 1e-5  # a lower temperature overflows float32 and means greedy anyway
GREEDY_ONLY = "speculative decoding is on: only temperature 0 without penalties is served"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one request. Lengths count generated tokens, never the prompt.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0, ``repetition_penalty`` 1 and penalties
    0 are off. ``logprobs`` is how many alternatives to report per token; LOGPROBS_OFF reports nothing, 0 only
    the chosen token's. ``stop_token_ids`` end the request and are not suppressed by ``ignore_eos``, which
    only concerns the model's own end tokens. Stop strings are the frontend's business: it alone sees text.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = LOGPROBS_OFF

    @property
    def greedy(self) -> bool:
        """Whether each token is simply the likeliest: nothing is drawn, and no penalty changes the scores."""
        return (
            self.temperature < GREEDY_BELOW
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
        )

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ConfigurationError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0 <= self.seed <= SEED_MAX, "seed", f"within 0 and {SEED_MAX}")
        need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "within 0 and max_tokens")
        need(0.0 <= self.temperature <= 2.0, "temperature", "within 0 and 2")
        need(self.top_k >= 0, "top_k", "0 (off) or positive")
        need(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        need(0.0 <= self.min_p <= 1.0, "min_p", "within 0 and 1")
        need(0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", "above 0 and at most 10")
        need(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "within -2 and 2")
        need(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "within -2 and 2")
        need(len(self.stop_token_ids) <= STOP_TOKENS_MAX, "stop_token_ids", f"at most {STOP_TOKENS_MAX} ids")
        need(LOGPROBS_OFF <= self.logprobs <= LOGPROBS_MAX, "logprobs", f"at most {LOGPROBS_MAX}")
