"""The doctor on other machines: broken wheels, both runtimes at once, no compiler, a container's limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmctl import device, doctor


def checks(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report["checks"]}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return doctor.doctor()


def test_this_machine_in_json_and_in_words(report: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["threads"] >= 1
    assert report["memory_bytes"] >= report["memory_available_bytes"] > 0
    found = checks(report)
    assert found["torch"]["state"] == "ok"
    assert found["torch"]["found"] == doctor.version("torch")
    assert {check["state"] for check in report["checks"]} <= {"ok", "missing", "problem"}
    assert all(check["get"] for check in report["checks"] if check["state"] == "problem")
    doctor.show(report)
    said = capfd.readouterr().out
    assert all(name in said for name in ("torch", "onnxruntime", "avx2", "c++", "memory", "disk"))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise ImportError('libtorch.so: wrong ELF class')", "wrong ELF class"),
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("import sys; sys.exit(3)", "code 3"),
    ],
)
def test_a_broken_package_is_a_line_of_the_table(
    body: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = doctor.doctor()
    torch = checks(report)["torch"]
    assert torch["state"] == "problem"
    assert told in torch["found"]
    assert "pip install" in torch["get"]
    assert not report["ok"]
    assert checks(report)["numpy"]["state"] == "ok"
    doctor.show(report)
    assert "To mend" in capfd.readouterr().out


def test_an_import_that_hangs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stuck.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.2)
    assert "more than" in doctor._probe(["stuck"])["stuck"]["error"]


def test_a_file_of_the_working_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemError('run by accident')")
    monkeypatch.chdir(tmp_path)
    assert "error" not in doctor._probe(["numpy"])["numpy"]


def test_both_onnx_runtimes_side_by_side_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = {"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(doctor, "version", lambda name: wheels.get(name, ""))
    (both,) = doctor._runtimes({"providers": []})
    assert both.state == "problem"
    assert "1.30.0" in both.found
    assert "1.31.1" in both.found
    assert "uninstall" in both.get
    wheels.clear()
    (none,) = doctor._runtimes({"error": "No module named 'onnxruntime'"})
    assert (none.state, "pip install" in none.get) == ("problem", True)


def test_tensorrt_comes_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wheel of ONNX Runtime lists its provider on every machine: it is believed where TensorRT's library is."""
    listed = {"providers": ["TensorrtExecutionProvider", "CPUExecutionProvider"]}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "version", lambda name: "")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    parser, trtexec, provider = doctor._tensorrt(listed)
    assert (parser.state, parser.get) == ("missing", "pip install tensorrt-rtx")
    assert (trtexec.name, trtexec.state, "container" in trtexec.get) == ("trtexec", "missing", True)
    assert (provider.state, "no libnvinfer" in provider.found) == ("missing", True)
    assert doctor._tensorrt({"providers": []})[2].get == "pip install onnxruntime-gpu"

    (tmp_path / "trtexec").write_text("#!/bin/sh\n")
    (tmp_path / "trtexec").chmod(0o755)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libnvinfer.so.10")
    assert [check.state for check in doctor._tensorrt(listed)] == ["missing", "ok", "ok"]


def test_a_driver_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "nvidia_driver", lambda: True)
    assert doctor._devices({"torch": {"cuda": ["NVIDIA H100"]}})[-1].state == "ok"
    blind = doctor._devices({"torch": {"cuda": []}})[-1]
    assert (blind.state, "CUDA build" in blind.get) == ("problem", True)


def test_no_compiler_is_said_with_its_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (compiler,) = doctor._compiler()
    assert (compiler.state, compiler.get) == ("missing", "apt-get install g++")


def test_memory_is_what_the_container_may_use(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 8000000 kB\n")
    assert doctor._memory(tmp_path) == (16_384_000_000, 8_192_000_000)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    assert doctor._memory(tmp_path) == (16_384_000_000, 8_192_000_000)
    (group / "memory.max").write_text("2000000000\n")
    (group / "memory.current").write_text("500000000\n")
    assert doctor._memory(tmp_path) == (2_000_000_000, 1_500_000_000)
    assert doctor._memory(tmp_path / "nothing") == (0, 0)


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, llmctl.doctor; sys.exit(bool({'torch', 'numpy', 'onnxruntime', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
