"""A tokenizer as GGUF metadata and as Hugging Face's files: the same ids both ways.

GGUF knows two kinds that llmctl uses: "gpt2", bytes spelled as printable characters with a named way to split a text
first, and "llama", SentencePiece's pieces with a score each. Where transformers and llama.cpp read a file differently
(how digits are split, whether a whole word in the vocabulary needs merges, whether a text gets a space before it), this
follows llama.cpp: it defines the format, and agrees with the tokenizers that the models were trained with.

Sources: llama.cpp's llama-vocab.cpp (how each pre-tokenizer splits) and transformers' gguf_tokenizer_mapping.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.errors import DataError
from llmctl.text.converting import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llmctl.text.decoding import ALPHABET
from llmctl.text.vocabulary import SPACE

LONGEST = 512  # characters a piece may have: each way to split it is tried
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "mask_token": "mask"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is split before merging, by tokenizer.ggml.pre: GPT-2's own expression, after cutting out each digit, or
# another expression. The first name of a kind is the one written.
GPT2, DIGITS = "gpt2", "digits"
SPLITS = {
    "gpt-2": GPT2,
    "default": GPT2,
    "olmo": GPT2,
    "mpt": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "codeshell": DIGITS,
    "minerva-7b": DIGITS,
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",
    "tekken": _TEKKEN,
}
SPLITS |= dict.fromkeys(("llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), SPLITS["llama-bpe"])
SPLITS |= dict.fromkeys(("deepseek-r1-qwen", "megrez"), SPLITS["qwen2"])
# A word that is a piece is taken whole, without merging, and a text begins with <s> unless the file says otherwise.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})


# ----------------------------------------------------------------------------------------------- from a GGUF's metadata


def from_metadata(metadata: Mapping[str, Any], architecture: str, path: Path) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, where the file has a template, chat_template.jinja.

    Raises:
        DataError: another kind of tokenizer, another way to split, or lists that contradict each other.
    """
    try:
        tokens, types = _tokens(metadata, path)
        if architecture.startswith("gemma"):  # whose pieces of several spaces are stored as spaces
            tokens = [SPACE * len(piece) if not piece.strip(" ") else piece for piece in tokens]
        config = _config(metadata, tokens, path)
        tokenizer = _tokenizer(metadata, tokens, types, architecture, path)
        _surround(tokenizer, config)
    except DataError:
        raise
    except Exception as reason:  # the library raises bare Exceptions, and a key may be of any type
        raise DataError(f"has a tokenizer that contradicts itself ({reason})", file=path) from None
    if tokenizer.get_vocab_size() != len(tokens):
        raise DataError(f"tokenizer.ggml.tokens has {len(tokens)} pieces, but not all differ", file=path)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    template = metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template.encode()} if isinstance(template, str) and template else {})


def _config(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> dict[str, Any]:
    """tokenizer_config.json: which pieces begin, end and pad a text, and which of them are put around every text."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in NAMES.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            problem = f"tokenizer.ggml.{key}_token_id is {index!r}, but there are {len(tokens)} pieces"
            raise DataError(problem, file=path)
        config[name] = tokens[index]
    begins = kind == "llama" or str(pre) in WHOLE_WORDS
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", begins))
    config["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    return config


def _tokenizer(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], architecture: str, path: Path
) -> Any:
    """The `tokenizers` object, its special pieces declared."""
    from tokenizers import AddedToken

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and pre in SPLITS:
        tokenizer = _byte_level(tokens, types, _merges(metadata, path), pre)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types, architecture, path)
    else:
        found = f"tokenizer.ggml.pre is {pre!r}" if kind == "gpt2" else f"tokenizer.ggml.model is {kind!r}"
        known = ", ".join(SPLITS) if kind == "gpt2" else "gpt2 and llama"
        hint = "import the model's Hugging Face folder, which has its tokenizer.json"
        raise DataError(f"{found}; llmctl builds {known}", file=path, hint=hint)
    by_type = list(zip(tokens, types, strict=True))
    special = [piece for piece, kind in by_type if kind in (UNKNOWN, CONTROL)]
    own = [piece for piece, kind in by_type if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in own])
    return tokenizer


def _surround(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Puts the piece that begins a text before every text, and the one that ends it behind, where the file says so."""
    from tokenizers import processors

    ends = (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token"))
    before, after = ([config[piece]] if config[adds] and piece in config else [] for adds, piece in ends)
    if before or after:
        second = [f"{piece}:1" for piece in (*before, "$B", *after)]
        ids = [(piece, tokenizer.token_to_id(piece)) for piece in (*before, *after)]
        single = [*before, "$A", *after]
        tokenizer.post_processor = processors.TemplateProcessing(single, [*single, *second], ids)


def _tokens(metadata: Mapping[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """The pieces in the order of their ids, and each one's type."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise DataError("has no tokenizer.ggml.tokens", file=path, hint="a GGUF file without a vocabulary is not read")
    if (longest := max(map(len, tokens))) > LONGEST:
        raise DataError(f"tokenizer.ggml.tokens has a piece of {longest:,} characters; {LONGEST} are read", file=path)
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:  # then at least what begins and ends a text is no ordinary piece
        ends = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot")}
        return tokens, [CONTROL if index in ends else NORMAL for index in range(len(tokens))]
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        found = len(types) if isinstance(types, np.ndarray | list) else types
        raise DataError(f"tokenizer.ggml.token_type has {found} entries for {len(tokens)} pieces", file=path)
    return tokens, types.tolist()


def _merges(metadata: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    """The merges that the file lists, the first ones first."""
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", []):
        pair = tuple(str(merge).split(" "))
        if len(pair) != 2:
            raise DataError(f"tokenizer.ggml.merges holds {merge!r}, but a merge is two pieces", file=path)
        merges.append(pair)
    return merges


def _byte_level(tokens: Sequence[str], types: Sequence[int], merges: list[tuple[str, str]], pre: str) -> Any:
    """GPT-2's kind; special pieces, and those a user added, are spelled as they are read, all others by bytes."""
    from tokenizers import Tokenizer, decoders, models

    characters = {byte: char for char, byte in ALPHABET.items()}

    def spelling(piece: str, kind: int) -> str:
        as_read = kind in (CONTROL, USER_DEFINED) or ALPHABET.keys() >= set(piece)
        return piece if as_read else "".join(characters[byte] for byte in piece.encode())

    pieces = zip(tokens, types, strict=True)
    vocabulary = {spelling(piece, kind): index for index, (piece, kind) in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=pre in WHOLE_WORDS))
    tokenizer.pre_tokenizer = _pre_tokenizer(SPLITS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(split: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if split == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == DIGITS:
        steps: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        steps = [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], architecture: str, path: Path
) -> Any:
    """SentencePiece's BPE with byte fallback: the merges of the file, or those that the pieces' scores imply."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    gemma = architecture.startswith("gemma")
    if "tokenizer.ggml.merges" in metadata:
        merges = _merges(metadata, path)
    else:
        # The order of Gemma's merges is that of the ids, not of the scores.
        scores: Any = -np.arange(len(tokens)) if gemma else metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
            raise DataError(f"has no tokenizer.ggml.scores for its {len(tokens)} pieces", file=path)
        merges = _implied(tokens, types, scores.tolist())
    ids = {piece: index for index, piece in enumerate(tokens)}
    unknown = next((piece for piece, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    if unknown is None and (index := metadata.get("tokenizer.ggml.unknown_token_id", -1)) in range(len(tokens)):
        unknown = tokens[index]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in ids))
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    if metadata.get("tokenizer.ggml.add_space_prefix", not gemma):  # at the beginning, and after each special token
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), tokenizer.normalizer])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _implied(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Each way to split a piece into two, those of the best pieces first (transformers' `generate_merges`).

    Only ordinary pieces merge: a text must not become a special piece by spelling it.
    """
    ids = {piece: index for index, piece in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in ids.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = sorted(
            ((a, b) for a, b in pairs if a in ids and b in ids), key=lambda pair: (ids[pair[0]], ids[pair[1]])
        )
        merges += [(scores[index], len(a), len(b), a, b) for a, b in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(a, b) for *_, a, b in merges]


# ------------------------------------------------------------------------------------------------ to a GGUF's metadata


def to_metadata(files: Mapping[str, bytes], vocab_size: int, path: Path) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file for a tokenizer's files; pieces are filled up to the embedding's rows.

    Raises:
        DataError: a tokenizer that neither kind of GGUF can hold, naming what it has.
    """
    description = json.loads(files["tokenizer.json"])
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    model, decoder = description["model"], description.get("decoder") or {}
    if model["type"] != "BPE":
        raise _unheld(f"a vocabulary of type {model['type']}", path)
    added = {token["id"]: token for token in description.get("added_tokens", ())}
    pieces = {index: piece for piece, index in model["vocab"].items()}
    pieces |= {index: token["content"] for index, token in added.items()}
    if len(pieces) > vocab_size or max(pieces) >= vocab_size:
        raise DataError(f"has {max(pieces) + 1} pieces, but the model's embedding {vocab_size} rows", file=path)
    tokens = [pieces.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [_type(index, pieces, added, model.get("unk_token")) for index in range(vocab_size)]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if decoder.get("type") == "ByteLevel":
        held: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _split_name(description, path)}
    else:
        tokens = _spaced(description, tokens, merges, path)
        prefixed = _prefixes(description)
        held = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": _scores(tokens, merges),
            "tokenizer.ggml.add_space_prefix": prefixed,
        }
    held |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if merges:
        held["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    ids = {piece: index for index, piece in enumerate(tokens)}
    for name, key in NAMES.items():
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value in ids:
            held[f"tokenizer.ggml.{key}_token_id"] = ids[value]
    for end, place in (("bos", 0), ("eos", -1)):
        stated = config.get(f"add_{end}_token")
        special = held.get(f"tokenizer.ggml.{end}_token_id")
        adds = _adds(description, place, special) if stated is None else stated
        held[f"tokenizer.ggml.add_{end}_token"] = bool(adds)
    template = files.get("chat_template.jinja", b"").decode() or config.get("chat_template")
    return held | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _type(index: int, pieces: Mapping[int, str], added: Mapping[int, Any], unknown: str | None) -> int:
    if index not in pieces:
        return UNUSED
    if pieces[index] == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index]["special"] else USER_DEFINED
    return BYTE if re.fullmatch("<0x[0-9A-F]{2}>", pieces[index]) else NORMAL


def _split_name(description: Mapping[str, Any], path: Path) -> str:
    """The name of the way in which a byte-level tokenizer splits its texts."""
    found = _compared(description.get("pre_tokenizer"))
    for name, split in SPLITS.items():
        if found == _compared(json.loads(_pre_tokenizer(split).__getstate__())):
            normalizer = (description.get("normalizer") or {}).get("type")
            if normalizer not in (None, "NFC"):  # llama.cpp leaves out Qwen's NFC too: no text that is typed changes
                raise _unheld(f"a normaliser {normalizer}", path)
            return name
    raise _unheld("a way to split text that GGUF has no name for", path)


def _compared(pre_tokenizer: Any) -> Any:
    """A pre-tokenizer without what changes no ids."""
    if isinstance(pre_tokenizer, dict):
        return {key: _compared(value) for key, value in pre_tokenizer.items() if key not in ("trim_offsets", "invert")}
    return [_compared(item) for item in pre_tokenizer] if isinstance(pre_tokenizer, list) else pre_tokenizer


def _spaced(description: Mapping[str, Any], tokens: list[str], merges: Sequence[Any], path: Path) -> list[str]:
    """The pieces with U+2581 for a space, as every "llama" vocabulary has them."""
    steps = description["decoder"].get("decoders", [description["decoder"]]) if description.get("decoder") else []
    kinds = {step["type"] for step in steps}
    if "ByteFallback" not in kinds:
        raise _unheld(f"the decoder {', '.join(sorted(kinds)) or 'none'}", path)
    if kinds & {"Replace", "Metaspace"}:
        return tokens
    if " " not in tokens or SPACE in tokens:  # llama.cpp turns every space of a text into U+2581 first
        raise _unheld("a vocabulary without a piece for the space (type byte)", path)
    return [SPACE if piece == " " else piece for piece in tokens]


def _prefixes(description: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before it (Llama 2's dummy prefix)."""
    normalizer = description.get("normalizer") or {}
    kinds = {step["type"] for step in normalizer.get("normalizers", [normalizer]) if step}
    return "Prepend" in kinds or (description.get("pre_tokenizer") or {}).get("prepend_scheme", "never") != "never"


def _scores(tokens: Sequence[str], merges: Iterable[Sequence[str]]) -> list[float]:
    """SentencePiece's scores: the earlier a piece is merged, the higher; what is never merged comes last."""
    ranks: dict[str, int] = {}
    for rank, (a, b) in enumerate(merges):
        ranks.setdefault(a + b, rank)
    last = len(ranks) and max(ranks.values()) + 1
    return [-float(ranks.get(piece, last)) for piece in tokens]


def _adds(description: Mapping[str, Any], place: int, special: int | None) -> bool:
    """Whether the post-processor puts a special piece at that place of a text."""
    processor = description.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing":
            piece = step["single"][place].get("SpecialToken", {}).get("id")
            return special is not None and special in step["special_tokens"].get(piece, {}).get("ids", ())
    return False


def _unheld(found: str, path: Path) -> DataError:
    return DataError(
        f"has {found}, which a GGUF file cannot hold",
        file=path,
        hint="byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece BPE with byte fallback can be exported",
    )
