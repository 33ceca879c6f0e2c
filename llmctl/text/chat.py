"""Chat templates: a conversation as text, as ids, and which of those ids are the assistant's.

The template travels inside the model artifact (chat_template.jinja, as transformers has it): training, evaluation,
export and serving render alike. It spells special tokens; what people write must not: a special token spelled in a
message is encoded as the characters it is spelled with, and never becomes the token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.text import sandbox
from llmctl.text.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
Message = Mapping[str, Any]

# OpenAI's chat markup. Content is trimmed, so that nothing can merge with the newline that a turn's header ends with.
CHATML = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("a message's role is system, user or assistant, not " ~ message['role']) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, and the file it came from."""

    source: str
    shown: Path = field(default=Path(TEMPLATE), compare=False)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder; None for a base model, which has none."""
        path = folder / TEMPLATE
        source: Any = path.read_text(encoding="utf-8") if path.is_file() else _config(folder).get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        return cls(source, path) if isinstance(source, str) and source else None

    def save(self, folder: Path) -> None:
        """Writes chat_template.jinja."""
        (folder / TEMPLATE).write_text(self.source, encoding="utf-8")

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, names: Mapping[str, str] | None = None
    ) -> str:
        """The conversation as the template writes it; `names` are the special tokens it can name (`bos_token` ...).

        Raises:
            DataError: the template refuses the messages, reaches out of its sandbox, or takes too much time or memory.
        """
        context = {
            **(names or {}),
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        renderer = sandbox.render if self.source == CHATML else sandbox.render_apart
        try:
            return renderer(self.source, context)
        except sandbox.RenderError as reason:
            hint = "mend the messages, or use another template"
            raise DataError(f"the chat template failed: {reason}", file=self.shown, hint=hint) from None


def encode(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    """The ids of a conversation: those of transformers' `apply_chat_template` if no message spells a special token.

    Raises:
        DataError: as `ChatTemplate.render`.
    """
    marked, marks = _mark(messages, tokenizer)
    return _ids(tokenizer, template.render(marked, add_generation_prompt, tokenizer.special_names), marks)


def supervised(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and a mask of those to learn: what the assistant says, and the token that ends it.

    Each turn is found by rendering the conversation up to it, so a template needs no marks of its own.

    Raises:
        DataError: as `ChatTemplate.render`; or a template that writes a turn otherwise once others follow.
    """
    marked, marks = _mark(messages, tokenizer)

    def ids_of(turns: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        return _ids(tokenizer, template.render(turns, add_generation_prompt, tokenizer.special_names), marks)

    ids = ids_of(marked)
    mask = [False] * len(ids)
    for turn, message in enumerate(marked):
        if message.get("role") != "assistant":
            continue
        before = ids_of(marked[:turn], add_generation_prompt=True)
        after = ids if turn + 1 == len(marked) else ids_of(marked[: turn + 1])
        if after[: len(before)] != before or ids[: len(after)] != after:
            problem = f"the chat template writes turn {turn + 1} otherwise when other turns follow it"
            mend = "train on single-turn conversations, or use a ChatML template"
            raise DataError(problem, file=template.shown, hint=mend)
        ends = [index for index in range(len(before), len(after)) if after[index] in tokenizer.special_ids]
        end = ends[-1] + 1 if ends else len(after)
        mask[len(before) : end] = [True] * (end - len(before))
    return ids, mask


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as reason:
        raise DataError(f"not JSON ({reason})", file=path, hint="restore the file") from None
    return content if isinstance(content, dict) else {}


def _mark(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The messages with each special token that they spell replaced by a mark, and what the marks stand for.

    A mark holds a digest of the messages, so no message can hold a mark.
    """
    specials = _pattern(tokenizer)
    if specials is None or not any(specials.search(text) for text in _strings(messages)):
        return [dict(message) for message in messages], {}
    nonce = hashlib.sha256(json.dumps(list(map(dict, messages)), default=str).encode()).hexdigest()[:32]
    marks: dict[str, str] = {}

    def mark(found: re.Match[str]) -> str:
        name = f"x{nonce}y{len(marks)}z"
        marks[name] = found[0]
        return name

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return specials.sub(mark, value)
        if isinstance(value, Mapping):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list | tuple) else value

    return [marked(message) for message in messages], marks


def _strings(value: Any) -> list[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in _strings(item)]


def _pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Finds special tokens as they are spelled, the longest first."""
    spelled = sorted(tokenizer.specials, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled))) if spelled else None


def _ids(tokenizer: Tokenizer, rendered: str, marks: Mapping[str, str]) -> list[int]:
    """The ids of a rendered conversation: the template's special tokens are meant, the marked ones are spelled out."""
    specials = _pattern(tokenizer)
    if not marks or specials is None:
        return tokenizer.encode_with_specials(rendered)
    unmark = re.compile("|".join(map(re.escape, marks)))
    ids: list[int] = []
    start = 0
    for found in [*specials.finditer(rendered), None]:
        end = found.start() if found else len(rendered)
        ids += tokenizer.encode(unmark.sub(lambda mark: marks[mark[0]], rendered[start:end]))
        if found:
            ids.append(tokenizer.special(found[0]))
            start = found.end()
    return ids
