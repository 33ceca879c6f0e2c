"""An exported encoder-decoder under ONNX Runtime, behind the interface of runners.py.

Its caches go in and come out with every step. Those of the source, which the first step computes, are kept.

B batch, S source tokens, T new tokens, C channels, K key/value heads, D head size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from llmctl.device import Device
from llmctl.errors import DataError
from llmctl.inference.onnx_runner import open_session
from llmctl.model import hf

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
PAST, PRESENT = "past_key_values.", "present."


@dataclass(eq=False)
class Seq2SeqCache:
    """What was read and written of B sequences, in the device's memory."""

    source: dict[str, Any]  # the encoder's states (B, S, C) and their mask (B, S), by the names of the decoder's inputs
    held: dict[str, Any]  # keys and values by name: (B, K, tokens, D)
    max_length: int
    length: int = 0  # tokens written


class Seq2SeqRunner:
    """Runs the two graphs of export/seq2seq_graph.py; the attributes are `runners.Runner`'s."""

    def __init__(self, folder: Path, device: Device) -> None:
        """Loads the graphs; raises what `OnnxRunner` raises."""
        self.config = config = hf.read_config(folder)
        self.folder, self.device = folder, device
        self.vocab_size, self.eos_ids = config.vocab_size, config.eos_ids
        self.max_length = config.max_position_embeddings
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
        self.start_ids: tuple[int, ...] = (start or 0,)
        self.encoder = open_session(folder, device, name=ENCODER)
        self.session = open_session(folder, device, name=DECODER)
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.cache_names = [name.removeprefix(PAST) for name in inputs if name.startswith(PAST)]
        if len(self.cache_names) != 4 * config.num_decoder_layers:
            found = f"{len(self.cache_names)} tensors for {config.num_decoder_layers} layers"
            raise DataError(f"has a cache of {found}", file=folder / DECODER)
        self.own = [name for name in self.cache_names if ".decoder." in name]
        self.dtype = np.float16 if inputs[PAST + self.own[0]].type == "tensor(float16)" else np.float32
        self.empty = (config.num_key_value_heads, 0, config.head_dim)
        overridable = {value.name for value in self.session.get_overridable_initializers()}
        self.keeps_last = "logits_to_keep" in overridable

    def begin(self, prompt: Sequence[int], new: int) -> tuple[Seq2SeqCache, list[int]]:
        """See `runners.Runner`."""
        return self.read(np.asarray([prompt], np.int64), max_length=len(self.start_ids) + new), list(self.start_ids)

    def read(self, ids: np.ndarray, mask: np.ndarray | None = None, max_length: int | None = None) -> Seq2SeqCache:
        """A cache that has read the source (B, S), `mask` (B, S) false at its padding, and nothing is written yet.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        given = {
            "input_ids": self._ids(ids),
            "attention_mask": self._value(np.ones_like(ids) if mask is None else mask),
        }
        (states,) = self.encoder.run_with_ort_values(["last_hidden_state"], given)
        source = {"encoder_hidden_states": states, "encoder_attention_mask": given["attention_mask"]}
        nothing = np.zeros((len(ids), *self.empty), self.dtype)
        held = {name: self._value(nothing) for name in self.cache_names}
        return Seq2SeqCache(source, held, max_length or self.max_length)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Seq2SeqCache:
        """See `runners.Runner`: `begin` gives the cache, since something has to be read first."""
        raise ValueError("an encoder-decoder begins with a source to read")

    def forward(self, ids: np.ndarray, cache: Seq2SeqCache | None = None, last_only: bool = True) -> np.ndarray:
        """See `runners.Runner`; the cache is one that `begin` or `read` gave.

        Raises:
            ValueError: an id outside the vocabulary, more positions than the cache has room for, or no cache.
        """
        T = ids.shape[1]
        if cache is None:
            raise ValueError("decoding needs the cache of a source that was read")
        if cache.length + T > cache.max_length:
            raise ValueError(f"{cache.length} + {T} positions do not fit in {cache.max_length}")
        names = self.own if cache.length else self.cache_names  # the source's don't change
        given = {"input_ids": self._ids(ids), **cache.source} | {
            PAST + name: cache.held[name] for name in self.cache_names
        }
        if self.keeps_last:
            given["logits_to_keep"] = self._value(np.array([1 if last_only else T]))
        logits, *present = self.session.run_with_ort_values(["logits", *(PRESENT + name for name in names)], given)
        cache.held |= dict(zip(names, present, strict=True))
        cache.length += T
        found: np.ndarray = logits.numpy()
        return found[:, -1:] if last_only else found

    def fill(self, ids: np.ndarray, decoder_ids: np.ndarray) -> np.ndarray:
        """What `EncoderDecoder.forward` gives of pairs without padding, (B, S), (B, T) -> (B, T, V)."""
        return self.forward(decoder_ids, self.read(ids), last_only=False)

    def select(self, cache: Seq2SeqCache, rows: Sequence[int]) -> Seq2SeqCache:
        """See `runners.Runner`."""

        def taken(values: dict[str, Any]) -> dict[str, Any]:
            return {name: self._value(value.numpy()[list(rows)]) for name, value in values.items()}

        return replace(cache, source=taken(cache.source), held=taken(cache.held))

    def _ids(self, ids: np.ndarray) -> Any:
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.vocab_size:
            raise ValueError(f"token ids lie outside 0 .. {self.vocab_size - 1}")
        return self._value(ids)

    def _value(self, array: np.ndarray) -> Any:
        whole = np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iub" else array.dtype)
        return ort.OrtValue.ortvalue_from_numpy(whole, self.device.kind)
