"""The report: from whatever a run holds to one page that is complete, safe and always the same."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmctl import report
from llmctl.artifact import MANIFEST, Run
from llmctl.errors import RunError
from llmctl.reporting import charts, lineage, markup, story

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x00\x1b[31m"
CHINESE = "什么是语言模型？它预测下一个词。"
PLACES = ("prep", "pretrain", "finetune", "eval/finetune", "export/finetune/onnx-ort")
RECIPE = """name = "small"
seed = 1

[prep]
sources = ["builtin:python-stdlib"]   # text

[origin]
recipe = "/secret/home/small.toml"
root = "/secret/home"
overrides = ["pretrain.max_steps=349"]
"""
CONFIG = json.dumps(
    {
        "model_type": "qwen3",
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "head_dim": 64,
        "num_attention_heads": 4,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
)
# What a manifest may hold where the report expects something else.
WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    5e-324,
    10**400,
    math.nan,
    math.inf,
    "",
    HOSTILE,
    [],
    [[2]],
    {},
    {"a": {}},
]


def identity(place: str) -> str:
    return f"{sum(map(ord, place)):08x}" + "0" * 56


def publish(
    run: Run,
    place: str,
    metrics: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    inputs: Mapping[str, str] | None = None,
    sources: tuple[str, ...] = (),
    sections: Mapping[str, Any] | None = None,
) -> Path:
    """An artifact as the stages write them, without their work."""
    folder = run.path / place
    folder.mkdir(parents=True)
    for name, text in (files or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    kinds = {"prep": "tokens", "eval": "evaluation", "export": "export"}
    stage = place.split("/")[0]
    manifest = {
        "schema": 1,
        "kind": kinds.get(stage, "model"),
        "stage": stage,
        "version": 1,
        "place": place,
        "identity": identity(place),
        "metrics": dict(metrics),
        "seed": 1,
        "sections": sections or {},
        "inputs": [{"role": role, "identity": identity(at), "path": at} for role, at in (inputs or {}).items()],
        "sources": {name: {"sha256": "ab" * 32, "files": 662} for name in sources},
        "files": {name: {"bytes": len(text.encode()), "sha256": "0" * 64} for name, text in (files or {}).items()},
        "environment": {
            "llmctl": "0.1.0",
            "python": "3.11.7",
            "platform": "Linux",
            "device": "AMD EPYC",
            "threads": 2,
            "isa": ["avx2"],
            "packages": {"torch": "2.13.0"},
        },
        "times": {"started": 1_795_356_635.0, "seconds": 60.0},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def metrics_log(steps: int, key: str, every: int, log_every: int = 1, low: float = 1.37) -> str:
    """A learning curve with some noise: as many steps as asked, an evaluation now and then."""
    chance, rows = random.Random(7), []
    for step in range(log_every, steps + 1, log_every):
        fall = math.exp(-5 * step / steps)
        row: dict[str, Any] = {
            "step": step,
            "train_loss": 3.1 + 4.2 * fall + chance.gauss(0, 0.06),
            "learning_rate": 0.004 * min(1, step / 10) * 0.5 * (1 + math.cos(math.pi * step / steps)),
            "gradient_norm": abs(chance.gauss(0.5, 0.1)) + 2 * fall,
            "tokens_per_second": 7800 + chance.gauss(0, 150),
            "peak_memory_bytes": 948_625_408,
        }
        if step % every == 0 and step < steps:
            row[key] = low + 2.2 * fall
            row |= {"val_loss": (low + 2.2 * fall) * 2.27} if key == "val_bits_per_byte" else {}
        rows.append(row)
    return lines(rows)


def make(path: Path, *, without: tuple[str, ...] = (), text: str = "def add(a, b):", steps: int = 349) -> Run:
    """A run with the figures of recipes/small.toml; `text` stands wherever a corpus or a model can write."""
    run = Run(path)
    path.mkdir()
    (path / story.RESOLVED).write_text(RECIPE, encoding="utf-8")
    (path / "logs").mkdir()
    (path / "logs" / "prep.log").write_text(f" prep  {text}\n", encoding="utf-8")
    made: dict[str, Callable[[], None]] = {
        "prep": lambda: make_prep(run, text),
        "pretrain": lambda: make_pretrain(run, text, steps),
        "finetune": lambda: make_finetune(run),
        "eval": lambda: make_eval(run, text),
        "export": lambda: make_exports(run, text),
    }
    for stage, write in made.items():
        if stage not in without:
            write()
    return run


def make_prep(run: Run, text: str) -> None:
    metrics = {
        "documents_read": 740,
        "bytes_read": 10_482_095,
        "dropped": {"duplicate": 31, "empty": 7, text: 2},
        "files_passed_over": {".pyc": 12},
        "documents": 700,
        "bytes": 9_900_000,
        "tokens": 3_000_000,
        "train_tokens": 2_860_000,
        "train_documents": 660,
        "val_tokens": 140_000,
        "val_documents": 40,
        "vocab_size": 4096,
        "bytes_per_token": 3.27,
        "longest_document": 89_855,
        "split": "hash",
    }
    shown = [{"split": "train", "origin": text, "bytes": 5218, "tokens": 1600, "text": f"{text}\n{CHINESE}"}] * 6
    publish(run, "prep", metrics, {"samples.jsonl": lines(shown)}, sources=("builtin:python-stdlib",))


def make_pretrain(run: Run, text: str, steps: int) -> None:
    metrics = {
        "val_loss": 3.09,
        "val_bits_per_byte": 1.362,
        "val_perplexity": 22.0,
        "parameters": 5_900_000,
        "steps": steps,
        "skipped_steps": 0,
        "tokens": 2_859_008,
        "tokens_per_second": 7811.0,
        "seconds": 366.0,
        "peak_memory_bytes": 1_900_000_000,
        "zlib_bits_per_byte": 2.01,
        "xz_bits_per_byte": 1.73,
        "xz_primed_bits_per_byte": 1.3741,
    }
    every = max(1, steps // 10)
    written = [
        {"step": step, "prompt": prompt, "text": f"{prompt} {step} {text}\n\n\n\n\nend " + "word " * 20}
        for step in [*range(every, steps, every), steps]
        for prompt in (text, "import functools\nimport", CHINESE)
    ]
    log = metrics_log(steps, "val_bits_per_byte", every)
    files = {"config.json": CONFIG, "metrics.jsonl": log, "samples.jsonl": lines(written), "model.safetensors": "x"}
    section = {"optimizer": "muon", "lr_scheduler": "cosine", "global_batch_size": 16, "max_grad_norm": 1.0}
    publish(run, "pretrain", metrics, files, {"data": "prep"}, sections={"pretrain": section})


def make_finetune(run: Run) -> None:
    metrics = {
        "answer_bits_per_byte": 1.62,
        "answer_bits_per_byte_before": 2.41,
        "answers_ended": 0.96,
        "conversations": 2400,
        "supervised_share": 0.21,
        "steps": 75,
        "seconds": 48.0,
        "tokens_per_second": 9000.0,
    }
    log = metrics_log(75, "answer_bits_per_byte", 8, low=1.62)
    files = {"config.json": CONFIG, "metrics.jsonl": log, "samples.jsonl": ""}
    sections = {"finetune": {"method": "full", "optimizer": "adamw", "max_grad_norm": 1.0}}
    publish(run, "finetune", metrics, files, {"model": "pretrain"}, ("builtin:python-docstrings",), sections)


def make_eval(run: Run, text: str) -> None:
    columns = []
    for index, (name, loss) in enumerate([("untrained", 8.3), ("pretrain", 3.09), (text[:20], 3.11)]):
        metrics = {
            "val_loss": loss,
            "val_perplexity": math.exp(loss),
            "val_bits_per_byte": loss / 2.27,
            "answer_bits_per_byte": loss / 1.3,
            "answers_ended": index / 2,
            "mmlu_accuracy": 0.25 + index / 10,
            "mmlu_stderr": 0.02,
        }
        columns.append({"name": name, "weights": f"{index}" * 64 if index else "", "metrics": metrics})
    answers = []
    for column, number in itertools.product(columns, range(12)):
        answer, reason = ("\n" * 48, "length") if column["name"] == "untrained" else (f"{text} {number}", "stop")
        asked = {"prompt": f"Question {number}: {text}", "reference": f"{text} {CHINESE}"}
        answers.append({"model": column["name"], **asked, "answer": answer, "finish_reason": reason})
    files = {"results.json": json.dumps({"columns": columns}), "samples.jsonl": lines(answers)}
    figures = {"val_bits_per_byte": 1.37, "answer_bits_per_byte": 1.6}
    inputs = {"model": "finetune", "before": "pretrain", "data": "prep"}
    publish(run, "eval/finetune", figures, files, inputs, ("builtin:python-docstrings",))


def make_exports(run: Run, text: str) -> None:
    cases = [
        {"case": name, "rows": rows, "difference": 3.8e-6, "largest_logit": 7.65, "error": error}
        for name, rows, error in [("one token", [[1]], 5e-7), (text[:30], [[5, 3, 1], [1, 4, 1]], 2.1e-6)]
    ]
    read = {
        "name": text,
        "tokens": 8191,
        "torch_perplexity": 22.0,
        "onnx_perplexity": 22.0,
        "change": -1e-9,
        "top1_agreement": 1.0,
        "difference": 5e-6,
        "largest_logit": 9.0,
        "error": 5.8e-7,
    }
    parity = {
        "passed": True,
        "error": 2.1e-6,
        "limits": {"logits": 1e-4, "perplexity": 1e-4},
        "logits": cases,
        "greedy": {"tokens": 256, "equal": 256, "partings": []},
        "text": read,
        "reference": "torch",
        "candidate": "onnxruntime",
    }
    metrics = {"bytes": 27_900_000, "parity_error": 2.1e-6, "greedy_tokens": 256, "greedy_equal": 256}
    files = {"parity.json": json.dumps(parity), "model.onnx": "graph", "model.onnx.data": "weights " * 400}
    publish(run, "export/finetune/onnx-ort", metrics, files, {"model": "finetune"})
    publish(run, "export/finetune/hf", {"bytes": 23_000_000}, {"README.md": "#"}, {"model": "finetune"})


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page; fails where an element is closed that is not the open one."""

    VOID = frozenset({"meta", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.data_blocks: list[Any] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = "".join(self.pieces).replace("\u00a0", " ")  # numbers hold on to their units

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.elements[-1][1].get("type") == "application/json":
                self.data_blocks.append(json.loads(data))
        elif not self.open or self.open[-1] != "style":
            self.pieces.append(data)

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.elements if "id" in attributes}


def drawn(run: Run) -> Page:
    return Page(report.write(run).read_text(encoding="utf-8"))


def test_a_whole_run(tmp_path: Path) -> None:
    page = drawn(make(tmp_path / "small"))
    assert page.ids() == {"lineage", "prep", "pretrain", "finetune", "eval", "export", "repeat"}
    said = page.text
    assert "5.9 M parameters read 2.9 M tokens of Python's standard library in 6 min 06 s: 1.36 bits/byte" in said
    assert "below primed xz at 1.37" in said
    assert "33 % fewer bits for answers" in said
    assert "22 November 2026, 14:11 UTC" in said  # from the artifacts' times, in UTC
    assert "Not in this run" not in said
    for shown in ("zlib 2.010", "primed xz 1.374", "this model 1.362", "kept 700 94.6 %", "mmlu accuracy", CHINESE):
        assert shown in said
    assert "ended by itself" in said
    assert "(48 newlines)" in said
    assert "↵ × 5" in said
    assert "/secret/home" not in said  # the recipe without what says where it lay
    assert "--set changed: pretrain.max_steps=349" in said


def test_it_reaches_for_nothing(tmp_path: Path) -> None:
    path = report.write(make(tmp_path / "small"))
    page = Page(path.read_text(encoding="utf-8"))
    for name, attributes in page.elements:
        assert name not in {"link", "img", "iframe", "object", "base", "form", "use", "image"}
        assert not attributes.keys() & {"src", "srcset", "xlink:href", "action"}
        assert not any(key.startswith("on") for key in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in path.read_text(encoding="utf-8")
    policy = next(found["content"] or "" for name, found in page.elements if name == "meta" and "http-equiv" in found)
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)  # and nothing else: no 'unsafe-inline' for scripts
    scripts = [found for name, found in page.elements if name == "script" and found.get("type") is None]
    assert len(scripts) == 1


def test_untrusted_text_is_text(tmp_path: Path) -> None:
    """Every field that a corpus, a model or a manifest could fill is filled with markup."""
    plain, hostile = drawn(make(tmp_path / "plain")), drawn(make(tmp_path / "hostile", text=HOSTILE))
    assert hostile.text.count("<img src=x onerror=alert(2)>") > 20
    assert "\u202e" not in hostile.text
    assert "\x1b" not in hostile.text
    kinds = [{name for name, _ in page.elements} for page in (plain, hostile)]
    assert kinds[0] == kinds[1]
    assert sum(name == "script" for name, _ in plain.elements) == sum(name == "script" for name, _ in hostile.elements)
    written = json.dumps(hostile.data_blocks, ensure_ascii=False)
    assert "<img src=x" in written  # the slider's texts, too, arrive as they were


def test_a_name_that_is_markup(tmp_path: Path) -> None:
    page = drawn(make(tmp_path / "<img src=x onerror=alert(1)>"))
    assert not any(name == "img" for name, _ in page.elements)
    assert "llmctl serve 'runs/<img src=x onerror=alert(1)>'" in page.text


def test_what_utf8_cannot_hold(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (run.path / "pretrain" / "samples.jsonl").write_text('{"step": 1, "prompt": "a", "text": "half \\ud83d"}\n')
    assert "half ?" in drawn(run).text


@pytest.mark.parametrize("missing", [*itertools.combinations(["prep", "pretrain", "finetune", "eval", "export"], 2)])
def test_missing_stages_are_told(tmp_path: Path, missing: tuple[str, ...]) -> None:
    page = drawn(make(tmp_path / "run", without=missing))
    assert f"Not in this run: {', '.join(missing)}." in page.text
    assert not page.ids() & set(missing)
    assert ("The recipe asks for prep" in page.text) == ("prep" in missing)


def test_an_empty_run(tmp_path: Path) -> None:
    assert "Nothing has been made in this run yet." in drawn(Run(tmp_path)).text


def test_only_an_import(tmp_path: Path) -> None:
    run = Run(tmp_path)
    config = json.dumps({"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64})
    publish(run, "import", {"parameters": 7_000_000}, {"config.json": config}, sources=("/models/SmolLM",))
    page = drawn(run)
    assert "A llama model of 7.0 M parameters was brought in from SmolLM." in page.text
    assert {"import", "lineage"} <= page.ids()
    assert "Not in this run: prep, pretrain, finetune, eval, export." in page.text


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["manifest cut off", "manifest gone", "a list", "file gone", "file cut off", "logs"])
def test_damage_is_told(tmp_path: Path, place: str, how: str) -> None:
    run = make(tmp_path / "run")
    folder = run.path / place
    manifest = folder / MANIFEST
    name = next(iter(json.loads(manifest.read_text())["files"]))
    if how == "manifest cut off":
        manifest.write_text(manifest.read_text()[:200])
    elif how == "manifest gone":
        manifest.unlink()
    elif how == "a list":
        manifest.write_text("[" * 5_000 + "]" * 5_000)
    elif how == "file gone":
        (folder / name).unlink()
    elif how == "file cut off":
        (folder / name).write_text("{")
    else:  # the same length, so that only reading finds out
        for file in folder.glob("*.json*"):
            if file.name != MANIFEST:
                file.write_text("x" * file.stat().st_size)
    page = drawn(run)
    assert f"{place} is damaged" in page.text or how == "logs"
    assert "repeat" in page.ids()


def test_any_manifest_gives_a_page(tmp_path: Path) -> None:
    """Values of every wrong type and size, anywhere in what the report reads."""
    run, chance = make(tmp_path / "run", steps=20), random.Random(1)
    names = [path for path in sorted(run.path.rglob("*.json*")) if path.is_file()]

    def mutated(value: Any) -> Any:
        if chance.random() < 0.1:
            return chance.choice(WRONG)
        if isinstance(value, dict):
            return {key: mutated(found) for key, found in value.items()}
        return [mutated(found) for found in value] if isinstance(value, list) else value

    originals = {path: path.read_text() for path in names}
    for _ in range(40):
        for path, text in originals.items():
            rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
            path.write_text("".join(json.dumps(mutated(row)) + "\n" for row in rows))
        Page(report.page(run))


def test_an_unfinished_training(tmp_path: Path) -> None:
    run = make(tmp_path / "run", without=("pretrain", "finetune", "eval", "export"))
    run.work("pretrain").mkdir(parents=True)
    (run.work("pretrain") / "metrics.jsonl").write_text(metrics_log(50, "val_bits_per_byte", 10) + '{"step": 51, "tra')
    page = drawn(run)
    assert "pretrain is not finished" in page.text
    assert any("at step 50" in (found.get("aria-label") or "") for _, found in page.elements)


def test_an_export_that_its_gate_stopped(tmp_path: Path) -> None:
    run = make(tmp_path / "run", without=("export",))
    work = run.work("export/finetune/onnx-ort")
    work.mkdir(parents=True)
    case = {"case": "past N", "rows": [[33, 1, 1]], "difference": 1.2, "largest_logit": 4.0, "error": 0.3}
    worst = {"figure": "logits, past N", "value": 0.3, "limit": 1e-4}
    node = {"name": "model.layers.1.self_attn.attended", "op": "GroupQueryAttention", "error": 0.2}
    parity = {"passed": False, "worst": worst, "limits": {"logits": 1e-4}, "logits": [case], "nodes": {"first": node}}
    (work / "parity.json").write_text(json.dumps(parity))
    text = drawn(run).text
    assert "nothing was published" in text
    assert "logits, past N: off by 0.3" in text
    assert "first node that differs is model.layers.1.self_attn.attended (GroupQueryAttention), by 0.2" in text


def test_a_quantised_export(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    path = run.path / "export/finetune/onnx-ort/parity.json"
    limits = {"increase": 0.05, "kl": 0.2, "lost": 0.3}
    original = {"original_perplexity": 20.0, "perplexity": 20.5, "change": 0.025, "top1_agreement": 0.9}
    original |= {"mean_kl": 0.03}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"original": {**original, "limits": limits}}))
    text = drawn(run).text
    assert "20.0000 → 20.5000 (+2.5000 %), up to 5.00 % allowed" in text
    assert "90.00 %, 30.00 % may be lost" in text
    assert "3.0e−2 nats a token, up to 2.0e−1 allowed" in text


def test_an_artifact_older_than_its_input(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    manifest = run.path / "pretrain" / MANIFEST
    manifest.write_text(manifest.read_text().replace(identity("pretrain"), "f" * 64))
    told = story.read(run)
    assert {part.place for part in told.parts.values() if told.outdated(part)} == {"finetune", "eval/finetune"}
    assert "finetune was made from an older pretrain" in drawn(run).text


def test_the_same_run_gives_the_same_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "run")
    first = report.write(run).read_bytes()
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(run.path, moved)
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    assert report.write(run).read_bytes() == first
    assert report.write(Run(moved)).read_bytes() == first


def test_a_long_training_is_thinned(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=100_000)
    log = run.path / "pretrain" / "metrics.jsonl"
    rows = log.read_text().splitlines()
    spiked = json.loads(rows[50_000]) | {"train_loss": 42.0}
    rows[50_000] = json.dumps(spiked)
    log.write_text("\n".join(rows) + "\n")
    path = report.write(run)
    assert path.stat().st_size < 500_000
    page = Page(path.read_text(encoding="utf-8"))
    assert max(len(line["x"]) for block in page.data_blocks if isinstance(block, list) for line in block) <= charts.MOST
    points = [(float(step), 42.0 if step == 50_000 else 3.0) for step in range(100_000)]
    assert max(bucket.high for bucket in charts.thin(points)) == 42.0  # the band shows it, though the mean does not


def test_it_stays_light() -> None:
    """`llmctl report` starts at once and works where no model could be loaded."""
    code = "import sys, llmctl.report; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert not loaded & {"torch", "numpy", "onnx", "onnxruntime", "transformers", "pydantic", "jinja2", "rich"}


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (run.path / report.NAME).mkdir()
    with pytest.raises(RunError, match="cannot write the report"):
        report.write(run)


# --------------------------------------------------------------------------------------------------------- the drawing


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 60, 5, [0, 10, 20, 30, 40, 50, 60]),
        (0, 349, 5, [0, 100, 200, 300]),
        (1.3, 2.8, 5, [1.5, 2.0, 2.5]),
        (0, 0.0057, 3, [0, 0.002, 0.004]),
        (3, 3, 4, [3]),
    ],
)
def test_ticks_are_round(low: float, high: float, about: int, expected: list[float]) -> None:
    assert charts.ticks(low, high, about) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1.3741, "1.374"),
        (2.4, "2.4"),
        (7811, "7,811"),
        (50_649, "50.6k"),
        (2.9e6, "2.9M"),
        (0.00569, "0.00569"),
        (5.77e-7, "5.8e−7"),
        (-1.5, "−1.5"),
    ],
)
def test_figures_hold_what_matters(value: float, expected: str) -> None:
    assert charts.figure(value) == expected


def test_labels_keep_their_distance() -> None:
    places = charts.spread([10, 12, 14, 100, 250, 251], 17, 252)
    assert all(later - earlier >= 17 for earlier, later in itertools.pairwise(places))
    assert places[-1] <= 252
    assert places[3] == 100  # what has room stays


def test_lineage_columns(tmp_path: Path) -> None:
    nodes, edges = lineage.graph(story.read(make(tmp_path / "run")))
    columns = {key: (node.column, node.row) for key, node in nodes.items()}
    assert columns["source builtin:python-stdlib"] == (0, 0)
    assert columns["source builtin:python-docstrings"] == (2, 1)  # just before finetune, below pretrain
    spine = ["prep", "pretrain", "finetune", "eval/finetune"]
    assert [columns[place] for place in spine] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert columns["export/finetune/onnx-ort"] == (4, 1)
    assert len(edges) == 10
    assert len(set(columns.values())) == len(columns)


def test_markup_escapes_what_is_not_markup() -> None:
    made = markup.tag("p", "<b>", markup.tag("b", "&"), title='"', data_x=None)
    assert made == '<p title="&quot;">&lt;b&gt;<b>&amp;</b></p>'
    assert "</script>" not in markup.data({"text": "</script>"})[:-9]
