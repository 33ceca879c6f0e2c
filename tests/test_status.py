"""`run`, `status` and `verify` at a glance."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.project import STAGES, Project


def rows(text: str) -> list[list[str]]:
    return [re.split(r" {3,}", line.strip()) for line in text.splitlines()]


def test_a_row_a_step(finished: Project) -> None:
    found = rows(finished.llmctl("status", "t.toml").out)
    assert found[0] == ["t", "identity", "made", "from", "result"]
    assert [row[0] for row in found[1:]] == list(STAGES)
    identities = finished.identities()
    for place, row in zip(STAGES, found[1:], strict=True):
        assert row[1:3] == ["up to date", identities[place][:8]]
        assert row[3] == "just now" or row[3].endswith(" ago")
    assert [row[4] for row in found[1:]] == [
        "text",
        f"prep {identities['prep'][:8]}",
        f"pretrain {identities['pretrain'][:8]}",
        f"finetune {identities['finetune'][:8]}",
        f"finetune {identities['finetune'][:8]}",
    ]
    assert found[1][5].endswith(" tokens")
    assert found[2][5].endswith(" bits/byte")


def test_the_reasons_stand_in_the_row(finished: Project) -> None:
    finished.edit("max_steps = 6", "max_steps = 7")
    found = {row[0]: row for row in rows(finished.llmctl("status", "t.toml").out)}
    assert found["finetune"][1] == "stale"
    assert found["finetune"][-1] == "[finetune] max_steps 6 -> 7"
    assert found["eval/finetune"][-1] == "its input is not up to date"
    shutil.rmtree(finished.run / "finetune")
    assert rows(finished.llmctl("status", "t.toml").out)[3] == ["finetune", "missing"]


def test_the_exit_code_says_whether_anything_is_behind(fresh: Project, finished: Project) -> None:
    assert finished.llmctl("status", "t.toml", "--exit-code").code == 0
    assert fresh.llmctl("status", "t.toml", "--exit-code").code == 1
    finished.edit("max_steps = 6", "max_steps = 7")
    assert finished.llmctl("status", "t.toml").code == 0
    assert finished.llmctl("status", "t.toml", "--exit-code").code == 1
    document = finished.llmctl("status", "t.toml", "--exit-code", "--json")
    assert document.code == 1
    assert document.json["ok"] is True
    finished.recipe.write_text("nonsense")
    assert finished.llmctl("status", "t.toml", "--exit-code").code == 2  # not 1: nothing is known


def test_status_of_a_run_follows_the_recipe_it_came_from(finished: Project) -> None:
    finished.edit("max_steps = 6", "max_steps = 7")
    assert finished.states("runs/t")["finetune"] == "stale"
    assert finished.states()["finetune"] == "stale"
    finished.recipe.unlink()
    assert finished.states("runs/t")["finetune"] == "up to date"


def test_status_touches_nothing(fresh: Project, finished: Project) -> None:
    for project in (fresh, finished):
        before = project.files()
        assert project.llmctl("status", "t.toml").code == 0
        assert project.files() == before


def test_verify_finds_a_flipped_bit(finished: Project) -> None:
    done = finished.llmctl("verify", "runs/t", "--json")
    assert done.code == 0
    assert done.json["metrics"] == {"artifacts": 5}
    path = finished.run / "pretrain" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    done = finished.llmctl("verify", "runs/t")
    assert done.code == 3
    assert "pretrain" in done.out
    assert "DAMAGED" in done.out
    assert "1 of 5 artifacts are damaged" in done.err
    assert "llmctl pretrain --rebuild" in done.err


def test_verify_finds_a_damaged_manifest(finished: Project) -> None:
    (finished.run / "prep" / "artifact.json").write_text("{")
    done = finished.llmctl("verify", "runs/t/finetune")
    assert done.code == 3
    assert "the manifest is damaged" in done.out


def test_a_damaged_input_never_trains_a_model(finished: Project) -> None:
    path = next((finished.run / "prep").glob("train-*.bin"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    shutil.rmtree(finished.run / "pretrain")
    done = finished.llmctl("pretrain", "t.toml")
    assert done.code == 3
    assert "is damaged: its bytes are not those that were published" in done.err
    assert "llmctl prep --rebuild" in done.err
    assert finished.llmctl("prep", "t.toml", "--rebuild").code == 0
    assert finished.llmctl("pretrain", "t.toml").code == 0


def test_verify_of_nothing(fresh: Project) -> None:
    (fresh.path / "runs" / "t").mkdir(parents=True)
    done = fresh.llmctl("verify", "t.toml")
    assert done.code == 2
    assert "holds no artifact" in done.err


def test_run_says_what_comes_next(fresh: Project) -> None:
    fresh.recipe.write_text(fresh.recipe.read_text().partition("[model]")[0])
    done = fresh.llmctl("run", "t.toml")
    assert done.code == 0
    assert "t · 1 stage to do · cpu, 1 thread, " in done.out
    assert "runs/t is complete in" in done.out
    assert "llmctl chat" not in done.out  # there is no model to talk to


def test_a_recipe_that_asks_for_nothing(fresh: Project) -> None:
    fresh.recipe.write_text("name = 't'\n")
    for command in ("run", "status"):
        done = fresh.llmctl(command, "t.toml")
        assert done.code == 2
        assert "asks for nothing" in done.err


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_file_beside_the_runs_is_no_run(finished: Project, command: str) -> None:
    (finished.path / "runs" / "notes.txt").write_text("x")
    assert finished.llmctl(command, "runs/t").code == 0
