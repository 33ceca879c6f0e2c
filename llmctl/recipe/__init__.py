"""The recipe: one TOML file that drives every stage."""

from llmctl.recipe.reading import default_name, is_builtin, load, of
from llmctl.recipe.schema import (
    SECTION_TYPES,
    SECTIONS,
    EvalSection,
    ExportSection,
    FinetuneSection,
    ModelSection,
    OriginSection,
    PrepSection,
    PretrainSection,
    Recipe,
    Section,
    ServeSection,
    TokenizerSection,
    TrainingSection,
)
from llmctl.recipe.writing import json_schema, reference, resolved

__all__ = [
    "SECTIONS",
    "SECTION_TYPES",
    "EvalSection",
    "ExportSection",
    "FinetuneSection",
    "ModelSection",
    "OriginSection",
    "PrepSection",
    "PretrainSection",
    "Recipe",
    "Section",
    "ServeSection",
    "TokenizerSection",
    "TrainingSection",
    "default_name",
    "is_builtin",
    "json_schema",
    "load",
    "of",
    "reference",
    "resolved",
]
