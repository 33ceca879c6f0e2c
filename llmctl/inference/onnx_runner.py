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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from llmctl.device import Device
from llmctl.errors import DataError, RunError, UnavailableError
from llmctl.inference.external_data import check_external_data
from llmctl.model import hf

GRAPH, ADAPTER = "model.onnx", "adapter.onnx_adapter"
PAST = "past_key_values."
# What a cache may hold, as onnx.TensorProto numbers it, and where that lies: NumPy has no bfloat16.
KINDS = {"tensor(float)": 1, "tensor(int8)": 3, "tensor(float16)": 10, "tensor(bfloat16)": 16}
STORED: dict[int, Any] = {1: np.float32, 3: np.int8, 10: np.uint16, 16: np.uint16}
ERRORS_ONLY = 3  # ONNX Runtime's severity; 2 warns about `logits_to_keep`, whose default is meant


class OnnxCache:
    """Keys and values of B sequences, (B, K, max_length, D) a layer, in the device's memory.

    `lengths` (B,) counts what each row holds. A view (`rows`) shares memory and lengths with the whole. The
    values lie in buffers of `STORED`.
    """

    def __init__(self, runner: OnnxRunner, buffers: dict[str, Any], lengths: np.ndarray, first: int = 0) -> None:
        self.runner, self.buffers, self.lengths, self.first = runner, buffers, lengths, first
        self.views: dict[tuple[int, int], OnnxCache] = {}
        self.binding = runner.session.io_binding()
        for name, value in runner.adapter.items():
            self.binding.bind_ortvalue_input(name, value)
        self.bind()

    def bind(self) -> None:
        """Points the session at these rows of the buffers."""
        kind = self.runner.cache_kind
        width = np.dtype(STORED[kind]).itemsize
        for name, buffer in self.buffers.items():
            _, *row = buffer.shape()  # (K, max_length, D)
            shape, pointer = [len(self.lengths), *row], buffer.data_ptr() + width * self.first * math.prod(row)
            place = (buffer.device_name(), 0, kind, shape, pointer)
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
            self.views[start, stop] = OnnxCache(self.runner, self.buffers, lengths, self.first + start)
        return self.views[start, stop]

    def select(self, rows: Sequence[int]) -> OnnxCache:
        """A copy whose row i goes on from row rows[i]."""
        at = [self.first + row for row in rows]
        held = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(buffer.numpy()[at]), buffer.device_name())
            for name, buffer in self.buffers.items()
        }
        return OnnxCache(self.runner, held, self.lengths[list(rows)])

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

    def __init__(self, folder: Path, device: Device, session: ort.InferenceSession | None = None) -> None:
        """Loads the graph, unless there is a session of it already.

        Raises:
            DataError: a file is missing or no ONNX model, or the graph names weights outside its folder.
            UnavailableError: CUDA was asked for and ONNX Runtime does not get it.
        """
        config = hf.read_config(folder)
        self.folder, self.device = folder, device
        self.vocab_size, self.eos_ids = config.vocab_size, config.eos_ids
        self.max_length = config.max_position_embeddings
        self.session = session or open_session(folder, device)
        names = [value.name for value in self.session.get_inputs()]
        self.cache_names = [name.removeprefix(PAST) for name in names if name.startswith(PAST)]
        layers = config.num_hidden_layers
        if len(self.cache_names) != 2 * layers:
            raise DataError(f"has a cache of {len(self.cache_names)} tensors for {layers} layers", file=folder / GRAPH)
        self.cache_row = K, D = (config.num_key_value_heads, config.head_dim)
        cache = {f"{PAST}{name}": (None, K, None, D) for name in self.cache_names}
        check_shapes(self.session, folder / GRAPH, {**cache, "logits": (None, None, self.vocab_size)})
        self.cache_kind = KINDS[next(value.type for value in self.session.get_inputs() if value.name.startswith(PAST))]
        overridable = {value.name: value.shape for value in self.session.get_overridable_initializers()}
        self.keeps_last = "logits_to_keep" in overridable
        self.adapter = read_adapter(folder / ADAPTER, overridable)

    def begin(self, prompt: Sequence[int], new: int) -> tuple[OnnxCache, list[int]]:
        """See `Runner`."""
        return self.new_cache(1, len(prompt) + new), list(prompt)

    def select(self, cache: OnnxCache, rows: Sequence[int]) -> OnnxCache:
        """See `Runner`."""
        return cache.select(rows)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> OnnxCache:
        """Empty buffers for `batch` sequences of up to `max_length` positions (default: the model's)."""
        return OnnxCache(self, self.buffers(batch, max_length or self.max_length), np.zeros(batch, np.int64))

    def buffers(self, batch: int, length: int) -> dict[str, Any]:
        """Zeros, (batch, K, length, D) for each of `cache_names`: the system hands out pages only where a row grows."""
        K, D = self.cache_row
        empty = (np.zeros((batch, K, length, D), STORED[self.cache_kind]) for _ in self.cache_names)
        held = (ort.OrtValue.ortvalue_from_numpy(values, self.device.kind) for values in empty)
        return dict(zip(self.cache_names, held, strict=True))

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
        if self._apart(cache, new):
            rows = [self.forward(ids[b : b + 1, : new[b]], cache.rows(b, b + 1), last_only) for b in range(B)]
            width = max(row.shape[1] for row in rows)
            return np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
        ragged = bool((new < T).any())
        keep = 1 if last_only and not ragged and self.keeps_last else T
        logits = self._run(ids, cache, self._where(cache, new), keep)
        cache.lengths += new
        return logits[np.arange(B), new - 1][:, None] if last_only and keep > 1 else logits

    def _apart(self, cache: OnnxCache, new: np.ndarray) -> bool:
        """Whether the rows have to go one by one: see the facts above."""
        return len(new) > 1 and int(new.max()) > 1 and bool(cache.lengths.any())

    def _where(self, cache: OnnxCache, new: np.ndarray) -> dict[str, np.ndarray]:
        """What tells the graph where the new tokens stand: (B, S), ones up to the last of each row."""
        totals = cache.lengths + new
        return {"attention_mask": np.ascontiguousarray(np.arange(totals.max()) < totals[:, None], np.int64)}

    def _run(self, ids: np.ndarray, cache: OnnxCache, where: Mapping[str, np.ndarray], keep: int) -> np.ndarray:
        """One pass of the session: (B, T) -> (B, keep, V)."""
        B = len(ids)
        logits = np.empty((B, keep, self.vocab_size), np.float32)
        kept = np.array([keep], np.int64)
        binding = cache.binding
        named = {"input_ids": ids, **where, **({"logits_to_keep": kept} if self.keeps_last else {})}
        for name, value in named.items():
            binding.bind_input(name, "cpu", 0, np.int64, value.shape, value.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self.session.run_with_iobinding(binding)
        except RuntimeError as reason:
            raise RunError(f"ONNX Runtime can't run it ({reason})", file=self.folder / GRAPH) from reason
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


def check_shapes(session: ort.InferenceSession, graph: Path, wanted: Mapping[str, tuple[int | None, ...]]) -> None:
    """Holds what a graph says of its inputs and outputs against the config; None is any size.

    Raises:
        DataError: an input or output that is not there, or is of another shape.
    """
    found = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    for name, shape in wanted.items():
        sizes = found.get(name, [])
        pairs = zip(sizes, shape, strict=False)
        if len(sizes) != len(shape) or any(want and isinstance(size, int) and size != want for size, want in pairs):
            said = f"is {sizes}" if sizes else "is not there"
            asked = ", ".join("any" if want is None else str(want) for want in shape)
            raise DataError(f"{name} {said}, but config.json asks for ({asked})", file=graph, hint="export it again")


def read_adapter(path: Path, takes: Mapping[str, Sequence[int | str]]) -> dict[str, Any]:
    """The low-rank changes that lie beside a graph, by the inputs that take them; none where there is no such file.

    Raises:
        DataError: it is no adapter, or not this graph's.
    """
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    except Exception as reason:  # RuntimeError and others of ONNX Runtime
        raise DataError(f"is no adapter that ONNX Runtime reads ({reason})", file=path) from reason
    for name, value in found.items():
        shape, sizes = takes.get(name, ()), value.shape()
        if len(shape) != len(sizes) or any(isinstance(a, int) and a != b for a, b in zip(shape, sizes, strict=True)):
            raise DataError(f"{name} {sizes} has no place in the graph beside it", file=path)
    return found


def open_session(
    folder: Path, device: Device, graph: bytes | None = None, *, name: str = GRAPH
) -> ort.InferenceSession:
    """The session of a folder's graph `name`, on the device that was asked for; `graph` is another over its weights.

    Raises:
        DataError, UnavailableError: see `OnnxRunner`.
    """
    check_external_data(folder / name)
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
        if graph is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        session = ort.InferenceSession(graph or str(folder / name), options, providers=providers)
    except NoKernel as reason:
        raise UnavailableError(
            f"ONNX Runtime {ort.__version__} can't run {folder / name} on the {device.kind} ({reason})",
            hint="bf16 wants a GPU (--device cuda); fp32 and fp16 run anywhere",
        ) from reason
    except Exception as reason:  # ONNX Runtime's own exceptions derive from nothing more precise
        raise DataError(f"ONNX Runtime {ort.__version__} can't load it ({reason})", file=folder / name) from reason
    if device.kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise UnavailableError(
            f"ONNX Runtime {ort.__version__} gets no CUDA here, only {', '.join(session.get_providers())}",
            hint="llmctl doctor says what is missing; --device cpu runs it here",
        )
    return session
