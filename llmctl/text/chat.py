"""Chat templates: a conversation as text, as ids, and which of those ids are the assistant's.

The template travels inside the model artifact (chat_template.jinja, as transformers has it): training, evaluation,
export and serving render alike. It spells special tokens; what people write must not: a special token spelled in a
message is encoded as the characters it is spelled with, and never becomes the token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.text import sandbox
from llmctl.text.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
MORE = "additional_chat_templates"  # a folder of further ones
Message = Mapping[str, Any]

_HERE = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own: a template sees the same text, and the space shows trimming

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
    others: Mapping[str, str] = field(default_factory=dict, hash=False)  # by name; "tool_use" is the one for tools

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder; None for a base model, which has none.

        As transformers has it: the files chat_template.jinja and additional_chat_templates/NAME.jinja go before what
        tokenizer_config.json holds, one template or several by name.
        """
        path, stated = folder / "tokenizer_config.json", _config(folder).get("chat_template")
        found: dict[Any, Any] = {"default": stated}
        if isinstance(stated, list):
            found = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        files = sorted((folder / MORE).glob("*.jinja"))
        if files or (folder / TEMPLATE).is_file():
            found = {file.stem: file.read_text(encoding="utf-8") for file in files}
            if (folder / TEMPLATE).is_file():
                path = folder / TEMPLATE
                found["default"] = path.read_text(encoding="utf-8")
        named = {name: source for name, source in found.items() if isinstance(source, str) and source}
        default = named.pop("default", None)
        return cls(default, path, named) if default else None

    def save(self, folder: Path) -> None:
        """Writes chat_template.jinja, and the further templates into additional_chat_templates/."""
        (folder / TEMPLATE).write_text(self.source, encoding="utf-8")
        for name, source in self.others.items():
            path = folder / MORE / f"{Path(name).name}.jinja"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source, encoding="utf-8")

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        names: Mapping[str, str] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it: the string of transformers' `apply_chat_template`.

        Args:
            messages: role, content, and whatever else the template reads; keys whose value is None are left out.
            add_generation_prompt: end with the beginning of an answer.
            names: the special tokens that the template can name (`bos_token` ...).
            tools: JSON schemas of functions; the template named "tool_use" renders them where there is one.
            documents: what to answer from, each with `title` and `text`.
            continue_final_message: end within the last message, so that a model goes on with it.
            variables: what else this template reads, such as Qwen 3's `enable_thinking`.

        Raises:
            DataError: the template refuses the messages, reaches out of its sandbox, or takes too much time or memory.
        """
        source = self.source if tools is None else self.others.get("tool_use", self.source)
        turns = [_as_templates_read(message) for message in messages]
        last = str(turns[-1].get("content") or "") if continue_final_message and turns else ""
        if last:
            turns[-1]["content"] = last + _HERE
        context = {
            **(names or {}),
            **(variables or {}),
            "messages": turns,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        renderer = sandbox.render if source == CHATML else sandbox.render_apart
        try:
            text = renderer(source, context)
        except sandbox.RenderError as reason:
            hint = "mend the messages, or use another template"
            raise DataError(f"the chat template failed: {reason}", file=self.shown, hint=hint) from None
        return _cut(text, last, self.shown) if continue_final_message else text


def encode(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a conversation: those of transformers' `apply_chat_template` if nothing in it spells a special token.

    Arguments and errors are those of `ChatTemplate.render`.
    """
    said = {"messages": list(messages), "tools": tools, "documents": documents, "variables": variables}
    marked, marks = _mark(said, tokenizer)
    rendered = template.render(
        marked["messages"],
        add_generation_prompt,
        tokenizer.special_names,
        tools=marked["tools"],
        documents=marked["documents"],
        continue_final_message=continue_final_message,
        variables=marked["variables"],
    )
    return tokenizer.encode_with_specials(rendered, marks)


def supervised(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and a mask of those to learn: what the assistant says, and the token that ends it.

    Each turn is found by rendering the conversation up to it, so a template needs no marks of its own.

    Raises:
        DataError: as `ChatTemplate.render`; or a template that writes a turn otherwise once others follow.
    """
    marked, marks = _mark(list(messages), tokenizer)

    def ids_of(turns: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        rendered = template.render(turns, add_generation_prompt, tokenizer.special_names)
        return tokenizer.encode_with_specials(rendered, marks)

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


def _as_templates_read(message: Message) -> dict[str, Any]:
    """A message as transformers hands it over: nothing that is None, reasoning under each name that templates use."""
    turn = {key: value for key, value in message.items() if value is not None}
    reasoning = next((turn[key] for key in ("reasoning_content", "thinking", "reasoning") if key in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def _cut(text: str, last: str, shown: Path) -> str:
    """The text up to where its last message ends; without the space behind that, where the template trimmed it off."""
    at = text.rfind(_HERE.strip())
    if not last or at < 0 or last.strip() not in text:
        problem = "the last message has no content to continue, or the chat template does not write it as it is"
        raise DataError(problem, file=shown, hint="ask for a new answer instead")
    return text[:at] if text[at : at + len(_HERE)] == _HERE else text[:at].rstrip()


def _mark(said: Any, tokenizer: Tokenizer) -> tuple[Any, dict[str, str]]:
    """A JSON value with each special token that its strings spell replaced by a mark, and what the marks stand for.

    A mark holds a digest of the value, so nothing in it can hold a mark; all digits, which no filter writes otherwise.
    """
    spelled = sorted(tokenizer.specials, key=len, reverse=True)
    specials = re.compile("|".join(map(re.escape, spelled)))
    if not spelled or not any(specials.search(text) for text in _strings(said)):
        return said, {}
    digest = int(hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:32], 16)
    marks: dict[str, str] = {}

    def mark(found: re.Match[str]) -> str:
        name = f"{digest:040}{len(marks):08}"
        marks[name] = found[0]
        return name

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return specials.sub(mark, value)
        if isinstance(value, Mapping):
            return {marked(key): marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list | tuple) else value

    return marked(said), marks


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, the keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
