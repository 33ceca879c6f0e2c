"""Makes a vocabulary from text: SentencePiece BPE or unigram, characters, or bytes; in the forms other tools read.

Pieces, in order: the special ones below, the 256 bytes (what the vocabulary lacks is spelled in bytes), the learned
ones. Special pieces never come out of text, only out of code that asks for them by name.

SentencePiece (arXiv:1808.06226) trains; tokenizer.json is then built so that the `tokenizers` library gives the same
ids: its BPE merges by rank, SentencePiece by the score of the merged piece, so each way to split a piece into two is a
merge, ranked by that piece. With an identity normaliser and no dummy prefix the ids of BPE are equal (tested), those
of unigram almost.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from llmctl.errors import DataError

Type = Literal["bpe", "unigram", "char", "byte"]

UNK, BOS, EOS, PAD, MASK = "<unk>", "<s>", "</s>", "<pad>", "<mask>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
SPECIALS = (UNK, BOS, EOS, PAD, MASK, IM_START, IM_END, *FIM, *(f"<extra_id_{i}>" for i in range(32)))
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"  # how SentencePiece spells a space

NO_LIMIT = 1_000_000_000_000_000_019_884_624_838_656  # transformers' "no limit" for model_max_length
COVERAGE = 0.9995  # of the characters of the text get a piece of their own; the rare others are spelled in bytes
THREADS = 2  # of the trainer: fixed, because the number enters the model's bytes
MAX_SENTENCE = 4_096  # characters

# SentencePiece drops the newlines that end a sentence. This stand-in, put back afterwards, keeps them in the text.
_NEWLINE = "\ue00a"


def train(texts: Iterable[str], type: Type = "bpe", vocab_size: int = 4096) -> dict[str, bytes]:
    """The files of a new tokenizer: tokenizer.json, tokenizer_config.json and, for bpe and unigram, tokenizer.model.

    The same texts in the same order give the same bytes. `texts` are held in memory while training.

    Raises:
        DataError: no text, or too little for `vocab_size` pieces; with the largest vocabulary possible.
    """
    if type == "byte":
        return _files(_without_merges([]))
    if type == "char":
        counts = Counter[str]()
        for text in texts:
            counts.update(text)
        common = sorted(counts, key=lambda char: (-counts[char], char))
        return _files(_without_merges(common[: max(0, vocab_size - len(SPECIALS) - len(BYTES))]))
    model = _train_sentencepiece(list(texts), type, vocab_size)
    return {"tokenizer.model": model.SerializeToString(deterministic=True), **_files(_from_sentencepiece(model))}


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """The texts in lines that end after each run of newlines.

    So no piece has a newline followed by anything else, and every line begins a token: a text encoded in two parts, cut
    after newlines, has the ids of the whole, and what a chat template puts before an answer never merges with it.
    """
    for text in texts:
        for line in re.findall(r"[^\n]*\n+|[^\n]+\Z", text):
            for start in range(0, len(line), MAX_SENTENCE):
                yield line[start : start + MAX_SENTENCE]


def _train_sentencepiece(texts: list[str], type: Type, vocab_size: int) -> Any:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    if not any(texts):
        raise DataError("no text to train a vocabulary on", hint="add text to [prep] sources")
    lines = sentences(_without_rare(texts, vocab_size))
    if type == "unigram":  # see _from_sentencepiece
        lines = (part for line in lines for part in re.split("(<)", line) if part)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.replace("\n", _NEWLINE) for line in lines),
            model_writer=written,
            model_type=type,
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            max_sentence_length=8 * MAX_SENTENCE,  # bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=list(SPECIALS[4:]),
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as reason:
        raise _explained(str(reason), vocab_size) from None
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    for piece in model.pieces:
        piece.piece = piece.piece.replace(_NEWLINE, "\n")
    reserved = tuple(piece.piece for piece in model.pieces[: len(SPECIALS) + len(BYTES)])
    assert reserved == SPECIALS + BYTES, "SentencePiece orders its reserved pieces in another way"
    return model


def _explained(reason: str, vocab_size: int) -> Exception:
    """SentencePiece's complaint as an error for people."""
    most = re.search(r"value <= (\d+)", reason)
    if most is None and "sentences_.empty()" not in reason:
        return RuntimeError(reason)
    limit = int(most[1]) if most else 0
    message = f"too little text for a vocabulary of {vocab_size:,} pieces" + (
        f": it makes {limit:,} at most" if limit else ""
    )
    smaller = (
        f"set [prep.tokenizer] vocab_size = {limit} or less" if limit >= 300 else 'set [prep.tokenizer] type = "byte"'
    )
    return DataError(message, hint=f"{smaller}, or add text to [prep] sources")


def _without_rare(texts: list[str], vocab_size: int) -> Iterator[str]:
    """The texts, split where a character is too rare for a piece of its own: nothing merges with its bytes either.

    Rare is what lies beyond `COVERAGE` of the text, or would take more than half of the learned pieces. (SentencePiece
    itself takes no coverage below 0.98, which Chinese under a small vocabulary needs.)
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    room, covered, enough = (vocab_size - len(SPECIALS) - len(BYTES)) // 2, 0, COVERAGE * counts.total()
    common = set(map(chr, range(128))) if room >= 256 else {"\n", " "}
    for char, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[: max(1, room)]:
        if covered >= enough:
            break
        common.add(char)
        covered += count
    rare = (set(counts) - common) | {_NEWLINE}
    pattern = re.compile(f"[{re.escape(''.join(sorted(rare)))}]+")
    for text in texts:
        if room >= 256 and text.isascii():
            yield text
        else:
            yield from filter(None, pattern.split(text))


def _from_sentencepiece(model: Any) -> Any:
    """The `tokenizers` object with the ids of a SentencePiece model (identity normaliser, no dummy prefix)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [piece.piece for piece in model.pieces]
    unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    if unigram:
        scored = [(piece.piece, piece.score) for piece in model.pieces]
        core: Any = models.Unigram(scored, unk_id=0, byte_fallback=True)
    else:
        ids = {piece: index for index, piece in enumerate(pieces)}
        normal = {piece.piece for piece in model.pieces if piece.type == piece.NORMAL}
        merges = [
            (piece[:cut], piece[cut:])
            for piece in pieces  # in the order of their scores, which is the order of their ids
            if piece in normal
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]
        merges.sort(key=lambda pair: (ids[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]))
        core = models.BPE(ids, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(core)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    if unigram:
        # The library's Unigram finds every piece in a text, special and byte pieces too. They all begin with "<", so no
        # learned piece has a "<" beside anything else, and it is cut off before the search.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("<", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _without_merges(characters: list[str]) -> Any:
    """The `tokenizers` object of a vocabulary of single characters and bytes."""
    from tokenizers import Tokenizer, decoders, models

    ids = {piece: index for index, piece in enumerate([*SPECIALS, *BYTES, *characters])}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _files(tokenizer: Any) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, for which AutoTokenizer gives the same ids, after one <s>."""
    from tokenizers import AddedToken, processors

    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIALS])
    bos = (BOS, SPECIALS.index(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS}:1 $B:1", [bos])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
