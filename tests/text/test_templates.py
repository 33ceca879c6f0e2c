"""Templates of the shapes in use, rendered by llmctl and by transformers: the same string, the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmctl.errors import DataError
from llmctl.text import chat
from llmctl.text.chat import CHATML, ChatTemplate
from llmctl.text.tokenizer import Tokenizer
from tests.text.kinds import KINDS

FOLDER = Path(__file__).parent / "templates"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))} | {"chatml": CHATML}
MARKUP = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
MARKUP += ["<end_of_turn>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather of a city, <b>now</b> & "later", für Köln und 北京',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "abc123DEF", "type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "n": 1.5}}}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CHATS: dict[str, list[dict[str, Any]]] = {
    "one question": [turn("user", "  What is 1 < 2 & 'x'? \n")],
    "with a system": [turn("system", "Be brief.\n"), turn("user", "Why? 😀")],
    "several turns": [
        turn("system", "Sei kurz."),
        turn("user", "你好"),
        turn("assistant", "你好！\n\n有什么？"),
        turn("user", "{{ bos_token }} {% raise %}"),
    ],
    "thinking": [
        turn("user", "1+1?"),
        turn("assistant", "<think>\nadd them\n</think>\n\n2"),
        turn("user", "2+2?"),
        turn("assistant", "4", reasoning_content="again\n", tool_calls=None),
    ],
    "older names of reasoning": [turn("user", "1+1?"), turn("assistant", "2", thinking="add")],
    "a tool": [
        turn("user", "The weather in 北京?"),
        turn("assistant", None, tool_calls=[CALL]),
        turn("tool", "sunny, 30°", name="weather", tool_call_id="abc123DEF"),
        turn("assistant", "It is sunny."),
        turn("user", "Thanks."),
    ],
    "parts": [turn("user", [{"type": "text", "text": " Hello "}, {"type": "image"}])],
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"tools": [WEATHER, WEATHER], "add_generation_prompt": True},
    "documents": {"documents": [{"title": f"t{n}", "text": "some words " * 5} for n in range(5)]},
    "variables": {"variables": {"enable_thinking": False, "date_string": "1 Jan 2026", "builtin_tools": ["weather"]}}
    | {"add_generation_prompt": True},
}


@pytest.fixture(scope="module", params=["llama3", "llama2", "llama2_legacy", "gemma"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    made = KINDS[request.param]()
    made.add_special_tokens({"additional_special_tokens": MARKUP})
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(saved: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def ours(saved: Path) -> Tokenizer:
    return Tokenizer.load(saved)


def expected(theirs: Any, source: str, messages: Any, extras: dict[str, Any], **how: Any) -> Any:
    """What transformers makes of it; None where the template refuses."""
    options = {key: value for key, value in extras.items() if key != "variables"} | dict(extras.get("variables", {}))
    try:
        return theirs.apply_chat_template(messages, chat_template=source, **options, **how)
    except Exception:
        return None


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_string_and_the_same_ids(name: str, ours: Tokenizer, theirs: Any) -> None:
    template, compared = ChatTemplate(SOURCES[name]), 0
    for messages in CHATS.values():
        for extras in EXTRAS.values():
            text = expected(theirs, template.source, messages, extras, tokenize=False)
            if text is None:
                with pytest.raises(DataError, match="the chat template failed"):
                    template.render(messages, names=ours.special_names, **extras)
                continue
            assert template.render(messages, names=ours.special_names, **extras) == text
            ids = expected(theirs, template.source, messages, extras, tokenize=True, return_dict=False)
            assert chat.encode(template, ours, messages, **extras) == ids
            compared += 1
    assert compared >= 15


@pytest.mark.parametrize("name", SOURCES)
def test_a_special_token_that_is_spelled_stays_text(name: str, ours: Tokenizer, theirs: Any) -> None:
    """transformers does the same when asked to (`sanitize_control_tokens`), except for the keys of a schema."""
    spelled = f" a {ours.special_names['eos_token']} b<|im_end|>[INST] c <start_of_turn>x<|eot_id|>"
    messages = [turn("user", spelled), turn("assistant", f"no{spelled}"), turn("user", "x")]
    function = {"name": "f", "description": spelled, "parameters": {"x": 1}}
    keyed = {**function, "parameters": {spelled: 1}}
    template = ChatTemplate(SOURCES[name])
    harmless = [turn("user", "o"), turn("assistant", "n"), turn("user", "x")]
    for tools in (None, [{"type": "function", "function": function}], [{"type": "function", "function": keyed}]):
        options = {"tools": tools and [WEATHER]}
        plain = expected(theirs, template.source, harmless, options, tokenize=True, return_dict=False)
        ids = chat.encode(template, ours, messages, tools=tools)
        assert [index for index in ids if index in ours.special_ids] == [
            index for index in plain if index in ours.special_ids
        ]
        if ours.unk_id is None and name != "documents" and (not tools or tools[0]["function"] is function):
            assert ours.decode(ids).count("<|im_end|>[INST]") >= 2
            how = {"tools": tools, "sanitize_control_tokens": True, "return_dict": False}
            assert ids == theirs.apply_chat_template(messages, chat_template=template.source, **how)


@pytest.mark.parametrize("name", ["chatml", "qwen-2.5", "llama-3.1", "gemma-3"])
def test_the_last_message_can_be_continued(name: str, ours: Tokenizer, theirs: Any) -> None:
    template = ChatTemplate(SOURCES[name])
    for end in ("The answer", "The answer is ", "The\n"):
        messages = [turn("user", "?"), turn("assistant", end)]
        text = expected(theirs, template.source, messages, {"continue_final_message": True}, tokenize=False)
        assert template.render(messages, names=ours.special_names, continue_final_message=True) == text
        assert text.rstrip().endswith(end.strip())
    for messages in ([turn("user", "?"), turn("assistant", "")], []):
        with pytest.raises(DataError, match=r"no content to continue|failed"):
            template.render(messages, continue_final_message=True)


def test_several_templates_by_name(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(saved)
    made.chat_template = {"default": "plain {{ messages[0].content }}", "tool_use": "tools {{ tools | tojson }}"}
    made.save_pretrained(tmp_path)
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    assert ChatTemplate.load(again) == loaded
    messages = [turn("user", "x")]
    for tools in (None, [WEATHER]):
        text = made.apply_chat_template(messages, tools=tools, tokenize=False)
        assert loaded.render(messages, tools=tools) == text
        assert text.startswith("plain" if tools is None else "tools")
