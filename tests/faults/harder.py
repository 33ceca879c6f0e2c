"""A project whose trainings have everything in them that a resume could get wrong, and what two of them must share.

Gradients accumulated over micro-batches, dropout, an average of the weights, checkpoints written in the background,
models kept on the way, evaluations, several epochs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests import project
from tests.project import Project
from tests.warm import Warm

STEPS = 20
HARDER = "micro_batch_size = 2\nema_decay = 0.9\nkeep_every = {}"


def harder(folder: Path, warm: Warm, steps: int = STEPS) -> Project:
    """A project of which `steps` steps of 8 samples in micro-batches of 2 are several epochs."""
    project.write(folder)
    for path in (folder / "text").iterdir():
        if path.name != "bisect.py":
            path.unlink()
    made = Project(folder, warm)
    made.edit("depth = 1", "depth = 1\ndropout = 0.1")
    more = HARDER.format(steps // 5)
    for old in (12, 6):
        made.edit(f"max_steps = {old}\nglobal_batch_size = 4", f"max_steps = {steps}\nglobal_batch_size = 8\n{more}")
    made.recipe.write_text(made.recipe.read_text().replace("eval_every = 0", f"eval_every = {steps // 4}"))
    return made


def losses(made: Project, stage: str) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step, less what a clock says."""
    rows = [json.loads(line) for line in (made.run / stage / "metrics.jsonl").read_text().splitlines()]
    known = ("step", "train_loss", "learning_rate", "gradient_norm", "update_norm", "val_loss", "answer_bits_per_byte")
    return [{key: row.get(key) for key in known} for row in rows]


def same(made: Project, whole: Project, stage: str) -> None:
    assert made.weights(stage) == whole.weights(stage)
    assert losses(made, stage) == losses(whole, stage)
    assert made.identities() == whole.identities()  # of the models that were kept on the way, too


def begun_again(whole: Project, stage: str, folder: Path) -> Project:
    """The same project before that stage."""
    made = project.copy(whole, folder)
    for later in ("pretrain", "finetune")[("pretrain", "finetune").index(stage) :]:
        for place in (later, f"checkpoints/{later}"):
            shutil.rmtree(made.run / place, ignore_errors=True)
    return made
