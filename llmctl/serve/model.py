"""A model as serve and chat take it from its folder: weights that run, their tokenizer, chat template and limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llmctl.device import Device
from llmctl.errors import DataError, UsageError
from llmctl.inference import runners
from llmctl.inference.encode import Embedder
from llmctl.inference.runners import Runner, TorchRunner
from llmctl.model import hf
from llmctl.text import chat
from llmctl.text.chat import TEMPLATE, ChatTemplate
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """`template` is None for a base model: it continues text and was never taught to answer."""

    name: str
    folder: Path
    runner: Runner | Embedder
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int  # tokens, prompt and answer together; of a sentence encoder, those it reads of a text

    @property
    def kind(self) -> Literal["chat", "base", "embedding"]:
        if isinstance(self.runner, Embedder):
            return "embedding"
        return "base" if self.template is None else "chat"

    @property
    def writer(self) -> Runner:
        """The runner of a model that writes text.

        Raises:
            UsageError: it is a sentence encoder.
        """
        if isinstance(self.runner, Embedder):
            raise UsageError(
                f"{self.folder} is a sentence encoder: it gives vectors and writes no text",
                hint="llmctl serve answers /v1/embeddings with it",
            )
        return self.runner

    @property
    def runtime(self) -> str:
        """What runs it, for people."""
        if isinstance(self.runner, TorchRunner):
            return f"torch in {self.runner.dtype}"
        return "torch" if type(self.runner) is Embedder else "ONNX Runtime"

    def continuation(self, text: str) -> list[int]:
        """The ids of a raw text: a prompt's, behind the one `<s>` that documents begin with, if they do; for an encoder
        with all that the tokenizer puts around it.
        """
        if isinstance(self.runner, Embedder) or self.runner.start_ids:
            return self.tokenizer.encode_for_model(text)[0]
        return self.tokenizer.prompt(text)

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt of a chat, up to where the answer begins.

        Raises:
            DataError: the template refuses these messages.
        """
        assert self.template is not None
        return chat.encode(self.template, self.tokenizer, messages, add_generation_prompt=True)

    def certainly_too_long(self, text: str) -> bool:
        """Whether a text can't fit, told without encoding it; Unicode normalisation shortens it at most threefold."""
        return len(text.encode()) > 3 * self.longest_piece * self.max_length

    @cached_property
    def longest_piece(self) -> int:
        """Bytes."""
        return max(len(self.tokenizer.token_bytes(index)) for index in range(len(self.tokenizer)))

    @cached_property
    def special_names(self) -> dict[int, str]:
        """How special pieces are spelled, for logprobs."""
        return dict(zip(sorted(self.tokenizer.special_ids), self.tokenizer.specials, strict=True))

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json with the chat template, as evaluation harnesses ask for it."""
        config: dict[str, Any] = json.loads(self.tokenizer.files.get("tokenizer_config.json", b"{}"))
        template = self.folder / TEMPLATE
        return {**config, "chat_template": template.read_text(encoding="utf-8")} if template.is_file() else config


def load(
    folder: Path,
    device: Device,
    *,
    name: str = "",
    runtime: str = "auto",
    dtype: str = "auto",
    max_model_len: int = 0,
) -> Model:
    """Loads the artifact or Hugging Face folder; `dtype` is what torch computes in, see `Device.dtype`.

    Raises:
        DataError: it is damaged, or its tokenizer does not match its weights.
        UsageError: `max_model_len` is over what the model holds.
        UnavailableError: the device or runtime is not on this machine.
    """
    runner = _runner(folder, device, runtime, dtype)
    tokenizer = runner.tokenizer if isinstance(runner, Embedder) else Tokenizer.load(folder)
    if len(tokenizer) > runner.vocab_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} pieces, the model {runner.vocab_size}: they don't belong together",
            file=folder,
            hint="serve the folder as its stage published it",
        )
    most = runner.longest if isinstance(runner, Embedder) else runner.max_length
    if max_model_len > most:
        raise UsageError(
            f"--max-model-len {max_model_len} is over the model's context of {most} tokens",
            hint="leave it out to use the whole context",
        )
    length = max_model_len or runner.max_length
    return Model(name or folder.name, folder, runner, tokenizer, ChatTemplate.load(folder), length)


def _runner(folder: Path, device: Device, runtime: str, dtype: str) -> Runner | Embedder:
    if (folder / "config.json").is_file() and hf.read_config(folder).task == "embedding":
        exported = runners.has_graph(folder)
        if exported and runtime != "torch":
            from llmctl.inference.onnx_encoder import OnnxEmbedder

            return OnnxEmbedder(folder, device)
        if not exported and runtime != "onnx":
            return Embedder(folder, device)
    return runners.load(folder, device, runtime, device.dtype(dtype)[0])
