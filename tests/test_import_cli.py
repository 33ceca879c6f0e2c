"""`llmctl import`: what it says, what it names, and how it stands beside the rest of a run."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests import folders
from tests.project import Project
from tests.warm import Done, Warm


class Here:
    """A working folder with a model in it."""

    def __init__(self, path: Path, warm: Warm) -> None:
        self.path, self.warm = path, warm
        self.source = folders.write(path / "models" / "Tiny-0.1B")

    def llmctl(self, *args: object, **more: str) -> Done:
        return self.warm.run(*args, cwd=self.path, env=more)

    def runs(self) -> list[str]:
        found = {path.parent.relative_to(self.path) for path in self.path.glob("runs/*/*/artifact.json")}
        return sorted(str(path) for path in found if path.parts[1] != "current")


@pytest.fixture
def here(warm: Warm, tmp_path: Path) -> Here:
    return Here(tmp_path, warm)


def test_one_line_says_what_came_in(here: Here) -> None:
    done = here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny")
    assert done.code == 0, done.err
    said, source, line = done.out.splitlines()
    assert said == "models/Tiny-0.1B as runs/tiny"
    assert source == " import     models/Tiny-0.1B"
    assert re.fullmatch(
        r" {12}llama, [\d,]+ parameters in bf16 · \d+ pieces · chat template · apache-2\.0 +\d\.\d s", line
    )
    (here.source / "README.md").unlink()
    (here.source / "chat_template.jinja").unlink()
    assert "no chat template · a licence file" in here.llmctl("import", "models/Tiny-0.1B", "--as", "other").out
    (here.source / "LICENSE").unlink()
    assert "no licence named" in here.llmctl("import", "models/Tiny-0.1B", "--as", "third").out


def test_the_document(here: Here) -> None:
    done = here.llmctl("import", "models/Tiny-0.1B", "--json")
    assert done.code == 0, done.err
    assert done.json["artifact"] == "runs/Tiny-0.1B/import"
    assert done.json["metrics"]["parameters"] > 0
    assert done.json["stages"]["import"]["made"] is True
    again = here.llmctl("import", "models/Tiny-0.1B", "--json")
    assert again.json["identity"] == done.json["identity"]
    assert again.json["stages"]["import"]["made"] is False


def test_status_and_verify_know_it(here: Here) -> None:
    assert here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny").code == 0
    status = here.llmctl("status").out.splitlines()
    assert status[0] == "run runs/tiny (runs/current)"
    assert re.search(r"import +up to date +[0-9a-f]{8} +just now +Tiny-0.1B +[\d,]+ parameters", status[2])
    assert here.llmctl("status", "--exit-code").code == 0
    verify = here.llmctl("verify")
    assert verify.code == 0
    assert re.search(r"import +whole", verify.out)
    weights = here.path / "runs/tiny/import/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert here.llmctl("verify").code == 3
    mended = here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny", "--rebuild")
    assert mended.code == 0, mended.err
    assert here.llmctl("verify").code == 0


def test_the_same_again_is_up_to_date_however_it_is_spelled(here: Here) -> None:
    assert here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny").code == 0
    (here.path / "link").symlink_to("models")
    for spelled in ("models/Tiny-0.1B", "./models/../models/Tiny-0.1B/", here.source, "link/Tiny-0.1B"):
        done = here.llmctl("import", spelled, "--as", "tiny")
        assert "import is up to date: runs/tiny/import" in done.out, done.out + done.err


def test_another_source_is_taken_and_the_reason_said(here: Here) -> None:
    first = here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny", "--json").json["identity"]
    (here.source / "chat_template.jinja").write_text("{{ messages }}")
    changed = here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny")
    assert "import is stale" in changed.out
    assert "Tiny-0.1B changed (chat_template.jinja)" in changed.out
    other = folders.write(here.path / "models" / "Other", seed=1)
    replaced = here.llmctl("import", "models/Other", "--as", "tiny", "--json")
    assert replaced.code == 0, replaced.err
    assert f"it was made from {here.source}, not {other}" in replaced.err
    assert replaced.json["identity"] != first
    assert (here.path / "runs/tiny/import/model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_source_that_turns_out_bad_leaves_the_old_model(here: Here) -> None:
    assert here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny").code == 0
    before = (here.path / "runs/tiny/import/artifact.json").read_bytes()
    bad = folders.write(here.path / "bad")
    (bad / "model.safetensors").write_bytes(b"junk")
    assert here.llmctl("import", "bad", "--as", "tiny").code == 3
    assert (here.path / "runs/tiny/import/artifact.json").read_bytes() == before
    assert here.llmctl("verify", "runs/tiny").code == 0
    back = here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny")
    assert "import is up to date" in back.out


def test_a_bad_source_leaves_no_empty_run(here: Here) -> None:
    bad = folders.write(here.path / "bad")
    (bad / "model.safetensors").write_bytes(b"junk")
    assert here.llmctl("import", "bad").code == 3
    assert not (here.path / "runs/bad").exists()


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/b", "..", ".", "", "current", "-x", "a b", "x" * 65, "ü", "a\nb"]
)
def test_a_name_is_a_name(here: Here, name: str) -> None:
    """Fault 19."""
    done = here.llmctl("import", "models/Tiny-0.1B", f"--as={name}")
    if name == "":  # nothing said: the source's own name
        assert done.code == 0, done.err
        return
    assert done.code == 2, done.out
    assert "is no run's name" in done.err
    assert [path.name for path in here.path.iterdir()] == ["models"]


def test_a_name_that_is_a_link_is_refused(here: Here) -> None:
    """Fault 19: nothing is written through it."""
    (here.path / "elsewhere").mkdir()
    (here.path / "runs").mkdir()
    (here.path / "runs" / "tiny").symlink_to("../elsewhere")
    done = here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny")
    assert done.code == 2
    assert "runs/tiny is a link to ../elsewhere" in done.err
    assert list((here.path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "run"),
    [
        ("Qwen3-0.6B", "Qwen3-0.6B"),
        ("my model (2)", "my-model-2"),
        ("current", "run"),
        ("a.link", "a.link"),
        ("models--org--Name-1.5B/snapshots/0123456789abcdef0123456789abcdef01234567", "Name-1.5B"),
    ],
)
def test_the_name_that_a_source_suggests(here: Here, folder: str, run: str) -> None:
    (here.path / folder).parent.mkdir(parents=True, exist_ok=True)
    if folder == "a.link":
        (here.path / folder).symlink_to(here.source)
    else:
        here.source.rename(here.path / folder)
    assert here.llmctl("import", folder).code == 0
    assert here.runs() == [f"runs/{run}/import"]


def test_a_run_of_a_recipe_is_not_taken_over(finished: Project) -> None:
    folders.write(finished.path / "hub")
    before = finished.files()
    done = finished.llmctl("import", "hub", "--as", "t")
    assert done.code == 2
    assert "runs/t belongs to the recipe" in done.err
    assert '[model] from = "hub"' in done.err
    assert finished.files() == before
    (finished.run / "recipe.resolved.toml").unlink()
    assert "runs/t holds prep already" in finished.llmctl("import", "hub", "--as", "t").err


def test_a_model_of_another_run(finished: Project) -> None:
    done = finished.llmctl("import", "runs/t", "--as", "mine", "--json")
    assert done.code == 0, done.err
    assert (finished.path / "runs/mine/import/model.safetensors").read_bytes() == finished.weights("finetune")
    assert finished.llmctl("import", "runs/t/pretrain", "--json").json["artifact"] == "runs/t-pretrain/import"
    origin = json.loads((finished.path / "runs/mine/import/artifact.json").read_text())["sources"]
    assert [entry["identity"] for entry in origin.values()] == [finished.identities()["finetune"]]
    itself = finished.llmctl("import", "runs/mine/import", "--as", "mine")
    assert itself.code == 2
    assert "lies in runs/mine" in itself.err


def test_every_stage_takes_it(here: Here) -> None:
    """A recipe of the same name goes on from it; a recipe anywhere starts from it."""
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(20)]
    (here.path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    finetune = (
        '[finetune]\nsources = ["chats.jsonl"]\nmax_steps = 2\nglobal_batch_size = 2\ndtype = "fp32"\ncompile = false\n'
    )
    assert here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny").code == 0
    (here.path / "tiny.toml").write_text(f'{finetune}[export]\nformats = ["hf"]\n')
    done = here.llmctl("run", "tiny.toml")
    assert done.code == 0, done.err
    (here.path / "other.toml").write_text(f'[model]\nfrom = "runs/tiny/import"\n{finetune}')
    other = here.llmctl("run", "other.toml")
    assert other.code == 0, other.err
    found = {"runs/tiny/import", "runs/tiny/finetune", "runs/other/import", "runs/other/finetune"}
    assert found <= set(here.runs())
    card = (here.path / "runs/tiny/export/finetune/hf/README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card  # of what it was made from
    assert "chat template · apache-2.0" in here.llmctl("import", "runs/tiny/finetune", "--as", "second").out
    chat = here.llmctl("chat", "runs/tiny/import", "-p", "hello", "--max-tokens", "4")
    assert chat.code == 0, chat.err


def test_a_dry_run_writes_nothing(here: Here) -> None:
    done = here.llmctl("import", "models/Tiny-0.1B", "--dry-run")
    assert done.code == 0, done.err
    assert re.search(r"import +would be made \(missing\)", done.out)
    assert not (here.path / "runs").exists()


def test_no_name_that_a_source_suggests_leaves_runs(here: Here) -> None:
    """Fault 19: a folder may be called anything."""
    for name in ("..x", "-", "a\nb", "$(touch x)", "ünï"):
        shutil.copytree(here.source, here.path / "odd" / name)
        assert here.llmctl("import", here.path / "odd" / name).code == 0
    assert sorted(path.name for path in here.path.iterdir()) == ["models", "odd", "runs"]
    assert here.runs() == [f"runs/{name}/import" for name in ("a-b", "n", "run", "touch-x", "x")]


@pytest.mark.parametrize("source", ["nothing", "models", "models/Tiny-0.1B/LICENSE"])
def test_what_is_no_model_is_named(here: Here, source: str) -> None:
    done = here.llmctl("import", source)
    assert done.code == 3
    assert source in done.err
    assert not here.runs()


def test_a_run_that_another_process_holds_is_waited_for_or_refused(here: Here) -> None:
    assert here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny").code == 0
    holder = """
import fcntl, os, time
fcntl.flock(os.open("runs/tiny/.lock", os.O_RDWR), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(30)
"""
    call = here.warm.start("--version", cwd=here.path, before=holder)
    call.until("held")
    try:
        done = here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny")
        assert done.code == 75
    finally:
        call.kill()
        call.wait()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle_it_leaves_what_was_there(here: Here, signum: int) -> None:
    assert here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny").code == 0
    other = folders.write(here.path / "models" / "Other", seed=1)
    slow = """
import time
from llmctl.importing import stage
def wait(*_):
    print("copying", flush=True)
    time.sleep(30)
stage.copy_weights = wait
"""
    call = here.warm.start("import", other, "--as", "tiny", cwd=here.path, before=slow)
    call.until("copying")
    call.kill(signum)
    assert call.wait().code == (-9 if signum == signal.SIGKILL else 128 + signum)
    weights = (here.path / "runs/tiny/import/model.safetensors").read_bytes()
    assert weights == (here.source / "model.safetensors").read_bytes()
    assert here.llmctl("verify", "runs/tiny").code == 0
    done = here.llmctl("import", other, "--as", "tiny")
    assert done.code == 0, done.err
    assert not list(here.path.rglob(".staging*"))


def test_pickles_by_a_flag_and_by_a_key(here: Here) -> None:
    folders.pickle(here.source)
    assert here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny").code == 3
    flag = here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny", "--convert-pickle", "--json")
    assert flag.code == 0, flag.err
    recipe = '[model]\nfrom = "models/Tiny-0.1B"\nconvert_pickle = true\n[export]\nformats = ["hf"]\n'
    (here.path / "key.toml").write_text(recipe)
    assert here.llmctl("run", "key.toml").code == 0
    key = json.loads((here.path / "runs/key/import/artifact.json").read_text())
    assert key["files"] == json.loads((here.path / "runs/tiny/import/artifact.json").read_text())["files"]
    shutil.rmtree(here.path / "runs")
    bare = here.llmctl("export", "models/Tiny-0.1B", "--hf")
    assert bare.code == 3
    assert "--convert-pickle" in bare.err


def test_the_licence_reaches_the_report(here: Here) -> None:
    assert here.llmctl("import", "models/Tiny-0.1B", "--as", "tiny").code == 0
    assert here.llmctl("report", "runs/tiny").code == 0
    assert "apache-2.0" in (here.path / "runs/tiny/report.html").read_text()
