"""What is derived, from what, and that it is printed."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmctl.recipe import PretrainSection
from llmctl.training import planning
from llmctl.training.planning import Plan


def made(sequences: int = 5_000, length: int = 512, cap: int = 0, **keys: Any) -> Plan:
    section = PretrainSection.model_validate(keys)
    return planning.make(section, sequences=sequences, length=length, width=256, peak=4e-3, cap=cap)


def test_what_is_given_is_taken() -> None:
    plan = made(max_steps=7, global_batch_size=12, learning_rate=1e-3, warmup_steps=2, eval_every=3, save_every=4)
    found = (plan.steps, plan.batch, plan.learning_rate, plan.warmup, plan.eval_every, plan.save_every)
    assert found == (7, 12, 1e-3, 2, 3, 4)
    assert plan.formulas == []
    assert plan.tokens == 7 * 12 * 512


def test_what_is_not_given_is_derived_and_told() -> None:
    plan = made()
    told = " ".join(plan.formulas)
    for name, value in (("global_batch_size", plan.batch), ("max_steps", plan.steps), ("warmup_steps", plan.warmup)):
        assert re.search(rf"\b{name} {value:,} = ", told), told
    assert f"learning_rate {plan.learning_rate:g} = 0.004 x sqrt(256 / width)" in told


def test_epochs_are_passes_over_the_data() -> None:
    one, three = made(global_batch_size=10), made(global_batch_size=10, epochs=3)
    assert (one.steps, three.steps) == (500, 1500)
    assert made(global_batch_size=10, epochs=0.1).steps == 50


def test_wider_models_take_smaller_steps() -> None:
    section = PretrainSection()
    rates = [
        planning.make(section, sequences=100, length=64, width=width, peak=4e-3).learning_rate
        for width in (64, 256, 1024)
    ]
    assert rates == [8e-3, 4e-3, 2e-3]


def test_the_cap_holds() -> None:
    assert made(sequences=100_000, length=64, cap=32).batch <= 32


@given(
    sequences=st.integers(1, 10**7),
    length=st.sampled_from([8, 64, 100, 512, 8192]),
    batch=st.none() | st.integers(1, 300),
    micro=st.just("auto") | st.integers(1, 64),
    steps=st.none() | st.integers(0, 10**6),
    epochs=st.none() | st.floats(0.001, 100),
)
def test_any_plan_can_be_carried_out(
    sequences: int, length: int, batch: int | None, micro: int | str, steps: int | None, epochs: float | None
) -> None:
    plan = made(sequences, length, global_batch_size=batch, micro_batch_size=micro, max_steps=steps, epochs=epochs)
    assert plan.batch >= 1
    assert 1 <= plan.micro_batch <= plan.batch
    assert plan.steps >= (1 if steps is None else 0)
    assert plan.eval_every >= 1
    assert plan.save_every >= 1
    assert plan.warmup >= 0
    if micro == "auto":
        assert plan.batch % plan.micro_batch == 0
        assert plan.micro_batch == 1 or plan.micro_batch * length <= planning.MICRO_TOKENS
    if batch is None:
        assert plan.batch <= sequences
    if plan.steps:
        assert 0 < plan.rate(0) <= 1
        assert 0 <= plan.rate(plan.steps - 1) <= 1  # 0 to the last bit behind some 10^8 steps
