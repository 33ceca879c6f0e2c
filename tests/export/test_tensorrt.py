"""Everything about TensorRT that a machine without a GPU can tell.

Three stand-ins, each for what it is: the table of NVIDIA's documentation (always); NVIDIA's own parser and builder, of
TensorRT for RTX, where that package is installed (`pip install tensorrt-rtx`, no GPU needed); and `Pretended`, a fake
package tensorrt with ONNX Runtime inside, which checks the calls that the runner and the stage make, and nothing of
TensorRT's own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from llmctl.artifact import Artifact, Job
from llmctl.device import Device
from llmctl.errors import DataError, GateError, RunError, UnavailableError, UsageError
from llmctl.export import stage, tensorrt
from llmctl.export import tensorrt_support as support
from llmctl.inference import exported, tensorrt_runner
from llmctl.inference.onnx_portable import PortableRunner
from llmctl.inference.tensorrt_runner import EngineRunner
from llmctl.model import hf, quant
from llmctl.model.config import FULL, SLIDING, Config
from llmctl.model.families import FAMILIES
from llmctl.model.quant import Scheme
from llmctl.recipe import ExportSection

CPU = Device("cpu", "test", 1, frozenset())
GEMMA = {"sliding_window": 8, "layer_types": (SLIDING, FULL), "attention_scale": 0.3, "embedding_scale": 7.0}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA | CAPS,
    "gemma3": GEMMA | {"rope_local_theta": 500.0},
    "gpt2": {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8},
    "mistral": {"sliding_window": 5, "layer_types": (SLIDING, SLIDING)},
    "stablelm": {"partial_rotary_factor": 0.5},
}
DECODERS = [name for name, family in FAMILIES.items() if family.switches.get("kind", "decoder") == "decoder"
            and "causal-lm" in family.architectures and name != "lstm"]  # fmt: skip

Shaped = Callable[..., Config]
Saved = Callable[..., Path]
Written = Callable[..., Path]
Publish = Callable[..., Artifact]
MakeJob = Callable[..., Job]


@pytest.fixture
def written(shaped: Shaped, saved: Saved, tmp_path: Path) -> Written:
    """What `tensorrt.write` leaves of a tiny random model."""

    def make(family: str = "qwen3", dtype: str = "fp32", **changes: Any) -> Path:
        model = saved(shaped(family, **SHAPES.get(family, {}), **changes))
        folder = tmp_path / f"tensorrt-{dtype}"
        folder.mkdir()
        tensorrt.write(model, folder, hf.read_config(model), {"llmctl.model": "test"}, dtype)
        shutil.copyfile(model / "config.json", folder / "config.json")
        return folder

    return make


@pytest.fixture(scope="session")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="needs the package tensorrt-rtx (make dev)")


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_is_in_the_table_and_nvidias_parser_takes_it(family: str, written: Written) -> None:
    folder = written(family, "bf16")
    assert support.unsupported(folder / tensorrt.ENGINE_GRAPH) == []
    for parser in support.parsers():
        assert support.verdict(parser, folder / tensorrt.ENGINE_GRAPH) == []


def value(name: str, dtype: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.DataType.Value(dtype), shape)


def constant(name: str, array: np.ndarray, dtype: str = "") -> onnx.TensorProto:
    if dtype:
        return helper.make_tensor(name, TensorProto.DataType.Value(dtype), array.shape, array.flatten())
    return numpy_helper.from_array(array, name)


def codes(dtype: str, rows: int) -> onnx.TensorProto:
    return constant("w", np.ones((rows, 16), np.int64), dtype)


def zero_points(at: int) -> onnx.TensorProto:
    return constant("z", np.full((2, 16), at), "INT4")


HEADS = [value("q", "FLOAT16", "B", 4, "T", 64), *(value(name, "FLOAT16", "B", 2, 32, 64) for name in "kv")]
ROWS, COUNTS = value("r", "FLOAT16", "B", "T", 256), {"q_num_heads": 4, "kv_num_heads": 4}
PAST = [value("pk", "FLOAT16", "B", 2, 32, 64), value("pv", "FLOAT16", "B", 2, 32, 64)]
ATTENTION_WITH_A_PAST = ("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "a", "b"], dict[str, Any]())
WAVES = [value("cos", "FLOAT16", 32, 32), value("sin", "FLOAT16", 32, 32), value("at", "INT64", "B", "T")]
SHORT, INTEGERS = value("p", "INT32", "B", "T"), value("m", "INT64", 1, 1, "T", 32)
ANY = value("any", "FLOAT16", "B", 2, "M", 64)
WRITTEN = [HEADS[1], ANY, value("new", "FLOAT16", "B", 2, "T", 64), value("to", "INT64", "B")]
CODES, LATE = [codes("INT4", 64), constant("s", np.ones((2, 16), np.float16))], value("t", "FLOAT16", 2, 16)
BYTES = [value("a", "INT8", 8, 8), constant("b", np.ones((8, 8), np.int8))]
BLOCKS = {"axis": 0, "block_size": 32}
Node = tuple[str, list[str], list[str], dict[str, Any]]

# A node, what it reads, and why TensorRT does not take it; "" where it does.
PLANTED: dict[str, tuple[Node, list[Any], str]] = {
    "contrib": (("MatMulNBits", ["q"], ["y"], {"domain": "com.microsoft"}), HEADS, "com.microsoft"),
    "not in the table": (("MatMulInteger", ["a", "b"], ["y"], {}), BYTES, "is not in the table"),
    "not read": (("LSTM", ["q"], ["y"], {}), HEADS, "does not read"),
    "attention": (("Attention", ["q", "k", "v"], ["y"], {}), HEADS, ""),
    "attention with a past": (ATTENTION_WITH_A_PAST, [*HEADS, *PAST], "input 4 is given"),
    "attention with a cap": (("Attention", ["q", "k", "v"], ["y"], {"softcap": 30.0}), HEADS, "softcap = 30.0"),
    "attention in 3-D": (("Attention", ["r", "r", "r"], ["y"], COUNTS), [ROWS], "input 0 has 3 dimensions"),
    "attention by integers": (("Attention", ["q", "k", "v", "m"], ["y"], {}), [*HEADS, INTEGERS], "INT64"),
    "rotation": (("RotaryEmbedding", ["q", "cos", "sin", "at"], ["y"], {}), [HEADS[0], *WAVES], ""),
    "rotation in 3-D": (
        ("RotaryEmbedding", ["r", "cos", "sin", "at"], ["y"], {"num_heads": 4}),
        [ROWS, *WAVES],
        "3 dim",
    ),
    "rotation by int32": (("RotaryEmbedding", ["q", "cos", "sin", "p"], ["y"], {}), [HEADS[0], *WAVES, SHORT], "INT32"),
    "scatter": (("TensorScatter", ["k", "new", "to"], ["y"], {"axis": -2}), WRITTEN, ""),
    "scatter around": (
        ("TensorScatter", ["k", "new", "to"], ["y"], {"axis": -2, "mode": "circular"}),
        WRITTEN,
        "circular",
    ),
    "scatter elsewhere": (("TensorScatter", ["k", "k", "to"], ["y"], {"axis": 1}), WRITTEN, "axis = 1"),
    "scatter anywhere": (("TensorScatter", ["any", "new", "to"], ["y"], {"axis": -2}), WRITTEN, "not fixed"),
    "product of integers": (("MatMul", ["a", "a"], ["y"], {}), [value("a", "INT64", 4, 4)], "INT64"),
    "doubles": (("Add", ["a", "a"], ["y"], {}), [value("a", "DOUBLE", 4)], "DOUBLE"),
    "int4": (("DequantizeLinear", ["w", "s"], ["y"], BLOCKS), CODES, ""),
    "int4 with zeros": (("DequantizeLinear", ["w", "s", "z"], ["y"], BLOCKS), [*CODES, zero_points(0)], ""),
    "int4 with zero points": (
        ("DequantizeLinear", ["w", "s", "z"], ["y"], BLOCKS),
        [*CODES, zero_points(1)],
        "not zero",
    ),
    "uint4": (("DequantizeLinear", ["w", "s"], ["y"], BLOCKS), [codes("UINT4", 64), CODES[1]], "UINT4"),
    "a short block": (
        ("DequantizeLinear", ["w", "s"], ["y"], BLOCKS),
        [codes("INT4", 40), CODES[1]],
        "do not divide 40",
    ),
    "late scales": (("DequantizeLinear", ["w", "t"], ["y"], BLOCKS), [CODES[0], LATE], "no constant"),
    "late axes": (("Squeeze", ["q", "a"], ["y"], {}), [HEADS[0], value("a", "INT64", 1)], "no constant"),
    "bytes looked up": (("Gather", ["b", "i"], ["y"], {}), [*BYTES, value("i", "INT64", "T")], "INT8"),
}
# What later versions take all the same, and what the parser takes and the builder does not.
NEWER = {"attention in 3-D", "rotation in 3-D", "rotation by int32", "late scales", "late axes", "doubles", "not read"}
ON_BUILDING = {"bytes looked up", "a short block"}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_node_is_caught_by_its_name(name: str, tmp_path: Path) -> None:
    (kind, given, made, options), around, reason = PLANTED[name]
    cache = ("B", 2, 32, 64) if kind == "TensorScatter" else ()
    outputs = [value(out, "FLOAT16", *cache) if cache else helper.make_empty_tensor_value_info(out) for out in made]
    inputs = [known for known in around if isinstance(known, onnx.ValueInfoProto)]
    stored = [known for known in around if isinstance(known, onnx.TensorProto)]
    nodes = [helper.make_node(kind, given, made, name="planted", **options)]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, stored), opset_imports=opsets, ir_version=11
    )
    for output in model.graph.output:  # what inference says it is, so that the planted node alone is at fault
        inferred = {known.name: known for known in onnx.shape_inference.infer_shapes(model).graph.output}
        output.type.CopyFrom(inferred[output.name].type)
        output.type.tensor_type.elem_type = output.type.tensor_type.elem_type or TensorProto.FLOAT16
    path = tmp_path / "graph.onnx"
    onnx.save(model, path)
    found = support.unsupported(path)
    assert [(problem.node, problem.operator) for problem in found] == ([("planted", kind)] if reason else [])
    assert all(reason in problem.reason for problem in found)
    for parser in support.parsers() if name not in NEWER | ON_BUILDING else ():
        assert bool(support.verdict(parser, path)) == bool(reason)


def test_one_bad_node_of_a_real_graph_is_the_one_that_is_named(written: Written) -> None:
    """What stands behind it has types that nobody can tell; those are not its fault."""
    path = written() / tensorrt.ENGINE_GRAPH
    model = onnx.load(str(path), load_external_data=False)
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    product.op_type, product.domain = "FusedMatMul", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    (problem,) = support.unsupported(path)
    assert str(problem) == f"FusedMatMul {product.name}: the parser has no operators of com.microsoft"
    product.op_type, product.domain = "MatMul", ""
    model.opset_import[0].version = 25
    onnx.save(model, path)
    assert "opsets 9 to 24" in support.unsupported(path)[0].reason


# --------------------------------------------------------------------------------------------- the graph and its shapes


def test_the_engines_graph_is_the_portable_one_with_a_cache_of_fixed_length(written: Written) -> None:
    folder = written()
    portable, engine = (
        onnx.load(str(folder / name), load_external_data=False) for name in ("model.onnx", "tensorrt.onnx")
    )
    assert [node.name for node in portable.graph.node] == [node.name for node in engine.graph.node]
    assert {value.name for value in portable.graph.input} - {value.name for value in engine.graph.input} == {
        "logits_to_keep"
    }
    cache = [value for value in engine.graph.input if value.name.startswith("past_key_values.")]
    assert {tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in cache} == {(0, 2, 320, 16)}
    places = {
        entry.value for tensor in engine.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert places == {"model.onnx.data"}  # the weights are there once
    attention = [node for node in engine.graph.node if node.op_type == "Attention"]
    assert all(any(a.name == "TRT_decomposable" and a.i == 1 for a in node.attribute) for node in attention)
    with pytest.raises(onnx.checker.ValidationError, match="TRT_decomposable"):  # why there are two files
        onnx.checker.check_model(str(folder / "tensorrt.onnx"))


def test_the_shapes_follow_from_the_model(written: Written, shaped: Shaped) -> None:
    folder = written()
    document = json.loads((folder / "profiles.json").read_text())
    prefill, decode = document["profiles"]["prefill"], document["profiles"]["decode"]
    assert prefill["input_ids"] == prefill["position_ids"] == {"min": [1, 1], "opt": [1, 160], "max": [8, 320]}
    assert decode["input_ids"] == {"min": [1, 1], "opt": [8, 1], "max": [8, 1]}
    assert prefill["past_key_values.1.value"] == {
        "min": [1, 2, 320, 16],
        "opt": [1, 2, 320, 16],
        "max": [8, 2, 320, 16],
    }
    assert decode["past_key_values.0.key"]["opt"] == [8, 2, 320, 16]
    assert tensorrt_runner.limits(folder) == (320, 8, 320)

    long = replace(
        shaped("llama"), max_position_embeddings=131_072, num_hidden_layers=32, num_key_value_heads=8, head_dim=128
    )
    length = tensorrt.cache_length(long, "fp16")  # an 8-billion Llama: 128 KiB a position
    assert length == 8192
    assert 8 * 2 * 32 * 8 * 128 * 2 * length == tensorrt.CACHES
    assert tensorrt.cache_length(long, "fp32") == 4096


def test_the_script_asks_trtexec_for_the_same_shapes(written: Written, tmp_path: Path) -> None:
    folder, seen = written(), tmp_path / "seen"
    (tmp_path / "trtexec").write_text(f'#!/bin/sh\npwd > {seen}\nfor a in "$@"; do echo "$a" >> {seen}; done\n')
    (tmp_path / "trtexec").chmod(0o755)
    subprocess.run(["sh", folder / "trtexec.sh"], check=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    where, *told = seen.read_text().splitlines()
    assert where == str(folder)
    assert "--onnx=tensorrt.onnx" in told
    assert "--stronglyTyped" in told
    assert told.index("--profile=0") < told.index("--profile=1")
    longest = next(part for part in told if part.startswith("--maxShapes="))
    assert "input_ids:8x320," in longest
    assert "past_key_values.1.value:8x2x320x16" in longest
    options = tensorrt_runner.provider_options(folder)
    assert options["trt_profile_max_shapes"].startswith(longest.removeprefix("--maxShapes="))
    assert options["trt_profile_max_shapes"].count("input_ids:") == 2  # both profiles, as the provider writes several
    assert shlex.split((folder / "trtexec.sh").read_text())


# -------------------------------------------------------------------------------------- NVIDIA's builder, without a GPU


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "fp32"), ("gemma2", "fp16"), ("gpt2", "bf16")])
def test_nvidias_builder_makes_an_engine(family: str, dtype: str, written: Written, rtx: Any) -> None:
    """An engine of TensorRT for RTX for a GPU that is not here; nothing runs it."""
    folder = written(family, dtype)
    timing = folder.parent / "timing.cache"
    assert (
        tensorrt.build(rtx, folder, timing, target=rtx.ComputeCapability.SM89) == (folder / "model.plan").stat().st_size
    )
    assert timing.exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_matrices_stay_so_in_the_engine(
    bits: int, shaped: Shaped, saved: Saved, tmp_path: Path, rtx: Any
) -> None:
    folder = quantised(saved(shaped("llama", hidden_size=64)), tmp_path, bits)
    assert support.unsupported(folder / "tensorrt.onnx") == []
    tensorrt.build(rtx, folder, target=rtx.ComputeCapability.SM89)


def test_a_quantised_lookup_is_the_same_behind_dequantizelinear(shaped: Shaped, saved: Saved, tmp_path: Path) -> None:
    folder = quantised(saved(shaped("llama", hidden_size=64)), tmp_path, 4)
    assert support.unsupported(folder / "tensorrt.onnx") == []
    feeds = {"input_ids": np.array([[1, 50, 51, 250]])}
    found = []
    for name in ("model.onnx", "tensorrt.onnx"):
        model = onnx.load(str(folder / name))
        del model.graph.output[:]
        model.graph.output.append(value("model.embed_tokens", "FLOAT", "B", "T", 64))
        part = onnx.utils.Extractor(model).extract_model(["input_ids"], ["model.embed_tokens"])
        session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, feeds)[0])
    assert np.array_equal(*found)


def quantised(model: Path, root: Path, bits: int) -> Path:
    """What `tensorrt.write` leaves of a model whose matrices are rounded to nearest, without zero points."""
    weights, folder = root / "quantised", root / "engine"
    for path in (weights, folder):
        path.mkdir()
    original = hf.load(model)
    values, scheme = original.state_dict(), Scheme(bits, 32, symmetric=True)
    rounded = {
        name: quant.nearest(values[name], quant.fitted(scheme, values[name].shape[1]))
        for name in quant.matrices(original)
    }
    quant.write(original, rounded, weights)
    tensorrt.write(weights, folder, hf.read_config(model), {}, "fp32")
    return folder


# ------------------------------------------------------------------------------------------------ without a GPU: exit 6


@pytest.fixture
def model(publish: Publish, shaped: Shaped, saved: Saved) -> Artifact:
    folder = saved(shaped("qwen3", max_position_embeddings=160))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return publish("finetune", "model", lambda to: shutil.copytree(folder, to, dirs_exist_ok=True))


def test_without_a_gpu_all_but_the_engine_is_kept_and_checked(model: Artifact, job: MakeJob) -> None:
    made = job(model, "tensorrt-fp32")
    with pytest.raises(UnavailableError, match="no NVIDIA GPU here") as caught:
        stage.export(made)
    assert caught.value.exit_code == 6
    assert "pip install 'llmctl[tensorrt]'" in caught.value.hint
    folder = Path(str(caught.value.file))
    assert folder == made.work / "graph"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "tensorrt.onnx", "profiles.json", "trtexec.sh", "check.json"}
    assert names >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    document = json.loads((folder / "check.json").read_text())
    assert document["unsupported"] == []
    assert f"all {document['nodes']} nodes are in the table of {document['table']['runtime']}" in caught.value.message
    assert not (made.run.path / made.place).exists()

    runner = exported.load(folder, CPU)  # the graph is the model all the same
    assert isinstance(runner, PortableRunner)
    ids = np.array([[1, 50, 51, 52]])
    expected = hf.load(model.path)(torch.from_numpy(ids)).detach().numpy()
    assert np.abs(runner.forward(ids, last_only=False) - expected).max() < 1e-4

    told = {
        entry.key: entry.value
        for entry in onnx.load(str(folder / "tensorrt.onnx"), load_external_data=False).metadata_props
    }
    assert told["llmctl.chat_template"] == "{{ messages[0].content }}"
    assert told["llmctl.sha256.model.safetensors"] == model.manifest["files"]["model.safetensors"]["sha256"]


def test_a_node_that_tensorrt_has_no_form_of_is_named(
    model: Artifact, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(support.TYPES, "RotaryEmbedding")
    with pytest.raises(
        UnavailableError, match=r"4 of \d+ nodes are not in the table .*: RotaryEmbedding model\.layers\.0"
    ):
        stage.export(job(model, "tensorrt-fp32"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantize": "int8-dynamic"}, "no products of integers"),
        ({"quantize": "int4", "symmetric": False}, "no zero points"),
        ({"adapter": "apart"}, "holds its weights"),
    ],
)
def test_what_tensorrt_never_has_is_refused_by_the_recipe(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ExportSection.model_validate({"formats": ["tensorrt"], **changes})
    assert ExportSection.model_validate({"formats": ["tensorrt"], "quantize": "int4"}).is_symmetric


def test_what_is_no_decoder_is_told_so(publish: Publish, shaped: Shaped, job: MakeJob) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 300, "max_position_embeddings": 64}
    config = json.dumps({"model_type": "lstm", **sizes})
    model = publish("finetune", "model", lambda to: (to / "config.json").write_text(config))
    with pytest.raises(UsageError):
        stage.export(job(model, "tensorrt-fp16"))


# ------------------------------------------------------------------------------------------------ with a GPU: pretended


class Pretended(ModuleType):
    """A package tensorrt whose engines are ONNX Runtime sessions over the addresses that they are given."""

    __version__ = "0.pretended"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32=0)
    broken = ""

    class ILogger:
        ERROR = 1

    class Logger(ILogger):
        def __init__(self, severity: int) -> None: ...

    def Builder(self, logger: Any) -> Any:
        settings = SimpleNamespace(shapes=[], cleared=[])
        settings.clear_flag = settings.cleared.append
        settings.add_optimization_profile = settings.shapes.append
        settings.create_timing_cache = lambda known: known + b"timed"
        settings.set_timing_cache = lambda cache, ignore: setattr(settings, "cache", cache)
        settings.get_timing_cache = lambda: SimpleNamespace(serialize=lambda: settings.cache)

        def shapes() -> Any:
            found: dict[str, Any] = {}
            return SimpleNamespace(found=found, set_shape=lambda name, *which: found.update({name: which}))

        def serialized(network: Any, settings: Any) -> bytes | None:
            assert settings.cleared == [0]
            self.settings = settings
            return None if self.broken == "engine" else str(network.path.parent).encode()

        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(path=Path(), flags=flags),
            create_builder_config=lambda: settings,
            create_optimization_profile=shapes,
            build_serialized_network=serialized,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        error = SimpleNamespace(node_operator=lambda: "Attention", node_name=lambda: "a", desc=lambda: "too new")

        def parse(path: str) -> bool:
            network.path = Path(path)
            return self.broken != "parser" and network.flags == 2

        return SimpleNamespace(parse_from_file=parse, num_errors=1, get_error=lambda i: error)

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: Engine(Path(data.decode()), self.settings.shapes))


class Engine:
    def __init__(self, folder: Path, profiles: list[Any]) -> None:
        self.session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.profiles = profiles
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.names = [value.name for value in values]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return str(self.names[index])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    """Refuses shapes outside the profile that it was set to, and a past and a present at two addresses."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> None:
        self.profile = index

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        least, _, most = self.engine.profiles[self.profile].found[name]
        assert all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)), (name, shape)
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.places[name] = pointer

    def execute_async_v3(self, stream: int) -> bool:
        binding = self.engine.session.io_binding()
        for name, shape in self.shapes.items():
            kind = np.int64 if name.endswith("_ids") else np.float32
            binding.bind_input(name, "cpu", 0, kind, shape, self.places[name])
            if name.startswith("past_key_values."):
                present = name.replace("past_key_values", "present")
                assert self.places[present] == self.places[name]
                binding.bind_output(present, "cpu", 0, np.float32, shape, self.places[name])
        logits = (*self.shapes["input_ids"], self.engine.session.get_outputs()[0].shape[2])
        binding.bind_output("logits", "cpu", 0, np.float32, logits, self.places["logits"])
        self.engine.session.run_with_iobinding(binding)
        return True


class Gpu(Device):
    @property
    def torch(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    module = Pretended("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None, wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return module


@pytest.fixture
def on_gpu(job: MakeJob, pretended: Pretended) -> MakeJob:
    return lambda *args, **options: replace(job(*args, **options), device=Gpu("cuda", "test", 1, frozenset()))


def test_an_engine_passes_the_same_gate(model: Artifact, on_gpu: MakeJob, pretended: Pretended) -> None:
    """However tokens arrive; the calls are TensorRT's, the numbers ONNX Runtime's."""
    made = on_gpu(model, "tensorrt-fp32")
    artifact = stage.export(made)
    assert artifact.place == "export/finetune/tensorrt-fp32"
    report = json.loads((artifact.path / "parity.json").read_text())
    assert report["passed"]
    assert report["error"] < 2e-5
    assert report["candidate"].endswith("TensorRT 0.pretended")
    assert [entry for entry in artifact.manifest["files"] if artifact.manifest["files"][entry].get("log")] == [
        "model.plan",
        "parity.json",
    ]
    assert (made.run.path / ".work" / "tensorrt-timing.cache").read_bytes() == b"timed"
    again = stage.export(on_gpu(model, "tensorrt-fp32"))
    assert again.identity == artifact.identity
    assert (made.run.path / ".work" / "tensorrt-timing.cache").read_bytes() == b"timedtimed"


def test_prompts_go_in_pieces_and_rows_that_do_not_fit_alone(
    written: Written, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "PROMPT", 16)
    monkeypatch.setattr(tensorrt, "BATCH", 3)
    folder = written("llama", max_position_embeddings=64)
    tensorrt.build(pretended, folder)
    runner = exported.load(folder, Gpu("cuda", "test", 1, frozenset()))
    assert isinstance(runner, EngineRunner)
    reference: Any = PortableRunner(folder, CPU)
    text = np.random.default_rng(0).integers(0, 250, (5, 63))

    def same(cache: Any, other: Any, ids: np.ndarray, new: list[int], **options: bool) -> None:
        found = runner.forward(ids, cache, new=np.array(new), **options)
        expected = reference.forward(ids, other, new=np.array(new), **options)
        for row, count in enumerate(new):
            assert np.abs(found[row, :count] - expected[row, :count]).max() < 1e-4

    for rows in (1, 2, 5):  # five are more than the engine takes
        cache, other = runner.new_cache(rows, 64), reference.new_cache(rows, 64)
        same(cache, other, text[:rows, :40], [40] * rows, last_only=False)  # three pieces
        same(cache, other, text[:rows, 40:41], [1] * rows)
        same(cache, other, text[:rows, 41:60], [19, *[2] * (rows - 1)], last_only=False)  # padded past a piece
        same(cache, other, text[:rows, 60:63], [3, *[1] * (rows - 1)], last_only=False)
        same(cache, other, text[:rows, :4], [1, *[4] * (rows - 1)], last_only=False)  # padding has no room
        assert cache.lengths.tolist() == other.lengths.tolist()
    forked, apart = cache.select([1, 1, 2]), other.select([1, 1, 2])
    same(forked, apart, text[:3, :1], [1] * 3)
    with pytest.raises(ValueError, match="do not fit"):
        runner.forward(text[:1], runner.new_cache(1, 20))


def test_what_tensorrt_refuses_is_said(model: Artifact, on_gpu: MakeJob, pretended: Pretended) -> None:
    pretended.broken = "parser"
    with pytest.raises(UnavailableError, match="does not take the graph: Attention a: too new"):
        stage.export(on_gpu(model, "tensorrt-fp32"))
    pretended.broken = "engine"
    with pytest.raises(RunError, match="made no engine"):
        stage.export(on_gpu(model, "tensorrt-fp32"))


def test_an_engine_that_is_not_the_model_is_not_published(
    model: Artifact, on_gpu: MakeJob, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = EngineRunner._run
    monkeypatch.setattr(EngineRunner, "_run", lambda self, ids, cache, new: 1.01 * run(self, ids, cache, new))
    made = on_gpu(model, "tensorrt-fp32")
    with pytest.raises(GateError):
        stage.export(made)
    assert not (made.run.path / made.place).exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"profiles": []}', '{"profiles": {"prefill": {"input_ids": {"max": [0]}}}}']
)
def test_shapes_that_make_no_sense_are_an_error(text: str, written: Written, pretended: Pretended) -> None:
    folder = written()
    (folder / "model.plan").write_bytes(b"")
    (folder / "profiles.json").write_text(text)
    with pytest.raises(DataError, match="shapes"):
        exported.load(folder, Gpu("cuda", "test", 1, frozenset()))


def test_a_gpu_without_tensorrt(model: Artifact, on_gpu: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match="the package tensorrt is not here"):
        stage.export(on_gpu(model, "tensorrt-fp32"))
