"""OnnxRunner against the torch model it was exported from, and what it refuses to load or run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from llmctl.device import Device
from llmctl.errors import DataError, UnavailableError
from llmctl.export import graph
from llmctl.inference import runners
from llmctl.inference.onnx_runner import OnnxRunner
from llmctl.inference.runners import TorchRunner
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder

CPU = Device("cpu", "test", 1, frozenset())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with grouped heads and weights that spread its logits."""
    torch.set_num_threads(1)
    config = Config("qwen3", 300, 48, 80, 2, 4, 2, 16, max_position_embeddings=160, qk_norm=True, eos_token_id=(6, 2))
    decoder = Decoder.random(config, seed=0)
    with torch.no_grad():
        for tensor in decoder.parameters():
            tensor.mul_(6.0 if tensor.ndim > 1 else 1.3)
    folder = tmp_path_factory.mktemp("model")
    hf.save(decoder, folder, folder)
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    graph.write(model, folder, hf.read_config(model), {})
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(model / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def torch_runner(model: Path) -> TorchRunner:
    return TorchRunner(model, CPU)


@pytest.fixture(scope="module")
def runner(exported: Path) -> OnnxRunner:
    return OnnxRunner(exported, CPU)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, (1, length))


def greedy(runner: runners.Runner, ids: np.ndarray, count: int) -> list[int]:
    cache, found = runner.new_cache(), []
    for _ in range(count):
        found.append(int(runner.forward(ids, cache)[0, -1].argmax()))
        ids = np.array([found[-1:]])
    return found


def test_greedy_ids_equal_torch(runner: OnnxRunner, torch_runner: TorchRunner) -> None:
    found = greedy(runner, prompt(7), 100)
    assert found == greedy(torch_runner, prompt(7), 100)
    assert len(set(found)) > 10  # no loop over one token, which would hide a dead cache


def test_the_interface_is_that_of_torch(exported: Path, runner: OnnxRunner, torch_runner: TorchRunner) -> None:
    assert (runner.vocab_size, runner.max_length, runner.eos_ids) == (300, 160, (6, 2))
    assert isinstance(runners.load(exported, CPU), OnnxRunner)
    ids = np.concatenate([prompt(9), prompt(9, seed=1)])
    for last_only in (True, False):
        ours, theirs = runner.forward(ids, None, last_only), torch_runner.forward(ids, None, last_only)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_chunks_equal_one_pass(runner: OnnxRunner) -> None:
    ids = prompt(50)
    whole = runner.forward(ids, last_only=False)
    cache = runner.new_cache(max_length=50)
    chunks = [runner.forward(ids[:, a:b], cache, last_only=False) for a, b in ((0, 1), (1, 2), (2, 20), (20, 50))]
    np.testing.assert_allclose(np.concatenate(chunks, 1), whole, atol=1e-5)
    assert cache.length == 50


def test_rows_of_any_length_share_a_batch(runner: OnnxRunner) -> None:
    """A padded prompt, one token each, a chunk each, and then a batch of the first two rows alone."""
    texts = [prompt(30, seed)[0] for seed in range(3)]
    whole = [runner.forward(text[None], last_only=False)[0] for text in texts]
    cache, at = runner.new_cache(3), np.zeros(3, int)
    for new in ([5, 1, 13], [1, 1, 1], [4, 9, 1], [1, 1, 1]):
        ids = np.zeros((3, max(new) + 2), np.int64)  # wider than the longest row
        for b, text in enumerate(texts):
            ids[b, : new[b]] = text[at[b] : at[b] + new[b]]
        last = runner.forward(ids, cache.rows(0, 3), new=np.array(new))
        at += new
        for b in range(3):
            np.testing.assert_allclose(last[b, 0], whole[b][at[b] - 1], atol=1e-5)
    two = runner.forward(np.array([[texts[0][at[0]]], [texts[1][at[1]]]]), cache.rows(0, 2))
    np.testing.assert_allclose(two[1, 0], whole[1][at[1]], atol=1e-5)
    assert cache.lengths.tolist() == [at[0] + 1, at[1] + 1, at[2]]


def test_a_row_can_be_prefilled_beside_others(runner: OnnxRunner) -> None:
    """What a scheduler does: a new prompt takes a free slot while its neighbours keep theirs."""
    cache = runner.new_cache(2)
    runner.forward(prompt(8), cache.rows(0, 1))
    expected = runner.forward(prompt(6, seed=1), None)
    found = runner.forward(prompt(6, seed=1), cache.rows(1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    step = runner.forward(np.array([[9], [10]]), cache)
    alone = runner.forward(np.concatenate([prompt(8), [[9]]], 1))
    np.testing.assert_allclose(step[:1], alone, atol=1e-5)


def test_a_single_padded_row_behind_a_past(runner: OnnxRunner) -> None:
    """S would equal T here, which GroupQueryAttention takes for a first prompt."""
    ids = prompt(8)
    cache = runner.new_cache()
    runner.forward(ids[:, :3], cache)
    padded = np.concatenate([ids[:, 3:], np.zeros((1, 3), np.int64)], 1)
    found = runner.forward(padded, cache, new=np.array([5]))
    np.testing.assert_allclose(found, runner.forward(ids), atol=1e-5)


def test_what_does_not_fit_is_refused_before_it_runs(runner: OnnxRunner) -> None:
    cache = runner.new_cache(max_length=10)
    runner.forward(prompt(8), cache)
    with pytest.raises(ValueError, match=r"8 \+ 3 positions do not fit in 10"):
        runner.forward(prompt(3), cache)
    with pytest.raises(ValueError, match="do not fit in 160"):
        runner.forward(prompt(161))
    for wrong in (-1, 300):
        with pytest.raises(ValueError, match=r"outside 0 \.\. 299"):
            runner.forward(np.array([[1, wrong]]))
    for ids, new in (
        (prompt(0), None),
        (np.array([[1], [2]]), None),
        (prompt(3), np.array([4])),
        (prompt(3), np.array([0])),
    ):
        with pytest.raises(ValueError, match="do not go with a cache"):
            runner.forward(ids, runner.new_cache(), new=new)
    assert cache.length == 8
    runner.forward(prompt(2), cache)  # what was there goes on


def test_cuda_that_is_not_there_is_an_error(exported: Path) -> None:
    import onnxruntime as ort

    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(UnavailableError, match="gets no CUDA") as caught:
        OnnxRunner(exported, Device("cuda", "test", 1, frozenset()))
    assert caught.value.exit_code == 6
    assert ort.__version__ in caught.value.message


def test_no_warning_is_printed(exported: Path) -> None:
    """Neither about CUDA on a machine without a GPU nor about inputs with a default."""
    program = (
        "import sys, numpy as np; from pathlib import Path; from llmctl.device import pick;"
        "from llmctl.inference.onnx_runner import OnnxRunner;"
        "OnnxRunner(Path(sys.argv[1]), pick('cpu')).forward(np.array([[1, 2, 3]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(exported)], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


# ------------------------------------------------------------------------------------------------- hostile folders


def outside(folder: Path, location: str) -> None:
    point(folder, "location", location)


def point(folder: Path, key: str, value: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    next(item for item in tensor.external_data if item.key == key).value = value
    onnx.save(model, folder / "model.onnx")


def hide(folder: Path, inside: str) -> None:
    """A constant inside a branch or a function of the graph, whose bytes lie elsewhere."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = onnx.TensorProto(name="secret", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["secret"], value=tensor)
    if inside == "branch":
        branch = onnx.helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["one"], ["out"], then_branch=branch, else_branch=branch))
    else:
        model.functions.append(onnx.helper.make_function("own", "secret", [], ["secret"], [constant], []))
    onnx.save(model, folder / "model.onnx")


def link(folder: Path, make: Callable[[Path, Path], object]) -> None:
    secret = folder.parent / "secret"
    (folder / "model.onnx.data").rename(secret)
    make(secret, folder / "model.onnx.data")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: outside(folder, "../secret"), r"'\.\./secret', which is no file beside the graph"),
        (lambda folder: outside(folder, str(folder.parent / "secret")), "which is no file beside"),
        (lambda folder: outside(folder, "sub/../../secret"), "which is no file beside"),
        (lambda folder: outside(folder, ""), "which is no file beside"),
        (lambda folder: hide(folder, "branch"), "which is no file beside"),
        (lambda folder: hide(folder, "function"), "which is no file beside"),
        (lambda folder: link(folder, lambda a, b: b.symlink_to(a)), "which is no file beside"),
        (lambda folder: link(folder, lambda a, b: os.link(a, b)), "hard links"),
        (lambda folder: point(folder, "offset", "99999999"), "past the end"),
        (lambda folder: point(folder, "offset", "-4096"), "past the end"),
        (lambda folder: point(folder, "length", "many"), "past the end"),
        (lambda folder: (folder / "model.onnx.data").unlink(), "which is no file beside"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"not a graph"), "is no ONNX model"),
        (lambda folder: (folder / "model.onnx").unlink(), "is no ONNX model"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
    ids=[
        *(
            "..",
            "absolute",
            "inner ..",
            "empty",
            "in a branch",
            "in a function",
            "symlink",
            "hard link",
            "offset",
            "negative",
        ),
        *("no number", "no data", "no ONNX", "no graph", "no config"),
    ],
)
def test_a_hostile_or_damaged_folder_is_refused(
    damage: Callable[[Path], object], message: str, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported, folder)
    shutil.copyfile(exported / "model.onnx.data", tmp_path / "secret")
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        OnnxRunner(folder, CPU)
    assert str(folder) in str(caught.value)
