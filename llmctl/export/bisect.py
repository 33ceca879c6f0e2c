"""Which node of a graph that is not its model is to blame: its values beside the model's own, layer by layer.

Graphs name their values after the modules that give them (`model.layers.3.self_attn.o_proj`), so the case that showed
the largest error is run once more on a graph with such values as outputs, and once through the torch model with hooks
on those modules. First the last value of each layer is compared, then all of the first layer that is off. Fused nodes
hide some values: where the first one that is off is behind others that nothing can be compared with, they are suspects
too.

B rows, T tokens, C whatever a value has for each token
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import nn

from llmctl.export import parity, tolerance
from llmctl.inference import external_data
from llmctl.inference.onnx_runner import GRAPH, open_session
from llmctl.model.hf import Causal

LAYER = re.compile(r"^(.*\blayers\.\d+)\.")
SHOWN = "shown/"  # before the names of values that are given out
LONGEST = 512  # tokens of one row that are looked at, the last ones
SUSPECTS = 12  # nodes that are named beside the first

MOVERS = {"Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze"}

# Values of the graph that are not named after a module: the modules whose outputs they are, side by side, or the module
# that reads them ("<").
JOINED: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    **{part: (f"{part}_proj",) for part in "qkv"},
    "attended": ("<o_proj", "<post_attention_layernorm"),
    "inner": ("<down_proj",),
}


class Value(NamedTuple):
    """A value of the graph that the model has too; `sources` are the modules that give it, or "<" one that reads it."""

    name: str
    node: Any  # onnx.NodeProto
    sources: tuple[str, ...]


class Found(NamedTuple):
    value: Value
    error: float  # of the worst token, as a share of its largest value
    limit: float

    @property
    def strain(self) -> float:
        return parity.strain(self.error, self.limit)


def blame(report: dict[str, Any], reference: Causal, candidate: Any, tokens: np.ndarray) -> None:
    """Puts into `report` of `parity.measure` the first node that is beyond its limit ("nodes": "first") and the worst.

    Args: as they were given to `measure`; `candidate` has a `folder`, a `device` and a `session`.

    The limit of a value is that of the logits; of a graph that rounds more than fp32 does, thrice what the rounding
    alone does to it in torch.
    """
    rows, texts = worst_case(report, candidate, tokens)
    model = external_data.read(candidate.folder / GRAPH)
    values = list(shared(model.graph, reference))
    order = {value.name: place for place, value in enumerate(values)}
    ends = {layer(value.name): value for value in values}  # the last of each
    run = Replay(model, reference, candidate, texts, rows, report["dtype"])

    outline = [value for value in values if not layer(value.name) or value is ends[layer(value.name)]]
    found = run.compare(outline)
    suspect = next((each for each in found if each.strain > 1), max(found, key=lambda each: each.strain))
    before = [layer(value.name) for value in outline if order[value.name] <= order[suspect.value.name]]
    inside = next((name for name in reversed(before) if name), "")  # of what stands behind the layers: the last one
    within = [value for value in values if inside and layer(value.name) == inside and value not in outline]
    found += run.compare(within) if within else []
    found.sort(key=lambda each: order[each.value.name])

    first = next((each for each in found if each.strain > 1), None)
    worst = max(found, key=lambda each: each.strain)
    told = {"case": report["worst"]["figure"], "compared": len(found), "worst": describe(worst, worst.value.node)}
    if first is not None:
        fine = {each.value.name for each in found if each.strain <= 1}
        node = culprit(model.graph, first.value.node, fine)
        told["first"] = describe(first, node) | {"suspects": suspects(model.graph, first.value, fine)}
    report["nodes"] = told


def worst_case(
    report: Mapping[str, Any], candidate: Any, tokens: np.ndarray
) -> tuple[Sequence[Sequence[int]], list[np.ndarray]]:
    """How tokens arrived where the error was largest, and which."""
    worst = report["worst"]["figure"]
    cases = {f"logits, {check['case']}": check for check in report["logits"]}
    nearest = max(report["logits"], key=lambda check: parity.strain(check["error"], 1.0))
    read = report.get("text", {"error": 0.0})
    if worst not in cases and parity.strain(read["error"], 1.0) > parity.strain(nearest["error"], 1.0):
        start, stop = read["worst"]
        text = tokens[start:stop]
        return [[min(LONGEST, len(text) - at) for at in range(0, len(text), LONGEST)]], [text]
    rows = cases.get(worst, nearest)["rows"]
    return rows, parity.cut(tokens, rows)


def shared(graph: Any, model: nn.Module) -> Iterator[Value]:
    """Every value that graph and model both have, in the order of the graph."""
    modules = {name for name, _ in model.named_modules()}
    for node in graph.node:
        for name in reversed(node.output):  # a node that adds and then norms gives the norm first
            if sources := sources_of(name, modules):
                yield Value(name, node, sources)


def sources_of(name: str, modules: set[str]) -> tuple[str, ...]:
    """The modules that give a value, side by side, or "<" one that reads it; empty where none does."""
    plain = name.removesuffix(".out").removesuffix("ed" if name.endswith("_normed") else ".normed")
    if plain in modules and plain:
        return (plain,)
    parent, _, leaf = name.rpartition(".")
    parts = [("<" if part[0] == "<" else "", f"{parent}.{part.lstrip('<')}") for part in JOINED.get(leaf, ())]
    known = [f"{mark}{module}" for mark, module in parts if module in modules]
    if leaf in ("attended", "inner"):
        if f"{parent}.pre_feedforward_layernorm" in modules:
            return (f"<{parent}.pre_feedforward_layernorm",)
        return tuple(known[:1])
    if name == "logits":
        return ("",)
    return tuple(known) if len(known) == len(parts) else ()


def layer(name: str) -> str:
    """The layer that a value belongs to; empty for what stands outside of them."""
    match = LAYER.match(name)
    return match[1] if match else ""


def culprit(graph: Any, node: Any, fine: set[str]) -> Any:
    """The node that made what `node` gives: those that only move or cast values are passed over."""
    makers = {name: maker for maker in graph.node for name in maker.output if name}
    while node.op_type in MOVERS and node.input[0] in makers and node.input[0] not in fine:
        node = makers[node.input[0]]
    return node


def suspects(graph: Any, value: Value, fine: set[str]) -> list[str]:
    """The nodes between what was right and a value that is not, the last first."""
    makers = {name: node for node in graph.node for name in node.output}
    queue, found = [value.node], dict[str, None]()
    while queue and len(found) < SUSPECTS:
        node = queue.pop(0)
        if node.name in found:
            continue
        found[node.name] = None
        queue += [makers[name] for name in node.input if name and name in makers and name not in fine]
    return list(found)


def describe(found: Found, node: Any) -> dict[str, Any]:
    """A node as parity.json has it."""
    told = {"name": node.name, "op": node.op_type, "value": found.value.name}
    return told | {"error": found.error, "limit": found.limit, "reads": [name for name in node.input if name]}


class Replay:
    """One case, to be run as often as it takes."""

    def __init__(
        self,
        model: onnx.ModelProto,
        reference: Causal,
        candidate: Any,
        texts: list[np.ndarray],
        rows: Sequence[Sequence[int]],
        dtype: str,
    ) -> None:
        self.model, self.reference, self.candidate = model, reference, candidate
        self.texts, self.rows, self.dtype = texts, rows, dtype

    def compare(self, values: Sequence[Value]) -> list[Found]:
        """How far each value is from the model's, over all tokens of the case."""
        wanted = {source for value in values for source in value.sources}
        expected = [seen(self.reference, wanted, text) for text in self.texts]
        with tolerance.rounding(self.reference, self.dtype) as twin:
            rounded = [seen(twin, wanted, text) for text in self.texts] if self.dtype != "fp32" else expected
        given, compared = self.given([value.name for value in values]), list[Found]()
        for value in values:
            ours, twins = ([joined(row, value) for row in rows] for rows in (expected, rounded))
            theirs = [row[value.name] for row in given]
            if all(a.shape == b.shape for a, b in zip(theirs, ours, strict=True)):  # else it shares the name alone
                rounds = max(distance(a, b) for a, b in zip(twins, ours, strict=True))
                error = max(distance(a, b) for a, b in zip(theirs, ours, strict=True))
                compared.append(Found(value, error, max(tolerance.FP32.logits, tolerance.LOGITS * rounds)))
        return compared

    def given(self, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """What the graph gives for each row, by name: (T, C), of the last `LONGEST` tokens."""
        own = self.candidate.session
        watched = Watched(self.candidate, Showing(exposed(self.model, names, self.candidate), names), len(self.texts))
        try:
            parity.arriving(watched, self.texts, self.rows)
        finally:
            self.candidate.session = own
        rows = watched.rows
        return [{name: np.concatenate(parts)[-LONGEST:] for name, parts in row.items()} for row in rows]


class Showing:
    """A session that gives some values out beside what it is asked for; `calls` keeps them, a dictionary a run."""

    def __init__(self, session: ort.InferenceSession, names: Sequence[str]) -> None:
        self.session, self.names = session, names
        self.outputs = [f"{SHOWN}{name}" for name in names]
        self.calls: list[dict[str, np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, Any], *options: Any) -> list[Any]:
        asked = [value.name for value in self.session.get_outputs()] if outputs is None else list(outputs)
        asked = [name for name in asked if name not in self.outputs]
        found = self.session.run([*asked, *self.outputs], feeds, *options)
        self.calls.append(dict(zip(self.names, found[len(asked) :], strict=True)))
        return list(found[: len(asked)])

    def run_with_iobinding(self, binding: Any, *options: Any) -> None:
        for name in self.outputs:  # behind what the runner has bound
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding, *options)
        found = binding.get_outputs()[-len(self.names) :]
        self.calls.append({name: value.numpy() for name, value in zip(self.names, found, strict=True)})


class Watched:
    """The candidate over a `Showing`, which notes what belongs to which row."""

    def __init__(self, candidate: Any, session: Showing, rows: int) -> None:
        self.candidate, self.session, self.max_length = candidate, session, candidate.max_length
        self.vocab_size = candidate.vocab_size
        self.rows: list[dict[str, list[np.ndarray]]] = [{name: [] for name in session.names} for _ in range(rows)]
        candidate.session = session

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Any:
        return self.candidate.new_cache(batch, max_length)

    def forward(self, ids: np.ndarray, cache: Any = None, last_only: bool = True, new: Any = None) -> np.ndarray:
        logits: np.ndarray = self.candidate.forward(ids, cache, last_only, new)
        calls, self.session.calls = self.session.calls, []
        for b, count in enumerate(new):
            call, at = (calls[b], 0) if len(calls) > 1 else (calls[0], b)  # a runner may take row by row
            for name, value in call.items():
                self.rows[b][name].append(by_token(value[at], int(count) if len(calls) > 1 else int(new.max()))[:count])
        return logits


def by_token(value: np.ndarray, tokens: int) -> np.ndarray:
    """(T, C), (T, H, D) or (H, T, D) -> (T, C)."""
    if value.ndim == 3 and value.shape[0] != tokens:
        value = value.swapaxes(0, 1)
    return value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1)


def exposed(model: onnx.ModelProto, names: Iterable[str], candidate: Any) -> ort.InferenceSession:
    """A session of the graph whose values `names` are outputs too, in fp32."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    for name in names:
        node = helper.make_node("Cast", [name], [f"{SHOWN}{name}"], to=TensorProto.FLOAT)
        shown.graph.node.append(node)
        shown.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    return open_session(candidate.folder, candidate.device, shown.SerializeToString())


def seen(model: Causal, sources: Iterable[str], text: np.ndarray) -> dict[str, np.ndarray]:
    """What modules of the torch model give, or read ("<"), for one row: (T, C), of the last `LONGEST` tokens."""
    kept: dict[str, np.ndarray] = {}

    def keep(source: str, value: torch.Tensor) -> None:
        row = value[0].flatten(1) if value.ndim > 2 else value  # (T, C) of what is looked up by position
        kept[source] = row[-LONGEST:].float().cpu().numpy().copy()

    hooks = []
    for source in sources:
        if source.startswith("<"):
            module = model.get_submodule(source[1:])
            hooks.append(module.register_forward_pre_hook(lambda _, given, source=source: keep(source, given[0])))
        elif source:
            module = model.get_submodule(source)
            hooks.append(module.register_forward_hook(lambda *told, source=source: keep(source, told[2])))
    try:
        kept[""] = parity.torch_logits(model, text)[-LONGEST:]
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def joined(row: Mapping[str, np.ndarray], value: Value) -> np.ndarray:
    """The model's counterpart of a value: (T, C)."""
    return np.concatenate([row[source] for source in value.sources], -1)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of a token's values, as a share of the largest of them; of tokens that are all but
    nothing, of a hundredth of the largest of all."""
    size = np.abs(expected).max(-1)
    return float((np.abs(found - expected).max(-1) / np.maximum(size, max(1e-30, 0.01 * size.max()))).max())
