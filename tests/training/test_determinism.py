"""The same training twice gives the same weights, compiled too."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
[prep]
sources = ["text.py"]
tokenizer.vocab_size = 400
[model]
depth = 2
max_seq_length = 256
[pretrain]
max_steps = 8
global_batch_size = 16
dtype = "fp32"
compile = true
"""


@pytest.mark.slow
def test_compiled_training_is_bitwise_repeatable(tmp_path: Path) -> None:
    """Inductor adds up an embedding's gradient in the order its threads arrive unless it is told not to; few pieces and
    long batches make them collide at every step.
    """
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler (g++)")
    (tmp_path / "text.py").write_text(Path(json.__file__).with_name("decoder.py").read_text() * 12)
    (tmp_path / "same.toml").write_text(RECIPE)
    found = set()
    for run in ("one", "two", "three"):
        command = [sys.executable, "-m", "llmctl", "pretrain", "same.toml", "--run-dir", run, "--quiet"]
        subprocess.run(command, cwd=tmp_path, check=True)
        found.add(hashlib.sha256((tmp_path / run / "pretrain" / "model.safetensors").read_bytes()).hexdigest())
    assert len(found) == 1
