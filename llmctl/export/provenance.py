"""What an exported file says of the model it was made from, inside itself: a file travels without its folder."""

from __future__ import annotations

from llmctl.artifact import Artifact
from llmctl.text.chat import ChatTemplate


def provenance(model: Artifact) -> dict[str, str]:
    """The properties of a graph: the model's identity, its weights' digests, its licence and its chat template."""
    known = {"llmctl.model": model.identity, "llmctl.stage": model.stage}
    for name, entry in model.manifest["files"].items():
        if name.endswith(".safetensors"):
            known[f"llmctl.sha256.{name}"] = entry["sha256"]
    if licence := model.licence():
        known["llmctl.licence"] = licence
    if template := ChatTemplate.load(model.path):
        known["llmctl.chat_template"] = template.source
    return known
