"""`llmctl report`: one page about a run, complete in itself, to show a colleague.

The page reaches for nothing: no network, no fonts, no images. What it says comes from the artifacts alone, so that the
same run gives the same page, byte for byte. Missing and damaged stages are told, not an error.
"""

from __future__ import annotations

import base64
import hashlib
import string
from importlib import resources
from pathlib import Path

from llmctl.artifact import Run
from llmctl.errors import RunError
from llmctl.reporting import evaluation, exports, lineage, opening, preparing, repeat, story, training
from llmctl.reporting.markup import Html, escape, join, tag
from llmctl.reporting.story import Story

NAME = "report.html"


def write(run: Run) -> Path:
    """Writes `report.html` into the run's folder, whole or not at all, and returns its path.

    Raises:
        RunError: the page can't be written.
    """
    path = run.path / NAME
    temporary = path.with_name(f".{NAME}.tmp")
    try:
        temporary.write_text(page(run), encoding="utf-8")
        temporary.replace(path)
    except OSError as reason:
        raise RunError(
            f"cannot write the report: {reason.strerror or reason}", file=path, hint="make room, or mend the rights"
        ) from reason
    return path


def page(run: Run) -> str:
    """The page of a run."""
    told = story.read(run)
    sections = _sections(told)
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    links = [tag("a", title, href=f"#{place}") for place, title, _ in sections]
    return string.Template(_resource("page.html")).substitute(
        title=escape(f"{told.name} · llmctl"),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        style=_resource("page.css"),
        script=script,
        head=opening.head(told),
        contents=tag("nav", *links),
        body=join(drawn for _, _, drawn in sections),
    )


def _sections(told: Story) -> list[tuple[str, str, Html]]:
    """Anchor, title in the contents and section of every stage that is there, in the order of the chain."""
    prep, imported, pretrain, finetune = (told.part(place) for place in story.PLACES)
    evaluations, exported = told.of("eval"), told.of("export")
    found = [
        ("lineage", "Lineage", lineage.draw(told)) if told.parts else None,
        ("prep", "Text", preparing.draw(prep)) if prep else None,
        ("import", "Import", training.imported(imported)) if imported else None,
        ("pretrain", "Pretraining", training.pretrain(pretrain, told)) if pretrain else None,
        ("finetune", "Finetuning", training.finetune(finetune)) if finetune else None,
        ("eval", "Evaluation", evaluation.draw(evaluations)) if evaluations else None,
        ("export", "Export", exports.draw(exported)) if exported else None,
        ("repeat", "Repeat", repeat.draw(told)) if told.parts else None,
    ]
    return [entry for entry in found if entry is not None]


def _resource(name: str) -> str:
    return resources.files("llmctl.reporting").joinpath("page", name).read_text(encoding="utf-8")
