"""Which runner an exported folder gets."""

from __future__ import annotations

from pathlib import Path

import onnx

from llmctl.device import Device
from llmctl.errors import DataError
from llmctl.inference.external_data import check_external_data
from llmctl.inference.onnx_portable import PortableRunner
from llmctl.inference.onnx_recurrent import RecurrentRunner
from llmctl.inference.onnx_runner import GRAPH, OnnxRunner
from llmctl.inference.tensorrt_runner import ENGINE, ENGINES, EngineRunner, ProviderRunner
from llmctl.model import hf

Exported = OnnxRunner | PortableRunner | RecurrentRunner | EngineRunner


def load(folder: Path, device: Device) -> Exported:
    """The runner for an exported decoder or LSTM: by its config's kind, and by what its graph asks for.

    Raises:
        DataError, UnavailableError: see `OnnxRunner`; or the model writes no text.
    """
    config = hf.read_config(folder)
    if config.kind == "recurrent":
        return RecurrentRunner(folder, device)
    if config.task != "causal-lm":
        raise DataError(f"is a {config.family} {config.kind} for {config.task}, which writes no text", file=folder)
    if device.kind == "cuda" and (folder / ENGINE).is_file():  # elsewhere the graph beside it does
        return EngineRunner(folder, device)
    if device.kind == "cuda" and (folder / ENGINES).is_dir():
        return ProviderRunner(folder, device)
    check_external_data(folder / GRAPH)
    inputs = {value.name for value in onnx.load(str(folder / GRAPH), load_external_data=False).graph.input}
    return PortableRunner(folder, device) if "position_ids" in inputs else OnnxRunner(folder, device)
