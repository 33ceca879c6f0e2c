"""The recipe: one TOML file that drives every stage."""

from llmctl.recipe.reading import default_name, is_builtin, load, of
from llmctl.recipe.schema import (
    ENCODERS,
    NAME,
    SECTION_TYPES,
    SECTIONS,
    EvalSection,
    ExportSection,
    ModelSection,
    OriginSection,
    PrepSection,
    Recipe,
    ServeSection,
    TokenizerSection,
)
from llmctl.recipe.section import Section, seconds
from llmctl.recipe.training import FinetuneSection, PretrainSection, TrainingSection
from llmctl.recipe.writing import json_schema, reference, resolved

__all__ = [
    "ENCODERS",
    "NAME",
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
    "seconds",
]
