"""Which steps are taken. One whose loss or gradient is no number, or whose loss leaps, would only do damage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from llmctl.errors import RunError

OnSpike = Literal["skip", "rollback", "ignore"]
# A spike is a loss more than SIGMAS standard deviations, and LEAP nats, above the mean of the last WINDOW, once there
# is half of it: OLMo's rule (github.com/allenai/OLMo-core, SkipStepOptimizer: 6 and 128). As there, spikes enter the
# window too, so that after some four of them the height they reach is no spike any more. Unlike there, what is no
# number stays out of it.
WINDOW, SIGMAS, LEAP = 128, 6.0, 0.1
IN_A_ROW = 20  # so many steps left out are no accident
ROLL_BACKS = 10


@dataclass
class Guard:
    """Judges each step before the weights change. Its fields are plain numbers that belong to the resume state."""

    recent: list[float] = field(default_factory=list)  # losses, the newest last
    in_a_row: int = 0  # steps that were left out
    roll_backs: int = 0  # counted by who does them

    def judge(self, loss: float, gradient_norm: float, on_spike: OnSpike) -> Literal["step", "skip", "roll back"]:
        """What to do: take the step, leave it out, or go back to the last checkpoint and on with the batches after this
        one, as PaLM was trained (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).

        Args:
            loss: nats a token.

        Raises:
            RunError: IN_A_ROW steps were left out in a row, or ROLL_BACKS roll backs did not help.
        """
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        spike = finite and on_spike != "ignore" and self._is_spike(loss)
        if finite:
            self.recent = [*self.recent, loss][-WINDOW:]
        if finite and not spike:
            self.in_a_row = 0
            return "step"
        if spike and on_spike == "rollback":
            if self.roll_backs == ROLL_BACKS:
                raise RunError(
                    f"the loss leapt again (to {loss:.2f} nats) after {ROLL_BACKS} roll backs",
                    hint="lower learning_rate or max_grad_norm",
                )
            return "roll back"
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW:
            raise RunError(
                f"the loss was no number for {IN_A_ROW} steps in a row",
                hint='lower learning_rate, or dtype = "fp32"',
            )
        return "skip"

    def _is_spike(self, loss: float) -> bool:
        count = len(self.recent)
        if count < WINDOW // 2:
            return False
        mean = sum(self.recent) / count
        deviation = math.sqrt(sum((past - mean) ** 2 for past in self.recent) / (count - 1))
        return loss > mean + max(SIGMAS * deviation, LEAP)
