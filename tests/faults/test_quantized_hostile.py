"""Fault 14 for quantised folders: config.json and the file contradict each other, or themselves, about the packing."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model import hf, quant
from llmctl.model.compressed import KEY, TOKENS
from llmctl.model.quant import Scheme
from tests import folders

State = dict[str, Tensor]
LAYER = "model.layers.0.mlp.down_proj"
KINDS = {"int4": Scheme(4, 16, False), "int8": Scheme(8, 16, True), "dynamic": Scheme(8, 0, True, True)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quantised folder of each kind."""
    source, made = folders.write(tmp_path_factory.mktemp("plain"), dtype="fp32"), {}
    model = hf.load(source)
    state = model.state_dict()
    for kind, scheme in KINDS.items():
        made[kind] = shutil.copytree(source, tmp_path_factory.mktemp(kind) / "model")
        matrices = {name: quant.fitted(scheme, state[name].shape[1]) for name in quant.matrices(model)}
        rounded = {
            name: quant.nearest(state[name], each if scheme.block else scheme) for name, each in matrices.items()
        }
        quant.write(model, rounded, made[kind])
    return made


@pytest.fixture
def folder(good: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(good[kind], tmp_path / "model")


def refused(folder: Path) -> str:
    """The error that both readers end in; it names a file of the folder."""
    said = []
    for read in (hf.load, quant.read):
        tracemalloc.start()
        with pytest.raises(DataError) as caught:
            read(folder)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()
        assert caught.value.file is not None
        assert Path(caught.value.file).parent == folder or Path(caught.value.file) == folder
        said.append(caught.value.message)
    return said[0]


def state_of(folder: Path, change: Callable[[State], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def config_of(folder: Path, change: Callable[[Any], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    made = change(config[KEY])
    config[KEY] = config[KEY] if made is None else made
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_read(kind: str, good: dict[str, Path]) -> None:
    model, matrices = hf.load(good[kind]), quant.read(good[kind])
    state = model.state_dict()
    for name, matrix in matrices.items():
        assert torch.equal(matrix.values(), state[name])


# ----------------------------------------------------------------------------------------------------- config.json


def group(**changes: Any) -> Callable[[Any], object]:
    return lambda stated: next(iter(stated["config_groups"].values())).update(changes)


def weights(**changes: Any) -> Callable[[Any], object]:
    return lambda stated: next(iter(stated["config_groups"].values()))["weights"].update(changes)


def whole(value: Any) -> Callable[[Any], object]:
    return lambda stated: value


def key(**changes: Any) -> Callable[[Any], object]:
    return lambda stated: stated.update(changes)


STATED: dict[str, Callable[[Any], object]] = {
    "a list": whole([1, 2]),
    "a word": whole("int4"),
    "a number": whole(4),
    "nothing in it": whole({}),
    "another method": key(quant_method="gptq"),
    "a method that is no word": key(quant_method=["compressed-tensors"]),
    "no groups": key(config_groups={}),
    "groups in a list": key(config_groups=[{}]),
    "a group that is none": key(config_groups={"group_0": "all"}),
    "a quantised cache": key(kv_cache_scheme={"num_bits": 8}),
    "three bits": weights(num_bits=3),
    "no bits": weights(num_bits=None),
    "bits in a fraction": weights(num_bits=4.0),
    "bits that are true": weights(num_bits=True),
    "a million bits": weights(num_bits=10**6),
    "floats": weights(type="float"),
    "a type that is no word": weights(type=["int"]),
    "blocks of none": weights(group_size=0),
    "blocks below none": weights(group_size=-16),
    "blocks in a fraction": weights(group_size=16.0),
    "blocks that are true": weights(group_size=True),
    "huge blocks": weights(group_size=1 << 60),
    "smaller blocks": weights(group_size=8),
    "another strategy": weights(strategy="tensor"),
    "a strategy that is no word": weights(strategy={"group": 1}),
    "weights that are none": group(weights=None),
    "weights in a list": group(weights=[4]),
    "an unknown format": group(format="marlin-24"),
    "a format that is no word": group(format={"pack": 1}),
    "a regular expression": group(targets=["re:(a+)+b"]),
    "targets that are no list": group(targets="Linear"),
    "targets that are no words": group(targets=[1, None]),
    "no targets": group(targets=[]),
    "targets of others": group(targets=["model.layers.7.mlp.up_proj"]),
    "a rounding of outputs": group(output_activations={"num_bits": 8}),
    "static activations": group(input_activations={**TOKENS, "dynamic": False}),
    "activations that are no object": group(input_activations=[8]),
    "symmetric where it is not": weights(symmetric=True),
}


@pytest.mark.parametrize("lie", STATED)
def test_a_config_that_lies(lie: str, folder: Callable[[str], Path]) -> None:
    place = folder("int4")
    config_of(place, STATED[lie])
    refused(place)


def test_no_word_of_the_packing(folder: Callable[[str], Path]) -> None:
    place = folder("int4")
    config = json.loads((place / "config.json").read_text())
    del config[KEY]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"the weights do not fit config\.json"):
        hf.load(place)


# ------------------------------------------------------------------------------------------------------ the tensors


def put(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], object]:
    return lambda state: state.update({f"{LAYER}.{leaf}": change(state[f"{LAYER}.{leaf}"])})


def gone(leaf: str) -> Callable[[State], object]:
    return lambda state: state.pop(f"{LAYER}.{leaf}")


def more(name: str, tensor: Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: tensor})


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def as_shape(*sizes: int) -> Callable[[State], object]:
    return put("weight_shape", lambda old: torch.tensor(sizes))


STORED: dict[str, tuple[str, Callable[[State], object]]] = {
    "no scales": ("int4", gone("weight_scale")),
    "no codes": ("int4", gone("weight_packed")),
    "no shape": ("int4", gone("weight_shape")),
    "no zero points": ("int4", gone("weight_zero_point")),
    "zero points of a symmetric one": ("int8", more(f"{LAYER}.weight_zero_point", torch.zeros(3, 3))),
    "the plain matrix beside it": ("int4", more(f"{LAYER}.weight", torch.zeros(48, 80))),
    "half of the scales": ("int4", put("weight_scale", lambda old: old[:, ::2])),
    "scales the wrong way round": ("int4", put("weight_scale", lambda old: old.t())),
    "one scale": ("int4", put("weight_scale", lambda old: old[:1, :1])),
    "integer scales": ("int4", put("weight_scale", lambda old: old.to(torch.int32))),
    "scales in fp64": ("int4", put("weight_scale", lambda old: old.double())),
    "a scale that is no number": ("int4", put("weight_scale", first(float("nan")))),
    "an infinite scale": ("int4", put("weight_scale", first(float("inf")))),
    "a scale below nothing": ("int4", put("weight_scale", first(-1.0))),
    "a scale of nothing": ("int4", put("weight_scale", first(0.0))),
    "fewer codes": ("int4", put("weight_packed", lambda old: old[:, :-1])),
    "fewer rows": ("int4", put("weight_packed", lambda old: old[:-1])),
    "wider codes": ("int4", put("weight_packed", lambda old: old.to(torch.int64))),
    "codes that are floats": ("int4", put("weight_packed", lambda old: old.float())),
    "flat codes": ("int4", put("weight_packed", lambda old: old.flatten())),
    "fewer zero points": ("int4", put("weight_zero_point", lambda old: old[:-1])),
    "zero points unpacked": ("int4", put("weight_zero_point", lambda old: old.to(torch.int8))),
    "a huge shape": ("int4", as_shape(1 << 31, 1 << 31)),
    "a shape below nothing": ("int4", as_shape(-48, 80)),
    "a shape that overflows": ("int4", as_shape(2**62, 4)),
    "a shape of nothing": ("int4", as_shape(0, 80)),
    "a shape of another": ("int4", as_shape(80, 48)),
    "a shape with more rows": ("int4", as_shape(96, 40)),
    "three sizes": ("int4", as_shape(48, 80, 1)),
    "a shape in fractions": ("int4", put("weight_shape", lambda old: old.float())),
    "a shape in bytes": ("int4", put("weight_shape", lambda old: old.to(torch.uint8))),
    "codes of another module": ("int4", more("model.layers.9.mlp.down_proj.weight_packed", torch.zeros(2, 2))),
    "a whole other module": (
        "int4",
        lambda state: state.update(
            {
                name.replace("layers.0", "layers.9"): tensor.clone()
                for name, tensor in state.items()
                if name.startswith(LAYER)
            }
        ),
    ),
    "int8 codes as floats": ("dynamic", put("weight", lambda old: old.float())),
    "int8 codes unsigned": ("dynamic", put("weight", lambda old: old.to(torch.uint8))),
    "int8 codes in one row": ("dynamic", put("weight", lambda old: old.flatten())),
    "int8 scales a block": ("dynamic", put("weight_scale", lambda old: old.repeat(1, 5))),
    "int8 without scales": ("dynamic", gone("weight_scale")),
    "a norm that is packed": ("int4", more("model.norm.weight_scale", torch.ones(48, 1))),
}


@pytest.mark.parametrize("lie", STORED)
def test_tensors_that_lie(lie: str, folder: Callable[[str], Path]) -> None:
    kind, change = STORED[lie]
    place = folder(kind)
    state_of(place, change)
    message = refused(place)
    assert "model." in message or "weight" in message, message


def test_codes_beyond_their_bits(folder: Callable[[str], Path]) -> None:
    """Four bits in bytes: the format of int8, said to be of int4."""
    place = folder("dynamic")
    config_of(
        place, lambda stated: [g["weights"].update(num_bits=4) for g in stated["config_groups"].values()] and None
    )
    assert "beyond 4 bits" in refused(place)


def test_a_config_drawn_at_random_is_read_or_refused(folder: Callable[[str], Path]) -> None:
    """Every value of the packing's description replaced by something else, one at a time."""
    place, drawn = folder("int4"), random.Random(0)
    text = (place / "config.json").read_text()

    def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
        return [at, *(path for name, inner in below for path in paths(inner, (*at, name)))]

    others: tuple[Any, ...] = (None, True, 0, -1, 1 << 70, 0.5, "", "x" * 1000, [], [[]], {}, {"a": 1}, ["a"])
    problems = 0
    for path in paths(json.loads(text)[KEY]):
        for other in drawn.sample(others, 6):
            config = json.loads(text)
            at, last = config, KEY
            for name in path:
                at, last = at[last], name
            at[last] = other
            (place / "config.json").write_text(json.dumps(config))
            try:
                hf.load(place)
            except DataError:
                problems += 1
    assert problems > 50
