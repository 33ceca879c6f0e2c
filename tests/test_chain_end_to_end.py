"""The whole chain in a process of its own, as a user and as another tool see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import project
from tests.project import STAGES, Project

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def llmctl(*args: str, cwd: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "llmctl", *args, "--json"], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_text_to_an_exported_model(tmp_path: Path) -> None:
    project.write(tmp_path / "p")
    made = llmctl("run", "t.toml", cwd=tmp_path / "p")
    assert list(made["stages"]) == list(STAGES)
    assert all(stage["made"] for stage in made["stages"].values())
    assert made["artifact"] == "runs/t/export/finetune/onnx-ort"
    again = llmctl("run", "t.toml", cwd=tmp_path / "p")
    assert not any(stage["made"] for stage in again["stages"].values())
    assert {place: stage["identity"] for place, stage in again["stages"].items()} == {
        place: stage["identity"] for place, stage in made["stages"].items()
    }
    assert llmctl("verify", cwd=tmp_path / "p")["metrics"] == {"artifacts": 5}
    assert Path(llmctl("report", cwd=tmp_path / "p")["artifact"]).name == "report.html"


@pytest.mark.parametrize("place", ["pretrain", "finetune"])
def test_transformers_takes_the_folder_and_says_the_same(finished: Project, place: str) -> None:
    """The same logits (1e-4 in fp32) and the same greedy tokens from the matching Auto classes."""
    transformers = pytest.importorskip("transformers")
    from llmctl.inference import generate
    from llmctl.inference.runners import TorchRunner
    from llmctl.inference.sampling import Sampling
    from llmctl.model import hf
    from llmctl.text.tokenizer import Tokenizer

    folder = finished.run / place
    ours, tokenizer = hf.load(folder), Tokenizer.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (finished.path / "text" / "textwrap.py").read_text()[1000:1080]
    ids = tokenizer.prompt(text)
    assert their_tokenizer(text)["input_ids"] == ids
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(ours(torch.tensor([ids])), expected, rtol=0, atol=1e-4)
        greedy = theirs.generate(torch.tensor([ids[:20]]), max_new_tokens=20, do_sample=False, pad_token_id=3)
    said = generate.complete(TorchRunner.of(ours), tokenizer, ids[:20], Sampling(temperature=0.0, max_tokens=20))
    produced = greedy[0, 20:].tolist()
    stop = next((at for at, found in enumerate(produced) if found in ours.config.eos_ids), len(produced))
    assert said.ids[:stop] == produced[:stop]
    assert their_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_token_of_a_text_is_counted_once(finished: Project) -> None:
    """From the shards back to the text: nothing was lost between a file and what the model is measured on."""
    from llmctl.text.shards import Shards
    from llmctl.text.tokenizer import Tokenizer

    folder, metrics = finished.run / "prep", finished.manifest("prep")["metrics"]
    tokenizer = Tokenizer.load(folder)
    splits = {name: Shards.open(folder, name) for name in ("train", "val")}
    text = b"".join(split.text(tokenizer) for split in splits.values()).decode()
    whole = "".join(path.read_text() for path in sorted((finished.path / "text").iterdir()))
    assert text == whole
    assert sum(len(split) for split in splits.values()) == metrics["tokens"]
    assert sum(split.bytes for split in splits.values()) == len(whole.encode()) == metrics["bytes"]
    assert int(np.max(splits["train"][:])) < 400


def test_the_ci_pipeline_on_the_smoke_recipe(tmp_path: Path) -> None:
    """docs/ci/pipeline.sh on recipes/tiny.toml: text to a model that answered over HTTP; a second run does no work."""
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    environment["GITHUB_STEP_SUMMARY"] = str(tmp_path / "summary.md")
    command = ["bash", str(RECIPES.parent / "docs/ci/pipeline.sh"), str(RECIPES / "tiny.toml"), "runs/ci"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ci answered (" in done.stdout
    assert "| bits/byte of answers |" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "runs/ci/report.html").is_file()
    for line in (tmp_path / "runs/ci/events.jsonl").read_text().splitlines():
        assert json.loads(line)["event"]
    metrics = json.loads((tmp_path / "runs/ci/eval/finetune/artifact.json").read_text())["metrics"]
    assert metrics["answer_bits_per_byte"] < metrics["answer_bits_per_byte_before"]
    again = llmctl("run", str(RECIPES / "tiny.toml"), "--run-dir", "runs/ci", cwd=tmp_path)
    assert not any(stage["made"] for stage in again["stages"].values())
