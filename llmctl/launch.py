"""Several processes, one command: `--nproc N` on one machine, torchrun on many.

Rank 0 is the command itself: it holds the run's lock, makes what is upstream, prints, writes and publishes. The others
run the same command line in silence: they wait until rank 0 begins a training, take part in its steps, and end with it.
What they need to find each other stands where torchrun puts it, in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from llmctl import console
from llmctl.device import Device
from llmctl.errors import (
    DataError,
    Interrupted,
    LlmctlError,
    Paused,
    RecipeError,
    RunError,
    TimeUp,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PAUSE = 0.05  # seconds between two looks
GRACE = 3.0  # seconds that the others have to say why, or to end, when one has failed
TOGETHER = timedelta(hours=1)  # machines do not all start at once
GO_ON = "the same command again goes on from the last checkpoint"


def size() -> int:
    """How many processes this command is."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in NAMES) else 1


def rank() -> int:
    """Which of them this is."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else 0


def check_batch(sequences: int | None, key: str) -> None:
    """Refuses a global batch that the ranks cannot share out evenly, with the nearest that they can.

    Raises:
        RecipeError: naming `key`.
    """
    if sequences is None or sequences % size() == 0:
        return
    below = sequences // size() * size()
    sizes = " or ".join(f"{near:,}" for near in (below, below + size()) if near)
    raise RecipeError(
        f"{key} = {sequences:,} cannot be divided among {size()} ranks",
        hint=f"set it to {sizes}; the batch is the same on any number of ranks",
    )


def share(device: Device) -> Device:
    """What a rank has of its machine: a GPU of its own, or its part of the CPU's threads."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1
    return dataclasses.replace(device, threads=max(1, device.threads // here))


# ---------------------------------------------------------------------------------------------------- on one machine

_ended: dict[int, int] = {}  # rank -> how a process that we started ended, as subprocess has it
_listening: socket.socket | None = None  # where rank 0 will answer: bound before the others need to know its port


@contextlib.contextmanager
def processes(count: int, failed: Callable[[LlmctlError], int]) -> Iterator[None]:
    """Runs the block in `count` processes, of which this one is rank 0. Nothing heavy may have been imported before.

    None outlives the block. `failed` reports an error, and says with which code to exit, where rank 0 cannot: it is
    stuck in a computation that waits for a process that is no more.
    """
    if count == 1:
        yield
        return
    if size() > 1:
        raise UsageError("--nproc and torchrun both start the ranks", hint="leave --nproc out under torchrun")
    global _listening
    _listening = socket.create_server(("127.0.0.1", 0))
    port = _listening.getsockname()[1]
    places = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"RANK": "0", "LOCAL_RANK": "0"}
    if sys.platform == "linux":
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")  # nobody outside this machine takes part
    sys.stdout.flush()
    children: dict[int, int] = {}
    for number in range(1, count):
        pid = os.fork()
        if pid == 0:
            _listening.close()
            _listening = None
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
            console.mute()
            yield
            return
        children[pid] = number
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(children, over, failed), daemon=True, name="ranks")
    watcher.start()
    patience = 10 * PAUSE
    try:
        yield
        patience = GRACE
    finally:
        over.set()
        watcher.join(patience)
        _kill(children)
        watcher.join()


def _watch(children: dict[int, int], over: threading.Event, failed: Callable[[LlmctlError], int]) -> None:
    """Collects the processes as they end. Where one fails and rank 0 does not notice, ends everything."""
    noticed = math.inf
    while children or not over.is_set():
        for pid in list(children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                number, code = children.pop(pid), os.waitstatus_to_exitcode(status)
                _ended[number] = code
                if code not in (0, 130, 143):
                    noticed = min(noticed, time.monotonic())
        if time.monotonic() > noticed + 3 * GRACE and not over.is_set():
            _kill(children)
            os._exit(failed(_reason(None)))
        time.sleep(PAUSE)


def _kill(children: Mapping[int, int]) -> None:
    for pid in list(children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------- what rank 0 begins


@functools.cache
def _store() -> Store:
    """Where the ranks leave word for each other. Rank 0 has it, or torchrun."""
    from torch._C._distributed_c10d import TCPStore

    if _listening is not None:
        handle, port = _listening.detach(), int(os.environ["MASTER_PORT"])
        return TCPStore("127.0.0.1", port, None, True, TOGETHER, False, master_listen_fd=handle)
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", rank(), size(), timeout=TOGETHER))[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Rank 0, around all that it does: in the end the others are sent home."""
    if size() == 1:
        yield
        return
    store = _store()
    try:
        yield
    finally:
        store.set(f"training {store.add('trainings', 0)}", "null")
        end = time.monotonic() + GRACE
        while store.add("heard", 0) < size() - 1 and not any(_ended.values()) and time.monotonic() < end:
            time.sleep(PAUSE)  # the store may end with this process


def trainings() -> Iterator[tuple[str, dict[str, Any]]]:
    """The others: the place of each training that rank 0 begins, and its word of it, until it ends."""
    store, number = _store(), 0
    while True:
        try:
            while not store.check([f"training {number}"]):
                time.sleep(PAUSE)
            found = json.loads(store.get(f"training {number}"))
        except RuntimeError as reason:
            raise RunError("rank 0 has ended") from reason
        if found is None:
            store.add("heard", 1)
            return
        yield found["place"], found["word"]
        number += 1


@contextlib.contextmanager
def together(place: str, word: Mapping[str, Any], timeout: float, device: Device) -> Iterator[None]:
    """One training: all ranks in one process group, with nccl on GPUs and gloo on CPUs.

    Args:
        word: what the others need to know of it, as JSON. timeout: seconds that a rank may let the others wait.

    Raises:
        RunError: a rank failed, ended or hung; on rank 0 with the reason of the first.
        DataError: the ranks do not see the same run folder.
        UnavailableError: more ranks than GPUs.
    """
    if size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    store = _store()
    if rank() == 0:
        number = store.add("trainings", 1) - 1
        store.set(f"training {number}", json.dumps({"place": place, "word": word}))
    if device.kind == "cuda":
        if (count := torch.cuda.device_count()) <= local_rank():
            raise UnavailableError(f"this machine has {count} GPUs for more ranks", hint=f"--nproc {count}, or fewer")
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if device.kind == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore(place, store),
            rank=rank(),
            world_size=size(),
            timeout=timedelta(seconds=timeout),
        )
        yield
    except (Interrupted, TimeUp, Paused):
        raise
    except Exception as problem:
        lost = not isinstance(problem, LlmctlError) and _is_of_the_network(problem)
        if rank() == 0 and lost:
            raise _reason(problem, timeout) from problem
        if rank() > 0:
            _leave_word(store, problem, lost)
        if lost:
            raise RunError("the other ranks are lost") from problem
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_of_the_network(problem: Exception) -> bool:
    """gloo raises a plain RuntimeError: by its words."""
    words = ("gloo", "nccl", "connection", "timed out", "broken pipe", "socket", "store")
    return isinstance(problem, RuntimeError) and any(word in str(problem).lower() for word in words)


def _leave_word(store: Store, problem: Exception, lost: bool) -> None:
    """Says why this rank ends, unless another said so first; or that it was kept waiting."""
    told = problem if isinstance(problem, LlmctlError) else LlmctlError(f"{type(problem).__name__}: {problem}")
    word = {"rank": rank(), "code": told.code, "message": told.message, "hint": told.hint, "file": told.file}
    with contextlib.suppress(RuntimeError):  # rank 0, which has the store, may be the one that ended
        if lost:
            store.set(f"waited {rank()}", "")
        else:
            store.compare_set("failed", "", json.dumps(word))


def _reason(problem: Exception | None, timeout: float = 0.0) -> LlmctlError:
    """Why the ranks broke up: what the first to fail said, how it ended, or who kept the others waiting."""
    store, end = _store(), time.monotonic() + GRACE
    waited = {0} if problem is not None else set[int]()
    with contextlib.suppress(ValueError):  # torchrun sends it to all when one has failed; we are about to say why
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while time.monotonic() < end and len(waited) < size():
        if store.check(["failed"]):
            word = json.loads(store.get("failed"))
            kinds = {kind.code: kind for kind in LlmctlError.__subclasses__()}
            kind = kinds.get(word["code"], LlmctlError)
            return kind(f"rank {word['rank']}: {word['message']}", hint=word["hint"] or GO_ON, file=word["file"])
        for number, code in list(_ended.items()):
            if code < 0:
                hint = f"want of memory is a common reason; {GO_ON}" if code == -signal.SIGKILL else GO_ON
                return RunError(f"rank {number} was ended by {signal.Signals(-code).name}", hint=hint)
        waited |= {number for number in range(size()) if store.check([f"waited {number}"])}
        time.sleep(PAUSE)
    for number, code in _ended.items():
        if code and number not in waited:
            return RunError(f"rank {number} ended with exit code {code}", hint=f"-v shows why; {GO_ON}")
    silent = sorted(set(range(size())) - waited)
    if not silent:
        return RunError(f"the ranks lost each other: {str(problem).splitlines()[0]}", hint=GO_ON)
    who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
    if problem is not None and "timed out" not in str(problem).lower():
        return RunError(f"{who} ended without a word", hint=GO_ON)
    return RunError(f"{who} did not answer" + f" within rank_timeout = {timeout:g} s" * bool(timeout), hint=GO_ON)


def agree_on(inputs: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raises DataError where this rank's run folder holds others than rank 0's."""
    if dict(inputs) != dict(theirs):
        raise DataError(
            "the run folder here is not the one that rank 0 works in",
            hint="put it on a file system that all machines share (--run-dir)",
        )
