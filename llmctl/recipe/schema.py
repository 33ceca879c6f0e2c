"""The sections of a recipe and what their keys mean.

A section that is absent is a stage that is absent. A value of `None` or "auto" is derived by the stage that needs it,
which prints the formula. Keys marked operational say how a call runs, not what it makes: they never enter an
artifact's identity.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llmctl.recipe.section import OneOrMany, Positive, Section, Sources, operational
from llmctl.recipe.training import FinetuneSection, PretrainSection


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
    extend: Annotated[int, Field(ge=0, le=131_072)] = Field(
        0,
        description="With `from`: learn so many new pieces from the sources, for text that it spells badly (another "
        "language). BPE vocabularies only; the model of `[model] from` grows with them.",
    )

    @model_validator(mode="after")
    def _extends_another(self) -> TokenizerSection:
        if self.extend and not self.source:
            raise ValueError('[prep.tokenizer] extend adds to another tokenizer: name it, from = "FOLDER"')
        return self


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


DECODERS = ("qwen3", "qwen2", "llama", "mistral", "gemma3", "gemma2", "stablelm", "gpt2")
ENCODERS, ENCODER_DECODERS = ("modernbert", "bert", "roberta", "xlm-roberta"), ("t5",)
Family = Literal[
    "qwen3", "qwen2", "llama", "mistral", "gemma3", "gemma2", "stablelm", "gpt2",
    "modernbert", "bert", "roberta", "xlm-roberta", "t5", "lstm",
]  # fmt: skip
# Keys that only some families have; the others refuse them.
ONLY: dict[str, tuple[str, ...]] = {
    "intermediate_size": DECODERS + ENCODERS + ENCODER_DECODERS,
    "num_attention_heads": DECODERS + ENCODERS + ENCODER_DECODERS,
    "head_dim": DECODERS + ENCODERS + ENCODER_DECODERS,
    "num_key_value_heads": DECODERS[:-1],
    "rope_theta": ("qwen3", "qwen2", "llama", "mistral", "gemma2", "stablelm"),
    "rms_norm_eps": ("qwen3", "qwen2", "llama", "mistral", "gemma3", "gemma2", "t5"),
}


class ModelSection(Section):
    """The shape of the model. `depth` alone is enough: the rest is derived from it and printed."""

    source: str = Field(
        "",
        alias="from",
        description="Start from this model: a run, an artifact, a Hugging Face folder, a .gguf file, or "
        "`hf:org/name@COMMIT`. Its shape then comes with it.",
    )
    convert_pickle: bool = operational(
        False, "Let `from` be a folder of pickled weights (.bin): tensors alone are read, and kept as safetensors."
    )
    family: Family = Field(
        "qwen3",
        description="The architecture, as transformers names it. It decides what is learned: encoders (modernbert, "
        "bert, roberta, xlm-roberta) masked tokens, t5 (an encoder-decoder) spans that were cut out, the others the "
        "next token. lstm is the recurrent baseline.",
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
    tie_word_embeddings: bool | None = Field(
        None, description="Use one matrix to read tokens and to predict them; default: true, for t5 false (T5 v1.1)."
    )
    rope_theta: Annotated[float, Field(gt=0)] = Field(
        10_000.0, description="Base of the rotary position embedding (RoFormer, arXiv:2104.09864)."
    )
    rms_norm_eps: Annotated[float, Field(gt=0)] = Field(1e-6, description="Epsilon of RMSNorm.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout on the residual branches while training; for small data seen many times."
    )

    @field_validator(*ONLY)
    @classmethod
    def _goes_with_the_family(cls, value: Any, info: ValidationInfo) -> Any:
        known, family = ONLY[str(info.field_name)], info.data.get("family")
        if family is not None and family not in known and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError(f"{family} has no such thing; {', '.join(known)} have")
        return value


class EvalSection(Section):
    """How good the last model is, beside the one it was made from."""

    text: Sources = Field((), description="Texts to score a model on; default: prep's validation split.")
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

    formats: Annotated[tuple[Literal["onnx", "hf", "gguf", "tensorrt"], ...], OneOrMany()] = Field(
        ("onnx",),
        description="onnx: a graph for ONNX Runtime; a decoder's has a KV cache. hf: the clean Hugging Face folder. "
        "gguf: one file for llama.cpp and what is built on it. tensorrt: an engine for an NVIDIA GPU.",
    )
    profile: Literal["ort", "portable"] = Field(
        "ort",
        description="Which operators an ONNX graph has. ort: ONNX Runtime's fused ones, the fastest there. portable: "
        "those of the standard alone (opset 24), for any runtime.",
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="What an ONNX graph or a TensorRT engine stores and computes in."
    )
    quantize: Literal["", "int4", "int8", "int8-dynamic", "mixed"] = Field(
        "",
        description="Smaller weights, for onnx, tensorrt and hf. int4, int8: weights alone, a scale a block. "
        "int8-dynamic: weights a scale a row, and what they are multiplied with a scale a token: the fastest prefill "
        "and the fastest batches on a CPU. mixed: 4 or 8 bits, chosen matrix by matrix.",
    )
    quantize_method: Literal["auto", "rtn", "k-quant", "gptq", "awq"] = Field(
        "auto",
        description="How weights are rounded. rtn: to nearest. k-quant: the scale of a block is searched. gptq: errors "
        "are made good by later weights (arXiv:2210.17323). awq: channels that matter are scaled up before "
        "(arXiv:2306.00978).",
    )
    block_size: Literal[16, 32, 64, 128] = Field(
        64, description="Weights of a row that share a scale; smaller ones cost bytes and time, and are more exact."
    )
    symmetric: bool | None = Field(
        None,
        description="Whether blocks have no zero point; default: true for tensorrt and the portable profile, else "
        "false.",
    )
    target_bits: Annotated[float, Field(ge=4, le=16)] | None = Field(
        None, description='Size budget of "mixed": bits a weight on average, scales counted.'
    )
    max_ppl_increase: Annotated[str, Field(pattern=r"^$|^\d+(\.\d+)?%$")] = Field(
        "",
        description='How much perplexity quantising may cost, e.g. "2%": the gate\'s limit, and the budget of "mixed".',
    )
    kv_cache: Literal["model", "int8"] = Field(
        "model", description="What an ONNX decoder keeps keys and values in: the graph's dtype, or int8."
    )
    adapter: Literal["merged", "apart"] = Field(
        "merged",
        description="LoRA: merged into the weights, or kept apart beside the base model's graph, which takes it or "
        "not at run time.",
    )
    gguf_type: Literal["f16", "bf16", "f32", "q8_0", "q4_0"] = Field(
        "f16", description="How a GGUF file stores matrices; q8_0 and q4_0 take 8.5 and 4.5 bits a weight."
    )
    text: str = Field(
        "",
        description="Text for the perplexity check of the parity gate; default: the lineage's validation split, "
        "else the built-in text.",
    )
    debug_parity: bool = operational(
        False, "When the gate fails, look for the node that is to blame; on a graph that passes, for the worst one."
    )

    @property
    def variant(self) -> str:
        """What quantising makes of the model: "" for nothing, else the folder's ending."""
        budget = self.target_bits is not None or bool(self.max_ppl_increase and not self.quantize)
        return "mixed" if budget else self.quantize

    @property
    def is_symmetric(self) -> bool:
        """`symmetric`, its default filled in."""
        if self.symmetric is not None:
            return self.symmetric
        return self.profile == "portable" or "tensorrt" in self.formats

    @model_validator(mode="after")
    def _goes_together(self) -> ExportSection:
        if self.target_bits is not None and self.quantize not in ("", "mixed"):
            raise ValueError(f'[export] target_bits is of quantize = "mixed", not of "{self.quantize}"')
        if self.quantize == "mixed" and self.target_bits is None and not self.max_ppl_increase:
            raise ValueError('[export] quantize = "mixed" needs a budget: target_bits = 4.5 or max_ppl_increase = "2%"')
        if self.variant and "gguf" in self.formats and len(self.formats) == 1:
            raise ValueError('[export] quantize is of onnx, tensorrt and hf; a GGUF file has gguf_type = "q4_0"')
        if self.kv_cache == "int8" and (self.profile == "portable" or set(self.formats) != {"onnx"}):
            raise ValueError(
                '[export] kv_cache = "int8" is of formats = ["onnx"] with profile = "ort": '
                "the standard's Attention has no quantised cache"
            )
        if "tensorrt" in self.formats and "int8-dynamic" in (self.quantize, self.variant):
            raise ValueError('[export] TensorRT has no products of integers as these: quantize = "int8" or "int4"')
        if "tensorrt" in self.formats and self.variant and self.symmetric is False:
            raise ValueError("[export] TensorRT knows no zero points: leave symmetric = false out")
        if "tensorrt" in self.formats and self.adapter == "apart":
            raise ValueError('[export] an engine holds its weights: adapter = "apart" is of formats = ["onnx"]')
        if self.variant and self.adapter == "apart":
            raise ValueError('[export] adapter = "apart" goes with weights that are not quantised')
        if self.variant and self.dtype != "fp32" and "onnx" in self.formats:
            raise ValueError("[export] a quantised graph computes in fp32: leave dtype or quantize out")
        return self


class ServeSection(Section):
    """The HTTP server. Nothing here makes an artifact."""

    host: str = operational("127.0.0.1", "Address to listen on; anything else than this machine wants an api_key.")
    port: Annotated[int, Field(ge=0, le=65535)] = operational(8000, "Port; 0 takes a free one.")
    api_key: str = operational(
        "", "Clients must send it as a bearer token; empty: no key asked. Better: the variable LLMCTL_API_KEY."
    )
    served_model_name: str = operational("", "The name clients ask for; default: the run's name.")
    max_model_len: Annotated[int, Field(ge=0)] = operational(
        0, "Cap on prompt and answer together; 0: the model's context."
    )
    runtime: Literal["auto", "onnx", "torch"] = operational("auto", "auto: the exported ONNX where there is one.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = operational(
        "auto", "What torch computes in; auto: bf16 where the hardware multiplies it fast, else fp32."
    )


class OriginSection(Section):
    """Where a resolved recipe came from; written by llmctl into recipe.resolved.toml, never by hand."""

    recipe: str = operational("", "The recipe file.")
    root: str = operational("", "The folder its paths are relative to.")
    overrides: tuple[str, ...] = operational((), "The --set arguments of that call.")


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of a run: a folder's name that needs no quoting anywhere
SECTIONS = ("prep", "model", "pretrain", "finetune", "eval", "export", "serve")


class Recipe(Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=NAME)] = Field(
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
        if self.pretrain is not None and self.prep is not None and self.pretrain.mixture:
            mixture, known = self.pretrain.mixture, self.prep.sources
            for name in (*mixture, *known):
                if name not in known or name not in mixture:
                    what = "is none of [prep] sources" if name in mixture else "has no weight (0 leaves it out)"
                    raise ValueError(f"[pretrain] mixture: {name!r} {what}")
            if not sum(mixture.values()):
                raise ValueError("[pretrain] mixture: one of the weights must be above 0")
        family = self.model.family if self.model is not None and not self.model.source else ""
        if family in ENCODERS + ENCODER_DECODERS:
            kind = "an encoder" if family in ENCODERS else "an encoder-decoder"
            if self.finetune is not None:
                raise ValueError(f"[finetune] teaches a decoder to answer; {family} is {kind}: leave the section out")
        if family == "lstm" and self.export is not None and self.export.formats != ("onnx",):
            raise ValueError('[export] formats: no other tool has a class for lstm, so it is exported as "onnx" alone')
        if family == "lstm" and self.finetune is not None and self.finetune.method == "lora":
            raise ValueError('[finetune] method: an lstm has no projections for adapters to change: method = "full"')
        if family == "lstm" and self.finetune is not None and self.finetune.prune:
            raise ValueError("[finetune] prune: what is pruned are transformers, and an lstm is none: leave it out")
        return self

    def section(self, name: str) -> Any:
        """The section called `name`, its defaults where the recipe leaves it out."""
        found = getattr(self, name)
        return found if found is not None else SECTION_TYPES[name]()


SECTION_TYPES: dict[str, type[Section]] = {
    "prep": PrepSection,
    "prep.tokenizer": TokenizerSection,
    "model": ModelSection,
    "pretrain": PretrainSection,
    "finetune": FinetuneSection,
    "eval": EvalSection,
    "export": ExportSection,
    "serve": ServeSection,
}
