"""Small tokenizers of every kind in use, trained on fixed texts and saved by transformers' own classes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmctl.text import tokenizer

HERE = Path(
    __file__
).parent  # english.txt, chinese.txt: pages of this repository as they once were; training depends on them
TEXTS = [
    "Hello world, it's a test. Don't you think so?",
    "hello",
    "",
    " ",
    "  two  spaces   and three ",
    "tabs\tand\nnewlines\n\n\n  indented\r\nend\n",
    "def f(x: int = 3) -> None:\n    return {'a': [1, 2.5e10]}  # comment\n",
    "自然语言处理很有趣。中文，测试！",
    "naïve café Ünïcode ﬁ ① ＡＢＣ",
    "emoji 😀👩‍👩‍👧🇩🇪 end",
    "שלום عربي हिन्दी ไทย",
    "a\u200bb\u00a0c\u2028d\ufeff\u0301e\ufffd",
    "1234567890 3.14 1,000",
    "UPPER lower MiXeD",
    "<think> not special </think>x",
    " ' quoted ' do not n't .",
]


@functools.cache
def english() -> list[str]:
    return [part for part in (HERE / "english.txt").read_text(encoding="utf-8").split("\n\n") if part]


@functools.cache
def chinese() -> list[str]:
    return [part for part in (HERE / "chinese.txt").read_text(encoding="utf-8").split("\n\n") if part]


@functools.cache
def bytes_bpe(size: int = 800, only_english: bool = False) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*english(), *([] if only_english else chinese())], trainer)
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _with(vocabulary: dict[str, int], pieces: list[str]) -> dict[str, int]:
    return vocabulary | {piece: len(vocabulary) + index for index, piece in enumerate(pieces)}


def gpt2() -> Any:
    from transformers import GPT2Tokenizer

    vocabulary, merges = bytes_bpe()
    return GPT2Tokenizer(vocab=_with(vocabulary, ["<|endoftext|>"]), merges=merges)


def roberta() -> Any:
    from transformers import RobertaTokenizer

    vocabulary, merges = bytes_bpe()
    return RobertaTokenizer(vocab=_with(vocabulary, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]), merges=merges)


def qwen2() -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary, merges = bytes_bpe()
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, extra_special_tokens=["<|im_start|>", "<|im_end|>"], add_prefix_space=False
    )


def llama3(only_english: bool = False) -> Any:
    """Llama 3's and SmolLM's way: a regular expression of their own, BOS by a template, ids behind the vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from llmctl.text.converting import QWEN_WORDS

    vocabulary, merges = bytes_bpe(only_english=only_english)
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    bos = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", "<|begin_of_text|> $A $B", [bos])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def modernbert() -> Any:
    """Byte-level with added runs of spaces, [CLS] and [SEP], and a mask that takes the space before it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = bytes_bpe()
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(" " * count, normalized=True) for count in (4, 3, 2)])
    made.add_special_tokens(
        [
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[PAD]",
            AddedToken("[MASK]", lstrip=True, normalized=False),
            AddedToken("[END]", rstrip=True),
        ]
    )
    ends = [(piece, made.token_to_id(piece)) for piece in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


@functools.cache
def _sentencepiece(only_english: bool = False) -> tuple[dict[str, int], list[tuple[str, str]]]:
    texts = [*english(), *([] if only_english else chinese())]
    model = json.loads(tokenizer.train(texts, "bpe", 900).files["tokenizer.json"])["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def llama2(only_english: bool = False) -> Any:
    from transformers import LlamaTokenizer

    vocabulary, merges = _sentencepiece(only_english)
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def llama2_legacy(only_english: bool = False) -> Any:
    """Llama 2's own tokenizer.json: a normaliser puts the first space, and one after each special token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _sentencepiece(only_english)
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def gemma(only_english: bool = False) -> Any:
    from transformers import GemmaTokenizer

    vocabulary, merges = _sentencepiece(only_english)
    renamed = {"<s>": "<bos>", "</s>": "<eos>"}
    return GemmaTokenizer(
        vocab={renamed.get(piece, piece): index for piece, index in vocabulary.items()}, merges=merges
    )


def bert(lowercase: bool = True) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        [*english(), *chinese()],
        trainers.WordPieceTrainer(vocab_size=1200, special_tokens=specials, show_progress=False),
    )
    return BertTokenizer(vocab=made.get_vocab(), do_lower_case=lowercase)


def bert_cased() -> Any:
    return bert(lowercase=False)


def t5() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([*english()[:200], *chinese()], trainer)
    vocabulary = [(piece, score) for piece, score in json.loads(made.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocabulary, extra_ids=10)


KINDS: dict[str, Callable[[], Any]] = {
    maker.__name__: maker
    for maker in (gpt2, roberta, qwen2, llama3, modernbert, llama2, llama2_legacy, gemma, bert, bert_cased, t5)
}
