"""Which device, dtype and threads a stage uses, and the sentence that says why."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import torch

# What /proc/cpuinfo calls the instruction sets that change what llmctl does.
ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")
CPU_BF16 = ("amx_bf16", "avx512_bf16")  # oneDNN multiplies bfloat16 natively with these; slower than fp32 without


@dataclass(frozen=True)
class Device:
    """Where the work runs."""

    kind: str  # "cpu" or "cuda"
    name: str
    threads: int
    isa: frozenset[str]

    @property
    def torch(self) -> torch.device:
        import torch

        return torch.device(self.kind)

    def dtype(self, wanted: str) -> tuple[str, str]:
        """The dtype of the matrix products, and why: "auto" takes bf16 where the hardware multiplies it fast."""
        if wanted != "auto":
            return wanted, "asked for"
        if self.kind == "cuda":
            import torch

            bf16 = torch.cuda.get_device_capability()[0] >= 8
            return ("bf16", "tensor cores") if bf16 else ("fp32", "this GPU has no bfloat16 tensor cores")
        found = next((name for name in CPU_BF16 if name in self.isa), None)
        return ("bf16", found) if found else ("fp32", "this CPU has neither avx512_bf16 nor amx_bf16")

    def describe(self) -> str:
        """`cpu, 2 threads` or the GPU's name."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"cpu, {threads}" if self.kind == "cpu" else self.name


def pick(wanted: str = "auto") -> Device:
    """The device a `--device` names. "auto" takes CUDA where torch finds it.

    Raises:
        UnavailableError: an explicit device that is not here; never a silent fall to the CPU.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {wanted} is not known", hint="choose auto, cpu or cuda")
    if wanted == "cpu" or not nvidia_driver():
        if wanted == "cuda":
            raise UnavailableError("no NVIDIA driver on this machine", hint="leave --device out to use the CPU")
        return Device("cpu", cpu_name(), cpu_quota(), cpu_isa())
    import torch

    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name(), cpu_quota(), cpu_isa())
    if wanted == "cuda":
        raise UnavailableError(
            f"this build of torch ({torch.__version__}) finds no CUDA device",
            hint="install a CUDA build of torch; see: llmctl doctor",
        )
    return Device("cpu", cpu_name(), cpu_quota(), cpu_isa())


def nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded; asks the kernel, so that nothing heavy is imported to learn "no"."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def cpu_quota() -> int:
    """Threads this process may use: its CPU affinity, cut by the container's quota (cgroup v2, then v1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota_file, period_file in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (Path("/sys/fs/cgroup") / quota_file).read_text().split()
            period = words[1] if period_file is None else (Path("/sys/fs/cgroup") / period_file).read_text()
            if words[0] not in ("max", "-1"):
                return max(1, min(allowed, round(int(words[0]) / int(period))))
        except (OSError, IndexError, ValueError):
            continue
    return max(1, allowed)


@functools.cache
def cpu_isa() -> frozenset[str]:
    """The instruction sets of `ISA` that this CPU has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = {
        word
        for line in text.splitlines()
        if line.startswith(("flags", "Features"))
        for word in line.split(":", 1)[1].split()
    }
    return frozenset(flags & set(ISA))


@functools.cache
def cpu_name() -> str:
    """The model's name as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
