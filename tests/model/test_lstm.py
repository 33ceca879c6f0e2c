"""The recurrent baseline by itself: the equations, caches, seeds, dropout, its shape and its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.families.stated import config_from_json
from llmctl.model.jsonfile import read_json, write_json
from llmctl.model.lstm import LSTM
from llmctl.recipe import ModelSection
from llmctl.text import tokenizer as tokenizers
from llmctl.training import objectives, optim


def shape(**changes: object) -> Config:
    asked = {"family": "lstm", "num_hidden_layers": 3, "hidden_size": 24, "max_seq_length": 320, **changes}
    return shapes.derive(ModelSection.model_validate(asked), 97)[0]


def loud(**changes: object) -> LSTM:
    """Weights whose gates open and shut and whose logits spread."""
    model = LSTM.random(shape(**changes), 1).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(1.0 if "embed_tokens" in name else 4.0)
    return model


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def equations(model: LSTM, ids: Tensor) -> Tensor:
    """Hochreiter and Schmidhuber 1997 with forget gates, one token at a time, from torch's names alone: logits."""
    weights, c = dict(model.named_parameters()), model.config
    embedding = weights["model.embed_tokens.weight"]
    states = [(torch.zeros(len(ids), c.hidden_size), torch.zeros(len(ids), c.hidden_size))] * c.num_hidden_layers
    rows = []
    for t in range(ids.shape[1]):
        x = embedding[ids[:, t]]
        for layer, (h, memory) in enumerate(states):
            w_in, w_state, b_in, b_state = (
                weights[f"model.lstm.{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            i, f, g, o = (x @ w_in.T + b_in + h @ w_state.T + b_state).chunk(4, dim=1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            x = o.sigmoid() * memory.tanh()
            states[layer] = (x, memory)
        rows.append(x @ weights.get("lm_head.weight", embedding).T)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_are_those_of_the_equations(tied: bool) -> None:
    model, ids = loud(tie_word_embeddings=tied), ids_of(3, 11)
    names = [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in names) is not tied
    found, expected = model(ids), equations(model, ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (
        torch.autograd.grad(logits.square().mean(), list(model.parameters())) for logits in (found, expected)
    )
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 1], [1, 7, 3, 1], [140, 150, 1]], ids=str)
def test_cached_equals_uncached(pieces: list[int]) -> None:
    """However the tokens arrive, one at a time (which takes another kernel) or many; two rows at once."""
    model, ids = loud(), ids_of(2, sum(pieces))
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(batch=2, max_length=sum(pieces))
        found = torch.cat([model(piece, cache) for piece in torch.split(ids, pieces, dim=1)], dim=1)
    assert cache.length == sum(pieces)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_bf16_is_cached_too() -> None:
    model, ids = loud().to(torch.bfloat16), ids_of(1, 9)
    with torch.no_grad():
        whole, cache = model(ids), model.new_cache()
        found = torch.cat([model(piece, cache) for piece in torch.split(ids, [6, 1, 2], dim=1)], dim=1)
    torch.testing.assert_close(found, whole, atol=2e-2, rtol=2e-2)


def test_a_text_begins_with_zeros_whatever_was_read_before() -> None:
    model, ids = loud(), ids_of(1, 9)
    with torch.no_grad():
        before = model(ids)
        model(ids_of(1, 30), model.new_cache())
        assert torch.equal(model(ids), before)
        torch.testing.assert_close(model(ids, model.new_cache()), before)


def test_the_state_goes_on_past_the_end_of_a_document() -> None:
    """Nothing resets it between packed documents: what stood before </s> and <s> still shows after them."""
    model, ids = loud(), ids_of(1, 12)
    ids[0, 5], ids[0, 6] = 2, 1
    other = ids.clone()
    other[0, :5] = 7
    with torch.no_grad():
        assert (model(ids)[:, 6:] - model(other)[:, 6:]).abs().max() > 1e-4


def test_nothing_depends_on_what_follows() -> None:
    model, ids = loud(), ids_of(1, 40)
    changed = ids.clone()
    changed[:, 30:] = 5
    with torch.no_grad():
        assert torch.equal(model(changed)[:, :30], model(ids)[:, :30])
        torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


def test_more_positions_than_fit_are_refused() -> None:
    model = LSTM.random(shape(), 1)
    with pytest.raises(ValueError, match=r"0 \+ 321 positions do not fit in 320"):
        model(ids_of(1, 321))
    cache = model.new_cache(max_length=8)
    model(ids_of(1, 6), cache)
    with pytest.raises(ValueError, match=r"6 \+ 3 positions do not fit in 8"):
        model(ids_of(1, 3), cache)


def test_the_seed_draws_the_weights() -> None:
    one = LSTM.random(shape(), 1).state_dict()
    torch.rand(7)
    same, other = LSTM.random(shape(), 1).state_dict(), LSTM.random(shape(), 2).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert one["model.embed_tokens.weight"].std() == pytest.approx(1, abs=0.05)
    assert one["model.lstm.weight_hh_l0"].abs().max() == pytest.approx(24**-0.5, rel=0.01)


@pytest.mark.parametrize("layers", [1, 3])
def test_dropout_falls_in_training_alone(layers: int) -> None:
    model, ids = LSTM.random(shape(dropout=0.5, num_hidden_layers=layers), 1), ids_of(1, 9)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    without = LSTM(shape(num_hidden_layers=layers)).eval()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), without(ids))


@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_bitwise_repeatable(autocast: bool) -> None:
    """Dropout included, in fp32 and under bf16 autocast, in which torch's LSTM takes part."""

    def trained() -> dict[str, Tensor]:
        torch.manual_seed(5)
        model, ids = LSTM.random(shape(dropout=0.1), 1), ids_of(4, 33)
        optimizers = optim.build(model, "muon", 1e-2, 0.1)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = objectives.loss(model, ids[:, :-1], ids[:, 1:])
                assert model.hidden(ids).dtype is (torch.bfloat16 if autocast else torch.float32)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    one, two = trained(), trained()
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------------------------------------------- shape and folder


def test_depth_alone_gives_about_the_parameters_of_a_transformer() -> None:
    for depth, layers, width in ((2, 2, 160), (4, 4, 240), (8, 4, 672)):
        config, formulas = shapes.derive(ModelSection(family="lstm", depth=depth), 1000)
        assert (config.num_hidden_layers, config.hidden_size) == (layers, width)
        assert [line.split(" = ")[0] for line in formulas] == [f"num_hidden_layers {layers}", f"hidden_size {width}"]
        transformer = shapes.derive(ModelSection(family="qwen3", depth=depth), 1000)[0]
        ours, theirs = (shape.parameters - 1000 * shape.hidden_size for shape in (config, transformer))
        assert ours == layers * (8 * width**2 + 8 * width)
        assert ours == pytest.approx(theirs, rel=0.1)


def test_a_config_that_names_no_class_is_a_language_model() -> None:
    stated = {"model_type": "lstm", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
    assert config_from_json({**stated, "max_position_embeddings": 16}, Path("config.json")).task == "causal-lm"


def test_the_folder_has_torchs_names_and_comes_back(tmp_path: Path) -> None:
    tokenizer = tokenizers.train([], type="byte")
    config = replace(shape(dropout=0.1, tie_word_embeddings=False), vocab_size=len(tokenizer), eos_token_id=(6, 2))
    model = LSTM.random(config, 1)
    hf.save(model, tokenizer, tmp_path)
    stated = read_json(tmp_path / "config.json")
    assert (stated["model_type"], stated["architectures"]) == ("lstm", ["LSTMForCausalLM"])
    assert not {"num_attention_heads", "rope_theta", "intermediate_size", "rms_norm_eps"} & stated.keys()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {
            "model.embed_tokens.weight",
            "lm_head.weight",
            *(
                f"model.lstm.{kind}_{part}_l{i}"
                for kind in ("weight", "bias")
                for part in ("ih", "hh")
                for i in range(3)
            ),
        }
    assert hf.read_config(tmp_path) == config
    back = hf.load(tmp_path)
    assert isinstance(back, LSTM)
    assert not back.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in back.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(back(ids_of(1, 5)), model.eval()(ids_of(1, 5)))


def test_a_folder_of_another_shape_is_refused(tmp_path: Path) -> None:
    hf.save(LSTM.random(shape(), 1), tmp_path, tmp_path)
    stated = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**stated, "num_hidden_layers": 2})
    with pytest.raises(DataError, match=r"unexpected model\.lstm\.bias_hh_l2"):
        hf.load(tmp_path)
