"""Which device, dtype and threads a stage uses, and the sentence that says why."""

from __future__ import annotations

import functools
import os
import platform
import re
import time
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
class Gpu:
    """What a maker promises of a GPU: memory, and the peak of its dense 16-bit matrix products, sums in fp32."""

    pattern: str  # found, whatever its case, in the name that torch gives the device
    memory: float  # bytes: the data sheet's GB, a little less than the driver shows
    peak: float  # FLOP/s without sparsity
    bf16: bool = True  # else the peak is fp16's


# From NVIDIA's data sheets (H100, H200, B200, A100, L40S, L4, A10, T4, V100: where one states the figure with sparsity
# alone, half of it), its architecture white papers (GA102 appendix A, AD102 appendix A, GB202 appendix A) and AMD's
# data sheet (MI300X). The first row whose pattern is found in a device's name is the one it is.
GPUS = {
    "b200": Gpu("b200", 180e9, 2250e12),
    "h200": Gpu("h200", 141e9, 989e12),
    "h100-pcie": Gpu("h100.*pcie", 80e9, 756e12),
    "h100": Gpu("h100", 80e9, 989e12),
    "a100-80": Gpu("a100.*80gb", 80e9, 312e12),
    "a100-40": Gpu("a100", 40e9, 312e12),
    "l40s": Gpu("l40s", 48e9, 362e12),
    "l4": Gpu(r"l4\b", 24e9, 121e12),
    "a10": Gpu(r"a10\b", 24e9, 125e12),
    "5090": Gpu("rtx 5090", 32e9, 209.5e12),
    "4090": Gpu("rtx 4090", 24e9, 165.2e12),
    "3090": Gpu("rtx 3090", 24e9, 71e12),
    "t4": Gpu(r"t4\b", 16e9, 65e12, bf16=False),
    "v100-32": Gpu("v100.*32gb", 32e9, 125e12, bf16=False),
    "v100": Gpu("v100", 16e9, 125e12, bf16=False),
    "mi300x": Gpu("mi300x", 192e9, 1307e12),
}


def gpu(name: str) -> Gpu | None:
    """The row of GPUS for a device's name as torch gives it; None for one that is not listed."""
    return next((row for row in GPUS.values() if re.search(row.pattern, name, re.IGNORECASE)), None)


@dataclass(frozen=True)
class Device:
    """Where the work runs."""

    kind: str  # "cpu" or "cuda"
    name: str
    threads: int
    isa: frozenset[str]

    @property
    def listed(self) -> Gpu | None:
        """What its maker says of it; None for a CPU, and for a GPU that is not in GPUS."""
        return gpu(self.name) if self.kind == "cuda" else None

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
            return ("bf16", "tensor cores") if bf16 else ("fp16", "this GPU has no bfloat16 tensor cores")
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


def free_memory(kind: str) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine without swapping (MemAvailable), or what
    its container leaves it (cgroup v2) where that is less; 0 where the system doesn't say.
    """
    if kind == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # "max", or no cgroup v2
        return found
    return max(0, min(found, left))


# Rows x inner x columns: what a small model's layers multiply, and cubes, which any library multiplies best.
GEMMS = ((512, 512, 512), (1024, 1024, 1024), (4096, 384, 1536), (2048, 2048, 2048))
GEMMS_CUDA = ((4096, 4096, 4096), (8192, 8192, 8192))


def gemm_rate(kind: str, dtype: str, seconds: float = 0.3) -> float:
    """FLOP/s of the best matrix product that this process measures in about so many seconds, with torch's threads.

    What a training is held against where no maker states a peak. `kind` and `dtype` as in `Device`.
    """
    import torch

    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    best, begun = 0.0, time.perf_counter()

    def now() -> float:
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    shapes = GEMMS_CUDA if kind == "cuda" else GEMMS
    for number, (rows, inner, columns) in enumerate(shapes, 1):
        if time.perf_counter() - begun > seconds:
            break  # a type that this machine multiplies slowly
        one = torch.ones((rows, inner), dtype=precision, device=kind)
        other = torch.ones((inner, columns), dtype=precision, device=kind)
        with torch.inference_mode():
            torch.mm(one, other)  # the first of a shape chooses its kernel
            while True:
                start = now()
                torch.mm(one, other)
                end = now()
                best = max(best, 2 * rows * inner * columns / (end - start))
                if end - begun > seconds * number / len(shapes):
                    break
    return best


def read_rate(kind: str, seconds: float = 0.2, size: int = 2**28) -> float:
    """Bytes a second of the best pass over `size` bytes of memory that this process measures in about so many seconds.

    With torch's threads; what a decoder is held against, which reads all its weights for every token.
    """
    import torch

    held = torch.ones(size // 4, device=kind)
    matrix, row, best, begun = held.view(-1, 4096), torch.ones(4096, device=kind), 0.0, time.perf_counter()
    with torch.inference_mode():
        while True:
            for product in (False, True):  # either may be the better one
                start = time.perf_counter()
                torch.mv(matrix, row) if product else torch.sum(held)
                if kind == "cuda":
                    torch.cuda.synchronize()
                best = max(best, size / (time.perf_counter() - start))
            if time.perf_counter() - begun > seconds:
                return best
