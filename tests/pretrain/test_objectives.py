"""`[pretrain]` objective, mixture and document_mask, and `[finetune]` packing, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.project import Project

MIXTURE = 'pretrain.mixture={"text" = 3, "more" = 1}'


@pytest.mark.parametrize(
    ("asked", "learns"),
    [
        (['objective="fim"', "fim_rate=0.8"], "the next token, middles last"),
        (['objective="infill"'], "blanks to fill in"),
        (["document_mask=true"], "the next token, documents apart"),
    ],
)
def test_a_decoder_is_measured_as_all_decoders_are_and_by_its_own_loss(
    fresh: Project, asked: list[str], learns: str
) -> None:
    done = fresh.llmctl("pretrain", "t.toml", *(f"--set=pretrain.{key}" for key in asked))
    assert done.code == 0, done.err
    assert learns in done.out
    made = fresh.manifest("pretrain")["metrics"]
    assert made["val_bits_per_byte"] > 0
    assert made["val_perplexity"] > 1
    assert 0 < made["val_objective_loss"] < 6.5
    assert made["val_objective_loss"] != made["val_loss"]


def test_what_does_not_go_with_the_model(fresh: Project) -> None:
    done = fresh.llmctl("pretrain", "t.toml", "--set", "pretrain.whole_word=true", "--json")
    assert done.code == 2
    assert "whole_word is about masked tokens" in done.json["error"]["message"]


def mixed(project: Project) -> None:
    """A second source, small enough to be read often."""
    (project.path / "more").mkdir()
    for file in list((project.path / "text").iterdir())[:1]:
        (project.path / "more" / file.name).write_text("\n".join(file.read_text().split("\n")[::-1]))
    project.edit('["text"]', '["text", "more"]')


def test_a_mixture_says_how_often_each_source_is_read(fresh: Project) -> None:
    mixed(fresh)
    done = fresh.llmctl("pretrain", "t.toml", "--set", MIXTURE, "--set", "pretrain.max_steps=8")
    assert done.code == 0, done.err
    runs = dict(_tokens(fresh.run / "prep" / "index.json"))
    for name, share in (("text", 0.75), ("more", 0.25)):
        epochs = share * 8 * 4 * 64 / runs[name]
        assert f"{name}: {100 * share:.1f} % of what is learned from, {epochs:.2g} epochs" in done.out
    assert "epochs of more" not in done.out + done.err
    done = fresh.llmctl("pretrain", "t.toml", "--rebuild", "--set", 'pretrain.mixture={"text" = 0, "more" = 1}',
                        "--set", "pretrain.max_steps=30", "--set", "pretrain.global_batch_size=40")  # fmt: skip
    assert done.code == 0, done.err
    assert "more than 4 epochs of more" in done.out + done.err


def _tokens(index: Path) -> list[tuple[str, int]]:
    return [(run["source"], run["tokens"]) for run in json.loads(index.read_text())["splits"]["train"]["sources"]]


def test_a_mixture_goes_on_where_it_stopped(fresh: Project) -> None:
    """Bitwise, by a position alone."""
    mixed(fresh)
    fresh.edit("[finetune]", 'mixture = {"text" = 3, "more" = 1}\n\n[finetune]')
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    whole = fresh.weights()
    shutil.rmtree(fresh.run / "pretrain")
    stopped = fresh.llmctl("pretrain", "t.toml", "--until-step", "7")
    assert stopped.code in (0, 75), stopped.err
    done = fresh.llmctl("pretrain", "t.toml")
    assert done.code == 0, done.err
    assert "resuming at step 7" in done.out
    assert fresh.weights() == whole


def test_packed_finetuning_reads_less_padding(finished: Project) -> None:
    """The same conversations a step, in fewer positions."""
    before = finished.manifest("finetune")["metrics"]
    done = finished.llmctl("finetune", "t.toml", "--set", "finetune.packing=true")
    assert done.code == 0, done.err
    after = finished.manifest("finetune")["metrics"]
    assert after["steps"] == before["steps"]
    assert after["tokens"] <= before["tokens"]
    assert after["train_loss"] == pytest.approx(before["train_loss"], abs=1e-4)
