"""`llmctl finetune`, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.project import Project


def chats(project: Project, *turns: tuple[str, str], times: int = 1) -> None:
    rows = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in turns]
    lines = [json.dumps({"messages": row}) + "\n" for row in rows] * times
    (project.path / "chats.jsonl").write_text("".join(lines))


def test_what_is_published(finished: Project) -> None:
    """Merged weights, the chat template, and every id that ends a turn or a text."""
    folder = finished.run / "finetune"
    assert (folder / "chat_template.jinja").read_text()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [6, 2]  # <|im_end|>, </s>
    assert not (folder / "adapter").exists()
    assert (folder / "tokenizer.json").read_bytes() == (finished.run / "pretrain" / "tokenizer.json").read_bytes()


def test_the_end_of_a_turn_is_supervised_and_the_question_is_not(finished: Project) -> None:
    from llmctl.finetune.batches import Example, collate
    from llmctl.text import chat
    from llmctl.text.chat import ChatTemplate
    from llmctl.text.tokenizer import Tokenizer
    from llmctl.training.batch import IGNORED

    folder = finished.run / "finetune"
    tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
    assert template is not None
    messages = [{"role": "user", "content": "What is 1 and 1?"}, {"role": "assistant", "content": "It is 2."}]
    ids, mask = chat.supervised(template, tokenizer, messages)
    batch = collate([Example(tuple(ids), tuple(mask))], tokenizer.pad_id or 0, 64)
    labels = [label for label in batch.labels[0].tolist() if label != IGNORED]
    assert labels[-1] == tokenizer.special("<|im_end|>")
    assert tokenizer.decode(labels) == "It is 2."


def test_the_supervised_share_is_told_and_right(finished: Project) -> None:
    from llmctl.text import chat
    from llmctl.text.chat import ChatTemplate
    from llmctl.text.conversations import conversations
    from llmctl.text.sources import is_held_out
    from llmctl.text.tokenizer import Tokenizer

    folder = finished.run / "finetune"
    tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
    assert template is not None
    every = list(conversations("chats.jsonl", finished.path))
    masks = [chat.supervised(template, tokenizer, found.messages)[1] for found in every if not is_held_out(found, 6.0)]
    share = sum(map(sum, masks)) / sum(map(len, masks))
    metrics = finished.manifest("finetune")["metrics"]
    assert metrics["supervised_share"] == pytest.approx(share)
    assert metrics["conversations"] == len(masks) < len(every)
    assert f"{100 * share:.0f} % of tokens supervised" in (finished.run / "logs" / "finetune.log").read_text()


def test_learning_to_answer_shows_in_the_figures(finished: Project) -> None:
    metrics = finished.manifest("finetune")["metrics"]
    assert metrics["answer_bits_per_byte"] < metrics["answer_bits_per_byte_before"]


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ([("What is it?", "word " * 300)] * 4, "longer than 64 tokens"),
        ([("What is it?", "")] * 4, ""),
    ],
)
def test_nothing_to_learn_from_is_an_error(finished: Project, turns: list[tuple[str, str]], why: str) -> None:
    """trl#6668: every label masked, loss 0.0, success."""
    chats(finished, *[(f"{ask} {index}", answer) for index, (ask, answer) in enumerate(turns)])
    before = finished.weights("finetune")
    done = finished.llmctl("finetune", "t.toml", "--json")
    assert done.code == 3, done.err
    assert done.json["error"]["file"].startswith("chats.jsonl")
    assert why in done.json["error"]["message"]
    assert finished.weights("finetune") == before


def test_long_conversations_are_left_out_and_counted(finished: Project) -> None:
    path = finished.path / "chats.jsonl"
    long = {"prompt": "Tell me.", "completion": "word " * 300}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    done = finished.llmctl("finetune", "t.toml")
    assert done.code == 0, done.err
    assert "1 of 39 conversations are longer than 64 tokens and are left out" in done.out


def test_one_conversation_is_too_few(finished: Project) -> None:
    chats(finished, ("What is it?", "It is it."))
    done = finished.llmctl("finetune", "t.toml")
    assert done.code == 3
    assert "1 conversations are too few" in done.err or "1 conversation is too few" in done.err


def test_a_handful_of_conversations_is_enough(finished: Project) -> None:
    chats(finished, ("What is 1?", "It is 1."), ("What is 2?", "It is 2."), ("What is 3?", "It is 3."))
    done = finished.llmctl("finetune", "t.toml", "--json")
    assert done.code == 0, done.err
    assert done.json["metrics"]["conversations"] == 2


def test_a_line_that_is_no_json_is_named(finished: Project) -> None:
    path = finished.path / "chats.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[7] = '{"messages": [\n'
    path.write_text("".join(lines))
    done = finished.llmctl("finetune", "t.toml", "--json")
    assert done.code == 3
    assert (done.json["error"]["file"], done.json["error"]["line"]) == ("chats.jsonl", 8)
    assert finished.llmctl("finetune", "t.toml", "--set", "finetune.on_error=skip").code == 0


def test_a_context_that_is_no_multiple_of_the_padding(finished: Project) -> None:
    finished.edit("max_seq_length = 64", "max_seq_length = 50")
    finished.edit("max_steps = 12", "max_steps = 1")
    done = finished.llmctl("finetune", "t.toml")
    assert done.code == 0, done.err


def test_at_most_so_many_examples(finished: Project) -> None:
    finished.edit("max_steps = 6", "max_steps = 6\nmax_examples = 10")
    assert finished.llmctl("finetune", "t.toml").code == 0
    assert finished.manifest("finetune")["metrics"]["conversations"] == 10


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_publishes_the_merged_model_and_the_adapter_beside_it(finished: Project) -> None:
    import torch
    from safetensors.torch import load_file

    done = finished.llmctl("finetune", "t.toml", "--method", "lora")
    assert done.code == 0, done.err
    folder = finished.run / "finetune"
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "adapter_config.json" not in {path.name for path in folder.iterdir()}  # transformers would apply it twice
    base, merged = load_file(finished.run / "pretrain/model.safetensors"), load_file(folder / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert base.keys() == merged.keys()
    moved = 0
    for name, before in base.items():
        key = "base_model.model." + name.removesuffix(".weight")
        expected = before
        if f"{key}.lora_A.weight" in adapter:
            low, high = adapter[f"{key}.lora_A.weight"], adapter[f"{key}.lora_B.weight"]
            expected = before + (high @ low) * (config["lora_alpha"] / config["r"])
            moved += not torch.equal(expected, before)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
    assert moved == 7


def test_a_lora_finetune_resumes_bitwise(finished: Project) -> None:
    assert finished.llmctl("finetune", "t.toml", "--method", "lora").code == 0
    whole = finished.weights("finetune")
    shutil.rmtree(finished.run / "finetune")
    stop = (
        "import os, llmctl.training.checkpoint as c; write = c.write\n"
        "c.write = lambda w, state, *a: (write(w, state, *a), os.kill(os.getpid(), 9) if state['step'] == 4 else 0)"
    )
    assert finished.llmctl("finetune", "t.toml", "--method", "lora", before=stop).code == -9
    done = finished.llmctl("finetune", "t.toml", "--method", "lora")
    assert "resuming at step 4 of 6" in done.out
    assert finished.weights("finetune") == whole


# ------------------------------------------------------------------------------------------------------------ held out


def test_the_same_modules_are_held_out_of_both() -> None:
    """The built-in chats are about the built-in text: what one is tested on the other must not have read."""
    from llmctl.text import builtin
    from llmctl.text.conversations import conversations
    from llmctl.text.sources import Tally, documents, is_held_out

    texts = {found.key: is_held_out(found, 6.0) for found in documents("builtin:python-stdlib", Path(), tally=Tally())}
    seen = 0
    for chat in conversations("builtin:python-docstrings", Path()):
        assert chat.key in texts
        assert is_held_out(chat, 6.0) == texts[chat.key]
        seen += is_held_out(chat, 6.0)
    assert seen > 100
    assert builtin.NAMES
