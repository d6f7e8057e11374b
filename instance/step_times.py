"""How long an engine's steps take lately, and what a prompt token adds: what preemption weighs a copy
against.

Exponential means, so that a new load shows within tens of steps. Called by the engine core.
"""

from collections.abc import Sequence

MEAN_WEIGHT = 0.1


class StepTimes:
    """``mean_s`` of all steps, ``decode_s`` of the last one without a prompt, ``prefill_token_s`` what each
    token of a prompt adds to a step. 0.0: not seen yet."""

    def __init__(self) -> None:
        self.mean_s = 0.0
        self.decode_s = 0.0
        self.prefill_token_s = 0.0

    def note_decodes(self, durations_s: Sequence[float]) -> None:
        """These steps, one at least, have computed no tokens of prompts."""
        mean_s, weight = self.mean_s or durations_s[0], MEAN_WEIGHT
        for duration_s in durations_s:
            mean_s += weight * (duration_s - mean_s)
        self.mean_s, self.decode_s = mean_s, durations_s[-1]

    def note_prefill(self, duration_s: float, prompt_tokens: int) -> None:
        """A step has computed so many tokens of prompts, one at least."""
        added_s = max(0.0, duration_s - self.decode_s) / prompt_tokens
        mean_s = self.mean_s or duration_s
        self.mean_s = mean_s + MEAN_WEIGHT * (duration_s - mean_s)
        self.prefill_token_s = self.prefill_token_s or added_s
        self.prefill_token_s += MEAN_WEIGHT * (added_s - self.prefill_token_s)
