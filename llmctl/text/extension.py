"""New pieces for a tokenizer that has another language to learn, and what they are made of.

Only BPE vocabularies are extended, by merges behind the ones they have, the way such vocabularies grow: a merge applies
only where none before it does, so every text is first spelled as ever and then shortened where new merges fit. A text
without them keeps its ids, and so does its round trip. (Added tokens would be cut out of a text before anything else:
they split words of the old language, and transformers decodes them one by one.)

A piece is learned only in words that the vocabulary spells badly, with fewer than `GOOD` characters a piece: English
words stay whole in a tokenizer that knows English, however often they stand among the Chinese ones. Words are runs of
letters: digits, punctuation and white space stay as they are.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from llmctl.errors import DataError
from llmctl.text.decoding import ALPHABET
from llmctl.text.tokenizer import Tokenizer
from llmctl.text.vocabulary import COVERAGE, SPACE

GOOD = 3  # characters a piece: English in English vocabularies has four, Chinese in them fewer than one
LONGEST = 16  # pieces of the old vocabulary in a new one: keeps whole sentences from becoming a piece
_PRIVATE = 0x10000  # the trainer sees a piece as a character: this one and those behind it


def extend(base: Tokenizer, texts: Iterable[str], count: int) -> Tokenizer:
    """`base` with `count` pieces more, learned from `texts`; their ids begin at len(base).

    The same texts in the same order give the same pieces.

    Raises:
        DataError: no BPE vocabulary, or too little text that it spells badly for so many pieces.
    """
    description = json.loads(base.files["tokenizer.json"])
    model = description["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise DataError(
            f"a {model.get('type')} vocabulary can't be extended, only BPE ones can",
            file="tokenizer.json",
            hint="train a new tokenizer: leave out [prep.tokenizer] from and extend",
        )
    for token in description["added_tokens"]:  # else the library numbers them behind the pieces that come here
        model["vocab"].setdefault(token["content"], token["id"])
    _learn(model, _words(base, model, texts), count, len(base))
    config = {
        **json.loads(base.files.get("tokenizer_config.json", b"{}")),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {name: content for name, content in base.files.items() if name != "tokenizer.model"}  # it lacks the pieces
    return Tokenizer(
        files
        | {
            "tokenizer.json": json.dumps(description, ensure_ascii=False).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        }
    )


def parts(base: Tokenizer, extended: Tokenizer) -> list[list[int]] | None:
    """What each new piece is made of, as ids of `base`, from id len(base) on; None if `extended` is no extension of it.

    A piece learned by merges is the pieces merged; a letter that `base` has no piece for is its bytes.
    """
    old, new = (json.loads(tokenizer.files["tokenizer.json"]) for tokenizer in (base, extended))
    before, after = old["model"], new["model"]
    merges, known = (list(map(_pair, model.get("merges") or ())) for model in (after, before))
    same = {**new, "model": None} == {**old, "model": None} and after.get("type") == before.get("type") == "BPE"
    if not same or merges[: len(known)] != known or before["vocab"].items() - after["vocab"].items():
        return None
    added = {token["content"]: token["id"] for token in old["added_tokens"]}
    made: dict[str, list[int]] = {piece: [index] for piece, index in (before["vocab"] | added).items()}
    try:
        for piece in after["vocab"]:
            if piece not in made and len(piece) == 1:
                made[piece] = [before["vocab"][f"<0x{byte:02X}>"] for byte in piece.encode()]
        for first, second in merges[len(known) :]:
            if first + second not in made:
                made[first + second] = made[first] + made[second]
        found = {index: made[piece] for piece, index in after["vocab"].items() if index >= len(base)}
        return [found[index] for index in range(len(base), len(extended))]
    except KeyError:  # a piece that nothing makes
        return None


def _learn(model: Any, words: Counter[str], count: int, start: int) -> None:
    """Puts `count` pieces, numbered from `start`, and their merges into a BPE model's description.

    Where letters are spelled in bytes, they come first: half of the pieces, more where there are too few words.
    """
    vocabulary = model["vocab"]
    missing = list(_missing_letters(words, vocabulary)) if model.get("byte_fallback") else []
    letters, new, merges = list[str](), list[str](), list[tuple[str, str]]()
    for letters in (missing[: count // 2], missing[:count]):
        model["vocab"] = vocabulary | {letter: start + index for index, letter in enumerate(letters)}
        merges = _merges(words, model, count - len(letters))
        new = list(dict.fromkeys(a + b for a, b in merges if a + b not in model["vocab"]))
        if len(letters) + len(new) >= count:
            break
    if (most := len(letters) + len(new)) < count:
        raise DataError(
            f"too little text that the tokenizer spells badly: it makes {most:,} new pieces, not {count:,}",
            hint=f"set [prep.tokenizer] extend = {most} or less, or add text to [prep] sources"
            if most
            else "leave out [prep.tokenizer] extend: the tokenizer knows this language",
        )
    new = new[: count - len(letters)]
    model["vocab"] |= {piece: start + len(letters) + index for index, piece in enumerate(new)}
    spaced = bool(model["merges"]) and isinstance(model["merges"][0], str)  # how older files write a pair
    within = itertools.takewhile(lambda pair: pair[0] + pair[1] in model["vocab"], merges)
    model["merges"] += [" ".join(pair) if spaced else list(pair) for pair in within]


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _words(base: Tokenizer, model: Any, texts: Iterable[str]) -> Counter[str]:
    """The runs of letters in the texts as the model is given them, each with the space before it, and their counts."""
    from tokenizers import Tokenizer as Parsed

    parsed = Parsed.from_buffer(base.files["tokenizer.json"])
    counts = Counter[str]()
    for text in texts:
        if parsed.normalizer is not None:
            text = parsed.normalizer.normalize_str(text)
        split = parsed.pre_tokenizer
        counts.update([part for part, _ in split.pre_tokenize_str(text)] if split is not None else [text])
    spelled = {part: part if model.get("byte_fallback") else _unspelled(part) for part in counts}
    letters = "".join(sorted(c for c in set().union(*spelled.values()) if unicodedata.category(c)[0] in "LM"))
    if not letters:
        return Counter()
    word = re.compile(f"[ {SPACE}]?[{re.escape(letters)}]+")
    words = Counter[str]()
    for part, times in counts.items():
        if model.get("byte_fallback"):  # nothing splits a text into words there
            for found in word.findall(part):
                words[found] += times
        elif word.fullmatch(spelled[part]) is not None:
            words[part] += times
    return words


def _unspelled(part: str) -> str:
    """A word of the byte-level alphabet as it is read."""
    return bytes(ALPHABET.get(char, 0) for char in part).decode("utf-8", "replace")


def _missing_letters(words: Counter[str], vocabulary: dict[str, int]) -> Iterator[str]:
    """Letters that are spelled in bytes, the most frequent first, up to `COVERAGE` of them."""
    counts = Counter[str]()
    for word, times in words.items():
        for char in word:
            if char not in vocabulary:
                counts[char] += times
    covered = 0
    for char, times in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        if covered >= COVERAGE * counts.total() or times < 2:
            return
        covered += times
        yield char


def _merges(words: Counter[str], model: Any, count: int) -> list[tuple[str, str]]:
    """Merges on top of the model's own, best first: at least `count` where the words have as many.

    The `tokenizers` trainer learns them from words whose characters stand for the pieces that the model makes.
    """
    from tokenizers import Tokenizer as Parsed
    from tokenizers import models, pre_tokenizers, trainers

    options = {key: model[key] for key in ("unk_token", "fuse_unk", "byte_fallback") if model.get(key) is not None}
    spell = models.BPE(model["vocab"], list(map(_pair, model["merges"])), **options).tokenize
    pieces = {index: piece for piece, index in model["vocab"].items()}
    sequences = Counter[str]()
    for word, times in words.items():
        tokens = [token.id for token in spell(word)]
        letters = len(word if model.get("byte_fallback") else _unspelled(word))
        if len(tokens) > 1 and letters < GOOD * len(tokens):  # what is spelled in bytes is too rare to merge
            for known, run in itertools.groupby(tokens, lambda index: not _is_byte(pieces[index])):
                if known:
                    sequences["".join(chr(_PRIVATE + index) for index in run)] += times
    alphabet = len(set(itertools.chain.from_iterable(sequences)))
    trained = Parsed(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wanted = alphabet + count + count // 4 + 64  # some spell a piece that is there already
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, min_frequency=2, max_token_length=LONGEST, show_progress=False, limit_alphabet=alphabet + 1
    )
    trained.train_from_iterator((" ".join([part] * times) for part, times in sorted(sequences.items())), trainer)

    def raw(characters: str) -> str:
        return "".join(pieces[ord(char) - _PRIVATE] for char in characters)

    found = json.loads(trained.to_str())["model"]["merges"]
    return [(raw(first), raw(second)) for first, second in map(_pair, found)]


def _is_byte(piece: str) -> bool:
    return re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None
