"""A LoRA adapter that llmctl wrote is one that PEFT loads: the same logits on the same base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmctl.model import hf, lora
from llmctl.model.transformer import Decoder
from tests.shapes import SHAPES

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT 0.21 uses what transformers 5.23 renamed


@pytest.mark.parametrize("shape", ["llama untied, biased", "qwen3 grouped, wide heads, untied"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)], ids=str)
def test_peft_gives_the_same_logits(shape: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    config = SHAPES[shape]
    model = Decoder.random(config, 0)
    hf.save(model, tmp_path, tmp_path)
    lora.apply(model, r=4, alpha=8, targets=targets, seed=1)
    trained(model)
    lora.save_adapter(model, tmp_path / "adapter")

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(40).remainder(config.vocab_size)[None]
    with torch.no_grad():
        expected, found = theirs(ids).logits, model(ids)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (found - hf.load(tmp_path)(ids)).abs().max() > 0.1  # the adapter does something


def test_the_untrained_adapter_is_the_base_and_as_large_as_peft_makes_it(tmp_path: Path) -> None:
    model = Decoder.random(SHAPES["qwen3"], 0)
    hf.save(model, tmp_path, tmp_path)
    lora.apply(model, r=4, alpha=8, targets=("all-linear",), seed=1)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(base, settings))
    ours = lora.adapter_state(model)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


def trained(model: Decoder) -> None:
    """Stands for a training: B is no longer zero."""
    with torch.no_grad():
        for layer in lora.layers(model).values():
            layer.lora_B.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
