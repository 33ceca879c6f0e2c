"""A model as serve and chat take it from its folder: weights that run, their tokenizer, chat template and limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmctl.device import Device
from llmctl.errors import DataError, UsageError
from llmctl.inference import runners
from llmctl.inference.runners import Runner, TorchRunner
from llmctl.text import chat
from llmctl.text.chat import TEMPLATE, ChatTemplate
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """`template` is None for a base model: it continues text and was never taught to answer."""

    name: str
    folder: Path
    runner: Runner
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int  # tokens, prompt and answer together

    @property
    def runtime(self) -> str:
        """What runs it, for people."""
        return "torch" if isinstance(self.runner, TorchRunner) else "ONNX Runtime"

    def continuation(self, text: str) -> list[int]:
        """The prompt of a raw completion: its ids behind the one `<s>` that documents begin with."""
        bos = self.tokenizer.bos_id
        return [*([] if bos is None else [bos]), *self.tokenizer.encode(text)]

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


def load(folder: Path, device: Device, *, name: str = "", runtime: str = "auto", max_model_len: int = 0) -> Model:
    """Loads the artifact or Hugging Face folder.

    Raises:
        DataError: it is damaged, or its tokenizer does not match its weights.
        UsageError: `max_model_len` is over what the model holds.
        UnavailableError: the device or runtime is not on this machine.
    """
    tokenizer = Tokenizer.load(folder)
    runner = runners.load(folder, device, runtime)
    if len(tokenizer) > runner.vocab_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} pieces, the model {runner.vocab_size}: they don't belong together",
            file=folder,
            hint="serve the folder as its stage published it",
        )
    if max_model_len > runner.max_length:
        raise UsageError(
            f"--max-model-len {max_model_len} is over the model's context of {runner.max_length} tokens",
            hint="leave it out to use the whole context",
        )
    length = max_model_len or runner.max_length
    return Model(name or folder.name, folder, runner, tokenizer, ChatTemplate.load(folder), length)
