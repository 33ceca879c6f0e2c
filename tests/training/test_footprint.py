"""The memory a plan states: its parts, what changes them, and that it is what a training takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmctl.model.config import Config, derive
from llmctl.recipe import ModelSection
from llmctl.training import footprint, outlook
from llmctl.training.footprint import Memory, Training

BENCH = Path(__file__).parents[2] / "docs" / "bench" / "plan.py"


def shape(family: str = "llama", vocabulary: int = 1000, **keys: Any) -> Config:
    section = ModelSection.model_validate({"family": family, "depth": 2, "max_seq_length": 64, **keys})
    return derive(section, vocabulary)[0]


def of(config: Config | None = None, **keys: Any) -> Training:
    base = Training(config or shape(), 64, 16, "fp32", "adamw", saves=False)
    return dataclasses.replace(base, **keys)


def parts(**keys: Any) -> dict[str, int]:
    return footprint.memory(of(**keys)).parts


def test_what_stays_is_counted_to_the_byte() -> None:
    config = shape()
    adamw, sgd = parts(), parts(optimizer="sgd")
    tensors = sum(1 for _ in footprint.hf.build(config).parameters())
    assert adamw["optimiser"] == 8 * config.parameters + 4 * tensors  # two moments, and a step count each
    assert sgd["optimiser"] == 4 * config.parameters
    assert parts(average=True)["average"] == 4 * config.parameters
    assert parts(saves=True)["checkpoint"] == sum(adamw[part] for part in ("weights", "optimiser"))
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in footprint.hf.build(config).buffers())
    assert adamw["weights"] == 4 * config.parameters + buffers


def test_gradients_wait_while_the_next_micro_batch_is_computed() -> None:
    assert parts()["gradients"] == 0  # the worst moment is the loss, and there are none yet
    assert parts(accumulates=True)["gradients"] == 4 * shape().parameters


def test_activations_are_what_the_sublayers_keep() -> None:
    one, two = parts(micro_batch=16)["activations"], parts(micro_batch=32)["activations"]
    fixed = 2 * one - two  # what does not grow with the batch: next to nothing
    assert 0 <= fixed < 0.1 * one
    assert parts(checkpointing=True)["activations"] < 0.4 * parts()["activations"]
    assert parts(gpu=True)["activations"] < parts()["activations"]  # no scores are kept
    assert parts(dtype="bf16")["activations"] < 0.9 * parts()["activations"] + 2 * shape().parameters


def test_there_is_never_a_whole_tensor_of_logits() -> None:
    config = shape(vocabulary=50_000)
    held = footprint.memory(of(config, micro_batch=64, length=64)).parts["logits"]
    assert held < 64 * 64 * 50_000 * 4 / 2


def test_a_teacher_and_what_stays_zero_are_counted() -> None:
    """The teacher's weights, its states for the chunks, and a byte a weight of the blocks' matrices."""
    config, teacher = shape(), shape(depth=3)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in footprint.hf.build(teacher).buffers())
    taught, alone = parts(teacher=teacher), parts()
    assert taught["teacher"] == 4 * teacher.parameters + buffers
    assert taught["weights"] == alone["weights"]
    more = footprint.memory(of(teacher=teacher)).total - footprint.memory(of()).total - taught["teacher"]
    assert 0 < more < 2 * 16 * 64 * (teacher.hidden_size + 3 * config.vocab_size) * 4
    matrices = sum(
        p.numel() for name, p in footprint.hf.build(config).named_parameters() if ".layers." in name and p.dim() == 2
    )
    assert parts(sparse=True)["optimiser"] == alone["optimiser"] + matrices


def test_fsdp_cuts_up_what_stays() -> None:
    alone, four = parts(), parts(ranks=4, strategy="fsdp")
    assert four["weights"] == -(-alone["weights"] // 4)
    assert four["optimiser"] == -(-alone["optimiser"] // 4)
    assert four["activations"] == alone["activations"]
    assert parts(ranks=4)["optimiser"] == alone["optimiser"]  # DDP does not


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2", "modernbert", "bert", "t5", "lstm"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kind_of_model_has_a_plan(family: str, dtype: str) -> None:
    config = shape(family)
    found = footprint.memory(of(config, dtype=dtype, optimizer="muon", micro_batch=64)).parts
    assert found["weights"] >= 4 * config.parameters
    assert found["activations"] > 0
    assert 4 * config.parameters <= found["optimiser"] <= 9 * config.parameters


def test_adapters_train_a_small_part() -> None:
    whole, lora = parts(), parts(lora=(4, ("q_proj", "v_proj")))
    assert lora["optimiser"] < 0.1 * whole["optimiser"]


def test_the_largest_micro_batch_that_fits() -> None:
    wanted = of(micro_batch=12)
    for size in (1, 2, 3, 4, 6, 12):
        room = footprint.memory(of(micro_batch=size, accumulates=size < 12)).total
        found = outlook.fitting(wanted, 12, room)
        assert found is not None
        assert found.micro_batch == size
        assert found.accumulates == (size < 12)
    assert outlook.fitting(wanted, 12, 1000.0) is None


def test_the_worst_moment_is_what_counts() -> None:
    """Parts are of one moment: their sum is the peak, not each part's own."""
    found = footprint.memory(of(shape(vocabulary=20_000), optimizer="adamw"))
    assert found == Memory(found.parts)
    assert found.total == sum(found.parts.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["200 MB", "500 MB"])
def test_it_is_what_a_training_takes(name: str) -> None:
    """Within 10 % of the peak above the process's size before the model; docs/bench/plan.py has shapes up to 4 GB."""
    command = [sys.executable, str(BENCH), "--measure", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert 0.9 < found["planned"] / found["measured"] < 1.1, found
