"""Learning from a teacher: torch's own KL divergence, exact resume, and what a teacher may be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.model.transformer import Decoder
from llmctl.training import cross_entropy, distillation
from llmctl.training.batch import IGNORED
from llmctl.training.distillation import Distiller
from llmctl.training.objectives import Learner
from tests.project import Project
from tests.shapes import SHAPES

IDS = torch.randint(5, 97, (2, 33), generator=torch.Generator().manual_seed(5))
INPUTS, LABELS = IDS[:, :-1], IDS[:, 1:].clone()
LABELS[:, ::5] = IGNORED
COUNTED = (LABELS != IGNORED).flatten()


def decoder(name: str, seed: int) -> Decoder:
    """With logits of the order of one, so that probabilities differ."""
    model = Decoder.random(SHAPES[name], seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20.0)
    return model


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("logits", [1 << 23, 300], ids=["one chunk", "three rows each"])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 2.0), (0.25, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_loss_and_its_gradients_are_torchs(
    monkeypatch: pytest.MonkeyPatch, logits: int, weight: float, temperature: float, cap: float | None
) -> None:
    """fp32: cross_entropy and kl_div over whole logits, one part in 100,000."""
    monkeypatch.setattr(cross_entropy, "LOGITS", logits)
    student, teacher = decoder("llama", 1), decoder("qwen3", 2)
    student.config = replace(student.config, final_logit_softcapping=cap)
    said, wanted = student(INPUTS).flatten(0, 1)[COUNTED], teacher(INPUTS).flatten(0, 1)[COUNTED].detach()
    apart = F.kl_div(
        (said / temperature).log_softmax(-1), (wanted / temperature).log_softmax(-1), reduction="sum", log_target=True
    )
    nats = F.cross_entropy(said, LABELS.flatten()[COUNTED], reduction="sum")
    theirs = (1 - weight) * nats + weight * temperature**2 * apart
    expected = gradients(student, theirs)
    ours = Distiller(student, teacher, weight, temperature)(INPUTS, LABELS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients(student, ours), expected, rtol=1e-4, atol=1e-4)
    at = COUNTED.nonzero()[:, 0]  # as few supervised tokens come
    torch.testing.assert_close(Distiller(student, teacher, weight, temperature)(INPUTS, LABELS, at=at), ours)


def test_a_student_that_says_what_its_teacher_says_learns_nothing() -> None:
    student = decoder("llama", 1)
    loss = Distiller(student, decoder("llama", 1), 1.0, 2.0)(INPUTS, LABELS)
    assert loss.item() == pytest.approx(0.0, abs=1e-3)
    assert all(float(gradient.abs().max()) < 1e-3 for gradient in gradients(student, loss).values())


def test_without_weight_it_is_the_plain_loss() -> None:
    student = decoder("llama", 1)
    plain = Learner(student)(INPUTS, LABELS)
    torch.testing.assert_close(Distiller(student, decoder("qwen3", 2), 0.0, 1.0)(INPUTS, LABELS), plain)


@pytest.mark.parametrize("rows", [90, 104])
def test_an_embedding_that_is_padded_otherwise_is_compared_where_both_have_rows(rows: int) -> None:
    student = decoder("llama", 1)
    teacher = Decoder.random(replace(SHAPES["llama"], vocab_size=rows), 2)
    ids, both = INPUTS % 80 + 5, min(97, rows)
    said, wanted = student(ids)[:, :, :both].log_softmax(-1), teacher(ids)[:, :, :both].log_softmax(-1)
    theirs = F.kl_div(said, wanted, reduction="none", log_target=True).sum(-1).flatten()[COUNTED].sum()
    torch.testing.assert_close(Distiller(student, teacher, 1.0, 1.0)(ids, LABELS), theirs, rtol=1e-5, atol=1e-4)


def test_the_logits_of_both_exist_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, ...]] = []

    def spied(x: Tensor, head: Tensor, labels: Tensor, cap: float | None, taught: Tensor, *more: float) -> Any:
        rows.append((len(x), *taught.shape))
        return chunk(x, head, labels, cap, taught, *more)

    chunk = distillation.chunk
    monkeypatch.setattr(cross_entropy, "LOGITS", 8 * 97)
    monkeypatch.setattr(distillation, "chunk", spied)
    Distiller(decoder("llama", 1), decoder("llama", 2), 0.5, 1.0)(INPUTS, LABELS)
    assert rows == [(8, 8, 97)] * 8


def test_the_teacher_is_neither_trained_nor_part_of_the_module() -> None:
    student, teacher = decoder("llama", 1), decoder("qwen3", 2)
    learner = Distiller(student, teacher, 0.5, 1.0).train()
    assert set(map(id, learner.parameters())) == set(map(id, student.parameters()))
    learner(INPUTS, LABELS).backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_packed_documents_are_apart_for_the_teacher_too() -> None:
    """A row of two documents teaches what each of them does alone."""
    student, teacher = decoder("llama", 1), decoder("qwen3", 2)
    learner = Distiller(student, teacher, 0.5, 1.0)
    documents = torch.tensor([[0] * 16 + [1] * 16])
    together = learner(INPUTS[:1], LABELS[:1], documents=documents)
    alone = learner(INPUTS[:1, :16], LABELS[:1, :16]) + learner(INPUTS[:1, 16:], LABELS[:1, 16:])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------------------------------- the command line

STOP = (
    "import os, llmctl.training.checkpoint as c; write = c.write\n"
    "c.write = lambda w, state, *a: (write(w, state, *a), os.kill(os.getpid(), 9) if state['step'] == 4 else 0)"
)


def teach(project: Project) -> None:
    """Puts a copy of the base model beside the recipe, as its teacher."""
    shutil.copytree(project.run / "pretrain", project.path / "teacher")
    project.edit('sources = ["chats.jsonl"]', 'sources = ["chats.jsonl"]\nteacher = "teacher"')


def test_a_teacher_belongs_to_the_identity(based: Project) -> None:
    """Its files' digests are sources of the artifact: another teacher, and the student is stale."""
    teach(based)
    done = based.llmctl("finetune", "t.toml")
    assert done.code == 0, done.out + done.err
    assert "taught by teacher: 50 % of the loss" in done.out
    manifest, base = based.manifest("finetune"), based.manifest("pretrain")
    assert manifest["sources"]["teacher"]["identity"] == base["identity"]
    assert based.states()["finetune"] == "up to date"
    config = based.path / "teacher" / "generation_config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    assert based.states()["finetune"] == "stale"
    assert "teacher changed" in based.reasons("finetune")[0]
    shutil.rmtree(based.path / "teacher")
    assert based.states()["finetune"] == "unverifiable"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_taught_finetune_resumes_bitwise(based: Project, method: str) -> None:
    teach(based)
    keys = ("finetune", "t.toml", "--method", method)
    assert based.llmctl(*keys).code == 0
    whole = based.weights("finetune")
    shutil.rmtree(based.run / "finetune")
    assert based.llmctl(*keys, before=STOP).code == -9
    done = based.llmctl(*keys)
    assert "resuming at step 4 of 6" in done.out, done.out + done.err
    assert based.weights("finetune") == whole
    assert based.llmctl("finetune", "t.toml", "--method", method, "--set", "finetune.distill_weight=0").code == 0
    assert based.weights("finetune") != whole


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        ("none", 3, "no such folder"),
        ("flip", 3, "damaged"),
        ("pieces", 3, "the teacher's tokenizer is not the student's"),
        ("short", 3, "the teacher reads 32 tokens, and is to read 64"),
    ],
)
def test_what_cannot_teach_is_refused(based: Project, damage: str, code: int, says: str) -> None:
    teach(based)
    folder = based.path / "teacher"
    if damage == "none":
        shutil.rmtree(folder)
    elif damage == "flip":
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-3] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
    else:
        (folder / "artifact.json").unlink()
        name = "tokenizer.json" if damage == "pieces" else "config.json"
        stated = json.loads((folder / name).read_text())
        if damage == "pieces":
            vocabulary = stated["model"]["vocab"]
            one, other = "e", "t"
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        else:
            stated["max_position_embeddings"] = 32
        (folder / name).write_text(json.dumps(stated))
    done = based.llmctl("finetune", "t.toml", "--json")
    assert done.code == code, done.out + done.err
    assert says in done.json["error"]["message"], done.json
    assert not (based.run / "finetune").exists()
