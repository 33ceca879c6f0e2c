"""Pruning: what goes is what matters least, what is left computes what it did, and zeros stay zero."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmctl.errors import RecipeError
from llmctl.finetune import prune
from llmctl.finetune.batches import Example
from llmctl.finetune.prune import Kept
from llmctl.model import hf
from llmctl.model.transformer import Decoder
from llmctl.recipe import FinetuneSection
from tests.parity.families import DECODERS, VOCAB
from tests.project import Project
from tests.shapes import LLAMA, SHAPES

IDS = torch.randint(5, 97, (2, 40), generator=torch.Generator().manual_seed(5))
EXAMPLES = [Example(row.tolist(), (True,) * 40) for row in IDS]
ALL = {"prune_layers": 1, "prune_heads": 1, "prune_mlp": 0.5}


def section(**keys: Any) -> FinetuneSection:
    return FinetuneSection.model_validate({"sources": ["chats.jsonl"], **keys})


def decoder(name: str = "llama", seed: int = 1, **more: Any) -> Decoder:
    """A random model whose layers matter differently."""
    model = Decoder.random(dataclasses.replace(SHAPES[name], **more), seed)
    with torch.no_grad():
        for matrix in prune.matrices(model).values():
            matrix.weight.mul_(4.0)
            if matrix.bias is not None:
                matrix.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return model.eval()


def logits(model: Decoder, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(ids)
        return found


# ------------------------------------------------------------------------------------------------------------ structure


def silenced(model: Decoder, kept: dict[int, Kept]) -> Tensor:
    """Logits of the whole model with what went zeroed: columns of heads and channels; of layers all that they add."""
    with torch.no_grad():
        for layer, block in enumerate(model.model.blocks):
            for matrix, part in ((block.self_attn.o_proj, "query"), (block.mlp.down_proj, "channels")):
                stays = torch.zeros(matrix.in_features)
                if layer in kept:
                    stays[getattr(kept[layer], part)] = 1.0
                elif matrix.bias is not None:
                    matrix.bias.zero_()
                matrix.weight.mul_(stays)
    return logits(model)


@pytest.mark.parametrize("name", [name for name, config in SHAPES.items() if config.num_key_value_heads > 1])
def test_a_smaller_model_is_the_whole_one_without_what_went(name: str) -> None:
    """Exact but for the order of sums: 1e-5, in logits of the order of one."""
    model = decoder(name)
    small, told = prune.pruned(model, section(prune="structured", **ALL), EXAMPLES, 0)
    measured = prune.measure(model, prune.sample(EXAMPLES, 0))
    layers = sorted(range(3), key=lambda layer: -measured.influence[layer])[: small.config.num_hidden_layers]
    kept = {layer: prune._kept(model, layer, small.config, measured) for layer in layers}
    assert "go" in told
    assert small.config == prune.shape(model.config, section(prune="structured", **ALL))
    torch.testing.assert_close(logits(small), silenced(model, kept), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [{"prune_layers": 1}, {"prune_heads": 1}, {"prune_mlp": 0.5}, ALL])
@pytest.mark.parametrize("name", ["llama, biases, untied", "mistral", "qwen2, sliding", "qwen3", "gemma3", "gemma2"])
def test_transformers_loads_it_with_equal_logits(tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    import transformers

    architecture, stated = DECODERS[name]
    torch.manual_seed(0)
    whole: Any = getattr(transformers, architecture)(getattr(transformers, architecture).config_class(**stated))
    whole.save_pretrained(tmp_path / "whole")
    model = hf.load(tmp_path / "whole")
    assert isinstance(model, Decoder)
    ids = IDS % (VOCAB - 5) + 5
    small, _ = prune.pruned(model, section(prune="structured", **keys), [Example(ids[0].tolist(), ())], 0)
    folder = tmp_path / "small"
    folder.mkdir()
    hf.save(small, tmp_path / "whole", folder)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        torch.testing.assert_close(logits(small, ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    ours = hf.load(folder)
    assert ours.config == small.config
    assert sum(p.numel() for p in theirs.parameters()) < sum(p.numel() for p in whole.parameters())


def test_the_layer_that_changes_least_goes() -> None:
    model = decoder()
    with torch.no_grad():
        found = prune.matrices(model)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[f"model.layers.1.{name}"].weight.mul_(1e-4)
    small, told = prune.pruned(model, section(prune="structured", prune_layers=1), EXAMPLES, 0)
    assert "layers 2 (0.000) of 3 go" in told
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-2)


def test_the_heads_and_channels_that_add_least_go() -> None:
    model = decoder()
    with torch.no_grad():
        for block in model.model.blocks:
            block.self_attn.o_proj.weight[:, 12:24] *= 1e-4  # the second head
            block.mlp.down_proj.weight[:, ::2] *= 1e-4  # 40 of 80 channels
    keys = {"prune_heads": 1, "prune_mlp": 0.2}
    small, told = prune.pruned(model, section(prune="structured", **keys), EXAMPLES, 0)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (3, 3)
    assert small.config.intermediate_size == 64
    assert told == "3 of 4 heads stay · 64 of 80 MLP channels stay"
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"prune_layers": 3}, "prune_layers = 3, and the model has 3"),
        ({"prune_heads": 4}, "prune_heads = 4, and the model has 4"),
        ({"prune_mlp": 0.01}, "takes none of 96 channels"),
    ],
)
def test_more_than_there_is_cannot_go(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as found:
        prune.pruned(decoder(intermediate_size=96), section(prune="structured", **keys), EXAMPLES, 0)
    assert found.value.hint


def test_heads_that_share_the_width_out_cannot_go() -> None:
    config = dataclasses.replace(LLAMA, family="gpt2")
    with pytest.raises(RecipeError, match="share its width out"):
        prune.shape(config, section(prune="structured", prune_heads=1))


# ---------------------------------------------------------------------------------------------------------------- zeros


def zeros(model: Decoder) -> dict[str, float]:
    return {name: float((m.weight == 0).float().mean()) for name, m in prune.matrices(model).items()}


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, "2:4"])
def test_the_share_that_is_asked_for_is_zero(method: str, sparsity: Any) -> None:
    model, _ = prune.pruned(decoder(), section(prune=method, sparsity=sparsity), EXAMPLES, 0)
    wanted = 0.5 if sparsity == "2:4" else sparsity
    assert all(share == pytest.approx(wanted, abs=1e-3) for share in zeros(model).values())
    assert int((model.model.embed_tokens.weight == 0).sum()) == 0
    if sparsity == "2:4":
        for matrix in prune.matrices(model).values():
            assert ((matrix.weight.view(-1, 4) == 0).sum(1) == 2).all()


def test_magnitude_takes_the_smallest_of_a_matrix() -> None:
    model = decoder()
    before = {name: m.weight.detach().clone() for name, m in prune.matrices(model).items()}
    prune.pruned(model, section(prune="magnitude", sparsity=0.3), EXAMPLES, 0)
    for name, matrix in prune.matrices(model).items():
        gone = matrix.weight == 0
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
        assert torch.equal(matrix.weight[~gone], before[name][~gone])


def test_wanda_is_nearer_than_magnitude_where_inputs_differ_in_size() -> None:
    """Norms with uneven gains, as trained models have: what is multiplied with large inputs matters more."""
    errors = {}
    for method in ("magnitude", "wanda"):
        model = decoder()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for block in model.model.blocks:
                for norm in (block.input_layernorm, block.post_attention_layernorm):
                    norm.get_parameter("weight").copy_(torch.randn(48, generator=generator).exp() ** 2)
        whole = logits(model)
        prune.pruned(model, section(prune=method), EXAMPLES, 0)
        errors[method] = float((logits(model) - whole).square().mean())
    assert errors["wanda"] < 0.7 * errors["magnitude"], errors


def test_inputs_are_measured_as_they_are() -> None:
    """Against the inputs that a hook records, batch and all."""
    model = decoder()
    seen: list[Tensor] = []
    matrix = prune.matrices(model)["model.layers.2.mlp.down_proj"]
    handle = matrix.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    found = prune.measure(model, EXAMPLES).inputs["model.layers.2.mlp.down_proj"]
    torch.testing.assert_close(found, seen[0].flatten(0, 1).square().mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_zeros_stay_zero(kind: Any) -> None:
    """Exactly, whatever the optimiser's momentum and Muon's orthogonalisation make of them."""
    from llmctl.training import optim
    from llmctl.training.objectives import Learner

    model, _ = prune.pruned(decoder(), section(prune="wanda"), EXAMPLES, 0)
    held = {name: m.weight == 0 for name, m in prune.matrices(model).items()}
    before = {name: m.weight.detach().clone() for name, m in prune.matrices(model).items()}
    optimizers = optim.build(model, kind, 1e-2, dtype="fp32")
    optim.hold_zeros(model, optimizers)
    learner = Learner(model)
    for _ in range(3):
        (learner(IDS[:, :-1], IDS[:, 1:]) / IDS.numel()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, matrix in prune.matrices(model).items():
        assert torch.equal(matrix.weight == 0, held[name])
        assert not torch.equal(matrix.weight, before[name])


def test_two_of_four_needs_a_multiple_of_four() -> None:
    with pytest.raises(RecipeError, match="no multiple of 4"):
        prune.pruned(decoder(intermediate_size=81), section(prune="magnitude", sparsity="2:4"), EXAMPLES, 0)


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"prune": "wanda", "method": "lora"}, 'method = "full"'),
        ({"prune": "structured"}, "prune_layers or prune_heads or prune_mlp"),
        ({"prune": "wanda", "prune_layers": 1}, 'prune_layers is of prune = "structured"'),
        ({"sparsity": 0.5}, 'sparsity is of prune = "magnitude" or "wanda"'),
        ({"prune": "structured", "prune_mlp": 0.5, "sparsity": 0.5}, "sparsity is of"),
        ({"prune": "wanda", "sparsity": "1:4"}, "2:4"),
        ({"teacher": "hf:org/name"}, "llmctl import hf:org/name"),
        ({"sources": []}, "names no source"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        section(**keys)


# ------------------------------------------------------------------------------------------------- the command line

STRUCTURED = (
    "--set",
    "finetune.prune=structured",
    "--set",
    "finetune.prune_heads=1",
    "--set",
    "finetune.prune_mlp=0.4",
)


def test_a_pruned_model_is_published_with_its_table(based: Project) -> None:
    done = based.llmctl("finetune", "t.toml", *STRUCTURED)
    assert done.code == 0, done.out + done.err
    assert "taught by base" in done.out
    before, pruned, after = based.manifest("finetune")["metrics"]["compression"]
    assert [before["name"], pruned["name"], after["name"]] == ["before", "pruned", "after"]
    assert after["parameters"] == pruned["parameters"] < before["parameters"]
    assert after["decode_tokens_per_second"] > 0 < before["prefill_tokens_per_second"]
    assert after["answer_bits_per_byte"] < pruned["answer_bits_per_byte"]
    config = json.loads((based.run / "finetune" / "config.json").read_text())
    parent = json.loads((based.run / "pretrain" / "config.json").read_text())
    assert config["num_key_value_heads"] == parent["num_key_value_heads"] - 1
    assert config["head_dim"] == parent["head_dim"]
    assert based.llmctl("eval", "t.toml", *STRUCTURED).code == 0
    assert based.llmctl("report", "t.toml").code == 0
    assert "<dt>pruning</dt><dd>structured</dd>" in (based.run / "report.html").read_text()
    plan = based.llmctl("plan", "t.toml", *STRUCTURED, "--json").json["plan"]["finetune"]
    assert plan["parameters"] == after["parameters"]
    assert plan["memory_by_part"]["teacher"] > 4 * before["parameters"]


@pytest.mark.parametrize("keys", [STRUCTURED, ("--set", "finetune.prune=wanda", "--set", "finetune.optimizer=muon")])
def test_a_pruned_finetune_resumes_bitwise(based: Project, keys: tuple[str, ...]) -> None:
    """Killed behind its second checkpoint; and what is pruned is not pruned again."""
    assert based.llmctl("finetune", "t.toml", *keys).code == 0
    whole = based.weights("finetune")
    shutil.rmtree(based.run / "finetune")
    stop = (
        "import os, llmctl.training.checkpoint as c; write = c.write\n"
        "c.write = lambda w, state, *a: (write(w, state, *a), os.kill(os.getpid(), 9) if state['step'] == 4 else 0)"
    )
    assert based.llmctl("finetune", "t.toml", *keys, before=stop).code == -9
    once = "import llmctl.finetune.prune as p; p.pruned = None"
    done = based.llmctl("finetune", "t.toml", *keys, before=once)
    assert done.code == 0, done.out + done.err
    assert "resuming at step 4 of 6" in done.out
    assert based.weights("finetune") == whole


def test_plain_text_heals_a_base_model(based: Project) -> None:
    """Without conversations there is neither template nor end of turn: a base model stays one."""
    based.edit('[finetune]\nsources = ["chats.jsonl"]', '[finetune]\ntext = ["text"]\nprune = "wanda"')
    done = based.llmctl("finetune", "t.toml")
    assert done.code == 0, done.out + done.err
    assert not (based.run / "finetune" / "chat_template.jinja").exists()
    metrics = based.manifest("finetune")["metrics"]
    rows = metrics["compression"]
    assert metrics["val_bits_per_byte"] == rows[2]["val_bits_per_byte"] < rows[1]["val_bits_per_byte"]
    assert metrics["val_bits_per_byte_before"] == rows[0]["val_bits_per_byte"]
    assert "windows of text, 100 % of tokens supervised" in done.out
    from safetensors.torch import load_file

    weights = load_file(based.run / "finetune" / "model.safetensors")
    for name, tensor in weights.items():
        if ".layers." in name and tensor.dim() == 2:
            assert (tensor == 0).float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_heal_one_pruned_model(based: Project, strategy: str) -> None:
    """Rank 0 prunes, both train what it wrote; shards hold their zeros as whole weights do."""
    from safetensors.torch import load_file

    keys = ("--set", "finetune.prune=wanda", "--set", f"finetune.strategy={strategy}")
    done = based.llmctl("finetune", "t.toml", *keys, "--nproc", "2")
    assert done.code == 0, done.out + done.err
    together = load_file(based.run / "finetune" / "model.safetensors")
    assert based.llmctl("finetune", "t.toml", *keys, "--rebuild").code == 0
    alone = load_file(based.run / "finetune" / "model.safetensors")
    for name, tensor in alone.items():
        if ".layers." in name and tensor.dim() == 2:
            assert torch.equal(together[name] == 0, tensor == 0)
            assert (tensor == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
