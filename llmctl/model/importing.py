"""Bringing a Hugging Face folder into a run: the same weights and tokenizer, as an artifact that every stage takes."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError
from llmctl.model import hf
from llmctl.text.tokenizer import Tokenizer


def import_model(job: Job) -> Artifact:
    """Checks the folder that `[model] from` names by loading it, and publishes a copy of it."""
    folder = job.recipe.root / job.recipe.section("model").source
    if not (folder / "config.json").is_file():
        raise DataError(
            "not a Hugging Face folder (config.json is missing)",
            file=folder,
            hint="[model] from names a folder with config.json",
        )
    tokenizer = Tokenizer.load(folder)
    model = hf.load(folder)
    hf.check_vocabulary(model.config, len(tokenizer), folder)
    console.stage(
        "import",
        f"{folder} · {model.config.family}, {console.count(model.config.parameters)} parameters · "
        f"{len(tokenizer):,} pieces",
    )
    with job.publishing() as staging:
        hf.save(model, folder, staging.path)
        for name in ("generation_config.json", "LICENSE", "LICENSE.txt"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(staging.path) / name)
        return staging.seal({"parameters": model.config.parameters})
