"""What a training tells while it runs: rows of metrics.jsonl, dashboards, the live line; and how fast it really is."""

# C channels, H heads, D head size, L layers, N parameters, T time

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from llmctl import console
from llmctl.model.config import Config
from llmctl.training import journal, loop, reporters
from llmctl.training.checkpoint import State
from llmctl.training.loop import Step
from llmctl.training.reporters import Reporter


def flops_per_token(config: Config, length: int, parameters: int | None = None, teacher: Config | None = None) -> float:
    """Floating-point operations that training does for a token of a sequence of so many: 6 N + 6 L H D T.

    6 N: each parameter is multiplied once forward and twice backward, two operations each (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1; an embedding that is looked up alone counts too, as in the figures of others). Scores
    and their sums of values are 12 L H D T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), of which a causal
    mask needs half; halves are counted whatever the kind. An LSTM has none; of an encoder-decoder, a token passes about
    half. A teacher is only asked: a third of what training it would take.
    """
    taught = flops_per_token(teacher, length) / 3 if teacher is not None else 0.0
    count = config.parameters if parameters is None else parameters
    if config.kind == "recurrent":
        return 6.0 * count + taught
    share = 0.5 if config.kind == "encoder-decoder" else 1.0
    layers = config.num_hidden_layers + config.num_decoder_layers
    return 6.0 * share * (count + layers * config.num_attention_heads * config.head_dim * length) + taught


class Watch:
    """Follows the steps of a training, and tells of them: a context, so that dashboards get what is still held.

    Speed is tokens over the time of the steps that processed them, waiting for data included; evaluations, samples and
    checkpoints lie between steps, and `overhead` is their share of the time.

    Args:
        path: of metrics.jsonl.
        state: counted by `session.follow` before each call here.
        flops: of a token.
        peak: FLOP/s that the device could do; 0 where nobody knows.
        of: what that is, "GEMM" or "peak".
    """

    def __init__(
        self, path: Path, state: State, flops: float, peak: float, of: str = "GEMM", dashboards: Sequence[Reporter] = ()
    ) -> None:
        self._path, self._state, self._flops, self._peak, self._of = path, state, flops, peak, of
        self._dashboards = list(dashboards)
        self._window = self._begun = (state.tokens, state.seconds)  # as they were at the last row, and at the start
        self._opened = self._closed = time.perf_counter()

    def __enter__(self) -> Watch:
        self._opened = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = time.perf_counter()
        reporters.close(self._dashboards)

    def record(self, step: Step, more: Mapping[str, Any] | None = None) -> None:
        """A line of metrics.jsonl about the steps since the last one; the same as an event and for the dashboards."""
        speed = self._since_last(step)
        row = {
            "step": step.number,
            "train_loss": round(step.loss, 6),
            "learning_rate": step.learning_rate,
            "gradient_norm": round(step.gradient_norm, 5),
            **({} if step.update_norm is None else {"update_norm": round(step.update_norm, 7)}),
            "tokens": self._state.tokens,
            "seconds": round(self._state.seconds, 6),
            "tokens_per_second": round(speed, 1),
            **({"mfu": round(self._share(speed), 4)} if self._peak else {}),
            "peak_memory_bytes": loop.peak_memory(),
            "skipped": self._state.skipped,
            **(more or {}),
        }
        self._window = self._state.tokens, self._state.seconds
        journal.append(self._path, row)
        console.event("step", **row)
        reporters.tell(self._dashboards, row)

    def text(self, step: Step, steps: int, quality: str) -> str:
        """The live line: what a person watching wants to know; `quality` is what the last validation found."""
        speed = self._since_last(step)
        rate = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
        parts = [
            f"step {step.number:,}/{steps:,}",
            f"loss {step.loss:.3f}",
            quality,
            f"lr {step.learning_rate:.2g}",
            f"{rate} tok/s",
            f"{100 * self._share(speed):.0f} % of {self._of}" if self._peak else "",
            console.size(loop.peak_memory()),
        ]
        return " · ".join(part for part in parts if part)

    @property
    def figures(self) -> dict[str, float]:
        """Of the artifact's metrics: `mfu` of this session where a peak is known, and `overhead`, the share of its time
        that was spent between steps.
        """
        wall, inside = self._closed - self._opened, self._state.seconds - self._begun[1]
        found = {"overhead": max(0.0, 1 - inside / wall)} if wall > 0 and inside else {}
        return found | ({"mfu": self._share(self._speed(self._begun))} if self._peak else {})

    def _since_last(self, step: Step) -> float:
        if self._state.seconds < self._window[1]:  # it was rolled back: this is the first step again
            self._window = self._state.tokens - step.tokens, self._state.seconds - step.seconds
        return self._speed(self._window)

    def _speed(self, since: tuple[int, float]) -> float:
        tokens, seconds = self._state.tokens - since[0], self._state.seconds - since[1]
        return tokens / seconds if seconds > 0 else 0.0

    def _share(self, speed: float) -> float:
        return speed * self._flops / self._peak
