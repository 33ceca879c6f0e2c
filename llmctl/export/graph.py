"""The decoder as an ONNX graph, written from the model's config node by node, in the order of model/transformer.py.

What differs by profile, the cache above all, is in ort.py and portable.py under the same names; sublayers.py has what
they share. Config's switches choose the nodes, as they choose the sublayers of the model; `unbuilt` names those that
have none.

B batch, T new tokens, C channels, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx

from llmctl.errors import DataError
from llmctl.export import ort, portable
from llmctl.export.blocks import blocks
from llmctl.export.builder import Graph, save
from llmctl.export.form import Form
from llmctl.export.sublayers import embedding, head
from llmctl.model.config import Config


class Profile(Protocol):
    """What a profile spells in its own way; `at` is what its `cursor` gave."""

    def inputs(self, form: Form, c: Config) -> list[onnx.ValueInfoProto]: ...
    def outputs(self, form: Form, c: Config) -> list[onnx.ValueInfoProto]: ...
    def unbuilt(self, c: Config) -> dict[str, Any]: ...
    def cursor(self, g: Graph) -> Any: ...
    def attention(self, g: Graph, index: int, x: str, at: Any) -> str: ...


PROFILES: dict[str, Profile] = {"ort": ort, "portable": portable}


def write(model: Path, folder: Path, config: Config, metadata: Mapping[str, str], form: Form | None = None) -> int:
    """Writes `model`'s decoder as model.onnx and model.onnx.data into `folder` and returns the bytes of both.

    `metadata` goes into the model's properties; `form` is the `ort` profile in fp32 unless told. Memory: a few
    megabytes, whatever the model's size.

    Raises:
        DataError: a switch that has no node here; or the weights and the config do not fit together.
    """
    form = form or Form()
    if switch := unbuilt(config, form):
        elsewhere = form.profile == "ort" and not unbuilt(config, Form("portable"))
        raise DataError(
            f"{switch}: the {form.profile} graph has no nodes for that",
            file=model / "config.json",
            hint="--profile portable has them" if elsewhere else "",
        )
    profile = PROFILES[form.profile]
    return save(
        model, folder, config, metadata, decoder, profile.inputs(form, config), profile.outputs(form, config), form
    )


def unbuilt(c: Config, form: Form) -> str:
    """The switch of a config that the graph has no nodes for; empty where it has all."""
    scaling = c.rope_scaling
    stretched = (  # keys that are cached already would have to turn as the text grows
        scaling is not None
        and scaling.kind == "dynamic"
        and c.max_position_embeddings > scaling.original_max_position_embeddings
    )
    switches = {
        "kind": c.kind if c.kind != "decoder" else "",
        "task": c.task if c.task != "causal-lm" else "",
        "norm_place": c.norm_place if c.norm_place == "post" else "",
        "positions": c.positions if c.positions == "relative" else "",
        "rope_scaling": "dynamic" if stretched else "",
        "embedding_norm": c.embedding_norm,
        "skip_first_norm": c.skip_first_norm,
        "position_offset": c.position_offset,
        "type_vocab_size": c.type_vocab_size,
        **PROFILES[form.profile].unbuilt(c),
    }
    return next((f"{name} = {value}" for name, value in switches.items() if value), "")


def decoder(g: Graph) -> None:
    """New tokens (B, T) and what is cached of each layer -> logits (B, T, V) and the cache with the new tokens."""
    profile = PROFILES[g.form.profile]
    at = profile.cursor(g)
    x = embedding(g, at.positions)
    x = blocks(g, "model", x, g.config.num_hidden_layers, lambda _, index, x: profile.attention(g, index, x, at))
    head(g, x, out="logits")
