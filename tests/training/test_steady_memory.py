"""A training does not grow: whatever it held after 200 steps it holds after 2,000."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import project

# What the rows call the peak is, in this process, what it holds at that moment.
PROGRAM = """
import resource, sys
from pathlib import Path
from llmctl.training import loop
loop.peak_memory = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
sys.argv = ["llmctl", "pretrain", "t.toml", *sys.argv[1:]]
from llmctl.cli import main
main()
"""
KEYS = {
    "max_steps": 2000,
    "log_every": 20,
    "eval_every": 100,
    "save_every": 50,
    "sample_every": 500,
    "prompts": '["a"]',
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_no_growth_over_2000_steps(tmp_path: Path) -> None:
    """With metrics, a dashboard, batches made ahead, evaluations, samples and checkpoints."""
    pytest.importorskip("tensorboard")
    project.write(tmp_path / "p")
    settings = [f"--set=pretrain.{key}={value}" for key, value in KEYS.items()]
    board = '--set=pretrain.report_to=["tensorboard"]'
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *settings, board],
        cwd=tmp_path / "p",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "p" / "runs" / "t" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    held = {row["step"]: row["peak_memory_bytes"] for row in map(json.loads, lines)}
    early = max(size for step, size in held.items() if 100 <= step <= 200)
    late = min(size for step, size in held.items() if step > 1900)
    assert late - early < 5e6, held
