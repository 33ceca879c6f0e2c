"""Two real processes train as one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl import launch
from llmctl.errors import RecipeError
from llmctl.model import hf
from llmctl.model.config import derive
from llmctl.model.sublayers import Block
from llmctl.recipe.schema import ModelSection
from llmctl.training import checkpoint, distributed, loop, optim
from llmctl.training.batch import IGNORED, Batch
from llmctl.training.checkpoint import Saver, State
from llmctl.training.distributed import Ranks
from llmctl.training.objectives import Learner
from llmctl.training.precision import Precision
from tests import ranks
from tests.warm import Warm

STEPS, SEQUENCES, LENGTH, PIECES = 5, 8, 16, 65
CPU = torch.device("cpu")


def batches(family: str) -> Iterator[Batch]:
    """The last rows are hardly supervised: a mean over rows or ranks is not the mean over tokens."""
    for number in range(100):
        ids = np.random.default_rng(number).integers(PIECES, size=(SEQUENCES, LENGTH + 1))
        labels = ids[:, 1:].copy()
        for row in range(SEQUENCES):
            labels[row, max(0, LENGTH - 3 * row) :] = IGNORED
        labels[0, 0] = ids[0, 1]
        yield Batch((ids[:, :-1],) * (1 + (family == "t5")), labels, number + 1)


def small(family: str, dropout: float = 0.0) -> Any:
    shape = {"family": family, "depth": 2, "hidden_size": 32, "max_seq_length": 32, "dropout": dropout}
    config, _ = derive(ModelSection.model_validate(shape), PIECES, bos=1, eos=2, pad=0)
    return hf.random(config, 1)


def trained(
    family: str = "qwen3",
    strategy: Any = "ddp",
    micro_batch: int = 4,
    optimizer: Any = "adamw",
    checkpointing: bool = False,
    dropout: float = 0.0,
    compiled: bool = False,
) -> list[list[float]]:
    """(loss, gradient norm, tokens) of each step; `micro_batch` is that of all ranks together."""
    here, model = distributed.here(CPU), small(family, dropout)
    learner = Learner(model)
    wrapped = distributed.wrap(learner, here, strategy, checkpointing=checkpointing)
    for block in learner.modules() if compiled else ():
        if isinstance(block, Block):
            block.compile()
    torch.manual_seed(5)
    steps = loop.train(
        wrapped,
        optim.build(model, optimizer, 1e-2, 0.1),
        batches(family),
        steps=range(STEPS),
        rate=lambda _: 1.0,
        micro_batch=micro_batch // here.size,
        max_grad_norm=0.5,
        precision=Precision(CPU),
        stop=lambda: False,
        ranks=here,
    )
    return [[step.loss, step.gradient_norm, step.tokens] for step in steps]


SAME: dict[str, dict[str, Any]] = {
    "ddp": {"micro_batch": 8},
    "ddp, accumulating": {"micro_batch": 2},
    "fsdp": {"strategy": "fsdp", "micro_batch": 8},
    "fsdp, accumulating": {"strategy": "fsdp", "micro_batch": 2},
    "fsdp, checkpointing": {"strategy": "fsdp", "checkpointing": True},
    "ddp, muon": {"optimizer": "muon"},
    "fsdp, muon": {"strategy": "fsdp", "optimizer": "muon"},
    "ddp, an encoder": {"family": "bert"},
    "fsdp, an encoder-decoder": {"strategy": "fsdp", "family": "t5", "checkpointing": True},
    "ddp, an LSTM": {"family": "lstm"},
    "fsdp, an LSTM": {"strategy": "fsdp", "family": "lstm"},
}


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_train_as_one_does(warm: Warm, tmp_path: Path, name: str) -> None:
    """Fault 6: the same losses, norms and samples, whatever the number of ranks."""
    one = trained(**{key: value for key, value in SAME[name].items() if key not in ("strategy", "checkpointing")})
    first, second = ranks.answers(warm, tmp_path, __name__, "trained", **SAME[name])
    assert first == second
    assert np.array(first) == pytest.approx(np.array(one), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_blocks_train_alike(warm: Warm, tmp_path: Path, strategy: str) -> None:
    flags = {"strategy": strategy, "compiled": True, "checkpointing": True}
    first, second = ranks.answers(warm, tmp_path, __name__, "trained", **flags)
    assert first == second
    assert np.array(first) == pytest.approx(np.array(trained()), abs=2e-4)


def test_checkpointing_changes_nothing_but_the_memory() -> None:
    assert trained(checkpointing=True, dropout=0.1) == trained(dropout=0.1)
    held = []
    for checkpointing in (False, True):
        learner = Learner(small("qwen3"))
        wrapped = distributed.wrap(learner, distributed.ALONE, checkpointing=checkpointing)
        sizes: list[int] = []
        tensors, _ = next(batches("qwen3")).tensors(CPU)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):  # type: ignore[misc] # None is falsy
            wrapped(*tensors)
        held.append(sum(sizes))
    assert held[1] < held[0] / 2


def test_each_rank_takes_its_rows() -> None:
    batch = next(batches("qwen3"))
    for size in (1, 2, 4, 8):
        parts = [Ranks(rank, size, rank, CPU).mine(batch) for rank in range(size)]
        assert np.array_equal(np.concatenate([part.labels for part in parts]), batch.labels)
        assert np.array_equal(np.concatenate([part.inputs[0] for part in parts]), batch.inputs[0])


@pytest.mark.parametrize(("batch", "ranks", "hint"), [(10, 4, "8 or 12"), (3, 4, "4"), (1025, 2, "1,024 or 1,026")])
def test_an_indivisible_batch_names_its_neighbours(
    monkeypatch: pytest.MonkeyPatch, batch: int, ranks: int, hint: str
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "MASTER_ADDR": "here", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    launch.check_batch(8 * ranks, "global_batch_size")
    with pytest.raises(RecipeError, match=f"cannot be divided among {ranks} ranks") as caught:
        launch.check_batch(batch, "global_batch_size")
    assert caught.value.hint.startswith(f"set it to {hint};")


def test_every_rank_has_random_numbers_of_its_own() -> None:
    """They follow from the step, so that a resumed rank draws what an uninterrupted one does; rank 0's go on."""

    def drawn(rank: int, step: int) -> list[float]:
        torch.manual_seed(1)
        Ranks(rank, 4, rank, CPU).stir(1, step)
        return torch.rand(3).tolist()

    assert drawn(0, 3) == drawn(0, 4)
    assert drawn(1, 3) == drawn(1, 3)
    assert len({tuple(drawn(rank, step)) for rank in (1, 2, 3) for step in (3, 4)}) == 6


def used_alone(strategy: Any) -> list[float]:
    """What rank 0 says of a text while the others wait, and after it; and what a whole copy says."""
    here, model = distributed.here(CPU), small("qwen3")
    wrapped = distributed.wrap(Learner(model), here, strategy)
    ids, found = torch.arange(20)[None], []
    for _ in range(2):
        with torch.no_grad():
            wrapped(ids, ids)  # all ranks
        with distributed.one_alone(wrapped) as mine, torch.inference_mode():
            if mine:
                found.append(model(ids).sum().item())
    whole = distributed.whole(model)
    if here.is_first:
        assert not [name for name, tensor in whole.state_dict().items() if hasattr(tensor, "full_tensor")]
        found.append(whole(ids).sum().item())
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_uses_the_model_while_the_others_wait(warm: Warm, tmp_path: Path, strategy: str) -> None:
    first, second = ranks.answers(warm, tmp_path, __name__, "used_alone", strategy=strategy)
    expected = small("qwen3")(torch.arange(20)[None]).sum().item()
    assert first == pytest.approx([expected] * 3)
    assert second == []


# --------------------------------------------------------------------------------------------------------- checkpoints


def saved(work: str, strategy: Any, optimizer: Any, write: bool) -> list[list[float]]:
    """Three steps and a checkpoint, or the steps after it."""
    here, model, folder = distributed.here(CPU), small("qwen3"), Path(work)
    wrapped = distributed.wrap(Learner(model), here, strategy)
    made = optim.build(model, optimizer, 1e-2, 0.1)
    state, source = State(), batches("qwen3")
    if not write:
        where, state = checkpoint.newest(folder) or (folder, State())
        checkpoint.restore(where, model, made)
        for _ in range(state.step):
            next(source)
    steps = loop.train(
        wrapped,
        made,
        source,
        steps=range(state.step, 3 if write else STEPS),
        rate=lambda _: 1.0,
        micro_batch=4,
        max_grad_norm=0.5,
        precision=Precision(CPU),
        stop=lambda: False,
        ranks=here,
    )
    found = [[step.loss, step.gradient_norm] for step in steps]
    if write:
        with Saver(folder, model, made) as saver:
            saver.finish(State(step=3))
            saver.finish(State(step=3))
    return found


@pytest.mark.parametrize(
    ("optimizer", "wrote", "read"),
    [("adamw", 2, 1), ("adamw", 1, 2), ("adamw", 4, 2), ("adamw", 2, 4), ("muon", 2, 1), ("muon", 1, 2)],
)
def test_a_checkpoint_of_any_number_of_ranks_is_read_by_any_other(
    warm: Warm, tmp_path: Path, optimizer: str, wrote: int, read: int
) -> None:
    """65 pieces divide among neither: shards of several sizes."""
    whole = np.array(trained(optimizer=optimizer))[3:, :2]
    work = {"work": str(tmp_path / "work"), "optimizer": optimizer, "strategy": "fsdp"}
    (tmp_path / "work").mkdir()
    ranks.answers(warm, tmp_path, __name__, "saved", wrote, **work, write=True)
    found = ranks.answers(warm, tmp_path, __name__, "saved", read, **work, write=False)
    assert np.array(found[0]) == pytest.approx(whole, abs=2e-4)
