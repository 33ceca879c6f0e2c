"""Faults 14 and 15 for graphs: weights from elsewhere, sizes that lie, bombs. A named error, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llmctl.errors import DataError
from llmctl.export import encoder_graph, graph, lstm_graph, seq2seq_graph
from llmctl.export.form import Form
from llmctl.inference import exported
from llmctl.inference.external_data import check_external_data
from llmctl.inference.onnx_encoder import EncoderRunner
from llmctl.inference.onnx_runner import ADAPTER, OnnxRunner
from llmctl.inference.onnx_seq2seq import DECODER, ENCODER, Seq2SeqRunner
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.families import FAMILIES
from llmctl.text import tokenizer as tokenizers
from tests.export.conftest import CPU

Edit = Callable[[onnx.ModelProto], None]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def shaped(family: str, **changes: Any) -> Config:
    kind = {"kind": FAMILIES[family].kind, "norm_eps": 1e-5}
    return Config(family, **{**FAMILIES[family].switches, **SIZES, **kind, **changes})


def written(root: Path, config: Config, write: Callable[..., object], *form: Form) -> Path:
    """A model and its export."""
    source, folder = root / "model", root / "onnx"
    source.mkdir(parents=True)
    folder.mkdir()
    hf.save(hf.random(config, 0), tokenizers.train([], type="byte"), source)
    write(source, folder, hf.read_config(source), {}, *form)
    shutil.copyfile(source / "config.json", folder / "config.json")
    return folder


LOADERS: dict[str, tuple[str, dict[str, Any], Any, tuple[Form, ...], Callable[[Path], object], tuple[str, ...]]] = {
    "ort": ("llama", {}, graph.write, (), lambda folder: exported.load(folder, CPU), ("model.onnx",)),
    "portable": (
        "llama",
        {},
        graph.write,
        (Form("portable"),),
        lambda folder: exported.load(folder, CPU),
        ("model.onnx",),
    ),
    "lstm": (
        "lstm",
        {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32},
        lstm_graph.write,
        (),
        lambda folder: exported.load(folder, CPU),
        ("model.onnx",),
    ),
    "encoder": (
        "bert",
        {"task": "masked-lm", "head_transform": "norm"},
        encoder_graph.write,
        (Form(),),
        lambda folder: EncoderRunner(folder, CPU),
        ("model.onnx",),
    ),
    "seq2seq": (
        "t5",
        {"task": "seq2seq-lm", "num_decoder_layers": 1, "decoder_start_token_id": 0},
        seq2seq_graph.write,
        (Form(),),
        lambda folder: Seq2SeqRunner(folder, CPU),
        (ENCODER, DECODER),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export for each loader, written once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            family, changes, write, form, _, _ = LOADERS[name]
            made[name] = written(tmp_path_factory.mktemp(name), shaped(family, **changes), write, *form)
        return made[name]

    return folder


@pytest.fixture
def copied(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str = "ort") -> Path:
        shutil.copytree(folders(name), tmp_path / "onnx")
        shutil.copyfile(folders(name) / "model.onnx.data", tmp_path / "secret")
        return tmp_path / "onnx"

    return copy


def edit(file: Path, change: Edit) -> None:
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())


def outside(model: onnx.ModelProto) -> Any:
    """The first tensor whose bytes lie in another file."""
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


def entry(key: str, value: str) -> Edit:
    def change(model: onnx.ModelProto) -> None:
        next(item for item in outside(model).external_data if item.key == key).value = value

    return change


# ------------------------------------------------------------------------------------------------- every loader


@pytest.mark.parametrize("name", LOADERS)
def test_the_untouched_folder_loads(name: str, folders: Callable[[str], Path]) -> None:
    LOADERS[name][4](folders(name))
    for file in LOADERS[name][5]:
        check_external_data(folders(name) / file)


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, (*_, files) in LOADERS.items() for file in files])
@pytest.mark.parametrize("location", ["../secret", "{root}/secret", "linked", "hard"])
def test_no_loader_reads_weights_from_elsewhere(
    location: str, name: str, file: str, copied: Callable[[str], Path]
) -> None:
    """Each of the files that a loader opens."""
    folder = copied(name)
    secret = folder.parent / "secret"
    (folder / "linked").symlink_to(secret)
    os.link(secret, folder / "hard")
    edit(folder / file, entry("location", location.format(root=folder.parent)))
    with pytest.raises(DataError, match=r"no file beside the graph|hard links") as caught:
        LOADERS[name][4](folder)
    assert caught.value.file == str(folder / file)
    assert caught.value.hint == "do not use this folder"


@pytest.mark.parametrize("name", LOADERS)
def test_no_loader_takes_a_file_that_is_no_graph(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    for file in LOADERS[name][5]:
        whole = (folder / file).read_bytes()
        for content in (b"", b"\x80\x04pickle", whole[: len(whole) // 2], b"\xff" * 4000):
            (folder / file).write_bytes(content)
            with pytest.raises(DataError) as caught:
                LOADERS[name][4](folder)
            assert str(folder / file) == caught.value.file
        (folder / file).write_bytes(whole)


# ------------------------------------------------------------------------------------------- where weights lie

PLACES: dict[str, tuple[Edit, str]] = {
    "nowhere": (entry("location", ""), "no file beside the graph"),
    "a folder": (entry("location", "."), "no file beside the graph"),
    "a folder of its own": (entry("location", "sub/model.onnx.data"), "no file beside the graph"),
    "a name with NUL": (entry("location", "model.onnx.data\0.txt"), "no file beside the graph"),
    "a name of a megabyte": (entry("location", "a" * 1_000_000), "no file beside the graph"),
    "memory": (entry("location", "*/_ORT_MEM_ADDR_/*"), "no file beside the graph"),  # ORT's mark of an address
    "a device": (entry("location", "/dev/zero"), "no file beside the graph"),
    "past the end": (entry("offset", "99999999"), "past the end"),
    "before the beginning": (entry("offset", "-4096"), "past the end"),
    "a signed offset": (entry("offset", "+0"), "past the end"),
    "other digits": (entry("offset", "\uff10"), "past the end"),
    "a number with an exponent": (entry("offset", "1e3"), "past the end"),
    "an offset that overflows": (entry("offset", str(2**64 - 64)), "past the end"),
    "a number of a million digits": (entry("offset", "9" * 1_000_000), "past the end"),
    "fewer bytes than the shape takes": (entry("length", "4"), "but 4 of model.onnx.data are theirs"),
    "no bytes": (entry("length", "0"), "but 0 of model.onnx.data are theirs"),
    "no number": (entry("length", "many"), "past the end"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_lies(place: str, copied: Callable[[], Path]) -> None:
    folder = copied()
    change, message = PLACES[place]
    edit(folder / "model.onnx", change)
    with pytest.raises(DataError) as caught:
        OnnxRunner(folder, CPU)
    assert message in caught.value.message
    assert len(caught.value.message) < 1000
    assert caught.value.file == str(folder / "model.onnx")


def grown(model: onnx.ModelProto) -> None:
    """More values than there are bytes left, and no length said: a runtime would read behind the file."""
    tensor = list(model.graph.initializer)[-1]
    tensor = [each for each in model.graph.initializer if each.data_location == TensorProto.EXTERNAL][-1]
    tensor.dims[0] *= 1000
    kept = [item for item in tensor.external_data if item.key != "length"]
    del tensor.external_data[:]
    tensor.external_data.extend(kept)


def said_twice(model: onnx.ModelProto) -> None:
    """Readers differ in which of two entries they take."""
    outside(model).external_data.add(key="location", value="../secret")


def dims(*sizes: int) -> Edit:
    def change(model: onnx.ModelProto) -> None:
        tensor = outside(model)
        del tensor.dims[:]
        tensor.dims.extend(sizes)

    return change


def typed(kind: int) -> Edit:
    def change(model: onnx.ModelProto) -> None:
        outside(model).data_type = kind

    return change


def doubled(model: onnx.ModelProto) -> None:
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])


SHAPES: dict[str, tuple[Edit, str]] = {
    "a shape behind the file": (grown, "past the end"),
    "a key twice": (said_twice, "a key of external_data is there twice"),
    "a negative size": (dims(-300, 32), "have the shape [-300, 32]"),
    "two negative sizes": (dims(-300, -32), "have the shape"),
    "sizes that overflow": (dims(2**62, 2**62), "have the shape"),
    "a thousand dimensions": (dims(*[2] * 1000), "have the shape"),
    "strings": (typed(TensorProto.STRING), "of type STRING, which is not kept outside of a graph"),
    "an unknown type": (typed(99), "of type 99, which is not kept outside of a graph"),
    "a wider type": (typed(TensorProto.DOUBLE), "of model.onnx.data are theirs"),
    "one name twice": (doubled, "has two initialisers named"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_that_lies(shape: str, copied: Callable[[], Path]) -> None:
    folder = copied()
    change, message = SHAPES[shape]
    edit(folder / "model.onnx", change)
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        OnnxRunner(folder, CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in caught.value.message
    assert caught.value.file == str(folder / "model.onnx")
    assert peak < 20e6


def secret(name: str = "secret") -> Any:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def constant(**attributes: Any) -> Any:
    return helper.make_node("Constant", [], ["secret"], **attributes)


def branch(node: Any) -> Any:
    return helper.make_graph([node], "branch", [], [])


def sparse() -> Any:
    return helper.make_sparse_tensor(secret(), helper.make_tensor("at", TensorProto.INT64, [1], [0]), [8])


def either(inner: Any) -> Any:
    return helper.make_node("If", ["one"], ["out"], then_branch=inner, else_branch=inner)


def hidden(model: onnx.ModelProto, place: str) -> None:
    nodes, opsets = model.graph.node, [helper.make_opsetid("", 23)]
    if place == "an attribute":
        nodes.append(constant(value=secret()))
    elif place == "a list of tensors":
        nodes.append(constant(values=[secret()]))
    elif place == "a sparse attribute":
        nodes.append(constant(sparse_value=sparse()))
    elif place == "a sparse initialiser":
        model.graph.sparse_initializer.append(sparse())
    elif place == "a branch":
        nodes.append(either(branch(constant(value=secret()))))
    elif place == "a branch of a branch":
        nodes.append(either(branch(either(branch(constant(value=secret()))))))
    elif place == "an initialiser of a branch":
        nodes.append(either(helper.make_graph([], "branch", [], [], [secret()])))
    elif place == "a function":
        model.functions.append(helper.make_function("own", "f", [], ["secret"], [constant(value=secret())], opsets))
    elif place == "a default of a function":
        function = helper.make_function("own", "f", [], ["secret"], [constant(value=secret())], opsets)
        del function.node[:]
        function.attribute_proto.append(helper.make_attribute("value", secret()))
        model.functions.append(function)
    elif place == "training":
        model.training_info.add().initialization.initializer.append(secret())


HIDDEN = (
    "an attribute",
    "a list of tensors",
    "a sparse attribute",
    "a sparse initialiser",
    "a branch",
    "a branch of a branch",
    "an initialiser of a branch",
    "a function",
    "a default of a function",
    "training",
)


@pytest.mark.parametrize("place", HIDDEN)
def test_a_tensor_is_found_wherever_it_hides(place: str, copied: Callable[[], Path]) -> None:
    folder = copied()
    edit(folder / "model.onnx", lambda model: hidden(model, place))
    with pytest.raises(DataError, match=r"'\.\./secret', which is no file beside the graph"):
        check_external_data(folder / "model.onnx")


# -------------------------------------------------------------------------------------------------------- bombs


def test_a_huge_graph_is_not_read(copied: Callable[[], Path]) -> None:
    """64 GB of holes behind a graph; and weights inside of the graph's own file, which are read whole."""
    folder = copied()
    with (folder / "model.onnx").open("r+b") as file:
        file.truncate(64 << 30)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"has 68,719,476,736 bytes; at most 134,217,728 are read"):
        exported.load(folder, CPU)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_deep_nesting(copied: Callable[[], Path]) -> None:
    """Graphs in graphs, 3,000 deep: protobuf stops at 100."""
    folder = copied()

    def field(number: int, content: bytes) -> bytes:
        length, size = b"", len(content)
        while True:
            length += bytes([size & 127 | (128 if size > 127 else 0)])
            size >>= 7
            if not size:
                return bytes([number << 3 | 2]) + length + content

    inner = b""
    for _ in range(3_000):  # GraphProto.node, NodeProto.attribute, AttributeProto.g
        inner = field(1, field(5, field(6, inner)))
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + field(7, inner))
    with pytest.raises(DataError, match="is no ONNX model"):
        exported.load(folder, CPU)


def test_functions_that_call_each_other_twice(copied: Callable[[], Path]) -> None:
    """2^40 nodes once they are expanded: ONNX Runtime would work on it for weeks."""
    folder = copied()

    def bomb(model: onnx.ModelProto) -> None:
        opsets = [helper.make_opsetid("own", 1), helper.make_opsetid("", 23)]
        for i in range(40):
            calls = [
                helper.make_node(f"f{i + 1}", [a], [b], domain="own") for a, b in (("a", "c"), ("c", "b")) if i < 39
            ]
            body = calls or [helper.make_node("Identity", ["a"], ["b"])]
            model.functions.append(helper.make_function("own", f"f{i}", ["a"], ["b"], body, opsets))
        model.opset_import.append(opsets[0])
        model.graph.node.append(helper.make_node("f0", ["one"], ["bomb"], domain="own"))

    edit(folder / "model.onnx", bomb)
    with pytest.raises(DataError, match="has functions of its own"):
        exported.load(folder, CPU)


def allocates(model: onnx.ModelProto) -> None:
    """4 TB of zeros that nothing reads but their sum."""
    model.graph.initializer.append(helper.make_tensor("sizes", TensorProto.INT64, [1], [1 << 40]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["sizes"], ["zeros"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["zeros"], ["sum"]))


def turned_round(model: onnx.ModelProto) -> None:
    model.graph.node[5].input[0] = model.graph.node[-1].output[0]


def unknown(model: onnx.ModelProto) -> None:
    model.graph.node[3].op_type = "NoSuch"


def dangling(model: onnx.ModelProto) -> None:
    model.graph.node[4].input[0] = "nothing"


def short_table(model: onnx.ModelProto) -> None:
    for name in ("rotary.cos", "rotary.sin"):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.dims[0] = 4
        next(item for item in tensor.external_data if item.key == "length").value = str(4 * 4 * tensor.dims[1])


def output(name: str, axis: int, size: int) -> Edit:
    def change(model: onnx.ModelProto) -> None:
        found = next(value for value in (*model.graph.input, *model.graph.output) if value.name == name)
        found.type.tensor_type.shape.dim[axis].dim_value = size

    return change


def renamed(model: onnx.ModelProto) -> None:
    next(value for value in model.graph.output if value.name == "logits").name = "kept"


RUN = """
import resource, sys
from pathlib import Path
import numpy as np
from llmctl.errors import LlmctlError
from llmctl.inference import exported
from tests.export.conftest import CPU
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for folder in map(Path, sys.argv[1:]):
    try:
        exported.load(folder, CPU).forward(np.arange(40)[None])
        print("ran", folder)
    except LlmctlError as problem:
        print(type(problem).__name__, problem.file, str(problem).splitlines()[0])
"""
PROGRAMS: dict[str, tuple[Edit, str]] = {
    "terabytes": (allocates, "RunError"),
    "a circle": (turned_round, "DataError"),
    "an unknown operator": (unknown, "DataError"),
    "a value of nobody": (dangling, "DataError"),
    "a rotary table that is too short": (short_table, "RunError"),
    "a cache of other heads": (output("past_key_values.0.key", 1, 1), "DataError"),
    "no logits": (renamed, "DataError"),
}


def run(folders: Sequence[Path]) -> list[str]:
    """A line for each folder, loaded and run in a process of its own with a gigabyte of memory."""
    done = subprocess.run([sys.executable, "-c", RUN, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("ran", "DataError", "RunError"))]


def test_programs_that_cannot_run(copied: Callable[[], Path], tmp_path: Path) -> None:
    """What ONNX Runtime itself refuses, or stops at."""
    folder, places = copied(), [tmp_path / str(number) for number in range(len(PROGRAMS))]
    for place, (change, _) in zip(places, PROGRAMS.values(), strict=True):
        shutil.copytree(folder, place)
        edit(place / "model.onnx", change)
    lines = run(places)
    assert len(lines) == len(PROGRAMS), lines
    for line, place, (name, (_, kind)) in zip(lines, places, PROGRAMS.items(), strict=True):
        assert line.startswith(f"{kind} {place / 'model.onnx'} "), (name, line)


def test_a_config_that_lies_about_the_vocabulary(copied: Callable[[], Path]) -> None:
    folder = copied()
    config = json.loads((folder / "config.json").read_text())
    for change in ({"vocab_size": 1 << 40}, {"num_key_value_heads": 1}, {"num_hidden_layers": 2}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=r"config.json asks for|has a cache of") as caught:
            exported.load(folder, CPU)
        assert caught.value.file == str(folder / "model.onnx")


def test_flipped_bytes_are_refused_or_run(copied: Callable[[], Path], tmp_path: Path) -> None:
    """A flip of the graph's file is named, or does no harm: none ends the process."""
    folder, drawn = copied(), np.random.default_rng(0)
    whole, refused, taken = (folder / "model.onnx").read_bytes(), 0, list[Path]()
    for number in range(150):
        content = bytearray(whole)
        for at in drawn.integers(0, len(content), drawn.choice([1, 1, 8])):
            content[at] = drawn.integers(256)
        (folder / "model.onnx").write_bytes(content)
        try:
            check_external_data(folder / "model.onnx")
        except DataError:
            refused += 1
        else:
            if len(taken) < 40:
                taken.append(shutil.copytree(folder, tmp_path / f"flipped-{number}"))
    assert refused > 30
    assert len(run(taken)) == len(taken)


# ------------------------------------------------------------------------------------------- what lies beside it


def test_genai_config_leads_nowhere(copied: Callable[[], Path]) -> None:
    """It is onnxruntime-genai's: no loader of llmctl opens what it names."""
    folder = copied()
    decoder = {"filename": "../secret.onnx", "session_options": {"custom_ops_library": "../evil.so"}}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    (folder.parent / "secret.onnx").write_bytes(b"no graph")
    runner = OnnxRunner(folder, CPU)
    assert runner.forward(np.array([[1, 2, 3]])).shape == (1, 1, 300)


def test_an_adapter_that_is_none(copied: Callable[[], Path]) -> None:
    folder = copied()
    for content in (b"", b"\x80\x04pickle", os.urandom(4000)):
        (folder / ADAPTER).write_bytes(content)
        with pytest.raises(DataError, match="is no adapter") as caught:
            OnnxRunner(folder, CPU)
        assert caught.value.file == str(folder / ADAPTER)
