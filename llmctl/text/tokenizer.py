"""Text to ids and back, by the tokenizer files of an artifact or of any Hugging Face folder.

Who adds what, written once: `encode` never gives a special id, not even for text that spells one, and adds none. In
token shards a document is `<s> ids </s>`; a chat template spells its own `<s>`; a raw completion prompt gets one `<s>`
from the caller. Nobody else adds one.

Every path in llmctl encodes by tokenizer.json. Decoding is by bytes (each piece is the bytes it stands for), so that a
text streamed piece by piece is the text decoded at once, and half a character is never shown.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.text import vocabulary
from llmctl.text.jsonl import valid
from llmctl.text.vocabulary import SPACE

# What a Hugging Face folder may hold of a tokenizer; saved again as it was loaded.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
CHUNK = 1 << 16  # characters encoded at a time: the merge queue takes about 100 bytes a character


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
        self._plain = self._parse()
        self._plain.encode_special_tokens = True  # text that spells a special token is encoded as any other text
        self._with_specials: Any = None
        description = json.loads(files["tokenizer.json"])
        added = {token["id"]: token for token in description.get("added_tokens", ())}
        self.special_ids = frozenset(index for index, token in added.items() if token["special"])
        self._bytes, self._strips_first_space = _piece_bytes(self._plain, description, added, self._shown)
        self._cuts_at_lines = _cuts_at_lines(description)
        names: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            names |= special_names(self._json(name))
        self.bos_id = self._id(names.get("bos_token"))
        self.eos_id = self._id(names.get("eos_token"))
        self.unk_id = self._id(names.get("unk_token"))
        pad = self._id(names.get("pad_token"))
        self.pad_id = pad if pad is not None else self.eos_id
        self.special_names = {name: piece for name, piece in names.items() if self._id(piece) is not None}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a prep or model artifact, or of a Hugging Face folder.

        Raises:
            DataError: no tokenizer.json, or a damaged one.
        """
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            if "tokenizer.model" in files:
                hint = "transformers writes it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            else:
                hint = "name a prep or model artifact, or a Hugging Face folder"
            raise DataError("no tokenizer.json in the folder", file=folder, hint=hint)
        return cls(files, folder)

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        """Writes the files as they were loaded or trained; `model_max_length` tells other tools the model's context."""
        for name, content in self.files.items():
            if name == "tokenizer_config.json" and model_max_length is not None:
                config = {**json.loads(content), "model_max_length": model_max_length}
                content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            (folder / name).write_bytes(content)

    def __len__(self) -> int:
        """Pieces in all, special ones included: the smallest vocabulary a model may have."""
        return len(self._bytes)

    # ------------------------------------------------------------------------------------------------ text to ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text: never a special one, none added."""
        return [
            index for chunk in self._chunks(text) for index in self._plain.encode(chunk, add_special_tokens=False).ids
        ]

    def prompt(self, text: str) -> list[int]:
        """The ids of a raw prompt: one `<s>`, where the vocabulary has it, and the text."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many texts, on several threads."""
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        if threads > 1:
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read once, when the library starts its threads
        chunks = [list(self._chunks(text)) for text in texts]
        flat = [chunk for parts in chunks for chunk in parts]
        encoded = iter(self._plain.encode_batch_fast(flat, add_special_tokens=False))
        return [[index for _ in parts for index in next(encoded).ids] for parts in chunks]

    def encode_with_specials(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are meant: a template's. Never for what a user wrote."""
        if self._with_specials is None:
            self._with_specials = self._parse()
        ids: list[int] = self._with_specials.encode(valid(text), add_special_tokens=False).ids
        return ids

    def _chunks(self, text: str) -> Iterator[str]:
        """The text in parts whose ids, put together, are the ids of the whole."""
        text = valid(text)
        start = 0
        while self._cuts_at_lines and len(text) - start > CHUNK:
            # No piece goes on after a newline, and a space only begins one: the ids don't depend on what lies across.
            cut = re.compile(r"\n(?=[^\n])|(?<=[^ ])(?= )").search(text, start + CHUNK - 1, start + 2 * CHUNK)
            end = cut.end() if cut is not None else start + 2 * CHUNK
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]

    # ------------------------------------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are skipped, bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def stream(self) -> Stream:
        """Decodes ids one at a time."""
        return Stream(self._bytes, self._strips_first_space)

    def token_bytes(self, index: int) -> bytes:
        """The bytes a piece stands for; nothing for a special one."""
        return self._bytes[index] if 0 <= index < len(self._bytes) else b""

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
        return [self._plain.id_to_token(index) for index in sorted(self.special_ids)]

    def digest(self) -> str:
        """SHA-256 of what decides the ids: equal for two folders that encode alike, however their JSON is laid out."""
        content = [json.loads(self.files["tokenizer.json"]), self.bos_id, self.eos_id, self.pad_id]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _id(self, piece: str | None) -> int | None:
        index: int | None = self._plain.token_to_id(piece) if piece else None
        return index

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self.files.get(name, b"{}"))
        except ValueError as reason:
            raise DataError(f"not JSON ({reason})", file=self._shown / name, hint="restore the file") from None

    def _parse(self) -> Any:
        from tokenizers import Tokenizer as Parsed

        try:
            return Parsed.from_buffer(self.files["tokenizer.json"])
        except Exception as reason:  # the library raises bare Exceptions
            raise DataError(
                f"not a tokenizer ({reason})", file=self._shown / "tokenizer.json", hint="restore the file"
            ) from None


def special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and so on of a tokenizer_config.json; transformers writes each as a string or as an object."""
    names = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[name] = value
    return names


class Stream:
    """Ids to text, one at a time: `push` gives what is complete, `flush` the rest."""

    def __init__(self, table: Sequence[bytes], strips_first_space: bool) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strips_first_space

    def push(self, index: int) -> str:
        """The text that this id completes: never half a character. Special and unknown ids give nothing."""
        piece = self._table[index] if 0 <= index < len(self._table) else b""
        if piece and self._strip:
            piece, self._strip = piece.removeprefix(b" "), False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left when no id follows."""
        return self._decoder.decode(b"", final=True)


# ------------------------------------------------------------------------------------------- pieces and their bytes


def _piece_bytes(tokenizer: Any, description: Any, added: Mapping[int, Any], shown: Path) -> tuple[list[bytes], bool]:
    """The bytes of each piece, and whether a text's first space is the encoding's own (Llama 2's dummy prefix).

    Two kinds are in use: bytes spelled as printable characters (GPT-2, Llama 3, Qwen), and U+2581 for a space with
    `<0x..>` for the other bytes (SentencePiece).

    Raises:
        DataError: another kind.
    """
    decoder = description.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        alphabet = _byte_level_alphabet()
    elif kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and kinds:
        alphabet = None
    else:
        names = ", ".join(sorted(str(kind) for kind in kinds))
        raise DataError(
            f"tokenizers with the decoder {names} are not supported",
            file=shown / "tokenizer.json",
            hint="byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece with byte fallback (Llama 2) are",
        )
    spelled = "Replace" in kinds or "Metaspace" in kinds
    table: list[bytes] = []
    for index in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        piece = tokenizer.id_to_token(index)
        if piece is None or index in added:
            table.append(b"" if piece is None or added[index]["special"] else piece.encode())
        elif alphabet is not None:
            table.append(bytes(alphabet[char] for char in piece))
        elif (byte := re.fullmatch("<0x([0-9A-F]{2})>", piece)) is not None:
            table.append(bytes.fromhex(byte[1]))
        else:
            table.append((piece.replace(SPACE, " ") if spelled else piece).encode())
    strips = any(step.get("type") == "Strip" and step.get("start") for step in steps) or "Metaspace" in kinds
    return table, strips


def _cuts_at_lines(description: Any) -> bool:
    """Whether this is a vocabulary of llmctl's own, in which no piece lies across a line's end or before a space."""
    steps = [(description.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
    return steps in (["Replace", None], ["Replace", "Split"], [None, None])


def _byte_level_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for: printable Latin-1 itself, the others U+0100 on.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
