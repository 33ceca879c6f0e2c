"""What `llmctl bench decode` measures: every variant of a model in one table, and what a step of decoding reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmctl import device
from llmctl.bench import decode, traffic, worker
from llmctl.bench.worker import Subject
from llmctl.device import Device
from llmctl.export import graph, seq2seq_graph
from llmctl.inference.onnx_seq2seq import DECODER
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.families import FAMILIES
from llmctl.text import tokenizer as tokenizers
from tests.project import Project

HERE = Device("cpu", "here", 1, frozenset())
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "t5": {"kind": "encoder-decoder", "num_decoder_layers": 2, "task": "seq2seq-lm", "decoder_start_token_id": 3},
    "lstm": {"kind": "recurrent"},
    "bert": {"kind": "encoder", "task": "embedding"},
}


def saved(folder: Path, family: str, **changes: Any) -> Config:
    """A tiny model with a context of 40."""
    tokenizer = tokenizers.train([], type="byte")
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    more = {"num_key_value_heads": 4, "max_position_embeddings": 40, **ids, **KINDS[family], **changes}
    config = Config(family, **{**FAMILIES[family].switches, **SIZES, **more})
    folder.mkdir(parents=True)
    hf.save(hf.random(config, 0), tokenizer, folder)
    return config


def test_one_table_of_every_variant(finished: Project) -> None:
    """A run with an export that is whole, one that is damaged, one that does not load, and one for llama.cpp."""
    exports = finished.path / "runs" / "t" / "export" / "finetune"
    whole = exports / "onnx-ort"
    for name, broken in (("onnx-ort-fp16", b"too short"), ("onnx-ort-int4", None), ("gguf-f16", b"")):
        copy = exports / name
        copy.mkdir()
        for file in whole.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        if broken is not None:
            (copy / "model.onnx").write_bytes(broken)
        else:  # of the length that the manifest gives
            (copy / "model.onnx").write_bytes(bytes((copy / "model.onnx").stat().st_size))
    done = finished.llmctl("bench", "decode", "runs/t", "--json", "--device", "cpu", before=FAST)
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in done.json["variants"]}
    assert done.json["metrics"]["variants"] == done.json["variants"]
    assert next(iter(rows)) == "torch-fp32"
    assert {"onnx-ort", "onnx-ort-fp16", "onnx-ort-int4", "gguf-f16"} <= set(rows)
    for name in ("torch-fp32", "onnx-ort"):
        row = rows[name]
        assert row["error"] is None
        assert row["decode_tokens_per_second"] == row["batch_tokens_per_second"]["1"] > 0
        assert set(row["batch_tokens_per_second"]) == {"1", "2"}
        assert min(row["prefill_tokens_per_second"], row["time_to_first_token_seconds"], row["load_seconds"]) > 0
        assert 0 < row["choosing_share"] < 1
        assert row["peak_memory_bytes"] > row["model_memory_bytes"] > 0
        assert row["bandwidth_share"] > 0
    assert rows["torch-fp32"]["bits_per_weight"] == 32
    assert "no ONNX model" in rows["onnx-ort-int4"]["error"]
    assert "model.onnx has 9 bytes" in rows["onnx-ort-fp16"]["error"]
    assert rows["onnx-ort-fp16"]["decode_tokens_per_second"] is None
    assert "onnx-ort-int4: " in done.err  # the table is for people, and stdout is the document's
    assert "fastest: " in done.err


FAST = """
from llmctl import device
from llmctl.bench import decode
decode.ROUNDS, decode.WRITE, decode.SWEEP, decode.BATCHES = 1, 4, 2, (2,)
device.read_rate = lambda kind: 1e9
"""


def test_without_a_model(fresh: Project) -> None:
    done = fresh.llmctl("bench", "decode", "t.toml")
    assert done.code == 2
    assert "has no model yet" in done.err
    done = fresh.llmctl("bench", "decode", "nowhere")
    assert done.code == 2
    assert "no such recipe, run or artifact" in done.err


@pytest.mark.parametrize("family", KINDS)
def test_a_worker_reads_and_writes(family: str, tmp_path: Path) -> None:
    config = saved(tmp_path / "m", family)
    subject = Subject(tmp_path / "m", "torch", "fp32", HERE)
    lengths = decode._lengths(config)
    assert lengths["prompt"] + lengths["write"] <= config.longest
    for name, request in decode._requests(config, lengths).items():
        _, found = worker.answer(subject, dict(request), lambda: pytest.fail("loads twice"))
        assert 0 < found["seconds"] < 60
        if name != "read" and config.kind != "encoder":
            assert found["tokens"] == int(name) * request["tokens"]
            assert 0 <= found["choosing"] < found["seconds"]


def test_a_slow_variant_is_cut_short(tmp_path: Path) -> None:
    saved(tmp_path / "m", "llama")
    subject = Subject(tmp_path / "m", "torch", "fp32", HERE)
    assert subject.write(prompt=4, tokens=20, batch=2, seconds=0.0)["tokens"] == 2


def test_a_process_that_dies_is_a_row(tmp_path: Path) -> None:
    saved(tmp_path / "m", "llama")
    workers: list[decode.Worker] = []
    with decode._workers([decode.Variant("torch-fp32", tmp_path / "m")], HERE, workers):
        workers[0].process.kill()
        workers[0].ask("load", do="load")
        workers[0].ask("read", do="read", tokens=4)
    assert "killed" in workers[0].error
    assert not any(workers[0].answers.values())


def test_what_a_step_reads(tmp_path: Path) -> None:
    """Counted by hand: every weight but a table that single rows are read of, and the cache."""
    tied = saved(tmp_path / "tied", "llama")
    V, C, F, L, kv = tied.vocab_size, 32, 48, 2, 16
    block = 2 * C * C + 2 * C * kv + 3 * C * F + 2 * C
    cache = L * 2 * kv * 10
    assert traffic.of_model(tied, "fp32", 10) == 4 * (L * block + C + V * C + cache)
    assert traffic.of_model(tied, "bf16", 10) == 2 * (L * block + C + V * C + cache)
    untied = saved(tmp_path / "untied", "llama", tie_word_embeddings=False)
    assert traffic.of_model(untied, "fp32", 10) == traffic.of_model(tied, "fp32", 10)

    seq2seq = saved(tmp_path / "t5", "t5")
    cross = 2 * C * C  # of its four products two are a prompt's
    self_ = 4 * C * C
    mlp = (3 if seq2seq.gated else 2) * C * F
    heads = seq2seq.relative_attention_num_buckets * 4
    head = seq2seq.vocab_size * C
    moved = traffic.of_model(seq2seq, "fp32", 10) / 4 - traffic.cache(seq2seq, 10)
    assert moved == pytest.approx(L * (cross + self_ + mlp + 3 * C) + C + heads + head)


def test_what_a_graph_reads(tmp_path: Path) -> None:
    """As much as torch in fp32, but for angles and small constants."""
    for name, tie in (("tied", True), ("untied", False)):
        config = saved(tmp_path / name, "llama", tie_word_embeddings=tie)
        (tmp_path / f"{name}-onnx").mkdir()
        graph.write(tmp_path / name, tmp_path / f"{name}-onnx", config, {})
        found = traffic.of_graph(tmp_path / f"{name}-onnx" / "model.onnx", config, 10)
        expected = traffic.of_model(config, "fp32", 10)
        assert expected <= found <= 1.02 * expected
    sliding = saved(tmp_path / "s", "llama", sliding_window=4, layer_types=("sliding_attention", "full_attention"))
    assert traffic.cache(sliding, 10) == 2 * 16 * (4 + 10)


def test_what_an_encoder_read_is_cached(tmp_path: Path) -> None:
    """Cross-attention's products of the source belong to the first step alone."""
    config = saved(tmp_path / "t5", "t5")
    (tmp_path / "onnx").mkdir()
    seq2seq_graph.write(tmp_path / "t5", tmp_path / "onnx", config, {})
    found = traffic.of_graph(tmp_path / "onnx" / DECODER, config, 10)
    assert found == pytest.approx(traffic.of_model(config, "fp32", 10), rel=0.02)


def test_an_encoder_has_no_first_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = saved(tmp_path / "m", "bert")
    row = decode._empty(decode.Variant("torch-fp32", tmp_path / "m"), config)
    known = {"load_seconds": 0.1, "peak_memory_bytes": 1e8, "model_memory_bytes": 1e6, "prefill_tokens_per_second": 9.0}
    rows = [{**row, **known, "batch_tokens_per_second": {"1": 1234.5}}]
    lengths = decode._lengths(config)
    decode.show({"variants": rows, "tokens": lengths, "rounds": 1, "memory_bandwidth_bytes_per_second": 2e9})
    said = capsys.readouterr().out
    assert "1,234" in said
    assert "batches of texts of 24" in said
    assert "None" not in said
    assert max(map(len, said.splitlines())) <= 100


def test_only_the_table_s_rows_are_read(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto
    table = onnx.numpy_helper.from_array(np.zeros((100, 4), np.float32), "table")
    matrix = onnx.numpy_helper.from_array(np.zeros((4, 8), np.float16), "matrix")
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"]), helper.make_node("MatMul", ["x", "matrix"], ["y"])]
    past = helper.make_tensor_value_info("past_key_values.0.key", kind.INT8, [1, 1, 1, 1])
    made = helper.make_model(helper.make_graph(nodes, "g", [past], [], [table, matrix]))
    onnx.save(made, str(tmp_path / "g.onnx"))
    shape: dict[str, Any] = {**SIZES, "vocab_size": 100, "num_key_value_heads": 2, "max_position_embeddings": 40}
    config = Config("llama", **shape)
    assert traffic.of_graph(tmp_path / "g.onnx", config, 10) == 2 * 32 + traffic.cache(config, 10)


def test_memory_is_read_at_a_plausible_rate() -> None:
    assert 1e8 < device.read_rate("cpu", seconds=0.01, size=2**22) < 1e13
