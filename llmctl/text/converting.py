"""A tokenizer.json for folders that have only the files of older tokenizers.

    tokenizer.model            SentencePiece, BPE or unigram: Llama 2, Mistral, Gemma, T5
    vocab.json, merges.txt     byte-level BPE: GPT-2, RoBERTa, Qwen
    vocab.txt                  WordPiece: BERT

What such files leave to a class of transformers (which special tokens there are, who adds them, how words are told
apart) follows `tokenizer_class`, else the model_type of config.json. The class becomes PreTrainedTokenizerFast, which
takes tokenizer.json as it stands, so that transformers gives llmctl's ids for what is saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmctl.errors import DataError
from llmctl.text.vocabulary import SPACE

# Qwen 2's words (its tokenizer.json); GPT-2's are what ByteLevel splits by itself.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The types of pieces in a SentencePiece model (sentencepiece_model.proto), which GGUF numbers alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """A piece of a SentencePiece vocabulary."""

    text: str
    score: float = 0.0
    type: int = NORMAL


def files(folder: Path) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json for a folder without the first.

    Raises:
        DataError: nothing there to make them of, or damaged files.
    """
    config, model = (_json(folder / name) for name in ("tokenizer_config.json", "config.json"))
    kind = str(config.get("tokenizer_class") or model.get("model_type") or "").lower()
    if (folder / "tokenizer.model").is_file():
        made, names = _of_sentencepiece(folder / "tokenizer.model", config, kind)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        made, names = _of_merges(folder, config, kind)
    elif (folder / "vocab.txt").is_file():
        made, names = _of_words(folder / "vocab.txt", config)
    else:
        raise DataError(
            "no tokenizer.json in the folder",
            file=folder,
            hint="name a prep or model artifact, or a Hugging Face folder with its tokenizer's files",
        )
    # The class may add what the converted file already does.
    rest = {key: value for key, value in config.items() if key not in ("add_bos_token", "add_eos_token")}
    stated = {**names, **rest, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(stated, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def sentencepiece_bpe(pieces: Iterable[Piece], *, dummy_prefix: bool) -> Any:
    """The `tokenizers` object of a SentencePiece BPE vocabulary: Llama 2's, Gemma's, or a GGUF's of kind "llama".

    SentencePiece merges by the score of the merged piece, `tokenizers` by rank: each way to split a piece into two is a
    merge, ranked by that piece's score. With `dummy_prefix` a text begins with a space of the encoding's own.
    """
    from tokenizers import Tokenizer, models

    listed = list(pieces)
    ids = {piece.text: index for index, piece in enumerate(listed)}
    normal = {piece.text: piece.score for piece in listed if piece.type in (NORMAL, USER_DEFINED)}
    merges = [
        (text[:cut], text[cut:])
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    merges.sort(key=lambda pair: (-normal[pair[0] + pair[1]], ids[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]))
    unknown = next((piece.text for piece in listed if piece.type == UNKNOWN), None)
    bytes_ = any(piece.type == BYTE for piece in listed)
    made = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_))
    return _spaced(made, listed, [], dummy_prefix)


def _sentencepiece_unigram(pieces: list[Piece], normal: list[Any], unknown: int, dummy_prefix: bool) -> Any:
    from tokenizers import Tokenizer, models

    # The library searches a text for every piece; the special, unused and byte ones must never be the best way.
    never = min(piece.score for piece in pieces) - 1000.0
    scored = [(piece.text, piece.score if piece.type in (NORMAL, USER_DEFINED) else never) for piece in pieces]
    bytes_ = any(piece.type == BYTE for piece in pieces)
    return _spaced(Tokenizer(models.Unigram(scored, unknown, bytes_)), pieces, normal, dummy_prefix)


def _spaced(made: Any, pieces: list[Piece], normal: list[Any], dummy_prefix: bool) -> Any:
    """Spells spaces as U+2581, one of them before the text where SentencePiece adds one, and takes them back."""
    from tokenizers import AddedToken, decoders, normalizers

    prefix = [normalizers.Prepend(SPACE)] if dummy_prefix else []
    made.normalizer = normalizers.Sequence([*normal, *prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.add_tokens(
        [
            AddedToken(piece.text, normalized=piece.type == USER_DEFINED, special=piece.type != USER_DEFINED)
            for piece in pieces
            if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return made


def _of_sentencepiece(path: Path, config: Mapping[str, Any], kind: str) -> tuple[Any, dict[str, str]]:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, normalizers, processors

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except Exception:  # protobuf's own, whose module has no types
        proto = sentencepiece_model_pb2.ModelProto()
    if not proto.pieces:
        hint = "tiktoken's and other files of this name are not read: save the tokenizer with transformers"
        raise DataError("not a SentencePiece model", file=path, hint=hint)
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    if spec.model_type == spec.BPE:
        made = sentencepiece_bpe(pieces, dummy_prefix=rules.add_dummy_prefix)
    elif spec.model_type == spec.UNIGRAM:
        known = {piece.text for piece in pieces}
        if "t5" in kind and "<extra_id_0>" not in known:  # T5's class puts its sentinels behind the pieces, backwards
            count = int(config.get("extra_ids", 100))
            pieces += [Piece(f"<extra_id_{index}>", 0.0, CONTROL) for index in reversed(range(count))]
        normal: list[Any] = []
        if rules.precompiled_charsmap:
            normal.append(normalizers.Precompiled(rules.precompiled_charsmap))
        if rules.remove_extra_whitespaces:
            normal += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        made = _sentencepiece_unigram(pieces, normal, spec.unk_id, rules.add_dummy_prefix)
    else:
        raise DataError("a SentencePiece model that is neither BPE nor unigram", file=path)
    named = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    names = {name: pieces[index].text for name, index in named.items() if 0 <= index < len(pieces)}
    is_t5 = "t5" in kind or spec.model_type == spec.UNIGRAM
    begins = names.get("bos_token") if config.get("add_bos_token", not is_t5) else None
    ends = names.get("eos_token") if config.get("add_eos_token", is_t5) else None
    single = " ".join(filter(None, (begins, "$A", ends)))
    pair = " ".join(f"{part}:{1 if part == '$B' else 0}" for part in filter(None, (begins, "$A", ends, "$B", ends)))
    specials = [(piece, made.token_to_id(piece)) for piece in (begins, ends) if piece]
    made.post_processor = processors.TemplateProcessing(single, pair, specials)
    return made, names


def _of_merges(folder: Path, config: Mapping[str, Any], kind: str) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    vocabulary = _json(folder / "vocab.json")
    try:
        made = Tokenizer(models.BPE(vocabulary, [(first, second) for first, second in pairs]))
    except Exception as reason:  # the library raises bare Exceptions
        raise DataError(f"not the merges of vocab.json ({reason})", file=folder / "merges.txt") from None
    prefix = bool(config.get("add_prefix_space", False))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if "qwen" in kind:
        names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        made.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(prefix, use_regex=False)])
    elif "roberta" in kind:
        names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
        names |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
        if missing := [piece for piece in names.values() if piece not in vocabulary]:
            raise DataError(f"lacks {', '.join(missing)}", file=folder / "vocab.json", hint="it is not RoBERTa's")
        sep, cls = (("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]))
        made.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=prefix)
        made.add_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([piece for piece in dict.fromkeys(names.values()) if piece in vocabulary])
    return made, {name: piece for name, piece in names.items() if piece in vocabulary}


def _of_words(path: Path, config: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    ids = {word: index for index, word in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))}
    if missing := [piece for piece in names.values() if piece not in ids]:
        raise DataError(f"the vocabulary lacks {', '.join(missing)}", file=path, hint="it is not BERT's")
    made = Tokenizer(models.WordPiece(ids, unk_token=names["unk_token"]))
    made.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [(piece, ids[piece]) for piece in ("[CLS]", "[SEP]")]
    )
    made.add_special_tokens(list(names.values()))
    return made, names


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as reason:
        raise DataError(f"not JSON ({reason})", file=path, hint="restore the file") from None
    return value if isinstance(value, dict) else {}
