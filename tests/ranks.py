"""Work that real processes do together, over gloo: forked from the warm llmctl, joined as its trainings are."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

from tests.warm import Call, Warm

CHILD = """
import json, sys
from tests.ranks import joined
joined({module!r}, {function!r}, {arguments!r}, {answer!r})
"""


def start(warm: Warm, folder: Path, module: str, function: str, size: int = 2, **arguments: Any) -> list[Call]:
    """`size` processes that run the function of that name of `module` as ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    calls = []
    for rank in range(size):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        env = {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
        env |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        before = CHILD.format(
            module=module, function=function, arguments=arguments, answer=str(folder / f"{rank}.json")
        )
        calls.append(warm.start(cwd=folder, before=before, env=env))
    return calls


def answers(warm: Warm, folder: Path, module: str, function: str, size: int = 2, **arguments: Any) -> list[Any]:
    """What the function returned on each rank, through JSON."""
    for call in start(warm, folder, module, function, size, **arguments):
        done = call.wait()
        assert done.code == 0, done.out + done.err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def joined(module: str, function: str, arguments: dict[str, Any], answer: str) -> None:
    """One rank's side; ends the process."""
    import importlib

    import torch

    from llmctl import device, launch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if launch.rank():
        next(launch.trainings())
    with launch.together("test", {}, 30, device.pick("cpu")):
        found = getattr(importlib.import_module(module), function)(**arguments)
    Path(answer).write_text(json.dumps(found))
    sys.exit(0)
