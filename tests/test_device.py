"""Which device is taken, and that one that was asked for by name is never replaced in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmctl import device
from llmctl.device import Device
from llmctl.errors import UnavailableError, UsageError


def no_driver() -> bool:
    return False


def test_cuda_without_a_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "nvidia_driver", no_driver)
    with pytest.raises(UnavailableError, match="no NVIDIA driver") as caught:
        device.pick("cuda")
    assert caught.value.exit_code == 6
    assert device.pick("auto").kind == "cpu"


def test_cuda_with_a_torch_for_cpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(device, "nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", no_driver)
    with pytest.raises(UnavailableError, match="finds no CUDA device"):
        device.pick("cuda")
    assert device.pick("auto").kind == "cpu"


def test_the_cpu_is_taken_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "nvidia_driver", lambda: True)
    assert device.pick("cpu").kind == "cpu"


def test_an_unknown_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--device tpu is not known"):
        device.pick("tpu")


@pytest.mark.parametrize(
    ("isa", "dtype"),
    [({"avx2", "avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"), ({"avx2", "avx512f"}, "fp32"), (set(), "fp32")],
)
def test_bf16_only_where_the_cpu_multiplies_it(isa: set[str], dtype: str) -> None:
    found, why = Device("cpu", "x", 2, frozenset(isa)).dtype("auto")
    assert found == dtype
    assert (why in isa) == (dtype == "bf16")


def test_a_dtype_that_was_asked_for_is_taken() -> None:
    assert Device("cpu", "x", 2, frozenset({"amx_bf16"})).dtype("fp32") == ("fp32", "asked for")


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.max": "nonsense"}, 8),
    ],
)
def test_threads_follow_the_quota_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], threads: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(device, "Path", lambda path: tmp_path if str(path) == "/sys/fs/cgroup" else Path(path))
    assert device.cpu_quota() == threads


@pytest.mark.parametrize(("threads", "text"), [(1, "cpu, 1 thread"), (2, "cpu, 2 threads")])
def test_describes_itself(threads: int, text: str) -> None:
    assert Device("cpu", "x", threads, frozenset()).describe() == text


def test_this_machine() -> None:
    assert 1 <= device.cpu_quota() <= (os.cpu_count() or 1)
    assert device.cpu_isa() <= set(device.ISA)
    assert device.cpu_name()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA T400", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, key: str | None) -> None:
    assert device.gpu(name) == (device.GPUS[key] if key else None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_best_product_is_the_yardstick(dtype: str) -> None:
    """At least as fast as a product measured by hand: the best of many is never below one of them, by much."""
    import time

    import torch

    rate = device.gemm_rate("cpu", dtype, seconds=0.1)
    one = torch.ones((512, 512), dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    torch.mm(one, one)
    start = time.perf_counter()
    torch.mm(one, one)
    assert rate > 0.3 * 2 * 512**3 / (time.perf_counter() - start)


def test_a_type_that_is_slow_here_takes_no_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    now, calls, counted = 0.0, 0, torch.mm

    def slow(*args: torch.Tensor) -> torch.Tensor:
        nonlocal now, calls
        now, calls = now + 2.0, calls + 1
        return counted(*args)

    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr(torch, "mm", slow)
    assert device.gemm_rate("cpu", "fp32") == 2 * 512**3 / 2.0
    assert calls == 2
