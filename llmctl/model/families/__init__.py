"""The families, as data: what each config.json says as switches of `Config`, and what each tensor is called on disk.

A family is a row: fields (a rename each), switches (what its block always has), and names. In memory every model has
Llama's names. docs/models.md adds a family as an example.

References: transformers' `configuration_*.py` and `modeling_*.py` of each model_type.
"""

from __future__ import annotations

from llmctl.model.families.decoders import DECODERS
from llmctl.model.families.encoder_decoders import ENCODER_DECODERS
from llmctl.model.families.encoders import ENCODERS
from llmctl.model.families.family import Family

FAMILIES: dict[str, Family] = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
BY_TYPE = {family.model_type: name for name, family in FAMILIES.items()}
