"""A model made smaller before it learns: weights that become zero, or layers, heads and channels that go.

What matters is measured on the conversations and the text that are learned from: how large the inputs of each matrix
are, and how much each layer changes what passes through it. What pruned models lose, learning gives back in part,
the more so from the parent's own probabilities (`teacher.py`).
"""

# K key/value heads, G query heads that share one, D head size, in/out features of a matrix

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl import launch
from llmctl.artifact import Job, hash_file, write_json
from llmctl.errors import RecipeError
from llmctl.finetune import comparing
from llmctl.finetune.batches import Example
from llmctl.finetune.comparing import Row
from llmctl.finetune.lesson import Lesson
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.families import FAMILIES
from llmctl.model.hf import Causal
from llmctl.model.transformer import Decoder
from llmctl.recipe import FinetuneSection
from llmctl.training import distributed

MULTIPLE = 32  # of MLP channels: what blocks of quantised weights and products like
CALIBRATION = 32_768  # tokens that are read to measure


FOLDER, RECORD = "pruned", "pruned.json"  # beside the checkpoints


def begin(job: Job, section: FinetuneSection, model: Causal, lesson: Lesson) -> tuple[Decoder, list[Row], str]:
    """The pruned model, the table's rows of it and of the one before, and what was done in a line.

    It is made once, by rank 0, and kept beside the checkpoints: a training that goes on, and every rank, has the same.

    Raises:
        RecipeError: an LSTM; else as `pruned`.
    """
    if not isinstance(model, Decoder):
        raise RecipeError("[finetune] prune: what is pruned are transformers, and this is an LSTM", hint="leave it out")
    folder, record = job.work / FOLDER, job.work / RECORD
    with distributed.here(job.device.torch).first_goes():
        if launch.rank() == 0 and not _is_whole(folder, record):
            rows = [comparing.row("before", model, lesson)]
            model, told = pruned(model, section, lesson.examples, job.recipe.seed)
            rows.append(comparing.row("pruned", model, lesson))
            folder.mkdir(exist_ok=True)
            hf.save(model, job.inputs["model"].path, folder)
            write_json(record, {"rows": rows, "told": told, "files": _digests(folder)})
    known = json.loads(record.read_text())
    made = hf.load(folder, device=job.device.torch)
    assert isinstance(made, Decoder)
    return made, known["rows"], known["told"]


def _is_whole(folder: Path, record: Path) -> bool:
    """Whether the files are those that the record, which is written last, says."""
    try:
        return bool(json.loads(record.read_text())["files"] == _digests(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Measured:
    """What a model's matrices and layers did with some text.

    Attributes:
        inputs: by a matrix's name, the mean square of each of its inputs, (in,).
        influence: of each layer, 1 - cos(what it reads, what it gives), the mean over tokens (Men et al. 2024,
            arXiv:2403.03853, equation 1): little where a layer hardly changes the stream.
    """

    inputs: Mapping[str, Tensor]
    influence: list[float]


def pruned(model: Decoder, section: FinetuneSection, examples: list[Example], seed: int) -> tuple[Decoder, str]:
    """The model as `prune` asks for it, and what was done in a line. Zeros are set in the model itself.

    Raises:
        RecipeError: more of it than there is, or a shape that the family can't have.
    """
    if section.prune == "structured":
        shape(model.config, section)  # raises before anything is measured
        return _structured(model, section, measure(model, sample(examples, seed)))
    measured = measure(model, sample(examples, seed)) if section.prune == "wanda" else None
    return model, _sparse(model, section.sparsity or 0.5, measured)


def sample(examples: list[Example], seed: int) -> Iterable[Example]:
    """Some of the examples, CALIBRATION tokens of them or a little more; the same seed takes the same ones."""
    left = CALIBRATION
    for index in np.random.default_rng([seed, len(examples)]).permutation(len(examples)):
        yield examples[index]
        if (left := left - len(examples[index].ids)) <= 0:
            return


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """What is pruned: the matrices of the blocks, by name; not the embedding, nor the head."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


@torch.inference_mode()
def measure(model: Decoder, examples: Iterable[Example]) -> Measured:
    """Reads the examples one by one, so that no padding counts."""
    model.eval()
    inputs: dict[str, Tensor] = {}
    influence = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    tokens = 0

    def reading(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].flatten(0, -2).double().square().sum(0)
            inputs[name] = inputs[name] + squares if name in inputs else squares

        return hook

    def passing(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            influence[layer] += (1 - F.cosine_similarity(args[0].double(), out.double(), dim=-1)).sum().cpu()

        return hook

    hooks = [matrix.register_forward_pre_hook(reading(name)) for name, matrix in matrices(model).items()]
    hooks += [block.register_forward_hook(passing(layer)) for layer, block in enumerate(model.model.blocks)]
    try:
        for example in examples:
            ids = torch.tensor(np.asarray(example.ids[: model.config.longest], np.int64), device=model.device)
            model.hidden(ids[None])
            tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return Measured({name: (total / tokens).float() for name, total in inputs.items()}, (influence / tokens).tolist())


# --------------------------------------------------------------------------------------------------------------- zeros


def _sparse(model: Decoder, sparsity: float | Literal["2:4"], measured: Measured | None) -> str:
    """Sets the weights that matter least to zero, in place.

    By size within a matrix; or, with what was measured, by |weight| x the norm of its input within a row of the matrix
    (Wanda, Sun et al. 2023, arXiv:2306.11695, equation 1; the inputs are those of the unpruned model).
    """
    found = matrices(model)
    for name, matrix in found.items():
        if sparsity == "2:4" and matrix.in_features % 4:
            why = f'[finetune] sparsity = "2:4": {name} has {matrix.in_features} inputs, no multiple of 4'
            raise RecipeError(why, hint="sparsity = 0.5")
        scores = matrix.weight.detach().abs()
        if measured is not None:
            scores = scores * measured.inputs[name].sqrt()
        with torch.no_grad():
            matrix.weight.masked_fill_(least(scores, sparsity, by_row=measured is not None), 0.0)
    zeros = sum(int((matrix.weight == 0).sum()) for matrix in found.values())
    total = sum(matrix.weight.numel() for matrix in found.values())
    return f"{100 * zeros / total:.0f} % of {total:,} weights in {len(found)} matrices are zero"


def least(scores: Tensor, sparsity: float | Literal["2:4"], *, by_row: bool) -> Tensor:
    """Which of (out, in) scores are the lowest: the share `sparsity` of each row or of the whole, or two of every four
    in a row. Of equal ones the first.
    """
    rows = scores.reshape(-1, 4) if sparsity == "2:4" else scores if by_row else scores.reshape(1, -1)
    count = 2 if sparsity == "2:4" else round(sparsity * rows.shape[1])
    found = torch.zeros_like(rows, dtype=torch.bool)
    return found.scatter_(1, rows.argsort(dim=1, stable=True)[:, :count], True).reshape(scores.shape)


# ----------------------------------------------------------------------------------------------------------- structure


class Kept(NamedTuple):
    """Which rows of a block's matrices stay."""

    query: Tensor  # of the queries, and columns of the output projection
    key: Tensor  # of keys and values
    channels: Tensor  # of the MLP


def shape(config: Config, section: FinetuneSection) -> Config:
    """What `prune = "structured"` makes of a shape, the same in every layer.

    Raises:
        RecipeError: more goes than there is, or nothing does; heads of a family whose head size follows from them.
    """
    layers, groups = config.num_hidden_layers - section.prune_layers, config.num_key_value_heads - section.prune_heads
    inner = config.intermediate_size
    for key, had, left in (
        ("prune_layers", config.num_hidden_layers, layers),
        ("prune_heads", config.num_key_value_heads, groups),
    ):
        if left < 1:
            raise RecipeError(f"[finetune] {key} = {had - left}, and the model has {had}", hint=f"at most {had - 1}")
    if section.prune_heads and "head_dim" not in FAMILIES[config.family].fields:
        raise RecipeError(
            f"[finetune] prune_heads: the heads of a {config.family} share its width out, so none can go",
            hint="prune_layers or prune_mlp",
        )
    if section.prune_mlp:
        inner = max(MULTIPLE, round(inner * (1 - section.prune_mlp) / MULTIPLE) * MULTIPLE)
        if inner >= config.intermediate_size:
            had = config.intermediate_size
            raise RecipeError(
                f"[finetune] prune_mlp = {section.prune_mlp:g} takes none of {had} channels: a multiple of {MULTIPLE} "
                "stays",
                hint=f"prune_mlp = {(had - (had - 1) // MULTIPLE * MULTIPLE) / had:.2g} or more"
                if had > MULTIPLE
                else "leave prune_mlp out",
            )
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        layer_types=config.layer_types[:layers],
        num_attention_heads=config.num_attention_heads // config.num_key_value_heads * groups,
        num_key_value_heads=groups,
        intermediate_size=inner,
    )


def _structured(model: Decoder, section: FinetuneSection, measured: Measured) -> tuple[Decoder, str]:
    """The smaller model: layers of little influence, and heads and channels that add little to the stream, go.

    What an input of an output projection adds is its mean square times that of its column; a head is the sum of its
    own. (Minitron, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2, with the projection's weights counted in.)
    """
    config = model.config
    small = shape(config, section)
    stay = _highest(torch.tensor(measured.influence), small.num_hidden_layers).tolist()
    kept = {layer: _kept(model, layer, small, measured) for layer in stay}
    made = cut(model, kept, small)
    gone = [
        f"{layer + 1} ({measured.influence[layer]:.3f})"
        for layer in range(config.num_hidden_layers)
        if layer not in stay
    ]
    told = [f"layers {', '.join(gone)} of {config.num_hidden_layers} go"] if gone else []
    for what, had, left in (
        ("heads", config.num_attention_heads, small.num_attention_heads),
        ("MLP channels", config.intermediate_size, small.intermediate_size),
    ):
        told += [f"{left:,} of {had:,} {what} stay"] if left < had else []
    return made, " · ".join(told)


def _kept(model: Decoder, layer: int, small: Config, measured: Measured) -> Kept:
    config, place = model.config, f"model.layers.{layer}"
    added = {
        name: measured.inputs[f"{place}.{name}"]
        * model.get_submodule(f"{place}.{name}").get_parameter("weight").detach().square().sum(0)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    groups = added["self_attn.o_proj"].view(config.num_key_value_heads, -1).sum(1)
    stay = _highest(groups, small.num_key_value_heads)
    channels = _highest(added["mlp.down_proj"], small.intermediate_size)

    def rows(width: int) -> Tensor:
        return (stay[:, None] * width + torch.arange(width)).flatten()

    return Kept(rows(len(added["self_attn.o_proj"]) // config.num_key_value_heads), rows(config.head_dim), channels)


def _highest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` highest, in order; of equal ones the first. On the CPU."""
    return scores.cpu().argsort(descending=True, stable=True)[:count].sort().values


def cut(model: Decoder, kept: Mapping[int, Kept], small: Config) -> Decoder:
    """A model of the shape `small` with those layers of `model` alone, and those rows of each."""
    places = {layer: place for place, layer in enumerate(sorted(kept))}
    types = model.config.layer_types
    small = dataclasses.replace(small, layer_types=tuple(types[layer] for layer in places) if types else ())
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if found is None:
            state[name] = tensor
        elif (layer := int(found[1])) in kept:
            state[f"model.layers.{places[layer]}.{found[2]}"] = _rows(found[2], tensor, kept[layer])
    made = hf.build(small)
    assert isinstance(made, Decoder)
    made.load_state_dict(state, assign=True)
    return made.to(model.device).eval()


def _rows(name: str, tensor: Tensor, kept: Kept) -> Tensor:
    """What stays of a block's weight or bias."""
    module = name.split(".")[1]
    rows = {"q_proj": kept.query, "k_proj": kept.key, "v_proj": kept.key}
    rows |= {"gate_proj": kept.channels, "up_proj": kept.channels}
    columns = {"o_proj": kept.query, "down_proj": kept.channels}
    if module in rows:
        return tensor[rows[module].to(tensor.device)]
    if module in columns and tensor.dim() == 2:
        return tensor[:, columns[module].to(tensor.device)]
    return tensor
