"""`llmctl pretrain`, through the command line."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest

from tests.project import Project


def rows(project: Project, place: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.run / place / name).read_text().splitlines()]


def test_what_is_published(finished: Project) -> None:
    """A Hugging Face folder with its tokenizer, without a chat template: a base model has none."""
    names = {path.name for path in (finished.run / "pretrain").iterdir()}
    assert names >= {"artifact.json", "config.json", "generation_config.json", "model.safetensors", "metrics.jsonl"}
    assert names >= {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert "chat_template.jinja" not in names
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pkl"))]
    for name in ("tokenizer.json", "tokenizer.model"):
        ours, preps = ((finished.run / place / name).read_bytes() for place in ("pretrain", "prep"))
        assert ours == preps


def test_the_figures_add_up(finished: Project) -> None:
    """Arithmetic over what was measured, not what was printed."""
    made, data = finished.manifest("pretrain")["metrics"], finished.manifest("prep")["metrics"]
    assert (made["steps"], made["tokens"], made["skipped_steps"]) == (12, 12 * 4 * 64, 0)
    assert made["tokens_per_second"] == pytest.approx(made["tokens"] / made["seconds"])
    assert 0 < made["seconds"] < finished.manifest("pretrain")["times"]["seconds"]
    nats = made["val_loss"] * (data["val_tokens"] - 1)
    assert made["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / data["val_bytes"])
    assert made["val_perplexity"] == pytest.approx(math.exp(made["val_loss"]))
    assert made["val_loss"] < math.log(400)  # better than knowing nothing
    assert 0 < made["xz_primed_bits_per_byte"] < made["xz_bits_per_byte"] < 8
    assert made["peak_memory_bytes"] > 50_000_000


def test_the_log_has_every_step_it_was_asked_for(finished: Project) -> None:
    found = rows(finished, "pretrain", "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 13))
    assert all(row["tokens_per_second"] > 0 and row["gradient_norm"] > 0 for row in found)
    assert found[-1]["learning_rate"] < max(row["learning_rate"] for row in found)


def test_evaluations_and_samples_on_the_way(fresh: Project) -> None:
    fresh.edit("eval_every = 0\nsave_every = 3", "eval_every = 4\nsample_every = 6\nprompts = ['def ']\nsave_every = 3")
    fresh.edit("max_steps = 12", "max_steps = 10")
    done = fresh.llmctl("pretrain", "t.toml", "--events", "events.jsonl")
    assert done.code == 0, done.err
    found = rows(fresh, "pretrain", "metrics.jsonl")
    assert [row["step"] for row in found if "val_bits_per_byte" in row] == [4, 8]
    samples = rows(fresh, "pretrain", "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [(6, "def "), (10, "def ")]
    events = [json.loads(line) for line in (fresh.path / "events.jsonl").read_text().splitlines()]
    assert [row["text"] for row in events if row["event"] == "sample"] == [row["text"] for row in samples]


def test_looking_on_the_way_changes_no_weight(fresh: Project, finished: Project) -> None:
    fresh.edit("eval_every = 0\nsave_every = 3\nlog_every = 1", "eval_every = 1\nsave_every = 0\nlog_every = 7")
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    assert fresh.weights() == finished.weights()
    assert fresh.identities()["pretrain"] == finished.identities()["pretrain"]


def test_micro_batches_change_nothing_that_is_hashed(fresh: Project, finished: Project) -> None:
    fresh.edit("max_steps = 12", "max_steps = 12\nmicro_batch_size = 1")
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    ours, theirs = (project.manifest("pretrain") for project in (fresh, finished))
    assert ours["sections"] == theirs["sections"]
    assert ours["metrics"]["val_loss"] == pytest.approx(theirs["metrics"]["val_loss"], rel=1e-4)


def test_no_steps_are_the_weights_before_training(fresh: Project) -> None:
    fresh.edit("max_steps = 12", "max_steps = 0")
    done = fresh.llmctl("pretrain", "t.toml", "--json")
    assert done.code == 0, done.err
    assert done.json["metrics"]["steps"] == 0
    assert done.json["metrics"]["val_loss"] == pytest.approx(math.log(400), rel=0.05)


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_context_longer_than_the_data(fresh: Project) -> None:
    fresh.edit("max_seq_length = 64", "max_seq_length = 100_000")
    done = fresh.llmctl("pretrain", "t.toml", "--json")
    assert done.code == 3
    error = done.json["error"]
    assert "the context (100,000 tokens) is longer than the training text" in error["message"]
    assert "max_seq_length" in error["hint"]


def test_too_little_text_for_the_vocabulary(fresh: Project) -> None:
    (fresh.path / "little.txt").write_text("a few words, and that is all there is to read here\n" * 4)
    fresh.edit('["text"]', '"little.txt"')
    fresh.edit("vocab_size = 400", "vocab_size = 8000")
    done = fresh.llmctl("prep", "t.toml", "--json")
    assert done.code == 3
    assert "8,000" in done.json["error"]["message"]
    assert "vocab_size" in done.json["error"]["hint"]


def test_a_model_from_elsewhere_goes_on_learning(finished: Project) -> None:
    """`[model] from`: the same tokenizer, further text."""
    shutil.copytree(finished.run / "pretrain", finished.path / "base")
    finished.edit("depth = 1\nmax_seq_length = 64", 'from = "base"')
    finished.edit('name = "t"', 'name = "further"')
    finished.edit("vocab_size = 400", 'from = "base"')
    done = finished.llmctl("pretrain", "t.toml", "--json")
    assert done.code == 0, done.err
    assert list(done.json["stages"]) == ["prep", "import", "pretrain"]
    before = finished.manifest("pretrain")["metrics"]["val_loss"]
    assert done.json["metrics"]["val_loss"] < before


def test_a_vocabulary_that_is_not_the_models(finished: Project) -> None:
    shutil.copytree(finished.run / "pretrain", finished.path / "base")
    finished.edit("depth = 1\nmax_seq_length = 64", 'from = "base"')
    finished.edit("vocab_size = 400", "vocab_size = 420")
    done = finished.llmctl("pretrain", "t.toml", "--json")
    assert done.code == 3
    assert "the tokenizer of [model] from is not the one of prep's tokens" in done.json["error"]["message"]
    assert "[prep.tokenizer] from" in done.json["error"]["hint"]


def test_a_context_longer_than_the_data_of_a_model_from_elsewhere(finished: Project) -> None:
    shutil.copytree(finished.run / "pretrain", finished.path / "base")
    (finished.path / "base" / "artifact.json").unlink()  # a folder like any other: an artifact must be what was written
    config = finished.path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 100_000}))
    finished.edit("depth = 1\nmax_seq_length = 64", 'from = "base"')
    finished.edit("vocab_size = 400", 'from = "base"')
    done = finished.llmctl("pretrain", "t.toml", "--json")
    assert done.code == 3
    assert "100,000" in done.json["error"]["message"]
    assert "text" in done.json["error"]["hint"]
