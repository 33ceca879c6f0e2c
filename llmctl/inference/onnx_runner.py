"""An exported decoder under ONNX Runtime, behind the interface of runners.py.

Past and present are one buffer a layer, bound once: a step writes its new keys and values in place and copies none.
Facts about GroupQueryAttention that shape this file [ran: ORT 1.31, CPU]: rows of a batch may hold different numbers
of tokens while each gets one new; a first prompt of several rows may be padded on the right; more than one new token
behind a past works for one row at a time.

B batch, T new tokens, S past and new, K key/value heads, D head size, V vocabulary
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort

from llmctl.device import Device
from llmctl.errors import DataError, UnavailableError
from llmctl.model import hf

GRAPH = "model.onnx"
PAST = "past_key_values."
ERRORS_ONLY = 3  # ONNX Runtime's severity; 2 warns about `logits_to_keep`, whose default is meant


class OnnxCache:
    """Keys and values of B sequences, (B, K, max_length, D) a layer, in the device's memory.

    `lengths` (B,) counts what each row holds. A view (`rows`) shares memory and lengths with the whole.
    """

    def __init__(
        self, session: ort.InferenceSession, buffers: Mapping[str, Any], lengths: np.ndarray, first: int = 0
    ) -> None:
        self.session, self.buffers, self.lengths, self.first = session, buffers, lengths, first
        self.views: dict[tuple[int, int], OnnxCache] = {}
        self.binding = session.io_binding()
        for name, buffer in buffers.items():
            _, *row = buffer.shape()  # (K, max_length, D)
            shape, pointer = [len(lengths), *row], buffer.data_ptr() + 4 * first * math.prod(row)
            place = (buffer.device_name(), 0, np.float32, shape, pointer)
            self.binding.bind_input(f"{PAST}{name}", *place)  # the past, and the present that grows in it
            self.binding.bind_output(f"present.{name}", *place)

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return int(self.lengths.max(initial=0))

    @property
    def max_length(self) -> int:
        """Positions a row has room for."""
        return int(next(iter(self.buffers.values())).shape()[2])

    def rows(self, start: int, stop: int) -> OnnxCache:
        """Some rows; the same view each time, since binding it costs as much as a step of a small model."""
        if (start, stop) not in self.views:
            lengths = self.lengths[start:stop]
            self.views[start, stop] = OnnxCache(self.session, self.buffers, lengths, self.first + start)
        return self.views[start, stop]

    def select(self, rows: Sequence[int]) -> OnnxCache:
        """A copy whose row i goes on from row rows[i]."""
        at = [self.first + row for row in rows]
        held = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(buffer.numpy()[at]), buffer.device_name())
            for name, buffer in self.buffers.items()
        }
        return OnnxCache(self.session, held, self.lengths[list(rows)])

    def reset(self) -> None:
        """Forgets every row; what the buffers hold is never read again."""
        self.lengths[:] = 0


class OnnxRunner:
    """Runs an export's model.onnx on the CPU or a CUDA GPU.

    Attributes:
        vocab_size: V.
        max_length: positions, prompt and answer together.
        eos_ids: every id that ends a text or a turn.
    """

    start_ids: tuple[int, ...] = ()

    def __init__(self, folder: Path, device: Device) -> None:
        """Loads the graph.

        Raises:
            DataError: a file is missing or no ONNX model, or the graph names weights outside its folder.
            UnavailableError: CUDA was asked for and ONNX Runtime does not get it.
        """
        config = hf.read_config(folder)
        self.folder, self.device = folder, device
        self.vocab_size, self.eos_ids = config.vocab_size, config.eos_ids
        self.max_length = config.max_position_embeddings
        self.session = open_session(folder, device)
        names = [value.name for value in self.session.get_inputs()]
        self.cache_names = [name.removeprefix(PAST) for name in names if name.startswith(PAST)]
        layers = config.num_hidden_layers
        if len(self.cache_names) != 2 * layers:
            raise DataError(f"has a cache of {len(self.cache_names)} tensors for {layers} layers", file=folder / GRAPH)
        self.cache_row = (config.num_key_value_heads, config.head_dim)
        overridable = {value.name for value in self.session.get_overridable_initializers()}
        self.keeps_last = "logits_to_keep" in overridable

    def begin(self, prompt: Sequence[int], new: int) -> tuple[OnnxCache, list[int]]:
        """See `Runner`."""
        return self.new_cache(1, len(prompt) + new), list(prompt)

    def select(self, cache: OnnxCache, rows: Sequence[int]) -> OnnxCache:
        """See `Runner`."""
        return cache.select(rows)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> OnnxCache:
        """Empty buffers for `batch` sequences of up to `max_length` positions (default: the model's)."""
        length, (K, D) = max_length or self.max_length, self.cache_row
        shape = (batch, K, length, D)  # zeros: the system hands out pages only where a row grows
        held = (
            ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), self.device.kind) for _ in self.cache_names
        )
        buffers = dict(zip(self.cache_names, held, strict=True))
        return OnnxCache(self.session, buffers, np.zeros(batch, np.int64))

    def forward(
        self, ids: np.ndarray, cache: OnnxCache | None = None, last_only: bool = True, new: np.ndarray | None = None
    ) -> np.ndarray:
        """Appends new tokens to the cache and returns their logits.

        Args:
            ids: (B, T) int64.
            cache: of B rows; None for one pass over whole sequences.
            last_only: (B, 1, V), each row's last new token, instead of (B, T, V).
            new: (B,) how many of the T are real where rows are padded on the right; default all. T then ends with the
                longest row, and logits of padding mean nothing.

        Raises:
            ValueError: ids outside the vocabulary, or more positions than the cache or the model holds.
        """
        B, T = ids.shape
        new = np.full(B, T) if new is None else np.asarray(new)
        cache = cache if cache is not None else self.new_cache(B, T)
        check(ids, cache, new, self.vocab_size, self.max_length)
        T = int(new.max())
        ids = np.ascontiguousarray(ids[:, :T], np.int64)
        if B > 1 and T > 1 and cache.lengths.any():
            rows = [self.forward(ids[b : b + 1, : new[b]], cache.rows(b, b + 1), last_only) for b in range(B)]
            width = max(row.shape[1] for row in rows)
            return np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
        ragged = bool((new < T).any())
        keep = 1 if last_only and not ragged and self.keeps_last else T
        logits = self._run(ids, cache, cache.lengths + new, keep)
        cache.lengths += new
        return logits[np.arange(B), new - 1][:, None] if last_only and keep > 1 else logits

    def _run(self, ids: np.ndarray, cache: OnnxCache, totals: np.ndarray, keep: int) -> np.ndarray:
        """One pass of the session: (B, T) -> (B, keep, V)."""
        B = len(ids)
        mask = np.ascontiguousarray(np.arange(totals.max()) < totals[:, None], np.int64)  # (B, S)
        logits = np.empty((B, keep, self.vocab_size), np.float32)
        kept = np.array([keep], np.int64)
        binding = cache.binding
        named = {"input_ids": ids, "attention_mask": mask} | ({"logits_to_keep": kept} if self.keeps_last else {})
        for name, value in named.items():
            binding.bind_input(name, "cpu", 0, np.int64, value.shape, value.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        return logits


class Held(Protocol):
    """What a cache tells of the rows it holds."""

    lengths: np.ndarray

    @property
    def length(self) -> int: ...
    @property
    def max_length(self) -> int: ...


def check(ids: np.ndarray, cache: Held, new: np.ndarray, vocab_size: int, max_length: int) -> None:
    """Checks what the kernels would not: Gather takes a negative id for one from the end.

    Raises:
        ValueError: see `OnnxRunner.forward`.
    """
    B, T = ids.shape
    if len(cache.lengths) != B or new.shape != (B,) or not T or new.min() < 1 or new.max() > T:
        held = len(cache.lengths)
        raise ValueError(f"{B} rows of {T} tokens do not go with a cache of {held} rows and new = {new.tolist()}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"token ids lie outside 0 .. {vocab_size - 1}")
    room = min(cache.max_length, max_length)
    if int((cache.lengths + new).max()) > room:
        raise ValueError(f"{cache.length} + {T} positions do not fit in {room}")


def open_session(folder: Path, device: Device) -> ort.InferenceSession:
    """The session of a folder's graph, on the device that was asked for.

    Raises:
        DataError, UnavailableError: see `OnnxRunner`.
    """
    check_external_data(folder / GRAPH)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = device.threads, 1
    options.log_severity_level = ERRORS_ONLY
    options.enable_mem_pattern = False  # a plan is kept for every shape seen, and each step of a decoder has a new one
    # Providers are always named: onnxruntime-gpu tries CUDA by default, and complains where there is none.
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.kind == "cuda":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it can't find
            ort.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))  # fp32 means fp32
    try:
        session = ort.InferenceSession(str(folder / GRAPH), options, providers=providers)
    except Exception as reason:  # ONNX Runtime's own exceptions derive from nothing more precise
        raise DataError(f"ONNX Runtime {ort.__version__} can't load it ({reason})", file=folder / GRAPH) from reason
    if device.kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise UnavailableError(
            f"ONNX Runtime {ort.__version__} gets no CUDA here, only {', '.join(session.get_providers())}",
            hint="llmctl doctor says what is missing; --device cpu runs it here",
        )
    return session


def check_external_data(graph: Path) -> None:
    """Refuses a graph whose weights are not plain files of its own folder (CVE-2026-27489, -34445 to -34447).

    Raises:
        DataError: no ONNX file, or an external tensor with an absolute path, "..", a link, a hard link, or bytes past
            the end of its file.
    """
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as reason:  # protobuf's and onnx's errors share no base
        raise DataError(f"is no ONNX model ({reason})", file=graph) from reason
    nodes = (node for function in model.functions for node in function.node)
    for tensor in (*_tensors(model.graph.initializer, model.graph.node), *_tensors((), nodes)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {"offset": "0", "length": "0"} | {item.key: item.value for item in tensor.external_data}
            problem = _outside(graph.parent, entry.get("location", ""), entry["offset"], entry["length"])
            if problem:
                raise DataError(f"the weights of {tensor.name} {problem}", file=graph, hint="do not use this folder")


def _tensors(initializers: Iterable[Any], nodes: Iterable[Any]) -> Iterator[Any]:
    """Every tensor of a graph: what nodes carry as attributes and what their subgraphs hold included."""
    yield from initializers
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner.initializer, inner.node)


def _outside(folder: Path, location: str, offset: str, length: str) -> str:
    """What is wrong with a place where weights are said to lie; empty for bytes of a plain file in the folder."""
    file = folder / location
    if not location or Path(location).name != location or file.is_symlink() or not file.is_file():
        return f"lie in {location!r}, which is no file beside the graph"
    if file.stat().st_nlink > 1:
        return f"lie in {location}, which has other names (hard links): it may be a file from elsewhere"
    if not (offset.isdecimal() and length.isdecimal() and int(offset) + int(length) <= file.stat().st_size):
        return f"lie past the end of {location} (offset {offset}, length {length})"
    return ""
