"""The sections that train: what pretraining and finetuning share, and what each adds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmctl.recipe.section import OneOrMany, Positive, Section, Sources, Time, operational


class TrainingSection(Section):
    """What pretraining and finetuning share."""

    max_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Optimiser steps; default: from `epochs`. 0: the weights as they are before training."
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the training data; default 1. Where max_steps is given too, that counts."
    )
    global_batch_size: Positive | None = Field(
        None, description="Sequences an optimiser step; default: derived, and printed."
    )
    micro_batch_size: Literal["auto"] | Positive = operational(
        "auto", "Sequences at a time through the model; gradients are accumulated up to global_batch_size."
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Peak learning rate; default: derived from the optimiser and the width."
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="The last learning rate as a share of the peak."
    )
    lr_scheduler: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = Field(
        "cosine",
        description="After the warm-up. cosine and linear: down to the last step. wsd: stable, then a linear decay. "
        "inverse_sqrt: sqrt(warmup_steps / step), which knows no end. constant.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up; default: 2 % of the steps, at least 10."
    )
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = Field(0.4, description="wsd: share of the steps spent decaying.")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Decoupled weight decay on matrices; norms, biases, embeddings and heads have none. Of muon and "
        "adamw in learning rates a step (default 0.1), of sgd independent of the learning rate (default 0.0002).",
    )
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.95, description="How long AdamW remembers the size of gradients; more, as 0.99, for small batches."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Gradients are clipped to this global norm; 0 turns it off."
    )
    on_spike: Literal["skip", "rollback", "ignore"] = Field(
        "skip",
        description="A step whose loss leaps (6 standard deviations above its last 128): skip leaves it out; rollback "
        "goes back to the last checkpoint and on with the batches after it; ignore takes it. One whose loss is no "
        "number is always left out.",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Average the weights over the steps, with this decay (0.999: over about 1,000 steps); the average "
        "is what is validated and published. 0: off.",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Of the matrix products. auto: bf16 where the device multiplies it fast, fp16 with a loss scale "
        "on GPUs before it. fp32 on CPU is bitwise repeatable.",
    )
    compile: Literal["auto"] | bool = operational(
        "auto",
        "torch.compile. auto: where a C++ compiler is and the run is long enough to pay for it; stored and "
        "reused on resume.",
    )
    eval_every: Annotated[int, Field(ge=0)] | None = operational(
        None, "Steps between validations; default: ten a run. 0: only at the end."
    )
    save_every: Annotated[int, Field(ge=0)] | None = operational(
        None, "Steps between checkpoints; default: ten a run. 0: only when stopped."
    )
    keep_last: Positive = operational(2, "Checkpoints that a training keeps to go on from, the newest ones.")
    keep_every: Annotated[int, Field(ge=0)] = operational(
        0, "Steps between models that are kept for good, in checkpoints/<stage>/ of the run; 0: none."
    )
    log_every: Positive = operational(10, "Steps between lines of metrics.jsonl.")
    strategy: Literal["ddp", "fsdp"] = operational(
        "ddp",
        "With several ranks (--nproc, torchrun). ddp: whole weights on each. fsdp: weights, gradients and optimiser "
        "state cut up between them, for models that one GPU does not hold.",
    )
    activation_checkpointing: bool = operational(
        False, "Keep only each block's input for the backward pass and compute the rest again: less memory, slower."
    )
    rank_timeout: Annotated[float, Field(gt=0)] = operational(
        600.0, "Seconds that a rank may keep the others waiting before they give up; an evaluation must fit in."
    )
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], OneOrMany()] = operational(
        (), "Dashboards that get the lines of metrics.jsonl too; each is an extra: pip install 'llmctl[tensorboard]'."
    )


class PretrainSection(TrainingSection):
    """Training from scratch, or on, on the tokens of prep. What is learned follows from `[model] family`."""

    objective: Literal["auto", "causal", "masked", "spans", "fim", "infill"] = Field(
        "auto",
        description="What is learned. auto: causal (the next token) by decoders and lstm, masked by encoders, spans by "
        "t5. Decoders and lstm may also learn fim (fill-in-the-middle, arXiv:2207.14255) or infill (blanks, as GLM, "
        "arXiv:2103.10360).",
    )
    time_budget: Time = Field(
        "",
        description='How long training may take here, e.g. "30m": depth (unless [model] gives one) and epochs follow '
        "from this machine's speed, the text at hand and scaling laws; measured once and stored. Instead of max_steps "
        "and epochs.",
    )
    whole_word: bool = Field(False, description="masked: all tokens of a word are hidden together.")
    fim_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="fim: share of the documents whose middle is moved to their end; default: 0.5."
    )
    document_mask: bool = Field(
        False, description="Tokens see only those of their own document, not what stands before it in the window."
    )
    mixture: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description='How much is drawn of each of [prep] sources, in any unit: {"books/*.md" = 2.0, '
        '"builtin:python-stdlib" = 1.0} makes two thirds of the training tokens books. Names all of them; 0 leaves one '
        "out. Default: the text as it is.",
    )

    optimizer: Literal["muon", "adamw", "sgd"] = Field(
        "muon",
        description="muon: Muon for matrices, AdamW for embeddings, heads and norms. adamw: for everything. sgd: with "
        "Nesterov momentum 0.9.",
    )
    prompts: tuple[str, ...] = operational(
        (),
        "What the model is asked now and then, for samples.jsonl: texts to continue, or with <mask> (encoders) or "
        "<extra_id_0> (t5) to fill in; default: from the validation text.",
    )
    sample_every: Annotated[int, Field(ge=0)] | None = operational(
        None, "Steps between samples; default: with each validation."
    )

    @model_validator(mode="after")
    def _has_one_end(self) -> PretrainSection:
        if self.time_budget and (self.max_steps is not None or self.epochs is not None):
            raise ValueError("[pretrain] time_budget decides how long: leave out max_steps and epochs, or time_budget")
        return self

    @model_validator(mode="after")
    def _fits_the_objective(self) -> PretrainSection:
        if self.fim_rate is not None and self.objective != "fim":
            raise ValueError('[pretrain] fim_rate is of fill-in-the-middle: objective = "fim", or leave the key out')
        return self


class FinetuneSection(TrainingSection):
    """Chat finetuning: loss on the assistant's tokens only. Pruning, distilling, and what heals a pruned model."""

    sources: Sources = Field(
        (),
        description="JSONL of `messages`, prompt/completion, Alpaca or ShareGPT shape, or `builtin:python-docstrings`. "
        "Left out only where there is `text`.",
    )
    text: Sources = Field(
        (),
        description="Plain text to learn from too, every token of it, as [pretrain] does: what heals a pruned base "
        "model. Sources as in [prep].",
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="A line that can't be used: stop with its file and line, or count and skip it."
    )
    val_percent: Annotated[float, Field(gt=0, lt=50)] = Field(
        6.0, description="Share of conversations, and of documents of `text`, held out, by the same hash as prep's."
    )
    max_seq_length: Positive | None = Field(
        None,
        description="Longest conversation in tokens; longer ones are left out and counted. Default: the model's "
        "context.",
    )
    max_examples: Positive | None = Field(None, description="Use at most this many conversations, chosen by the seed.")
    packing: bool = Field(
        False,
        description="Several conversations share a row, none seeing the others: the same batches and losses with less "
        "padding. Not for lstm.",
    )
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
    optimizer: Literal["muon", "adamw", "sgd"] = Field(
        "adamw", description="As in [pretrain]; adamw is the usual choice here."
    )

    prune: Literal["", "magnitude", "wanda", "structured"] = Field(
        "",
        description="Make the model smaller before it learns; what it learns then heals it. magnitude, wanda: the "
        "smallest weights of each matrix in the blocks become zero and stay zero, by size alone or by size times what "
        "they are multiplied with (arXiv:2306.11695). structured: whole layers, heads and MLP channels go, those that "
        "matter least (arXiv:2407.14679), which leaves a smaller dense model. Not for lstm, nor with lora.",
    )
    sparsity: Literal["2:4"] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description='magnitude and wanda: share of the weights that become zero; "2:4": two of each four in a row, '
        "which some GPUs multiply faster. Default: 0.5.",
    )
    prune_layers: Annotated[int, Field(ge=0)] = Field(
        0,
        description="structured: so many layers go, those that change what passes through them least "
        "(arXiv:2403.03853).",
    )
    prune_heads: Annotated[int, Field(ge=0)] = Field(
        0,
        description="structured: so many key/value heads go in each layer, and the query heads that share them.",
    )
    prune_mlp: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="structured: share of the MLP's channels that go; a multiple of 32 stays."
    )
    teacher: str = Field(
        "",
        description="Learn the next-token probabilities of this model too (arXiv:1503.02531): a run, an artifact or a "
        'Hugging Face folder with the same tokenizer, or "base", the model that finetuning starts from. Default: '
        '"base" where it is pruned, else none.',
    )
    distill_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Share of the loss that the teacher's probabilities have; the labels have the rest. 0: none."
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Both models' logits are divided by it before they are compared: above 1, rare tokens count more.",
    )

    @property
    def is_sparse(self) -> bool:
        """Whether weights become zero and stay it."""
        return self.prune in ("magnitude", "wanda")

    @property
    def taught_by(self) -> str:
        """`teacher`, its default filled in; empty for none."""
        return (self.teacher or ("base" if self.prune else "")) if self.distill_weight else ""

    @model_validator(mode="after")
    def _has_a_source(self) -> FinetuneSection:
        if not self.sources and not self.text:
            raise ValueError('[finetune] names no source: sources = ["chats.jsonl"], or text = ["book.txt"]')
        return self

    @model_validator(mode="after")
    def _prunes_something(self) -> FinetuneSection:
        parts = {key: getattr(self, key) for key in ("prune_layers", "prune_heads", "prune_mlp")}
        said = next((key for key, value in parts.items() if value), "")
        if self.prune and self.method == "lora":
            raise ValueError('[finetune] prune changes the weights that lora freezes: method = "full"')
        if self.prune == "structured" and not said:
            raise ValueError(f'[finetune] prune = "structured" needs to know what goes: {" or ".join(parts)}')
        if said and self.prune != "structured":
            raise ValueError(f'[finetune] {said} is of prune = "structured"')
        if self.sparsity is not None and not self.is_sparse:
            raise ValueError('[finetune] sparsity is of prune = "magnitude" or "wanda"')
        if self.teacher.startswith("hf:") or self.teacher.endswith(".gguf"):
            raise ValueError(
                f"[finetune] teacher is a folder: llmctl import {self.teacher} --as teacher, then "
                'teacher = "runs/teacher"'
            )
        return self
