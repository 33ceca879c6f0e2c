"""What `llmctl bench train` measures: the real step on random tokens, and the arithmetic of its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl import device, recipe
from llmctl.bench import train
from llmctl.device import Device
from llmctl.errors import RecipeError
from llmctl.training import watching

HERE = Device("cpu", "here", 1, frozenset({"avx2"}))
FIGURES = {
    "tokens_per_second",
    "first_step_seconds",
    "gflops",
    "gemm_share",
    "gemm_share_of_dtype",
    "gemm_gflops",
    "peak_memory_bytes",
    "model",
    "dtype",
    "compile",
    "batch",
    "threads",
    "machine",
}


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    (folder / "t.toml").write_text(
        "[prep]\nsources = ['nothing-is-read']\n[prep.tokenizer]\nvocab_size = 300\n"
        "[model]\ndepth = 1\nmax_seq_length = 32\n[pretrain]\nglobal_batch_size = 4\ncompile = false\n"
    )
    monkeypatch.setattr(train, "SECONDS", 0.0)
    monkeypatch.setattr(device, "gemm_rate", lambda kind, dtype: {"bf16": 4e9, "fp32": 2e9}[dtype])
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        return train.train(recipe.load(folder / "t.toml", overrides), HERE)
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)


def test_the_figures_follow_from_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(tmp_path, monkeypatch)
    assert set(found) >= FIGURES
    assert (found["dtype"], found["compile"], found["threads"]) == ("fp32", False, 1)
    assert found["batch"] == {"sequences": 4, "tokens_each": 32, "micro_batch": 4}
    layers, width, length = 1, 64, 32
    assert found["gflops"] * 1e9 == pytest.approx(
        found["tokens_per_second"] * (6 * found["parameters"] + 6 * layers * width * length)
    )
    assert found["gemm_share"] == pytest.approx(found["gflops"] / 4)
    assert found["gemm_share_of_dtype"] == pytest.approx(found["gflops"] / 2)
    assert found["steps"] == train.MEASURED
    assert found["peak_memory_bytes"] > 50e6


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.family='lstm'",),
        ("model.family='bert'", "model.num_hidden_layers=1"),
        ("model.family='t5'",),
        ("pretrain.optimizer='adamw'", "pretrain.micro_batch_size=3"),
        ("pretrain.dtype='bf16'",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_kind_of_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]) -> None:
    assert measured(tmp_path, monkeypatch, *overrides)["tokens_per_second"] > 0


def test_a_model_from_elsewhere_needs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="Hugging Face folder"):
        measured(tmp_path, monkeypatch, "model.from='hf:org/name@0123456789012345678901234567890123456789'")


def test_the_peers_formula() -> None:
    """train_peers.py counts (6 N + 6 L C T) of this shape."""
    shape = train._shape(recipe.load(Path(__file__).resolve().parents[2] / "recipes" / "bench.toml"))
    assert watching.flops_per_token(shape, 256) == 6 * 13_767_552 + 6 * 6 * 384 * 256
