"""What is printed, where, and how it reads."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmctl import console
from llmctl.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    console.configure()


def test_lines_for_people_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    console.say("hello")
    console.stage("prep", "text", "1 s")
    found = capsys.readouterr()
    assert found.out.splitlines()[0] == "hello"
    assert found.out.splitlines()[1].startswith(" prep       text ")
    assert found.err == ""


def test_a_document_has_stdout_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(json=True)
    console.say("hello")
    console.table("t", ["", "a"], [["x", "1"]])
    console.warn("look")
    console.result({"ok": True})
    found = capsys.readouterr()
    assert json.loads(found.out) == {"ok": True}
    assert "hello" in found.err
    assert "warning: look" in found.err


def test_quiet_keeps_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    console.say("hello")
    console.note("by the way")
    console.table("t", ["", "a"], [["x", "1"]])
    console.warn("look")
    console.error(DataError("broken", hint="mend it\nor not", file="a.txt", line=3))
    found = capsys.readouterr()
    assert found.out == "warning: look\n"
    assert found.err == "a.txt:3: broken\n   mend it\n   or not\n"


def test_text_is_never_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    console.say("[bold]no[/bold] :smile: [pretrain]")
    console.table("", ["", "[x]"], [["[red]a[/red]", "1"]])
    found = capsys.readouterr().out
    assert "[bold]no[/bold] :smile: [pretrain]" in found
    assert "[red]a[/red]" in found
    assert "[x]" in found


def test_long_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    console.say("x" * 500)
    assert capsys.readouterr().out == "x" * 500 + "\n"


def test_columns_line_up_wide_characters_too(capsys: pytest.CaptureFixture[str]) -> None:
    console.columns([["论文", "b"], ["aaaa", "c"], ["d"]])
    assert capsys.readouterr().out == " 论文   b\n aaaa   c\n d\n"


def test_events_are_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    console.configure(events=path)
    console.event("step", step=1, loss=2.5)
    console.warn("grüße")
    console.configure()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["event"], row.get("loss"), row.get("message")) for row in rows] == [
        ("step", 2.5, None),
        ("warning", None, "grüße"),
    ]


def test_numbers_that_json_has_not_become_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN and Infinity are no JSON: strict readers (jq, JavaScript) choke on the whole document."""
    console.configure(json=True, events=tmp_path / "e.jsonl")
    console.event("step", loss=float("nan"), deep={"norm": [float("inf")]})
    console.result({"ok": True, "metrics": {"val_loss": float("nan")}})
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["metrics"] == {"val_loss": None}
    first = json.loads((tmp_path / "e.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert (first["loss"], first["deep"]) == (None, {"norm": [None]})


def test_events_that_cannot_be_written_are_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="events"):
        console.configure(events=tmp_path / "file" / "e.jsonl")


def test_logs_copy_lines_without_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.configure(quiet=True)
    with console.log_to(tmp_path / "logs" / "prep.log"):
        console.warn("look")
        console.say("hello")
    console.say("after")
    assert (tmp_path / "logs" / "prep.log").read_text() == "warning: look\nhello\n"


@pytest.mark.parametrize(("forced", "no_color"), [(True, False), (True, True), (False, False)])
def test_colour(
    forced: bool, no_color: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, on in (("FORCE_COLOR", forced), ("NO_COLOR", no_color)):
        monkeypatch.setenv(name, "1") if on else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    console.configure()
    console.warn("look")
    coloured = "\x1b[33m" in capsys.readouterr().out
    assert coloured == (forced and not no_color)


def test_progress_in_a_pipe_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console.configure()
    with console.progress("prep", total=100, unit="docs") as live:
        for done in range(1, 101):
            now += 1.0
            live.update(done)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["prep", "30", "%", "·", "30", "docs", "·", "ETA", "1", "min", "10", "s"]


def test_what_takes_long_before_the_first_step_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    with console.progress("pretrain", total=100, opening="compiling") as live:
        assert capsys.readouterr().out.split() == ["pretrain", "compiling"]
        live.update(1)
    with console.progress("pretrain", total=100):
        pass
    assert capsys.readouterr().out == ""


def test_a_pipe_hears_of_us_while_the_first_step_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And while an evaluation takes its time: nobody calls `update` then."""
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.15)
    console.configure()
    with console.progress("pretrain", total=100, unit="steps", opening="compiling") as live:
        time.sleep(0.4)
        live.update(1, "step 1/100")
        time.sleep(0.4)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["pretrain", "compiling"]
    assert lines[1][:3] == ["pretrain", "compiling", "·"]
    assert lines[-1][:7] == ["pretrain", "1", "%", "·", "step", "1/100", "·"]
    assert lines[-1][-2:] == ["s", "ago"]
    assert 4 <= len(lines) <= 7
    time.sleep(0.3)
    assert capsys.readouterr().out == ""


def test_progress_of_a_resumed_run_counts_its_own_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console.configure()
    with console.progress("train", total=1000, unit="steps") as live:
        for done in range(900, 950):
            live.update(done)
            now += 1.0
    assert "ETA 1 min 10 s" in capsys.readouterr().out.splitlines()[0]  # step 930, a step a second


def test_annotations_of_github(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "_ANNOTATE", True)
    console.configure(json=True)
    console.error(DataError("100 % bad\nreally", file="a,b:c.txt", line=3))
    console.result({"ok": False})
    found = capsys.readouterr()
    assert "::error file=a%2Cb%3Ac.txt,line=3::100 %25 bad%0Areally\n" in found.err
    assert json.loads(found.out) == {"ok": False}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_000, "1.0 kB"), (9_900_000, "9.9 MB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")],
)
def test_size(value: float, text: str) -> None:
    assert console.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12_345, "12,345"), (999_999, "999,999"), (2_900_000, "2.9 M"), (1.2e9, "1.2 G")],
)
def test_count(value: float, text: str) -> None:
    assert console.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.42, "0.4 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (11.4, "11 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (366, "6 min 06 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration(value: float, text: str) -> None:
    assert console.duration(value) == text


def test_ago() -> None:
    assert [console.ago(value) for value in (5, 61, 7200, 90_000)] == ["just now", "1 min ago", "2 h ago", "1 d ago"]
