"""A decoder that was exported for TensorRT, behind the interface of runners.py.

Written from NVIDIA's and ONNX Runtime's documentation, and not run on a GPU yet (docs/tested-on.md).

`EngineRunner` runs model.plan through the package tensorrt; `ProviderRunner` the graph beside it through ONNX Runtime's
TensorRT provider, which builds engines of its own and keeps them in the folder. Both hold a cache of fixed length whose
past and present are one buffer, and know the shapes in profiles.json: prompts go in pieces.

B sequences, T new tokens, S positions of the cache, K key/value heads, D head size, V vocabulary
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from llmctl.device import Device
from llmctl.errors import DataError, UnavailableError
from llmctl.inference.external_data import check_external_data
from llmctl.inference.onnx_portable import GrowingCache, PortableRunner
from llmctl.inference.onnx_runner import ERRORS_ONLY, GRAPH, PAST, check
from llmctl.model import hf

ENGINE, PROFILES, ENGINES = "model.plan", "profiles.json", "engines"
PROVIDER = "TensorrtExecutionProvider"
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}  # as TensorRT calls them


class EngineCache:
    """Keys and values of B sequences, (B, K, S, D) a layer, on the GPU; `lengths` (B,) counts what each row holds."""

    def __init__(self, buffers: Mapping[str, Tensor], lengths: np.ndarray, max_length: int) -> None:
        self.buffers, self.lengths, self.max_length = buffers, lengths, max_length

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return int(self.lengths.max(initial=0))

    def rows(self, start: int, stop: int) -> EngineCache:
        """Some rows, sharing memory and lengths with the whole."""
        buffers = {name: buffer[start:stop] for name, buffer in self.buffers.items()}
        return EngineCache(buffers, self.lengths[start:stop], self.max_length)

    def select(self, rows: Sequence[int]) -> EngineCache:
        """A copy whose row i goes on from row rows[i]."""
        at = list(rows)
        buffers = {name: buffer[at].contiguous() for name, buffer in self.buffers.items()}
        return EngineCache(buffers, self.lengths[at], self.max_length)

    def reset(self) -> None:
        """Forgets every row; what the buffers hold is never read again."""
        self.lengths[:] = 0


class EngineRunner:
    """Runs model.plan on the GPU it was built for; the attributes are `OnnxRunner`'s."""

    start_ids: tuple[int, ...] = ()

    def __init__(self, folder: Path, device: Device) -> None:
        """Loads the engine.

        Raises:
            UnavailableError: no package tensorrt, or the engine is of another version of it or another GPU.
        """
        config = hf.read_config(folder)
        self.vocab_size, self.eos_ids, self.device = config.vocab_size, config.eos_ids, device
        self.max_length, self.batch, self.piece = limits(folder)
        self.trt = tensorrt()
        engine = self.trt.Runtime(self.trt.Logger(self.trt.Logger.ERROR)).deserialize_cuda_engine(
            (folder / ENGINE).read_bytes()
        )
        if engine is None:
            raise UnavailableError(
                f"tensorrt {self.trt.__version__} can't load it: an engine is of one version and one GPU",
                file=folder / ENGINE,
                hint="llmctl export --tensorrt --rebuild builds it here",
            )
        self.engine, self.stream = engine, torch.cuda.Stream()  # type: ignore[no-untyped-call]
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.cache_names = [name.removeprefix(PAST) for name in names if name.startswith(PAST)]
        self.dtype = DTYPES[engine.get_tensor_dtype(f"{PAST}{self.cache_names[0]}").name]
        self.cache_row = (config.num_key_value_heads, self.max_length, config.head_dim)
        self.contexts = [engine.create_execution_context() for _ in range(2)]  # one a profile: prompts, decoding
        for profile, context in enumerate(self.contexts):
            context.set_optimization_profile_async(profile, self.stream.cuda_stream)
        self.stream.synchronize()
        self.session = self  # parity.json names the runtime by what its session says

    def get_providers(self) -> list[str]:
        """What runs it, as an ONNX Runtime session would say."""
        return [f"TensorRT {self.trt.__version__}"]

    def begin(self, prompt: Sequence[int], new: int) -> tuple[Any, list[int]]:
        """See `Runner`."""
        return self.new_cache(1, len(prompt) + new), list(prompt)

    def select(self, cache: Any, rows: Sequence[int]) -> Any:
        """See `Runner`."""
        return cache.select(rows)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Any:
        """Empty buffers for `batch` sequences of up to `max_length` positions (default: all that the engine has)."""
        shape = (batch, *self.cache_row)
        buffers = {name: torch.zeros(shape, dtype=self.dtype, device=self.device.torch) for name in self.cache_names}
        return EngineCache(buffers, np.zeros(batch, np.int64), min(max_length or self.max_length, self.max_length))

    def forward(self, ids: np.ndarray, cache: Any = None, last_only: bool = True, new: Any = None) -> np.ndarray:
        """See `OnnxRunner.forward`."""
        B, T = ids.shape
        new = np.full(B, T) if new is None else np.asarray(new)
        cache = cache if cache is not None else self.new_cache(B, T)
        check(ids, cache, new, self.vocab_size, self.max_length)
        T, longest = int(new.max()), cache.length
        ragged = bool((new < T).any())
        # Padding is written behind its row: it must find room there, and no row may end before the last piece.
        crowded = self.batch < B or (ragged and (self.piece < T or longest + T > self.max_length))
        if B > 1 and crowded:
            rows = [self.forward(ids[b : b + 1, : new[b]], cache.rows(b, b + 1), last_only) for b in range(B)]
            width = max(row.shape[1] for row in rows)
            return np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
        pieces = np.split(ids[:, :T], range(self.piece, T, self.piece), axis=1)
        counts = [new] if len(pieces) == 1 else [np.full(B, piece.shape[1]) for piece in pieces]
        logits = [self._run(piece, cache, count) for piece, count in zip(pieces, counts, strict=True)]
        return logits[-1][np.arange(B), counts[-1] - 1][:, None] if last_only else np.concatenate(logits, axis=1)

    def _run(self, ids: np.ndarray, cache: Any, new: np.ndarray) -> np.ndarray:
        """One pass of the engine: (B, T) -> (B, T, V); the cache then holds `new` more of each row."""
        B, T = ids.shape
        context, place = self.contexts[int(T == 1)], self.device.torch
        positions = cache.lengths[:, None] + np.arange(T)
        logits = torch.empty((B, T, self.vocab_size), device=place)
        given = {
            "input_ids": torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(place),
            "position_ids": torch.from_numpy(np.ascontiguousarray(positions, np.int64)).to(place),
            **{f"{PAST}{name}": buffer for name, buffer in cache.buffers.items()},
        }
        made = {"logits": logits, **{f"present.{name}": buffer for name, buffer in cache.buffers.items()}}
        for name, tensor in given.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in (given | made).items():
            context.set_tensor_address(name, tensor.data_ptr())
        self.stream.wait_stream(torch.cuda.current_stream())  # the copies above are on torch's own
        done = context.execute_async_v3(self.stream.cuda_stream)
        self.stream.synchronize()
        if not done:
            raise RuntimeError(f"TensorRT could not run {B} rows of {T} tokens")
        cache.lengths += new
        return np.asarray(logits.cpu().numpy())


class ProviderRunner(EngineRunner):
    """Runs model.onnx through ONNX Runtime's TensorRT provider; the attributes are `OnnxRunner`'s."""

    def __init__(self, folder: Path, device: Device) -> None:
        """Loads the graph, and builds engines that the folder does not hold yet: minutes, the first time.

        Raises:
            DataError, UnavailableError: see `OnnxRunner`; or no TensorRT in this onnxruntime.
        """
        self.session = provider_session(folder)
        self.graph = PortableRunner(folder, device, self.session)
        self.vocab_size, self.eos_ids, self.device = self.graph.vocab_size, self.graph.eos_ids, device
        self.max_length, self.batch, self.piece = limits(folder)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Any:
        """Empty buffers of the length that the engine was built for, whatever `max_length`."""
        buffers, limit = self.graph.buffers(batch, self.max_length), min(max_length or self.max_length, self.max_length)
        return GrowingCache(self.graph, buffers, np.zeros(batch, np.int64), limit)

    def _run(self, ids: np.ndarray, cache: Any, new: np.ndarray) -> np.ndarray:
        return self.graph.forward(ids, cache, last_only=False, new=new)


def limits(folder: Path) -> tuple[int, int, int]:
    """(S, the most sequences, the most new tokens at once) of a folder's engine."""
    try:
        stated = shapes(folder)["prefill"]
        batch, piece = (int(size) for size in stated["input_ids"]["max"])
        cache = int(next(shape for name, shape in stated.items() if name.startswith(PAST))["max"][2])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as reason:
        raise DataError(f"says no shapes that an engine could have ({reason!r})", file=folder / PROFILES) from reason
    if min(cache, batch, piece) < 1:
        raise DataError(f"says shapes of no size: {cache}, {batch}, {piece}", file=folder / PROFILES)
    return cache, batch, piece


def shapes(folder: Path) -> dict[str, dict[str, dict[str, list[int]]]]:
    """The profiles in profiles.json, by name: min, opt and max of each input."""
    try:
        found: dict[str, dict[str, dict[str, list[int]]]] = json.loads((folder / PROFILES).read_text())["profiles"]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise DataError(f"says no shapes ({reason!r})", file=folder / PROFILES) from reason
    return found


def tensorrt() -> Any:
    """The package tensorrt.

    Raises:
        UnavailableError: it is not installed, or it can't be imported here.
    """
    try:
        return importlib.import_module("tensorrt")
    except Exception as reason:  # without its libraries or a driver it raises whatever the loader does
        raise UnavailableError(
            f"the package tensorrt is not here ({reason})",
            hint="pip install 'llmctl[tensorrt]', on a machine with a GPU",
        ) from reason


def provider_options(folder: Path) -> dict[str, str]:
    """What ONNX Runtime's provider is told: the shapes of profiles.json, and to keep its engines in the folder.

    Reference: https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
    """
    profiles = shapes(folder)
    told = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder / ENGINES)}
    for which in ("min", "opt", "max"):
        told[f"trt_profile_{which}_shapes"] = ",".join(
            f"{name}:{'x'.join(map(str, shape[which]))}"
            for inputs in profiles.values()
            for name, shape in inputs.items()
        )
    return told


def provider_session(folder: Path) -> ort.InferenceSession:
    """A session whose nodes TensorRT runs, over a cache of the length in profiles.json."""
    check_external_data(folder / GRAPH)
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_free_dimension_override_by_name("max_sequence_length", limits(folder)[0])
    ort.preload_dlls()
    asked = [(PROVIDER, provider_options(folder)), "CUDAExecutionProvider", "CPUExecutionProvider"]
    session = ort.InferenceSession(str(folder / GRAPH), options, providers=asked)
    if PROVIDER not in session.get_providers():  # it falls silently
        raise UnavailableError(
            f"ONNX Runtime {ort.__version__} gets no TensorRT here, only {', '.join(session.get_providers())}",
            hint="llmctl doctor says what is missing",
        )
    return session
