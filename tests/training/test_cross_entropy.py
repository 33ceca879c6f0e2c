"""The fused head and cross-entropy against torch's own, value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmctl.training import cross_entropy
from llmctl.training.batch import IGNORED
from llmctl.training.cross_entropy import linear_cross_entropy

N, C, V = 37, 16, 50


def drawn(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = IGNORED
    return x, weight, labels


@pytest.mark.parametrize("logits", [1 << 23, 5 * V, 1], ids=["one chunk", "eight chunks", "a row each"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_value_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch, logits: int, cap: float | None) -> None:
    """fp32, one part in a million. The loss is divided, as the step does."""
    monkeypatch.setattr(cross_entropy, "LOGITS", logits)
    x, weight, labels = drawn()
    plain = F.linear(x, weight)
    plain = plain if cap is None else cap * torch.tanh(plain / cap)
    theirs = F.cross_entropy(plain, labels, ignore_index=IGNORED, reduction="sum")
    (theirs / 7).backward()
    wanted = x.grad, weight.grad
    x.grad = weight.grad = None
    ours = linear_cross_entropy(x, weight, labels, cap=cap)
    (ours / 7).backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close((x.grad, weight.grad), wanted, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_is_as_far_from_fp32_as_torchs() -> None:
    x, weight, labels = drawn()
    exact = linear_cross_entropy(x, weight, labels).item()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, labels)
        theirs = F.cross_entropy(F.linear(x, weight).float(), labels, ignore_index=IGNORED, reduction="sum")
    assert ours.dtype == torch.float32
    assert abs(ours.item() - exact) <= abs(theirs.item() - exact) + 1e-3
    ours.backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_nothing_supervised_is_no_loss_and_no_gradient() -> None:
    x, weight, labels = drawn()
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert not x.grad.any()
    assert weight.grad is not None
    assert not weight.grad.any()
