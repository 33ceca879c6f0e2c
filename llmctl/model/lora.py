"""LoRA (Hu et al. 2021, arXiv:2106.09685): training a low-rank change of some matrices, stored in PEFT's format.

    y = W x + (alpha / r) B A x        A (r, in) drawn at random, B (out, r) zero, so that training starts at the base
    model

`apply` swaps each target for a `LoraLinear` under the same name; the base weight keeps its name too, so that a state
dict holds the model's own names plus `...lora_A.weight` and `...lora_B.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llmctl.errors import RecipeError
from llmctl.model.families import FAMILIES
from llmctl.model.jsonfile import write_json
from llmctl.model.transformer import Decoder

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."  # what PEFT wraps the model in, and so begins every name with


class LoraLinear(nn.Linear):
    """A frozen linear layer and its trained change."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        with torch.device("meta"):  # the base's own tensors replace these
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, r, bias=False, **place)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, **place)
        self.r, self.alpha, self.scale = r, alpha, alpha / r

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        change: Tensor = self.lora_B(self.lora_A(x))
        return F.linear(x, self.weight, self.bias) + self.scale * change

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        change = self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        plain.weight = nn.Parameter((self.weight.float() + change).to(self.weight.dtype).detach())
        plain.bias = self.bias
        return plain


def apply(model: Decoder, r: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freezes the model and makes the `targets` of every block trainable through matrices of rank `r`.

    `targets` are names of `TARGETS`, or "all-linear" for all of them, as in PEFT. A is drawn as PEFT draws it.

    Raises:
        RecipeError: an unknown target, none at all, a rank below 1, or a family that PEFT adapts otherwise.
    """
    wanted = TARGETS if tuple(targets) == ("all-linear",) else tuple(targets)
    unknown = [name for name in wanted if name not in TARGETS]
    if unknown or not wanted:
        raise RecipeError(
            f"[finetune] lora_target_modules names {', '.join(unknown) or 'nothing'}",
            hint=f'choose from {", ".join(TARGETS)}, or ["all-linear"]',
        )
    if FAMILIES[model.config.family].names:
        raise RecipeError(
            f"[finetune] method = lora: {model.config.family} stores its projections under names of its own, some "
            "fused, which PEFT has no adapter for",
            hint='use method = "full"',
        )
    if r < 1:
        raise RecipeError(f"[finetune] lora_r = {r}, but it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name in wanted:
                base = getattr(parent, name, None)
                if base is None:
                    continue
                layer = LoraLinear(base, r, alpha)
                bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform with a = sqrt(5)
                drawn = torch.empty(layer.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
                with torch.no_grad():
                    layer.lora_A.weight.copy_(drawn)
                    layer.lora_B.weight.zero_()
                setattr(parent, name, layer)


def layers(model: Decoder) -> dict[str, LoraLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merge(model: Decoder) -> Decoder:
    """The model itself with each change added into its base weight, trainable again, and nothing of LoRA left."""
    for name, layer in layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.merged())
    model.requires_grad_(True)
    return model


def adapter_state(model: Decoder) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names, in fp32 on the CPU."""
    return {
        f"{PEFT_PREFIX}{name}.{part}.weight": getattr(layer, part).weight.detach().to("cpu", torch.float32).contiguous()
        for name, layer in layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def save_adapter(model: Decoder, folder: Path, base: str = "") -> None:
    """Writes adapter_config.json and adapter_model.safetensors; PEFT loads them onto `base`, the model trained from.

    Args:
        folder: made if missing.
        base: a path or name that tells people and PEFT's Auto classes which model the adapter goes on.
    """
    found = layers(model)
    first = next(iter(found.values()))
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.rpartition(".")[2] for name in found})
    write_json(
        folder / "adapter_config.json",
        {
            "base_model_name_or_path": base or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": first.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": first.r,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        },
    )
    save_file(adapter_state(model), folder / "adapter_model.safetensors", metadata={"format": "pt"})
