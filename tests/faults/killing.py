"""Killing a process at each of its file operations in turn."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

# What publishing is made of: everything that changes a folder or makes it last.
OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def killed_at(point: int, work: Callable[[], object], operations: tuple[str, ...] = OPERATIONS) -> bool:
    """Runs `work` in a forked process that is killed before its operation `point // 2`, or right after it if odd.

    Returns:
        Whether it was killed; False means that it has fewer operations and finished.
    """
    pid = os.fork()
    if pid == 0:
        _arm(point, operations)
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"it ended with {code}"
    return code != 0


def _arm(point: int, operations: tuple[str, ...]) -> None:
    left = point

    def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            made = operation(*args, **named)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return made

        return run

    for name in operations:
        setattr(os, name, deadly(getattr(os, name)))


# The same for a warm llmctl: Python that it runs first.
ARMED = "from tests.faults.killing import _arm, OPERATIONS; _arm({point}, OPERATIONS)"

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
