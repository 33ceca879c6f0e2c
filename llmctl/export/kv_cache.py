"""The scales of a cache in int8: how large keys and values get in each channel of each head, over real text that the
gate does not read.

GroupQueryAttention keeps round(x / scale), -128 to 127, and multiplies by the scale when it reads
(https://github.com/microsoft/onnxruntime/pull/28578). What gets larger than in this text is cut off, rarely but then
by much: so all of the text is read, and some room is left.
"""

# L layers, K key/value heads, D head size

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llmctl.errors import UsageError
from llmctl.model import hf
from llmctl.model.transformer import Decoder

WINDOW, WINDOWS = 1024, 8  # tokens that are read at once, and how often
ROOM = 1.1
LEAST = 1e-6  # a scale of a channel that is always 0


def calibrated(model: Path, tokens: np.ndarray, device: torch.device) -> dict[str, np.ndarray]:
    """`scales` of the model in a folder.

    Raises:
        UsageError: it is no decoder.
    """
    found = hf.load(model, device=device)
    if not isinstance(found, Decoder):
        raise UsageError(
            f"{model} is a {found.config.family} {found.config.kind}, and only a decoder's cache has an int8 form",
            hint='leave out [export] kv_cache = "int8"',
        )
    return scales(found, tokens)


def scales(model: Decoder, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """(K, D) fp32 by "0.key", "0.value", "1.key" ..., for every layer of a decoder that reads `tokens`."""
    window = min(WINDOW, model.config.max_position_embeddings)
    found: dict[str, np.ndarray] = {}
    for start in range(0, len(tokens), window):
        part = torch.from_numpy(tokens[None, start : start + window].astype(np.int64)).to(model.device)
        cache = model.new_cache(1, window)
        with torch.inference_mode():
            model(part, cache=cache, last_only=True)
        for name, held in (("key", cache.keys), ("value", cache.values)):  # (L, 1, K, window, D), keys are rotated
            largest = held[:, 0, :, : cache.length].float().abs().amax(2).cpu().numpy()  # (L, K, D)
            for layer, most in enumerate(largest):
                found[f"{layer}.{name}"] = np.maximum(ROOM * most / 127, found.get(f"{layer}.{name}", LEAST))
    return found
