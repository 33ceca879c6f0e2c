"""The command line as a script sees it: exit codes, one document, clean streams."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.project import Project

STAGES = ["prep", "pretrain", "finetune", "eval", "export", "serve"]
AROUND = ["run", "status", "verify", "chat", "plan", "init", "report", "doctor"]
COMMANDS = [*STAGES, *AROUND, "bench train"]
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "transformers", "tokenizers", "sentencepiece", "safetensors", "scipy"}


def llmctl(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a shell starts it."""
    clean = {key: value for key, value in os.environ.items() if key not in ("GITHUB_ACTIONS", "LLMCTL_RUN")}
    call = [sys.executable, "-m", "llmctl", *args]
    return subprocess.run(
        call, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


# ------------------------------------------------------------------------------------------------------------ imports


LOOKING = [
    (["--help"], {"pydantic", "llmctl.recipe"}),
    (["run", "--help"], {"llmctl.recipe"}),
    (["status", "t.toml"], set()),
    (["verify", "t.toml"], set()),
]


@pytest.mark.parametrize(("args", "more"), LOOKING)
def test_looking_imports_nothing_heavy(finished: Project, args: list[str], more: set[str]) -> None:
    program = (
        "import sys; sys.argv = ['llmctl', *sys.argv[1:]]\n"
        "from llmctl.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, *args], cwd=finished.path, capture_output=True, text=True, check=True
    )
    loaded = set(found.stderr.split())
    assert "llmctl.cli" in loaded
    assert not loaded & (HEAVY | more)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(fresh: Project, command: str) -> None:
    done = fresh.llmctl(*command.split(), "--help")
    assert done.code == 0
    assert done.out.split("\n\n")[0].strip()
    for flag in ("--set", "--json", "--dry-run", "--device", "--max-time"):
        assert flag in done.out


def test_the_help_lists_two_panels(fresh: Project) -> None:
    text = fresh.llmctl("--help").out
    stages, around = text.index("Stages"), text.index("Around them")
    for command in STAGES:
        assert stages < text.index(f" {command} ") < around
    for command in [*AROUND, "bench"]:
        assert text.rindex(f" {command} ") > around


# --------------------------------------------------------------------------------------------------------- exit codes


def broken(project: Project, code: int) -> list[str]:
    """Arguments that end with an exit code; the project may be changed for it."""
    match code:
        case 2:
            project.edit("depth = 1", "dept = 1")
        case 3:
            project.edit('["text"]', '["nothing"]')
        case 5:
            project.edit("[export]", '[eval.require]\nval_loss = "<0.1"\n[export]')
        case 6:
            return ["run", "t.toml", "--device", "cuda"]
        case 75:
            project.edit("max_steps = 12", "max_steps = 13")
            return ["run", "t.toml", "--max-time", "0.0001s"]
    return ["run", "t.toml"]


NO_DRIVER = "import llmctl.device; llmctl.device.nvidia_driver = lambda: False"


@pytest.mark.parametrize(
    ("code", "word"), [(0, None), (2, "recipe"), (3, "data"), (5, "gate"), (6, "unavailable"), (75, "time")]
)
def test_exit_codes_and_their_documents(finished: Project, code: int, word: str | None) -> None:
    args = broken(finished, code)
    done = finished.llmctl(*args, "--json", before=NO_DRIVER)
    assert done.code == code, done.err
    assert set(done.json) >= {"ok", "error", "artifact", "identity", "metrics"}
    assert done.json["ok"] is (code == 0)
    if word is None:
        assert done.json["error"] is None
    else:
        error = done.json["error"]
        assert error["code"] == word
        assert error["message"] in done.err
        assert error["hint"]
        assert error["file"] or code in (6, 75)
        plain = finished.llmctl(*args, before=NO_DRIVER)
        assert plain.code == code
        assert "Traceback" not in plain.out + plain.err
        if code == 2:
            assert plain.err.startswith("t.toml:11: unknown key `dept` in [model]")


def test_a_recipe_error_names_the_line_the_key_and_the_mend(fresh: Project) -> None:
    fresh.edit("max_steps = 12", "max_step = 12")
    done = fresh.llmctl("pretrain", "t.toml", "--json")
    assert done.json["error"] == {
        "code": "recipe",
        "message": "unknown key `max_step` in [pretrain]",
        "hint": "Did you mean `max_steps`? All keys: llmctl init --keys pretrain",
        "file": "t.toml",
        "line": 15,
    }


def test_disk_full_is_told_and_nothing_is_lost(finished: Project) -> None:
    """Fault 3: wherever it strikes, the error says what to do, and what was published stays whole."""
    before = finished.identities()
    finished.edit("max_steps = 12", "max_steps = 13")
    for limit in (2_000, 10_000, 150_000, 400_000):
        full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        done = finished.llmctl("pretrain", "t.toml", "--json", before=full)
        assert done.code == 4, (limit, done.err)
        assert done.json["error"]["code"] == "run"
        assert "make room" in done.json["error"]["hint"]
        assert finished.identities() == before
        assert finished.llmctl("verify", "runs/t").code == 0
    done = finished.llmctl("pretrain", "t.toml")
    assert done.code == 0, done.err
    assert finished.identities()["pretrain"] != before["pretrain"]


def test_a_folder_that_cannot_be_written(fresh: Project) -> None:
    refused = """
import os
def no(path, *args, **named):
    raise PermissionError(13, "Permission denied", str(path))
os.mkdir = no
"""
    done = fresh.llmctl("prep", "t.toml", "--json", before=refused)
    assert done.code == 4
    assert "Permission denied" in done.json["error"]["message"]
    assert done.json["error"]["file"] == "runs/t"


@pytest.mark.parametrize(
    "raised", ["MemoryError()", "RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')"]
)
def test_out_of_memory_is_no_bug(fresh: Project, raised: str) -> None:
    done = fresh.llmctl("prep", "t.toml", "--json", before=BROKEN.format(raised))
    assert done.code == 4
    assert done.json["error"]["message"] == "out of memory"


BROKEN = """
import llmctl.prep.stage
def broken(job): raise {}
llmctl.prep.stage.prep = broken
"""


def test_a_bug_is_told_as_one(fresh: Project) -> None:
    done = fresh.llmctl("prep", "t.toml", "--json", before=BROKEN.format("ZeroDivisionError('oh')"))
    assert done.code == 70
    assert done.json["error"]["code"] == "bug"
    assert done.json["error"]["message"] == "ZeroDivisionError: oh"
    assert "Traceback" not in done.err
    loud = fresh.llmctl("prep", "t.toml", "-v", before=BROKEN.format("ZeroDivisionError('oh')"))
    assert loud.code == 70
    assert "in broken" in loud.err


def test_a_second_process_on_the_run(finished: Project) -> None:
    """Fault 12."""
    finished.edit("max_steps = 12", "max_steps = 100000")
    first = finished.start("pretrain", "t.toml")
    first.until("steps of 4 x 64")
    second = finished.llmctl("export", "runs/t", "--json")
    assert second.code == 75
    assert second.json["error"]["code"] == "busy"
    assert f"in use by process {first.pid}" in second.json["error"]["message"]
    assert finished.llmctl("status", "runs/t").code == 0  # looking is always allowed
    waiting = finished.start("export", "runs/t", "--wait-lock")
    waiting.until("waiting")
    first.kill(signal.SIGTERM)
    assert first.wait().code == 143
    assert waiting.wait().code == 0


# ------------------------------------------------------------------------------------------------------------- --json

SUCCESS: dict[str, list[str]] = {
    "prep": ["t.toml"],
    "pretrain": ["t.toml"],
    "finetune": ["t.toml"],
    "eval": ["runs/t"],
    "export": ["runs/t"],
    "serve": ["runs/t", "--dry-run"],
    "run": ["t.toml"],
    "status": ["t.toml"],
    "verify": ["runs/t"],
    "chat": ["runs/t", "-p", "What is 1 and 1?", "--max-tokens", "4"],
    "plan": ["t.toml"],
    "init": ["text", "-o", "new.toml"],
    "report": ["runs/t"],
    "doctor": [],
    "bench train": ["t.toml"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_one_document_on_success(finished: Project, command: str) -> None:
    done = finished.llmctl(*command.split(), *SUCCESS[command], "--json")
    assert done.code == 0, done.err
    assert set(done.json) >= {"ok", "error", "artifact", "identity", "metrics"}
    assert done.json["ok"] is True
    if command in ("prep", "pretrain", "finetune", "eval", "export", "run"):
        assert (finished.path / done.json["artifact"] / "artifact.json").exists()
        assert done.json["identity"] in finished.identities().values()


@pytest.mark.parametrize("command", COMMANDS)
def test_one_document_on_failure(fresh: Project, command: str) -> None:
    for args in (["nowhere.toml"], ["--no-such-flag"], ["--set", "nonsense"], ["--max-time", "soon"]):
        if command in ("doctor", "init", "report", "verify", "status", "serve", "chat") and args[0] != "--no-such-flag":
            args = ["nowhere.toml", "--no-such-flag"]
        done = fresh.llmctl(*command.split(), *args, "--json")
        assert done.code == 2, (args, done.err)
        assert done.json["ok"] is False
        assert done.json["error"]["code"] in ("usage", "recipe")
        assert done.json["error"]["message"]


def test_the_document_of_a_dry_run(finished: Project) -> None:
    for command in ("run", "pretrain", "export", "eval"):
        done = finished.llmctl(command, "t.toml", "--dry-run", "--json")
        assert done.code == 0, done.err
        assert done.json["ok"] is True


def test_an_answer_is_part_of_the_document(finished: Project) -> None:
    done = finished.llmctl("chat", *SUCCESS["chat"], "--json")
    assert isinstance(done.json["answer"], str)
    plain = finished.llmctl("chat", *SUCCESS["chat"], "--temperature", "0")
    assert plain.code == 0
    greedy = finished.llmctl("chat", *SUCCESS["chat"], "--temperature", "0", "--json")
    assert plain.out.strip() == greedy.json["answer"]  # without --json, stdout is the answer and nothing else


def test_the_schema_and_the_keys_are_documents(fresh: Project) -> None:
    assert json.loads(fresh.llmctl("init", "--schema").out)["title"] == "llmctl recipe"
    assert json.loads(fresh.llmctl("init", "--schema", "--json").out)["title"] == "llmctl recipe"
    keys = fresh.llmctl("init", "--keys", "pretrain", "--json").json["keys"]
    assert {"max_steps", "learning_rate"} <= {row["key"] for row in keys}
    assert fresh.llmctl("init", "--keys", "pretrian").code == 2


def test_two_owners_of_stdout_are_refused(finished: Project) -> None:
    done = finished.llmctl("eval", "runs/t", "--markdown", "--json")
    assert done.code == 2
    assert "--markdown and --json" in done.json["error"]["message"]


# ----------------------------------------------------------------------------------------------------- other streams


def test_events_are_json_lines(fresh: Project) -> None:
    def strict(line: str) -> Any:
        return json.loads(line, parse_constant=pytest.fail)

    done = fresh.llmctl("pretrain", "t.toml", "--events", "out/events.jsonl")
    assert done.code == 0, done.err
    rows = [strict(line) for line in (fresh.path / "out" / "events.jsonl").read_text().splitlines()]
    kinds = [row["event"] for row in rows]
    assert kinds[0] == "stage_started"
    assert kinds[-2:] == ["stage_finished", "result"]
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 13))
    assert rows[-1]["identity"] == fresh.identities()["pretrain"]
    assert all(row["time"] > 1.7e9 for row in rows)
    fresh.llmctl("pretrain", "nowhere.toml", "--events", "out/events.jsonl")
    last = strict((fresh.path / "out" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["ok"], last["error"]["code"]) == ("result", False, "recipe")


def test_events_that_cannot_be_written(fresh: Project) -> None:
    done = fresh.llmctl("prep", "t.toml", "--events", "t.toml/x", "--json")
    assert done.code == 2
    assert done.json["error"]["file"] == "t.toml/x"


def test_quiet_says_nothing_when_all_is_well(fresh: Project) -> None:
    fresh.edit("max_steps = 12", "max_steps = 1")
    done = fresh.llmctl("pretrain", "t.toml", "--quiet")
    assert done.code == 0
    assert all(line.startswith("warning: ") for line in (done.out + done.err).splitlines())
    assert done.out.count("very little text") == 1
    assert "step 1/1" in (fresh.run / "logs" / "pretrain.log").read_text()  # the log has it all


def test_logs_are_kept_beside_the_run(finished: Project) -> None:
    names = {path.name for path in (finished.run / "logs").iterdir()}
    assert names >= {"prep.log", "pretrain.log", "finetune.log", "eval.log", "export.log"}
    for path in (finished.run / "logs").iterdir():
        assert "\x1b" not in path.read_text()


def test_a_reader_that_goes_away_does_not_end_the_work(finished: Project) -> None:
    shutil.rmtree(finished.run / "export")
    command = f"{sys.executable} -m llmctl export runs/t 2>err.txt | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], cwd=finished.path, capture_output=True, text=True, check=True)
    assert found.stdout == "0\n", (finished.path / "err.txt").read_text()
    assert (finished.path / "err.txt").read_text() == ""
    assert (finished.run / "export/finetune/onnx-ort/artifact.json").exists()


def test_github_gets_annotations_and_stdout_stays_one_document(fresh: Project) -> None:
    fresh.edit("depth = 1", "dept = 1")
    done = llmctl("run", "t.toml", "--json", cwd=fresh.path, GITHUB_ACTIONS="true")
    assert done.returncode == 2
    assert json.loads(done.stdout)["ok"] is False
    assert "::error file=t.toml,line=11::unknown key `dept` in [model]" in done.stderr.splitlines()


def test_colour_is_for_terminals(fresh: Project) -> None:
    fresh.edit("depth = 1", "dept = 1")
    assert "\x1b" not in llmctl("run", "t.toml", cwd=fresh.path, TERM="xterm-256color").stderr
    forced = llmctl("run", "t.toml", cwd=fresh.path, FORCE_COLOR="1", TERM="xterm-256color").stderr
    assert "\x1b[1;31m" in forced
    plain = llmctl("run", "t.toml", cwd=fresh.path, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color").stderr
    assert "\x1b[1;31m" not in plain


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("2h", 7200), ("0.5h", 1800)])
def test_times(text: str, seconds: float) -> None:
    from llmctl.cli import _seconds

    assert _seconds(text) == seconds


@pytest.mark.parametrize("text", ["soon", "1d", "-5m", "nan", "inf", "m"])
def test_a_time_that_is_none(fresh: Project, text: str) -> None:
    done = fresh.llmctl("prep", "t.toml", "--max-time", text)
    assert done.code == 2
    assert f"--max-time {text}: expected a time" in done.err


def test_interrupted_outside_of_training(fresh: Project) -> None:
    slow = BROKEN.replace("raise {}", "import time; print('at work', flush=True); time.sleep(30)")
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        call = fresh.start("prep", "t.toml", "--json", before=slow)
        call.until("at work")
        call.kill(signum)
        done = call.wait()
        assert done.code == code
        document = json.loads(done.out.removeprefix("at work\n"))
        assert document["error"]["code"] == "interrupted"
        assert "the same command again" in document["error"]["hint"]
