"""The recipe: one TOML file that drives every stage. Its schema, how it is read, and errors that name file and line.

A section that is absent is a stage that is absent. A value of `None` or "auto" is derived by the stage that needs
it, which
prints the formula. Keys marked operational say how a call runs, not what it makes: they never enter an artifact's
identity.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticUndefined, core_schema

from llmctl.errors import RecipeError


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class _OneOrMany:
    """Of a tuple: a single value stands for a list of one, in the recipe as in its JSON Schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_as_tuple, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema)
        return {"anyOf": [many, many["items"]]}


Positive = Annotated[int, Field(gt=0)]
Sources = Annotated[tuple[str, ...], _OneOrMany()]


def _operational(default: Any, description: str, **rules: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"operational": True}, **rules)


class Section(BaseModel):
    """A table of the recipe. Unknown keys are errors; values never change once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True, allow_inf_nan=False
    )

    def declared(self) -> dict[str, Any]:
        """What enters an artifact's identity: every key that is not operational, defaults filled in, under its TOML
        name.
        """
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if is_operational(field):
                continue
            kept[field.alias or name] = value.declared() if isinstance(value, Section) else _plain(value)
        return kept


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def is_operational(field: FieldInfo) -> bool:
    """Whether a key says how a call runs rather than what it makes."""
    return bool(isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational"))


class TokenizerSection(Section):
    """The vocabulary."""

    type: Literal["bpe", "unigram", "char", "byte"] = Field(
        "bpe",
        description="bpe: SentencePiece BPE with byte fallback, ids equal in every tool. unigram: trains 15 "
        "times slower and "
        "its tokenizer.json is not promised to agree id for id. char: one piece a character. byte: no training at all.",
    )
    vocab_size: Annotated[int, Field(ge=300, le=262_144)] = Field(
        4096,
        description="Pieces in all, special and byte pieces included (bpe and unigram). Small models want small "
        "vocabularies.",
    )
    source: str = Field(
        "",
        alias="from",
        description="Take the tokenizer of this artifact or Hugging Face folder instead of training one.",
    )


class PrepSection(Section):
    """Text in, tokens out."""

    sources: Sources = Field(
        description="Files, folders, globs (.txt .md .rst .html, source code, .jsonl), `builtin:python-stdlib` or "
        "`builtin:python-docstrings`."
    )
    text_key: str = Field("", description="The key of a JSONL line that holds the text; empty: guessed, and printed.")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="A line that can't be read: stop with its file and line, or count and skip it."
    )
    normalize: Literal["nfc", "none"] = Field(
        "nfc", description="Unicode normalisation form. Newlines always become \\n."
    )
    val_percent: Annotated[float, Field(gt=0, lt=50)] = Field(
        6.0,
        description="Share of documents held out, chosen by a hash of each document. Below 100 documents: the "
        "tail 10 % of the text.",
    )
    tokenizer: TokenizerSection = Field(TokenizerSection(), description="The vocabulary.")

    @field_validator("sources")
    @classmethod
    def _not_empty(cls, value: Sources) -> Sources:
        if not value:
            raise ValueError("names no source")
        return value


class ModelSection(Section):
    """The shape of the model. `depth` alone is enough: the rest is derived from it and printed."""

    source: str = Field(
        "",
        alias="from",
        description="Start from this artifact or Hugging Face folder; the other keys then come from it.",
    )
    family: Literal["qwen3", "llama"] = Field(
        "qwen3", description="The architecture, as transformers names it. qwen3 normalises queries and keys."
    )
    depth: Positive | None = Field(
        None,
        description="The one dial: number of layers, from which width, heads and learning rates follow (4 if "
        "nothing is said).",
    )
    num_hidden_layers: Positive | None = Field(None, description="Layers; default: depth.")
    hidden_size: Positive | None = Field(None, description="Width; default: 128 x depth / 3, up to a multiple of 64.")
    intermediate_size: Positive | None = Field(
        None, description="Width inside the MLP; default: 8/3 of the width, up to a multiple of 64."
    )
    num_attention_heads: Positive | None = Field(None, description="Query heads; default: width / head_dim.")
    num_key_value_heads: Positive | None = Field(
        None, description="Key and value heads; default: as many as query heads."
    )
    head_dim: Positive | None = Field(None, description="Width of a head; default: 64 (32 for widths below 128).")
    max_seq_length: Annotated[int, Field(ge=8, le=1_048_576)] = Field(512, description="Context length in tokens.")
    tie_word_embeddings: bool = Field(True, description="Use one matrix to read tokens and to predict them.")
    rope_theta: Annotated[float, Field(gt=0)] = Field(
        10_000.0, description="Base of the rotary position embedding (RoFormer, arXiv:2104.09864)."
    )
    rms_norm_eps: Annotated[float, Field(gt=0)] = Field(1e-6, description="Epsilon of RMSNorm.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout on the residual branches while training; for small data seen many times."
    )


class TrainingSection(Section):
    """What pretraining and finetuning share."""

    max_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Optimiser steps; default: from `epochs`. 0: the weights as they are before training."
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the training data; default 1, unless max_steps is given."
    )
    global_batch_size: Positive | None = Field(
        None, description="Sequences an optimiser step; default: derived, and printed."
    )
    micro_batch_size: Literal["auto"] | Positive = _operational(
        "auto", "Sequences at a time through the model; gradients are accumulated up to global_batch_size."
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Peak learning rate; default: derived from the optimiser and the width."
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="The last learning rate as a share of the peak."
    )
    lr_scheduler: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="cosine; wsd: warm-up, stable, then a linear decay; constant."
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up; default: 2 % of the steps, at least 10."
    )
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = Field(0.4, description="wsd: share of the steps spent decaying.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Decoupled weight decay on matrices; norms, biases and embeddings have none."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Gradients are clipped to this global norm; 0 turns it off."
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Of the matrix products. auto: bf16 where the device multiplies it fast. fp32 on CPU is "
        "bitwise repeatable.",
    )
    compile: Literal["auto"] | bool = _operational(
        "auto",
        "torch.compile. auto: where a C++ compiler is and the run is long enough to pay for it; stored and "
        "reused on resume.",
    )
    eval_every: Annotated[int, Field(ge=0)] | None = _operational(
        None, "Steps between validations; default: ten a run. 0: only at the end."
    )
    save_every: Annotated[int, Field(ge=0)] | None = _operational(
        None, "Steps between checkpoints; default: ten a run. 0: only when stopped."
    )
    log_every: Positive = _operational(10, "Steps between lines of metrics.jsonl.")


class PretrainSection(TrainingSection):
    """Next-token prediction on the tokens of prep."""

    optimizer: Literal["muon", "adamw"] = Field(
        "muon",
        description="muon: torch.optim.Muon for matrices, AdamW for embeddings and norms. adamw: for everything.",
    )
    prompts: tuple[str, ...] = _operational(
        (), "Beginnings that the model continues now and then, for samples.jsonl; default: from the validation text."
    )
    sample_every: Annotated[int, Field(ge=0)] | None = _operational(
        None, "Steps between samples; default: with each validation."
    )


class FinetuneSection(TrainingSection):
    """Chat finetuning: loss on the assistant's tokens only."""

    sources: Sources = Field(
        description="JSONL of `messages`, prompt/completion, Alpaca or ShareGPT shape, or `builtin:python-docstrings`."
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="A line that can't be used: stop with its file and line, or count and skip it."
    )
    val_percent: Annotated[float, Field(gt=0, lt=50)] = Field(
        6.0, description="Share of conversations held out, by the same hash as prep's."
    )
    max_seq_length: Positive | None = Field(
        None,
        description="Longest conversation in tokens; longer ones are left out and counted. Default: the model's "
        "context.",
    )
    max_examples: Positive | None = Field(None, description="Use at most this many conversations, chosen by the seed.")
    system: str = Field("", description="A system message put before conversations that have none.")
    method: Literal["full", "lora"] = Field(
        "full",
        description="full: all weights. lora: low-rank adapters (arXiv:2106.09685), published beside the merged model.",
    )
    lora_r: Positive = Field(16, description="Rank of the adapters.")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="Scale of the adapters: alpha / r.")
    lora_target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="Which projections get an adapter.",
    )
    optimizer: Literal["muon", "adamw"] = Field(
        "adamw", description="As in [pretrain]; adamw is the usual choice here."
    )

    @field_validator("sources")
    @classmethod
    def _not_empty(cls, value: Sources) -> Sources:
        if not value:
            raise ValueError("names no source")
        return value


class EvalSection(Section):
    """How good the last model is, beside the one it was made from."""

    text: Sources = Field(
        (), description="Texts to score for perplexity and bits a byte; default: prep's validation split."
    )
    tasks: Sources = Field(
        (),
        description="JSONL task files: {question, choices, answer} for multiple choice, {question, answer} for "
        "exact answers.",
    )
    num_fewshot: Annotated[int, Field(ge=0)] = Field(
        0, description="Worked examples put before each question, from the file's own first lines."
    )
    conversations: Sources = Field(
        (), description="Chats whose held-out answers are scored and generated; default: finetune's sources."
    )
    max_examples: Positive = Field(256, description="At most this many conversations and questions a task.")
    max_new_tokens: Positive = Field(128, description="Longest generated answer in tokens.")
    require: dict[str, str] = Field(
        default_factory=dict,
        description='Gates, e.g. val_bits_per_byte = "<1.6"; a metric that misses one ends with exit 5.',
        json_schema_extra={"operational": True},
    )

    @field_validator("require")
    @classmethod
    def _gates(cls, value: dict[str, str]) -> dict[str, str]:
        for metric, rule in value.items():
            if not re.fullmatch(r"\s*(<=|>=|<|>)\s*-?\d+(\.\d+)?([eE][+-]?\d+)?\s*", rule):
                raise ValueError(f'{metric} = "{rule}" is not a comparison such as "<1.6"')
        return value


class ExportSection(Section):
    """The model in the form another runtime takes."""

    formats: Annotated[tuple[Literal["onnx", "hf"], ...], _OneOrMany()] = Field(
        ("onnx",), description="onnx: a decoder graph with a KV cache. hf: the clean Hugging Face folder."
    )
    text: str = Field(
        "",
        description="Text for the perplexity check of the parity gate; default: the lineage's validation split, "
        "else the built-in text.",
    )


class ServeSection(Section):
    """The HTTP server. Nothing here makes an artifact."""

    host: str = _operational("127.0.0.1", "Address to listen on; anything else than this machine wants an api_key.")
    port: Annotated[int, Field(ge=0, le=65535)] = _operational(8000, "Port; 0 takes a free one.")
    api_key: str = _operational(
        "", "Clients must send it as a bearer token; empty: no key asked. Better: the variable LLMCTL_API_KEY."
    )
    served_model_name: str = _operational("", "The name clients ask for; default: the run's name.")
    max_model_len: Annotated[int, Field(ge=0)] = _operational(
        0, "Cap on prompt and answer together; 0: the model's context."
    )
    runtime: Literal["auto", "onnx", "torch"] = _operational("auto", "auto: the exported ONNX where there is one.")


class OriginSection(Section):
    """Where a resolved recipe came from; written by llmctl into recipe.resolved.toml, never by hand."""

    recipe: str = _operational("", "The recipe file.")
    root: str = _operational("", "The folder its paths are relative to.")
    overrides: tuple[str, ...] = _operational((), "The --set arguments of that call.")


SECTIONS = ("prep", "model", "pretrain", "finetune", "eval", "export", "serve")


class Recipe(Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        "", description="The run's name: runs/<name>; default: the file's name.", validate_default=False
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Everything random flows from it.")
    prep: PrepSection | None = None
    model: ModelSection | None = None
    pretrain: PretrainSection | None = None
    finetune: FinetuneSection | None = None
    eval: EvalSection | None = None
    export: ExportSection | None = None
    serve: ServeSection | None = None
    origin: OriginSection | None = None
    file: Path = Field(Path("recipe.toml"), exclude=True)
    root: Path = Field(Path(), exclude=True)

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value == "current":
            raise ValueError("runs/current means the run that was made last; choose another name")
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> Recipe:
        if self.pretrain is not None and self.prep is None:
            raise ValueError("[pretrain] needs a [prep] section: it trains on prep's tokens")
        return self

    def section(self, name: str) -> Any:
        """The section called `name`, its defaults where the recipe leaves it out."""
        found = getattr(self, name)
        return found if found is not None else _SECTION_TYPES[name]()


_SECTION_TYPES: dict[str, type[Section]] = {
    "prep": PrepSection,
    "prep.tokenizer": TokenizerSection,
    "model": ModelSection,
    "pretrain": PretrainSection,
    "finetune": FinetuneSection,
    "eval": EvalSection,
    "export": ExportSection,
    "serve": ServeSection,
}


# ------------------------------------------------------------------------------------------------------------ reading


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, the one its `base` names below it, and the `--set` overrides on top (their paths from the
    current folder).

    Raises:
        RecipeError: not TOML, an unknown key or section, a value of the wrong kind; with file, line and the mend.
    """
    text, table = _read(path)
    places = {key: (path, line) for key, line in _lines(text)}
    base = table.pop("base", None)
    if base is not None:
        below = path.parent / str(base)
        below_text, below_table = _read(below, named_by=(path, places.get(("base",), (path, 1))[1]))
        if "base" in below_table:
            raise RecipeError(
                "a base may not have a base itself",
                file=path,
                line=places[("base",)][1],
                hint=f"copy what you need from {below}",
            )
        below_table.pop("name", None)
        places = {key: (below, line) for key, line in _lines(below_text)} | places
        table = _rebased(_merge(below_table, table), below, path, places)
    table.setdefault("name", default_name(path))
    return _validated(table, overrides, path, places)


def of(table: dict[str, Any], overrides: Sequence[str], file: Path) -> Recipe:
    """A recipe that no file holds (yet): `table` with the overrides on top; `file` is where it would be kept."""
    return _validated(_copied(table), overrides, file, {})


def _validated(
    table: dict[str, Any], overrides: Sequence[str], path: Path, places: dict[tuple[str, ...], tuple[Path, int]]
) -> Recipe:
    origin = table.get("origin")
    given = origin.get("root") if isinstance(origin, dict) else None
    root = Path(given if isinstance(given, str) and given else path.parent).absolute()
    for override in overrides:
        key, value = _override(override)
        _set(table, key, _below(root, value) if key in PATHS else value, override)
        places = {key[:depth]: (Path(f"--set {override}"), 0) for depth in range(1, len(key))} | places
        places[key] = (Path(f"--set {override}"), 0)
    try:
        return Recipe.model_validate({**table, "file": path, "root": root})
    except ValidationError as problem:
        raise _explained(problem.errors()[0], path, places) from None


def default_name(path: Path) -> str:
    """The run's name that a file or folder suggests."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:64]
    return name if name not in ("", "current") else "run"


def _read(path: Path, named_by: tuple[Path, int] | None = None) -> tuple[str, dict[str, Any]]:
    file, line = named_by or (path, None)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = (
            difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.toml")], 1)
            if path.parent.is_dir()
            else []
        )
        hint = f"did you mean {path.parent / near[0]}?" if near else "llmctl init FOLDER writes one for your text"
        raise RecipeError(
            f"no recipe {path}" if named_by else "no such recipe", file=file, line=line, hint=hint
        ) from None
    except UnicodeDecodeError:
        raise RecipeError("the recipe is not UTF-8 text", file=file, line=line, hint="save it as UTF-8") from None
    except OSError as reason:
        raise RecipeError(f"the recipe cannot be read: {reason.strerror}", file=file, line=line) from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as reason:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(reason))
        message = re.sub(r" \(at .*\)$", "", str(reason))
        raise RecipeError(
            f"not TOML: {message}", file=path, line=int(found[1]) if found else None, hint="see https://toml.io"
        ) from None


def _lines(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Where each key and table of a TOML text stands: (("prep", "sources"), 12). Good enough for messages; tomllib
    keeps no lines.
    """
    table: tuple[str, ...] = ()
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        if fence:
            fence = "" if fence in line else fence
            continue
        if header := re.match(r"\s*\[\[?\s*([A-Za-z0-9_.\-\"' ]+?)\s*\]\]?\s*(#.*)?$", line):
            table = tuple(part.strip(" \"'") for part in header[1].split("."))
            yield table, number
        elif pair := re.match(r"\s*([A-Za-z0-9_.\-\"']+)\s*=\s*(.*)$", line):
            yield (*table, *(part.strip("\"'") for part in pair[1].split("."))), number
            fence = next((mark for mark in ('"""', "'''") if pair[2].count(mark) == 1), "")


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


# Keys whose values are paths (or sources, which may be paths).
PATHS = (("prep", "sources"), ("prep", "tokenizer", "from"), ("model", "from"), ("finetune", "sources"), ("eval",
"text"), ("eval", "tasks"),
         ("eval", "conversations"), ("export", "text"))  # fmt: skip


def _rebased(
    table: dict[str, Any], below: Path, above: Path, places: Mapping[tuple[str, ...], tuple[Path, int]]
) -> dict[str, Any]:
    """Paths that came from the base are relative to the base: makes them so when the two lie in different folders."""
    if below.parent.resolve() == above.parent.resolve():
        return table
    between = os.path.relpath(below.parent.resolve(), above.parent.resolve())  # relative: a checkout may move
    return rewrite_paths(
        table, lambda key, path: f"{between}/{path}" if places.get(key, (above, 0))[0] == below else path
    )


def rewrite_paths(table: dict[str, Any], change: Callable[[tuple[str, ...], str], str]) -> dict[str, Any]:
    """A copy of a recipe's table with `change(key, path)` applied to every relative path in it."""
    copy = _copied(table)
    for key in PATHS:
        holder: Any = copy
        for part in key[:-1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        value = holder.get(key[-1]) if isinstance(holder, dict) else None
        if isinstance(value, str) and value:
            holder[key[-1]] = value if _fixed(value) else change(key, value)
        elif isinstance(value, list):
            holder[key[-1]] = [item if _fixed(item) else change(key, item) for item in value]
    return copy


def _copied(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in table.items()}


def _fixed(path: Any) -> bool:
    """Whether a value means the same from any folder."""
    return not isinstance(path, str) or is_builtin(path) or path.startswith("~") or Path(path).is_absolute()


def is_builtin(source: str) -> bool:
    """Whether a source is one that every machine has."""
    return source.startswith("builtin:")


def _override(argument: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {argument}: expected section.key=value", hint="for example: --set pretrain.max_steps=100"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, as a shell user expects
    parts = tuple(key.strip().split("."))
    return parts, _from_here(value) if parts in PATHS else value


def _from_here(value: Any) -> Any:
    """A shell user names files from where they stand, not from where the recipe lies."""
    if isinstance(value, list):
        return [_from_here(item) for item in value]
    return value if _fixed(value) or not value else os.path.abspath(value)  # noqa: PTH100 (it takes ".." away, too)


def _below(root: Path, value: Any) -> Any:
    """A path as the recipe itself would spell it, so that giving it by --set makes no other artifact."""
    if isinstance(value, list):
        return [_below(root, item) for item in value]
    inside = isinstance(value, str) and not is_builtin(value) and Path(value).is_relative_to(root)
    return Path(value).relative_to(root).as_posix() if inside else value


def _set(table: dict[str, Any], key: tuple[str, ...], value: Any, argument: str) -> None:
    holder = table
    for part in key[:-1]:
        below = holder.get(part, {})
        if not isinstance(below, dict):
            raise RecipeError(f"--set {argument}: {part} is not a section")
        holder[part] = dict(below)
        holder = holder[part]
    holder[key[-1]] = value


# ------------------------------------------------------------------------------------------------------------- errors


def _explained(problem: ErrorDetails, path: Path, places: Mapping[tuple[str, ...], tuple[Path, int]]) -> RecipeError:
    """A validation error as a person needs it: the line, the key, what was expected, the nearest known key."""
    where = tuple(str(part) for part in problem["loc"] if not isinstance(part, int))
    while (
        where
        and where not in places
        and (".".join(where[:-1]) or len(where) == 1)
        and len(where) > 1
        and where[-1] not in _keys_of(where[:-1])
    ):
        where = where[:-1]  # pydantic adds the member of a union it tried
    file, line = places.get(where, places.get(where[:-1], (path, 0)))
    override = str(file).startswith("--set ")
    at: dict[str, Any] = {"file": None if override else file, "line": line or None}
    prefix = f"{file}: " if override else ""
    table, key = ".".join(where[:-1]), where[-1] if where else ""
    if problem["type"] == "extra_forbidden":
        return _unknown(prefix, table, key, at)
    if problem["type"] == "missing":
        return RecipeError(
            f"[{table}] has no `{key}`", hint=f"add {key} = ... ; its meaning: llmctl init --keys {table}", **at
        )
    message = re.sub(r"^Value error, ", "", problem["msg"])
    if problem["type"] in ("model_type", "dict_type"):
        message = "expected a section"
    found = "" if problem["type"] == "value_error" else f", found {problem['input']!r}"
    name = f"[{table}] {key}" if table else f"`{key}`" if key else ""
    text = f"{prefix}{name}: {message[:1].lower()}{message[1:]}{found}" if name else f"{prefix}{message}"
    return RecipeError(
        text, hint=f"llmctl init --keys {table or key} lists what is allowed" if table or key in SECTIONS else "", **at
    )


def _unknown(prefix: str, table: str, key: str, at: dict[str, Any]) -> RecipeError:
    known = _keys_of(tuple(table.split("."))) if table else ("name", "seed", "base", *SECTIONS)
    near = difflib.get_close_matches(key, known, 1, 0.6)
    elsewhere = [name for name in _SECTION_TYPES if key in _keys_of(tuple(name.split(".")))]
    hints = [f"Did you mean `{near[0]}`?"] if near else [f"It is a key of [{elsewhere[0]}]."] if elsewhere else []
    hints.append(f"All keys: llmctl init --keys {table}" if table else f"Known here: {', '.join(known)}")
    what = f"unknown key `{key}` in [{table}]" if table else f"unknown section or key `{key}`"
    return RecipeError(prefix + what, hint=" ".join(hints), **at)


def _keys_of(where: tuple[str, ...]) -> tuple[str, ...]:
    section = _SECTION_TYPES.get(".".join(where))
    return tuple(field.alias or name for name, field in section.model_fields.items()) if section else ()


# ---------------------------------------------------------------------------------------------------------- reference


def reference(section: str) -> list[tuple[str, str, str, str]]:
    """The keys of a section for people: (key, kind, default, meaning)."""
    if section not in _SECTION_TYPES:
        raise RecipeError(f"no section [{section}]", hint=f"the sections: {', '.join(_SECTION_TYPES)}")
    rows = []
    for name, field in _SECTION_TYPES[section].model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            continue
        default = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
        shown = "required" if default is PydanticUndefined else "derived" if default is None else _toml(_plain(default))
        meaning = (field.description or "") + (" (operational)" if is_operational(field) else "")
        rows.append((field.alias or name, _kind(field.annotation), shown, meaning))
    return rows


def _kind(annotation: Any) -> str:
    """A type as the reference shows it."""
    text = str(annotation)
    choices = [
        f'"{arg}"' for part in (annotation, *get_args(annotation)) for arg in get_args(part) if isinstance(arg, str)
    ]
    names = [
        name
        for name, mark in (("true/false", "bool"), ("integer", "int"), ("number", "float"))
        if re.search(rf"\b{mark}\b", text)
    ]
    if "tuple" in text or "dict" in text:
        return "list" if "tuple" in text else "table"
    return " | ".join([*dict.fromkeys(choices), *names]) or "text"


def schema() -> dict[str, Any]:
    """The recipe's JSON Schema, for editors."""
    made = Recipe.model_json_schema(by_alias=True)
    for hidden in ("file", "root", "origin"):
        made["properties"].pop(hidden, None)
    made["properties"]["base"] = {
        "type": "string",
        "description": "Another recipe, read first; this one's values win (one level).",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "llmctl recipe"}


def resolved(recipe: Recipe, overrides: Sequence[str]) -> str:
    """The whole recipe as TOML with its defaults filled in, as it is kept in the run."""
    table = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    kept: dict[tuple[str, ...], Any] = {}  # the last of each key, its paths as they were meant when it was given
    for key, value in map(_override, overrides):
        kept.pop(key, None)
        if key[0] != "serve":  # nothing there makes an artifact, and a key is a secret
            kept[key] = value
    spelled = [f"{'.'.join(key)}={_toml(value)}" for key, value in kept.items()]
    table["origin"] = {"recipe": str(recipe.file.absolute()), "root": str(recipe.root), "overrides": spelled}
    table.get("serve", {}).pop("api_key", None)
    return "# Written by llmctl: the recipe as it was resolved. Edit the recipe, not this file.\n" + _tables(table)


def _tables(table: Mapping[str, Any], prefix: str = "") -> str:
    plain = "".join(
        f"{_toml_key(key)} = {_toml(value)}\n" for key, value in table.items() if not isinstance(value, dict)
    )
    nested = "".join(
        f"\n[{prefix}{_toml_key(key)}]\n{_tables(value, f'{prefix}{_toml_key(key)}.')}"
        for key, value in table.items()
        if isinstance(value, dict)
    )
    return plain + nested


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'
