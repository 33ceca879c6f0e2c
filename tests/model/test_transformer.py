"""The decoder by itself: seeds, caches, dropout, compiling. Parity with transformers is in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llmctl.model import rotary, sublayers, trunk
from llmctl.model.config import FULL, SLIDING, Config
from llmctl.model.sublayers import MLP
from llmctl.model.transformer import Decoder, Encoder
from llmctl.model.trunk import TABLE
from tests.shapes import LLAMA, SHAPES


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, LLAMA.vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 1], [1, 7, 3, 1], [140, 150, 1]], ids=str)
def test_cached_equals_uncached(config: Config, pieces: list[int]) -> None:
    """However the tokens arrive: one by one, a prompt and steps, chunks behind a past; two rows at once."""
    model = Decoder.random(config, 1).eval()
    ids = ids_of(2, sum(pieces))
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(batch=2, max_length=sum(pieces))
        found = torch.cat([model(piece, cache) for piece in torch.split(ids, pieces, dim=1)], dim=1)
    assert cache.length == sum(pieces)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_the_kernel_equals_the_blockwise_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, and a CPU for long texts, is the same function: causal, with a window, padded, both ways."""
    shape, ids = SHAPES["qwen3 grouped, wide heads, untied"], ids_of(2, 300)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, 200:] = False
    window = replace(shape, sliding_window=40, layer_types=(SLIDING, FULL, SLIDING))
    encoder = replace(window, kind="encoder", task="embedding")
    models = [Decoder.random(shape, 1), Decoder.random(window, 1), Encoder.random(encoder, 1)]
    with torch.no_grad():
        for model in models:
            model.eval()
            blockwise = [model.hidden(ids), model.hidden(ids, mask=mask)[mask]]
            with monkeypatch.context() as patched:
                patched.setattr(sublayers, "BLOCKWISE", 0)
                patched.setattr(model.model, "future", model.model.future[:0])
                patched.setattr(sublayers, "blockwise", None)  # not called any more
                found = [model.hidden(ids), model.hidden(ids, mask=mask)[mask]]
            torch.testing.assert_close(found, blockwise, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # FlexAttention warns that it is not compiled here
def test_flex_attention_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs where windows or documents hide most pairs; here uncompiled, and forward only."""
    window = replace(
        SHAPES["qwen3 grouped, wide heads, untied"], sliding_window=9, layer_types=(SLIDING, FULL, SLIDING)
    )
    capped = replace(window, attn_logit_softcapping=2.0)
    encoder = replace(window, kind="encoder", task="embedding")
    ids, mask = ids_of(2, 50), torch.ones(2, 50, dtype=torch.bool)
    mask[1, 40:] = False
    documents = (torch.arange(50) // 20).expand(2, 50)
    for model in (Decoder.random(window, 1), Decoder.random(capped, 1), Encoder.random(encoder, 1)):
        model.eval()
        with torch.no_grad():
            dense = [model.hidden(ids, mask=mask)[mask], model.hidden(ids, documents=documents)]
            with monkeypatch.context() as patched:
                patched.setattr(trunk, "FLEX", {"cpu"})
                found = [model.hidden(ids, mask=mask)[mask], model.hidden(ids, documents=documents)]
        torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)


def test_a_window_hides_what_lies_before_it() -> None:
    """With one layer, a token's state depends on the last W tokens alone; with a cache as without."""
    config = replace(LLAMA, num_hidden_layers=1, sliding_window=5, layer_types=(SLIDING,))
    model, ids = Decoder.random(config, 1).eval(), ids_of(1, 30)
    changed = ids.clone()
    changed[:, :20] = 7
    with torch.no_grad():
        cache = model.new_cache(1, 40)
        stepped = torch.cat([model(ids[:, :9], cache), *(model(ids[:, i : i + 1], cache) for i in range(9, 30))], 1)
        torch.testing.assert_close(stepped, model(ids), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(changed)[:, 24:], model(ids)[:, 24:], atol=1e-5, rtol=1e-5)
        assert (model(changed)[:, 23] - model(ids)[:, 23]).abs().max() > 1e-3


def test_without_positions_order_does_not_matter() -> None:
    config = replace(LLAMA, positions="none", kind="encoder", task="embedding")
    model, ids = Encoder.random(config, 1).eval(), ids_of(1, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids[:, order]), model.hidden(ids)[:, order], atol=1e-5, rtol=1e-5)


def test_relu2_is_the_square_of_relu() -> None:
    mlp = MLP(replace(LLAMA, hidden_act="relu2", gated=False))
    x = torch.randn(2, 3, LLAMA.hidden_size)
    expected = (x @ mlp.up_proj.weight.T).clamp(min=0) ** 2 @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_rotations_beyond_the_table_are_computed_when_they_come() -> None:
    """The table of rotations ends at `TABLE` positions; beyond it the angles are the same."""
    short = Decoder.random(replace(LLAMA, max_position_embeddings=TABLE + 64), 1).eval()
    ids = ids_of(1, 9)
    with torch.no_grad():
        at = torch.arange(TABLE + 2, TABLE + 11)
        beyond = short.model.ropes(TABLE + 2, 9, None)[FULL]
        cos, sin = rotary.table(short.config, TABLE + 64)
        assert torch.equal(beyond.cos[:, 0], cos[at])
        assert torch.equal(beyond.sin[:, 0], sin[at])
        assert short(ids).isfinite().all()


def test_last_only_is_the_last_row() -> None:
    model, ids = Decoder.random(LLAMA, 1).eval(), ids_of(3, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


def test_positions_move_the_rotation() -> None:
    """Attention sees distances only: a text moved by 50 positions reads the same; a gap in it does not."""
    model, ids = Decoder.random(LLAMA, 1).eval(), ids_of(1, 9)
    with torch.no_grad():
        here, moved = model(ids), model(ids, positions=torch.arange(50, 59))
        gap = model(ids, positions=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 70, 80]]))
    torch.testing.assert_close(moved, here, atol=1e-5, rtol=1e-5)
    assert (gap - here).abs().max() > 1e-3


def test_nothing_depends_on_what_follows() -> None:
    model, ids = Decoder.random(LLAMA, 1).eval(), ids_of(1, 200)
    changed = ids.clone()
    changed[:, 130:] = 5
    with torch.no_grad():
        torch.testing.assert_close(model(changed)[:, :130], model(ids)[:, :130], atol=1e-6, rtol=0)


def test_more_positions_than_fit_are_refused() -> None:
    model = Decoder.random(LLAMA, 1)
    with pytest.raises(ValueError, match=r"0 \+ 321 positions do not fit in 320"):
        model(ids_of(1, 321))
    cache = model.new_cache(max_length=8)
    model(ids_of(1, 6), cache)
    with pytest.raises(ValueError, match=r"6 \+ 3 positions do not fit in 8"):
        model(ids_of(1, 3), cache)


def test_the_seed_draws_the_weights() -> None:
    """Whatever else is drawn in the process; and the outputs into the residual stream start smaller."""
    one = Decoder.random(LLAMA, 1).state_dict()
    torch.randn(10)
    again, other = Decoder.random(LLAMA, 1).state_dict(), Decoder.random(LLAMA, 2).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert one["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert one["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert one["model.norm.weight"].eq(1).all()


def test_dropout_only_in_training() -> None:
    model, ids = Decoder.random(replace(LLAMA, dropout=0.5), 1), ids_of(1, 9)
    with torch.no_grad():
        assert not torch.equal(model.train()(ids), model.train()(ids))
        assert torch.equal(model.eval()(ids), model.eval()(ids))
        torch.testing.assert_close(model(ids), Decoder.random(LLAMA, 1).eval()(ids))


def test_a_training_step_is_bitwise_repeatable() -> None:
    def gradients() -> list[torch.Tensor | None]:
        model = Decoder.random(LLAMA, 1).train()
        model(ids_of(4, 150)).logsumexp(-1).sum().backward()
        return [weight.grad for weight in model.parameters()]

    assert all(
        a is not None and b is not None and torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole_without_a_graph_break(dtype: torch.dtype) -> None:
    """`fullgraph` raises at a break. The backend only traces: no C++ compiler is needed."""
    model = Decoder.random(SHAPES["qwen3 grouped, wide heads, untied"], 1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = ids_of(2, 150)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        expected, found = model(ids), compiled(ids)
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=1e-5)
    F.cross_entropy(found.flatten(0, 1), ids.flatten()).backward()  # type: ignore[no-untyped-call]
