"""Generation: when it ends, what it shows, and that a cache changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl import device
from llmctl.errors import DataError, UsageError
from llmctl.inference.generate import Delta, TextStream, complete, generate, samples, stream
from llmctl.inference.runners import TorchRunner, Writer
from llmctl.inference.sampling import Sampling
from llmctl.model import hf
from llmctl.model.transformer import Decoder
from llmctl.text import tokenizer as tokenizers
from llmctl.text.tokenizer import Tokenizer
from tests.inference.scripted import Scripted
from tests.shapes import SHAPES

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([], "byte")


def said(tokenizer: Tokenizer, text: str, sampling: Sampling, end: bool = True) -> list[Delta]:
    """The deltas when the model says `text`, and then ends it."""
    return list(stream(Scripted(tokenizer.encode(text) + [2] * end), tokenizer, [1], sampling))


def sampling(*stop: str, max_tokens: int | None = None, ignore_eos: bool = False) -> Sampling:
    return Sampling(temperature=0.0, stop=stop, max_tokens=max_tokens, ignore_eos=ignore_eos)


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_decoding_takes_the_tokens_of_whole_passes(shape: str) -> None:
    model = Decoder.random(SHAPES[shape], 4).eval()
    prompt = [1, 17, 44, 3, 9]
    found = [
        token.id for token in generate(TorchRunner.of(model), prompt, Sampling(0.0, max_tokens=30, ignore_eos=True))
    ]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(30):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert found == ids[5:]


def test_the_end_of_the_text_ends_it(tokenizer: Tokenizer) -> None:
    found = complete(Scripted([*tokenizer.encode("hello"), 2, *tokenizer.encode("more")]), tokenizer, [1], GREEDY)
    assert (found.text, found.finish_reason) == ("hello", "stop")
    assert found.ids[-1] == 2
    assert all(-0.01 < logprob <= 0 for logprob in found.logprobs)


def test_ignoring_the_end(tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    found = complete(Scripted(script), tokenizer, [1], sampling(max_tokens=3, ignore_eos=True))
    assert (found.text, found.finish_reason) == ("ab", "length")


@pytest.mark.parametrize(("max_tokens", "text"), [(3, "hel"), (1, "h"), (0, ""), (5, "hello")])
def test_max_tokens(tokenizer: Tokenizer, max_tokens: int, text: str) -> None:
    found = complete(Scripted(tokenizer.encode("hello!")), tokenizer, [1], sampling(max_tokens=max_tokens))
    assert (found.text, len(found.tokens), found.finish_reason) == (text, max_tokens, "length")


def test_the_end_at_the_last_token_is_an_end(tokenizer: Tokenizer) -> None:
    assert complete(Scripted([50, 2]), tokenizer, [1], sampling(max_tokens=2)).finish_reason == "stop"


def test_the_context_ends_it(tokenizer: Tokenizer) -> None:
    found = complete(Scripted([50] * 99, max_length=10), tokenizer, [1] * 4, sampling(max_tokens=99))
    assert (len(found.tokens), found.finish_reason) == (6, "length")


@pytest.mark.parametrize(("length", "named"), [(0, "empty"), (10, "10 tokens"), (11, "11 tokens")])
def test_prompts_that_do_not_fit(length: int, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        next(generate(Scripted([], max_length=10), [1] * length, GREEDY))


@pytest.mark.parametrize("stop", ["lo w", "o wo", "wor", "world"])
def test_a_stop_string_ends_it_and_is_never_shown(tokenizer: Tokenizer, stop: str) -> None:
    """Every byte is a token here, so each stop string lies across boundaries."""
    deltas = said(tokenizer, "hello world", sampling(stop))
    assert "".join(delta.text for delta in deltas) == "hello world".partition(stop)[0]
    assert deltas[-1].finish_reason == "stop"
    shown = ""
    for delta in deltas:
        shown += delta.text
        assert not any(shown.endswith(stop[:length]) for length in range(1, len(stop) + 1)) or "hello".startswith(shown)


def test_generation_ends_with_the_stop_string(tokenizer: Tokenizer) -> None:
    runner = Scripted(tokenizer.encode("hello world"))
    complete(runner, tokenizer, [1], sampling("lo"))
    assert len(runner.calls) == 5


def test_what_only_looked_like_a_stop_string_is_shown(tokenizer: Tokenizer) -> None:
    assert [delta.text for delta in said(tokenizer, "a###b", sampling("####"))] == ["a", "###b", ""]
    assert "".join(delta.text for delta in said(tokenizer, "a###", sampling("####"))) == "a###"
    assert "".join(delta.text for delta in said(tokenizer, "aab", sampling("ab"))) == "a"


def test_the_first_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert "".join(delta.text for delta in said(tokenizer, "one two three", sampling("three", "two"))) == "one "


def test_a_character_is_shown_whole(tokenizer: Tokenizer) -> None:
    deltas = said(tokenizer, "né 語 🙂", sampling())
    assert [delta.text for delta in deltas] == [*"né 語 🙂", ""]
    assert [len(delta.tokens) for delta in deltas] == [1, 2, 1, 3, 1, 4, 1]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_a_character_cut_off_is_not_shown(tokenizer: Tokenizer, max_tokens: int) -> None:
    deltas = said(tokenizer, "a🙂", sampling(max_tokens=max_tokens))
    assert "".join(delta.text for delta in deltas) == ("a🙂" if max_tokens == 5 else "a")
    assert sum(len(delta.tokens) for delta in deltas) == max_tokens


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=5), max_size=3))
def test_a_stream_is_the_text_up_to_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Nothing else is lost or added, and what was shown is never taken back."""
    made = tokenizers.train([], "byte")
    shown, ends = TextStream(made, stop), ""
    for id in made.encode(text):
        ends += shown.push(id)
        if shown.stopped:
            break
    else:
        ends += shown.flush()
    plain = made.decode(made.encode(text))
    # The one that is complete first ends the text; of those complete at the same character, the one that begins first.
    found = [(plain.find(s) + len(s), plain.find(s)) for s in stop if s in plain]
    assert ends == (plain[: min(found)[1]] if found else plain)


def test_cancelling_ends_it_before_the_next_step(tokenizer: Tokenizer) -> None:
    runner, answers = Scripted([50] * 99), iter([False, False, True])
    deltas = list(stream(runner, tokenizer, [1], GREEDY, cancel=lambda: next(answers)))
    assert deltas[-1].finish_reason == "cancelled"
    assert len(runner.calls) == 2


def test_cancelling_a_long_prompt(tokenizer: Tokenizer) -> None:
    runner, answers = Scripted([50], max_length=5000), iter([False, False, True])
    assert not list(generate(runner, [1] * 4000, GREEDY, cancel=lambda: next(answers)))
    assert runner.calls == [512, 512]


def test_a_prompt_in_chunks_is_the_prompt() -> None:
    model = Decoder.random(SHAPES["qwen3"], 4).eval()
    prompt = np.random.default_rng(0).integers(0, 97, 200).tolist()
    runner = TorchRunner.of(model)
    whole = list(generate(runner, prompt, Sampling(0.0, max_tokens=5)))
    cache = runner.new_cache(max_length=200)
    for start in range(0, 200, 70):
        logits = runner.forward(np.array([prompt[start : start + 70]]), cache)
    assert whole[0].id == logits[0, -1].argmax()


def test_two_runs_with_a_seed_are_equal_and_two_without_differ(tokenizer: Tokenizer) -> None:
    runner = TorchRunner.of(Decoder.random(SHAPES["llama"], 0))

    def ids(seed: int | None) -> list[int]:
        return [token.id for token in generate(runner, [1, 5], Sampling(seed=seed, max_tokens=30, ignore_eos=True))]

    assert ids(3) == ids(3)
    assert ids(3) != ids(4)
    assert ids(None) != ids(None)


@pytest.mark.parametrize("kind", ["decoder", "recurrent", "encoder-decoder"])
def test_samples_of_one_prompt_are_those_drawn_one_by_one(tokenizer: Tokenizer, kind: str) -> None:
    """The prompt is read once, and rows leave the batch as they end."""
    runner = TorchRunner.of(writer(kind, len(tokenizer)))
    runner.eos_ids = tuple(range(2, 40))  # so many that texts end at many lengths
    settings = Sampling(temperature=1.0, seed=7, max_tokens=40, stop=("zz",), logprobs=2, repetition_penalty=1.2)
    found = samples(runner, tokenizer, [50, 60, 70], settings, 8)
    for i, text in enumerate(found):
        alone = complete(runner, tokenizer, [50, 60, 70], replace(settings, seed=7 + i))
        assert (text.ids, text.text, text.finish_reason) == (alone.ids, alone.text, alone.finish_reason)
        np.testing.assert_allclose(text.logprobs, alone.logprobs, atol=1e-5)
    assert len({len(text.tokens) for text in found}) > 3
    assert len({tuple(text.ids) for text in found}) == 8
    assert [text.tokens for text in samples(runner, tokenizer, [50], replace(settings, max_tokens=0), 2)] == [(), ()]


def writer(kind: str, vocab_size: int) -> Writer:
    """A tiny random model of a kind."""
    shape = replace(SHAPES["llama"], vocab_size=vocab_size)
    if kind == "recurrent":
        shape = replace(shape, family="lstm", kind="recurrent", positions="none")
    if kind == "encoder-decoder":
        t5 = {"positions": "relative", "num_decoder_layers": 2, "decoder_start_token_id": 3, "attention_scale": 1.0}
        shape = replace(shape, family="t5", kind="encoder-decoder", task="seq2seq-lm", **t5)
    model = hf.random(shape, 0)
    assert isinstance(model, Writer)
    return model.eval()


def test_an_encoder_reads_the_prompt_and_the_answer_has_the_context_to_itself(tokenizer: Tokenizer) -> None:
    runner = TorchRunner.of(writer("encoder-decoder", len(tokenizer)))
    assert (runner.start_ids, runner.max_length) == ((3,), 320)
    endless = Sampling(0.0, ignore_eos=True)
    assert len(list(generate(runner, [50] * 300, endless))) == 319
    with pytest.raises(UsageError, match="321 tokens"):
        next(generate(runner, [50] * 321, endless))
    one, other = (complete(runner, tokenizer, [50, at], replace(endless, max_tokens=1)).logprobs for at in (51, 52))
    assert one != other  # what is said depends on what was read


def test_a_model_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    config = replace(SHAPES["llama"], task="sequence-classification", num_labels=2, pooling="last")
    hf.save(hf.random(config, 0), tmp_path, tmp_path)
    with pytest.raises(DataError, match="writes no text"):
        TorchRunner(tmp_path, device.pick("cpu"))
