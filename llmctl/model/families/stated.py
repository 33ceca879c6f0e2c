"""A family's config.json as switches of `Config`, and back."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.model.config import FULL, Config, Kind, Task, impossible
from llmctl.model.families import BY_TYPE, FAMILIES
from llmctl.model.families.family import ACT_NAMES, COMMON, Stated
from llmctl.model.sublayers import ACTIVATIONS

UNSAID: dict[Kind, Task] = {  # what a config.json without `architectures` is for
    "decoder": "causal-lm",
    "recurrent": "causal-lm",
    "encoder": "embedding",
    "encoder-decoder": "seq2seq-lm",
}


def task_of(stated: Stated, name: str, file: Path) -> Task:
    """What the class named in `architectures` does.

    Raises:
        DataError: a class that llmctl does not build.
    """
    family = FAMILIES[name]
    classes = stated.get("architectures") or []
    if not classes:
        return UNSAID[family.kind]
    wanted = str(classes[0])
    if wanted.endswith("ForPreTraining") and family.kind == "encoder":
        return "masked-lm"  # BERT's pair of heads; the one for pairs of sentences is left aside
    for task, architecture in family.architectures.items():
        if architecture == wanted:
            return task
    known = ", ".join(family.architectures.values())
    raise DataError(f"architectures names {wanted}", file=file, hint=f"of {name}, llmctl builds {known}")


INTEGERS = {*COMMON, "num_key_value_heads", "head_dim", "type_vocab_size", "num_decoder_layers"}

INTEGERS |= {"relative_attention_num_buckets", "relative_attention_max_distance"}


REALS = {"norm_eps", "attn_logit_softcapping", "final_logit_softcapping"}


def to_switches(stated: Stated, name: str, file: Path) -> dict[str, Any]:
    """The fields of `Config` in a parsed config.json of a known family.

    Raises:
        DataError: a missing or mistyped key, or a switch that llmctl does not build.
    """
    family = FAMILIES[name]
    for key, built in family.built.items():
        if key in stated and stated[key] not in built:
            raise DataError(f"{key} is {stated[key]!r}, which llmctl does not build", file=file)
    found: dict[str, Any] = dict(family.switches)
    for target, (key, default) in family.fields.items():
        value = stated.get(key)
        if value is None:
            value = default
        if value is not None:
            found[target] = _typed(target, key, value, file)
        elif target in COMMON:
            raise DataError(f"{key} is missing", file=file)
    try:
        found |= family.read(stated)
    except (ValueError, TypeError, KeyError, OverflowError, ZeroDivisionError) as reason:
        raise DataError(f"cannot be read: {reason}", file=file) from None
    return found


def _typed(target: str, key: str, value: Any, file: Path) -> Any:
    if target in INTEGERS or target in REALS:
        kind = int if target in INTEGERS else float
        if isinstance(value, bool) or not isinstance(value, int | kind):
            raise DataError(f"{key} is {value!r}, but it must be a number", file=file)
        return kind(value)
    if target in ("hidden_act", "head_act"):
        act = ACT_NAMES.get(str(value), str(value))
        if act not in ACTIVATIONS:
            raise DataError(f"{key} is {value!r}; llmctl builds {', '.join(ACTIVATIONS)}", file=file)
        return act
    return bool(value)


def to_stated(config: Config) -> Stated:
    """The family's own keys for a config; `to_switches` reads them back."""
    family = FAMILIES[config.family]
    said: Stated = {}
    for target, (key, _) in family.fields.items():
        said[key] = getattr(config, target)
    return said | family.write(config)


def consumed(name: str) -> set[str]:
    """The keys of config.json that `to_stated` writes for itself, so that they are not carried along."""
    family = FAMILIES[name]
    probe = Config(name, 8, 4, 8, 1, 1, 1, 4, 8, **{"layer_types": (FULL,), **family.switches})
    keys = {key for key, _ in family.fields.values()} | family.write(probe).keys()
    return keys | {"layer_types"}


# ------------------------------------------------------------------------------------------- the whole config.json

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as torch calls them


def config_to_json(config: Config, dtype: str = "fp32") -> Stated:
    """What config.json says; `config_from_json` reads it back."""
    family = FAMILIES[config.family]
    name = NAMES[dtype]
    stated: Stated = {
        **config.carried,
        "architectures": [family.architectures[config.task]],
        "model_type": family.model_type,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_ids[0] if config.eos_ids else None,
        "pad_token_id": config.pad_token_id,
        "dtype": name,
        "torch_dtype": name,  # what transformers 4 and vLLM call `dtype`
        **to_stated(config),
    }
    if config.task.endswith("classification") and len(config.carried.get("id2label", ())) != config.num_labels:
        stated["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        stated["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    if config.problem_type is not None:
        stated["problem_type"] = config.problem_type
    if config.dropout:
        # llmctl's own key: dropout on the residual stream, which a finetune inherits
        stated["dropout"] = config.dropout
    return stated


def generation_to_json(config: Config) -> Stated:
    """What generation_config.json says: which ids begin, end and pad a text."""
    eos = config.eos_ids
    stated: Stated = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    stated["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    stated["decoder_start_token_id"] = config.decoder_start_token_id
    return {key: value for key, value in stated.items() if value is not None}


VOLATILE = {"architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"}
VOLATILE |= {"transformers_version", "_name_or_path", "problem_type", "dropout", "decoder_start_token_id"}
VOLATILE |= {"quantization_config"}  # of the folder's weights; in memory they are plain


def config_from_json(stated: Stated, file: Path) -> Config:
    """The shape in a parsed config.json.

    Raises:
        DataError: another architecture, a switch that llmctl does not build, a missing or mistyped field, each by name.
    """
    if "auto_map" in stated:
        raise DataError(
            "auto_map asks for code that comes with the model, which llmctl never runs",
            file=file,
            hint="use a copy of the model in one of these families: " + ", ".join(FAMILIES),
        )
    name = BY_TYPE.get(str(stated.get("model_type")))
    if name is None:
        near = difflib.get_close_matches(str(stated.get("model_type")), BY_TYPE, 1, 0.5)
        raise DataError(
            f"model_type is {stated.get('model_type')!r}, which llmctl does not build",
            file=file,
            hint=f"it builds {', '.join(sorted(BY_TYPE))}" + (f"; the nearest is {near[0]}" if near else ""),
        )
    family, task = FAMILIES[name], task_of(stated, name, file)
    switches = to_switches(stated, name, file)
    heads = max(1, switches["num_attention_heads"])
    bos, eos, pad, start = (_ids(stated, f"{key}_token_id", file) for key in ("bos", "eos", "pad", "decoder_start"))
    labels = stated.get("id2label")
    pooling = "mean"
    if task == "sequence-classification":
        pooling = "last" if family.kind == "decoder" else stated.get("classifier_pooling", "cls")
    dropout = stated.get("dropout", 0.0)
    defaults: dict[str, Any] = {
        "kind": family.kind,
        "task": task,
        "num_key_value_heads": heads,
        "head_dim": switches["hidden_size"] // heads,
        "pooling": pooling,
        "head_transform": family.head.get(task, ""),
        "num_labels": len(labels) if isinstance(labels, dict) else int(stated.get("num_labels", 2)),
        "problem_type": stated.get("problem_type"),
        "dropout": float(dropout) if isinstance(dropout, int | float) else 0.0,
        "bos_token_id": bos[0] if bos else None,
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": pad[0] if pad else None,
        "decoder_start_token_id": start[0] if start else None,
        "carried": {k: v for k, v in stated.items() if k not in VOLATILE | consumed(name)},
    }
    config = Config(family=name, **{**defaults, **switches})
    if problem := impossible(config):
        raise DataError(problem, file=file)
    return config


def _ids(stated: Stated, key: str, file: Path) -> tuple[int, ...]:
    """The token ids of a field that may be absent, one id, or a list of them; -1 is how old configs spell "none"."""
    value = stated.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) for id in ids):
        raise DataError(f"{key} is {value!r}, but it must be a token id", file=file)
    return tuple(id for id in ids if id >= 0)
