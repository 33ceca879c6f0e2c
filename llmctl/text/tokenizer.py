"""Text to ids and back, by the tokenizer files of an artifact or of any Hugging Face folder.

Who adds what, written once:

- `encode` never gives a special id, not even for text that spells one (the id of unknown text, where a vocabulary has
  no bytes, is the exception), and adds none.
- In token shards a document is `begin_id`, its ids, `end_id`. `begin_id` is what the tokenizer's own post-processor
  puts before a text (`<s>`, `<bos>`, `[CLS]`; nothing for GPT-2, Qwen, SmolLM, T5), `end_id` ends it (`eos_token`, else
  what the post-processor puts behind it: `[SEP]`). So an encoder reads `[CLS] document [SEP]`, T5 `document </s>`.
- `prompt`, a raw prompt for a decoder, is `begin_id` and the text; nothing ends it.
- `encode_for_model`, the input of an encoder or of an encoder-decoder's encoder, is all that the post-processor adds:
  `[CLS] text [SEP] pair [SEP]`, `<s> text </s></s> pair </s>`, `text </s>`.
- A chat template spells its own special tokens.

Nobody else adds one.

Every path in llmctl encodes by tokenizer.json; a folder without one gets it from its older files (text/converting.py).
Decoding is by bytes (text/decoding.py), so that a text streamed piece by piece is the text decoded at once, and half a
character is never shown.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.text import converting, vocabulary
from llmctl.text.decoding import Pieces, Stream
from llmctl.text.jsonl import valid

# What a Hugging Face folder may hold of a tokenizer; saved again as it was loaded.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
CHUNK = 1 << 16  # characters encoded at a time: the merge queue takes about 100 bytes a character
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def train(texts: Iterable[str], type: vocabulary.Type = "bpe", vocab_size: int = 4096) -> Tokenizer:
    """A new tokenizer from text; see `vocabulary.train`."""
    return Tokenizer(vocabulary.train(texts, type, vocab_size))


class Tokenizer:
    """A vocabulary and the way to apply it."""

    def __init__(self, files: Mapping[str, bytes], shown: Path | str = "tokenizer") -> None:
        """From the contents of tokenizer files; `shown` is where they came from, for errors.

        Raises:
            DataError: a damaged file, or a kind of tokenizer that llmctl can't decode.
        """
        self.files = dict(files)
        self._shown = Path(shown)
        names = special_names(self._json("special_tokens_map.json")) | special_names(
            self._json("tokenizer_config.json")
        )
        self._plain = self._read()
        self._plain.encode_special_tokens = True  # text that spells a special token is encoded as any other text
        added = self._plain.get_added_tokens_decoder()
        self._specials = {index: token.content for index, token in sorted(added.items()) if token.special}
        self.special_ids = frozenset(self._specials)
        everything = self._plain.get_vocab(with_added_tokens=True)
        plain = {index: self._plain.id_to_token(index) for index in added if index not in self.special_ids}
        self._pieces = Pieces(everything, _described(self._plain.decoder), self.special_ids, plain, self._shown)
        self._never = self.special_ids - {self._id(names.get("unk_token"))}
        self.bos_id = self._id(names.get("bos_token"))
        self.eos_id = self._id(names.get("eos_token"))
        self.unk_id = self._id(names.get("unk_token"))
        self.mask_id = self._id(names.get("mask_token"))
        pad = self._id(names.get("pad_token"))
        self.pad_id = pad if pad is not None else self.eos_id
        self.special_names = {name: piece for name, piece in names.items() if self._id(piece) is not None}
        before, behind = self._around()
        self.begin_id = before[0] if before else None
        self.end_id = self.eos_id if self.eos_id is not None else behind[-1] if behind else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a prep or model artifact, or of a Hugging Face folder.

        Raises:
            DataError: no tokenizer.json and nothing to make it of, or a damaged one.
        """
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        return cls(files if "tokenizer.json" in files else files | converting.files(folder), folder)

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        """Writes the files as they were loaded or trained; `model_max_length` tells other tools the model's context."""
        for name, content in self.files.items():
            if name == "tokenizer_config.json" and model_max_length is not None:
                config = {**json.loads(content), "model_max_length": model_max_length}
                content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            (folder / name).write_bytes(content)

    def __len__(self) -> int:
        """Pieces in all, special ones included: the smallest vocabulary a model may have."""
        return len(self._pieces.table)

    # ------------------------------------------------------------------------------------------------ text to ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text: never a special one, none added."""
        return [index for chunk in self._chunks(text) for index in self._encoding(chunk)[1]]

    def prompt(self, text: str) -> list[int]:
        """The ids of a raw prompt: `begin_id`, where the tokenizer puts one, and the text."""
        return [*([] if self.begin_id is None else [self.begin_id]), *self.encode(text)]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many texts, on several threads."""
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        if threads > 1:
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read once, when the library starts its threads
        chunks = [list(self._chunks(text)) for text in texts]
        flat = [chunk for parts in chunks for chunk in parts]
        encoded = zip(flat, self._plain.encode_batch_fast(flat, add_special_tokens=False), strict=True)
        ids = (self._never_special(chunk, encoding)[1] for chunk, encoding in encoded)
        return [[index for _ in parts for index in next(ids)] for parts in chunks]

    def encode_for_model(
        self, text: str, pair: str | None = None, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """The ids of a text, or of two, with all that the post-processor adds, and the token type of each.

        Args:
            max_length: ids in all; more are cut off the end of the longer text, as transformers' "longest_first" does.
        """
        first = self._encoding(valid(text))[0]
        second = self._encoding(valid(pair))[0] if pair is not None else None
        if max_length is not None:
            room = max(0, max_length - self._plain.num_special_tokens_to_add(second is not None))
            a, b = _shares(len(first.ids), len(second.ids) if second is not None else 0, room)
            first.truncate(a)
            if second is not None:
                second.truncate(b)
        made = self._plain.post_process(first, second, add_special_tokens=True)
        return made.ids, made.type_ids

    def encode_with_specials(self, text: str, marks: Mapping[str, str] | None = None) -> list[int]:
        """The ids of a text in which special tokens are meant: a template's. Never for what a user wrote.

        `marks` are names that stand, in the text, for what users wrote that spells a special token: it stays text, and
        everything else has the ids that it would have beside any other text.
        """
        encoder = self._renamed if marks else self._with_specials
        if marks:
            pieces = sorted([*marks, *self.specials], key=len, reverse=True)
            meant = re.compile("|".join(map(re.escape, pieces)))
            text = meant.sub(lambda found: marks.get(found[0]) or self._salt + found[0], text)
        ids: list[int] = encoder.encode(valid(text), add_special_tokens=False).ids
        return ids

    def _encoding(self, text: str) -> tuple[Any, list[int]]:
        return self._never_special(text, self._plain.encode(text, add_special_tokens=False))

    def _never_special(self, text: str, encoding: Any) -> tuple[Any, list[int]]:
        """The encoding with its ids, or another if these are special: Unigram finds all of its pieces in a text."""
        ids = encoding.ids  # a new list each time
        if not self._never.isdisjoint(ids):
            encoding = self._unspellable.encode(text, add_special_tokens=False)
            ids = encoding.ids
        return encoding, ids

    @functools.cached_property
    def _salt(self) -> str:
        return secrets.token_hex(16)

    @functools.cached_property
    def _with_specials(self) -> Any:
        return self._read()

    @functools.cached_property
    def _unspellable(self) -> Any:
        """Encodes no text to a special id."""
        parsed = _parse(self._renamed.to_str().encode())
        parsed.encode_special_tokens = True
        return parsed

    @functools.cached_property
    def _renamed(self) -> Any:
        """The same vocabulary with special pieces renamed to what no text holds: the salt, and their name."""
        description = json.loads(self._plain.to_str())
        model, spelled = description["model"], set(self.specials)
        unknown = model.get("unk_token")

        def renamed(piece: str) -> str:
            return self._salt + piece if piece in spelled else piece

        if unknown is not None:
            model["unk_token"] = renamed(unknown)

        for token in description["added_tokens"]:
            token["content"] = renamed(token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed(piece): index for piece, index in model["vocab"].items()}
        else:
            model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [[a, b] for a, b in pairs if spelled.isdisjoint((a, b, a + b))]
        return _parse(json.dumps(description).encode())

    def _around(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before a text, and behind it."""
        marked = self._plain.encode("a", add_special_tokens=True)
        ids, added = marked.ids, marked.special_tokens_mask
        text = [index for index, special in enumerate(added) if not special] or [len(ids)]
        return ids[: text[0]], ids[text[-1] + 1 :]

    def _chunks(self, text: str) -> Iterator[str]:
        """The text in parts whose ids, put together, are the ids of the whole."""
        text = valid(text)
        start = 0
        while len(text) - start > CHUNK and self._cuts_at_lines:
            # No piece goes on after a newline, and a space only begins one: the ids don't depend on what lies across.
            cut = re.compile(r"\n(?=[^\n])|(?<=[^ ])(?= )").search(text, start + CHUNK - 1, start + 2 * CHUNK)
            end = cut.end() if cut is not None else start + 2 * CHUNK
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]

    @functools.cached_property
    def _cuts_at_lines(self) -> bool:
        across = re.compile(rb"\n[^\n]|[^ ] ")
        return _may_cut(self._plain) and not any(across.search(piece) for piece in self._pieces.table)

    # ------------------------------------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are skipped, bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def stream(self, after: Sequence[int] = ()) -> Stream:
        """Decodes ids one at a time. With `after`, the ids before them, the space that goes on a text is kept."""
        return Stream(self._pieces, after)

    def token_bytes(self, index: int) -> bytes:
        """The bytes a piece stands for; nothing for a special one."""
        return self._pieces.table[index] if 0 <= index < len(self) else b""

    # ------------------------------------------------------------------------------------------------ special pieces

    def special(self, name: str) -> int:
        """The id of a special piece, such as "<|im_end|>".

        Raises:
            DataError: this vocabulary has none of that name.
        """
        index = self._id(name)
        if index is None:
            raise DataError(
                f"the vocabulary has no piece {name}", file=self._shown, hint="use a tokenizer made by llmctl prep"
            )
        return index

    @property
    def specials(self) -> list[str]:
        """The special pieces as they are spelled."""
        return list(self._specials.values())

    def digest(self) -> str:
        """SHA-256 of what decides the ids: equal for two folders that encode alike, however their JSON is laid out."""
        content = [json.loads(self.files["tokenizer.json"]), self.bos_id, self.eos_id, self.pad_id]
        content += [self._json("tokenizer_config.json").get(key) for key in ("add_bos_token", "add_eos_token")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _id(self, piece: str | None) -> int | None:
        index: int | None = self._plain.token_to_id(piece) if piece else None
        return index

    def _json(self, name: str) -> Any:
        try:
            found = json.loads(self.files.get(name, b"{}"))
        except ValueError as reason:
            raise DataError(f"not JSON ({reason})", file=self._shown / name, hint="restore the file") from None
        if not isinstance(found, dict):
            raise DataError("not a JSON object", file=self._shown / name, hint="restore the file")
        return found

    def _read(self) -> Any:
        """The tokenizer as transformers has it, tried out once."""
        config = self._json("tokenizer_config.json")
        with self._named():
            parsed = _parse(self.files["tokenizer.json"])
            _complete(parsed, config, special_names(self._json("special_tokens_map.json")) | special_names(config))
            parsed.encode("a")
            parsed.encode("\U000e0fff", "a")  # a letter that no vocabulary has
        return parsed

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What the library says of files that are damaged, or meant to be, as an error that names the file."""
        try:
            yield
        except DataError:
            raise
        except BaseException as reason:  # it raises bare Exceptions, and a panic of Rust's is not even that
            if not isinstance(reason, Exception) and type(reason).__name__ != "PanicException":
                raise
            raise DataError(
                f"not a tokenizer ({reason})", file=self._shown / "tokenizer.json", hint="restore the file"
            ) from None


def _parse(content: bytes) -> Any:
    from tokenizers import Tokenizer as Parsed

    if re.search(rb'"type"\s*:\s*"BPE"', content) and re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', content):
        raise ValueError("a BPE vocabulary with a prefix within words")  # the library aborts the process
    parsed = Parsed.from_buffer(content)
    parsed.no_truncation()  # a sentence encoder's file may cut and pad every text to a length
    parsed.no_padding()
    return parsed


def special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and so on of a tokenizer_config.json; transformers writes each as a string or as an object."""
    names = {}
    for name in NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[name] = value
    return names


def _complete(parsed: Any, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Adds what transformers adds to a tokenizer.json out of tokenizer_config.json (`TokenizersBackend.__init__`).

    Tokens of `added_tokens_decoder` that tokenizer.json lacks or has with other flags, the named special tokens and the
    extra ones; and a post-processor of its own where `add_bos_token` or `add_eos_token` is stated.
    """
    from tokenizers import AddedToken, processors

    present = parsed.get_added_tokens_decoder()
    known = {repr(token) for token in present.values()}
    stated = config.get("added_tokens_decoder")
    described = stated if isinstance(stated, dict) else {}
    described = {index: token for index, token in described.items() if isinstance(token, dict)}
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = [
        AddedToken(**{flag: token[flag] for flag in flags if flag in token})
        for _, token in sorted(described.items(), key=lambda entry: int(entry[0]))
    ]
    tokens = [token for token in tokens if repr(token) not in known]
    extra = [config.get(key) for key in ("extra_special_tokens", "additional_special_tokens")]
    more = [piece for pieces in extra if isinstance(pieces, list) for piece in pieces if isinstance(piece, str)]
    have = {token.content for token in [*present.values(), *tokens]}
    spelled = dict.fromkeys([*names.values(), *more])
    tokens += [AddedToken(piece, special=True) for piece in spelled if piece not in have]
    if tokens:
        parsed.add_tokens(tokens)
    if "add_bos_token" in config or "add_eos_token" in config:
        bos = names.get("bos_token") if config.get("add_bos_token") else None
        eos = names.get("eos_token") if config.get("add_eos_token") else None
        single, pair = (
            " ".join([*([f"{bos}:{kind}"] if bos else []), f"${text}:{kind}", *([f"{eos}:{kind}"] if eos else [])])
            for text, kind in (("A", 0), ("B", 1))
        )
        specials = [(piece, parsed.token_to_id(piece)) for piece in dict.fromkeys((bos, eos)) if piece]
        parsed.post_processor = processors.TemplateProcessing(single, f"{single} {pair}", specials)


def _described(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as tokenizer.json has it."""
    found: dict[str, Any] = json.loads(part.__getstate__()) if part is not None else {}
    return found


def _may_cut(parsed: Any) -> bool:
    """Whether a text may be cut between pieces: nothing looks across, as in llmctl's own vocabularies and Gemma's."""
    normalizer, splitter = _described(parsed.normalizer), _described(parsed.pre_tokenizer)
    whole = normalizer.get("type") in (None, "Replace")
    return whole and (not splitter or splitter.get("pattern") in ({"String": "<"}, {"String": " "}))


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many ids of each text fit in `room`; source: `longest_first` in tokenizers' utils/truncation.rs."""
    if first + second <= room:
        return first, second
    less, more = sorted((first, second))
    more = less if less > room else max(less, room - less)
    if less + more > room:
        less = room // 2
        more = less + room % 2
    return (less, more) if first <= second else (more, less)
