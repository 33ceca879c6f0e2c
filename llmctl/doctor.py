"""What this machine offers llmctl: packages, devices, instruction sets, memory; what each enables, and how to get it.

Versions come from the packages' metadata, and what must be imported to be believed is imported in a process of its own:
a wheel that is broken, hangs or takes the interpreter down is a line of the table and never the end of it.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llmctl
from llmctl import console, device

PROBE_SECONDS = 60.0  # importing torch from a cold network disk takes half a minute; a hang must still end
_STATES = {"ok": "yes", "missing": "-", "problem": "!"}


@dataclass(frozen=True)
class Check:
    """One line. `state` is "ok", "missing" (optional, and not here) or "problem" (needed, and it does not work)."""

    area: str
    name: str
    state: str
    found: str
    enables: str
    get: str = ""  # the mend; empty where there is nothing to do


# Distribution, the module it installs, what it enables, how to get it, and whether llmctl itself needs it.
_PACKAGES = (
    ("torch", "torch", "pretrain, finetune, eval, export", "pip install torch", True),
    ("numpy", "numpy", "every stage", "pip install numpy", True),
    ("sentencepiece", "sentencepiece", "trains tokenizers (prep)", "pip install sentencepiece", True),
    ("tokenizers", "tokenizers", "encodes text (prep, serve)", "pip install tokenizers", True),
    ("safetensors", "safetensors", "reads and writes weights", "pip install safetensors", True),
    ("pydantic", "pydantic", "checks recipes and requests", "pip install pydantic", True),
    ("jinja2", "jinja2", "chat templates", "pip install jinja2", True),
    ("onnx", "onnx", "export --onnx", "pip install onnx", True),
    ("gguf", "gguf", "import and export of GGUF files", "pip install gguf", True),
    ("starlette", "starlette", "serve", "pip install starlette", True),
    ("uvicorn", "uvicorn", "serve", "pip install uvicorn", True),
    ("transformers", "", "loads the published folders elsewhere; the parity tests", "pip install transformers", False),
    ("huggingface_hub", "", "import hf:org/name", "pip install 'llmctl[hub]'", False),
    ("tensorboard", "", "report_to: curves in a browser", "pip install 'llmctl[tensorboard]'", False),
    ("wandb", "", "report_to: Weights & Biases", "pip install 'llmctl[wandb]'", False),
    ("trackio", "", "report_to: trackio", "pip install 'llmctl[trackio]'", False),
    ("peft", "", "loads finetune/adapter elsewhere", "pip install peft", False),
    ("openai", "", "a client for `llmctl serve`", "pip install openai", False),
    ("onnxruntime-genai", "", "runs exports elsewhere", "pip install --no-deps onnxruntime-genai", False),
    ("tensorrt", "", "export --tensorrt: an engine", "pip install 'llmctl[tensorrt]' (with an NVIDIA GPU)", False),
)

# What each instruction set changes, best first within its family.
_ISA = {
    "x86": (
        ("amx_bf16", "bf16 training, fastest"),
        ("avx512_bf16", "bf16 training"),
        ("amx_int8", "int8 serving, fastest"),
        ("avx512_vnni", "fast int8 and int4 serving"),
        ("avx_vnni", "fast int8 serving"),
        ("avx512f", "wide fp32 kernels"),
        ("avx2", "the fp32 kernels of torch and ONNX Runtime"),
    ),
    "arm": (("bf16", "bf16 products"), ("asimd", "the fp32 kernels of torch and ONNX Runtime")),
}

_PROBE = """
import json, sys
module = __import__(sys.argv[1])
answer = {"version": str(getattr(module, "__version__", ""))}
if sys.argv[1] == "torch":
    cuda = module.cuda.is_available()
    answer["cuda"] = [module.cuda.get_device_name(i) for i in range(module.cuda.device_count())] if cuda else []
if sys.argv[1] == "onnxruntime":
    answer["providers"] = module.get_available_providers()
print("\\n" + json.dumps(answer))
"""


def doctor() -> dict[str, Any]:
    """Everything found, as one JSON document.

    Returns:
        `ok` (nothing that llmctl needs is broken), `llmctl`, `python`, `platform`, `device`, `cpus`, `threads`,
        `memory_bytes`, `memory_available_bytes`, `disk_free_bytes`, and `checks`: a list of `Check` as objects.
    """
    modules = [module for _, module, _, _, needed in _PACKAGES if needed and module] + ["onnxruntime"]
    probes = _probe(modules)
    checks = [*_packages(probes), *_runtimes(probes["onnxruntime"]), *_tensorrt(probes["onnxruntime"])]
    checks += [*_devices(probes), *_instructions(), *_compiler()]
    total, available = _memory()
    checks += _room(total, available)
    return {
        "ok": not any(check.state == "problem" for check in checks),
        "llmctl": llmctl.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.cpu_name(),
        "cpus": os.cpu_count() or 1,
        "threads": device.cpu_quota(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "checks": [asdict(check) for check in checks],
    }


def show(report: dict[str, Any]) -> None:
    """Prints what `doctor()` found: a line a check, then what to do."""
    console.say(f"llmctl {report['llmctl']} · Python {report['python']} · {report['platform']}")
    area = ""
    rows: list[list[str]] = []
    for check in report["checks"]:
        head = check["area"] if check["area"] != area else ""
        area = check["area"]
        rows.append([head, _STATES[check["state"]], check["name"], check["found"], check["enables"]])
    console.columns(rows)
    broken = [check for check in report["checks"] if check["state"] == "problem"]
    absent = [check for check in report["checks"] if check["state"] == "missing" and check["get"]]
    if broken:
        console.say()
        console.say("To mend:")
        console.columns([[check["name"], check["found"], check["get"]] for check in broken])
    if absent:
        console.say()
        console.say("Not here, and how to get it:" if not broken else "Optional:")
        console.columns([[check["name"], check["get"]] for check in absent])
    console.say()
    console.say("Everything that llmctl needs is here." if report["ok"] else f"{len(broken)} to mend.")


def _probe(modules: list[str]) -> dict[str, dict[str, Any]]:
    """Imports each module in a process of its own, all at once: {"version", ...} or {"error": reason}."""
    running = {}
    for module in modules:
        command = [sys.executable, "-P", "-W", "ignore", "-c", _PROBE, module]  # -P: not ./torch.py
        running[module] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return {module: _answer(process) for module, process in running.items()}


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"its import took more than {PROBE_SECONDS:.0f} s"}
    if process.returncode == 0:
        with contextlib.suppress(ValueError, IndexError):
            answer: dict[str, Any] = json.loads(out.splitlines()[-1])
            return answer
    if process.returncode < 0:
        return {"error": f"its import ended the interpreter (signal {-process.returncode})"}
    lines = err.strip().splitlines()
    return {"error": lines[-1][:200] if lines else f"its import ended with code {process.returncode}"}


def version(distribution: str) -> str:
    """The installed version by the package's metadata, or "" where it is not installed (or its metadata is broken)."""
    try:
        return importlib.metadata.version(distribution) or ""
    except Exception:  # a half-deleted package raises whatever its missing parts raise
        return ""


def _packages(probes: dict[str, dict[str, Any]]) -> list[Check]:
    checks = []
    for name, module, enables, get, needed in _PACKAGES:
        installed, error = version(name), probes.get(module, {}).get("error", "")
        if installed and not error:
            checks.append(Check("packages", name, "ok", installed, enables))
        elif installed:
            mend = f"{get} --force-reinstall"
            checks.append(Check("packages", name, "problem", f"{installed}: {error}", enables, mend))
        else:
            checks.append(Check("packages", name, "problem" if needed else "missing", "not installed", enables, get))
    return checks


def _runtimes(probe: dict[str, Any]) -> list[Check]:
    """ONNX Runtime comes as two wheels that install the same files: exactly one of them may be here."""
    wheels = {name: version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    here = {name: found for name, found in wheels.items() if found}
    wanted = "onnxruntime-gpu" if sys.platform == "linux" and platform.machine() == "x86_64" else "onnxruntime"
    enables, area = "export's parity gate, serve", "packages"
    found = ", ".join(f"{name} {found}" for name, found in here.items())
    if not here:
        return [Check(area, "onnxruntime", "problem", "neither wheel is installed", enables, f"pip install {wanted}")]
    if len(here) == 2:
        mend = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {wanted}"
        return [Check(area, "onnxruntime", "problem", f"{found}: each overwrites the other's files", enables, mend)]
    if "error" in probe:
        mend = f"pip install --force-reinstall {next(iter(here))}"
        return [Check(area, "onnxruntime", "problem", f"{found}: {probe['error']}", enables, mend)]
    providers = [name.removesuffix("ExecutionProvider") for name in probe.get("providers", [])]
    return [Check(area, "onnxruntime", "ok", f"{found} ({', '.join(providers)})", enables)]


def _tensorrt(probe: dict[str, Any]) -> list[Check]:
    """What else reads, makes or runs an engine: NVIDIA's parser, trtexec, and ONNX Runtime's provider."""
    area, engine = "tensorrt", "pip install 'llmctl[tensorrt]' (with an NVIDIA GPU)"
    names = ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings")
    parser, trtexec = next(filter(None, map(version, names)), ""), shutil.which("trtexec")
    enables = "export --tensorrt: NVIDIA's own check, without a GPU"
    checks = [
        Check(area, "tensorrt-rtx", "ok", parser, enables)
        if parser
        else Check(area, "tensorrt-rtx", "missing", "not installed", enables, "pip install tensorrt-rtx")
    ]
    enables = "builds what export --tensorrt wrote elsewhere"
    get = "it comes with NVIDIA's TensorRT archive and the container nvcr.io/nvidia/tensorrt"
    checks.append(
        Check(area, "trtexec", "ok", trtexec, enables)
        if trtexec
        else Check(area, "trtexec", "missing", "not on the PATH", enables, get)
    )
    enables, library = "export --tensorrt without the package tensorrt", ctypes.util.find_library("nvinfer")
    if "TensorrtExecutionProvider" not in probe.get("providers", []):
        found = Check(area, "provider", "missing", "not in this onnxruntime", enables, "pip install onnxruntime-gpu")
    elif not (library or version("tensorrt")):  # every GPU wheel lists it
        found = Check(area, "provider", "missing", "in onnxruntime, but no libnvinfer here", enables, engine)
    else:
        told = f"in onnxruntime, with {library or 'the package tensorrt'}"
        found = Check(area, "provider", "ok", told, enables)
    return [*checks, found]


def _devices(probes: dict[str, dict[str, Any]]) -> list[Check]:
    threads, cpus = device.cpu_quota(), os.cpu_count() or 1
    quota = f"{threads} threads" if threads == cpus else f"{threads} of {cpus} threads (affinity or container quota)"
    checks = [Check("devices", "cpu", "ok", f"{device.cpu_name()}, {quota}", "every stage")]
    enables = "training and serving on a GPU"
    if not device.nvidia_driver():
        return [*checks, Check("devices", "cuda", "missing", "no NVIDIA driver", enables)]
    gpus = probes["torch"].get("cuda", [])
    if gpus:
        return [*checks, *(Check("devices", "cuda", "ok", name, enables) for name in gpus)]
    names = ", ".join(_gpu_names()) or "a GPU"
    found = f"{names}, but torch {version('torch') or '(missing)'} finds no CUDA device"
    mend = "pip install --force-reinstall torch (a CUDA build)"
    return [*checks, Check("devices", "cuda", "problem", found, enables, mend)]


def _gpu_names() -> list[str]:
    """The GPUs by the driver's own word, for a torch that can't see them."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            names += re.findall(r"^Model:\s*(.+)$", file.read_text(), re.MULTILINE)
    return names


def _instructions() -> list[Check]:
    """The instruction sets of this CPU's own family; a missing one can't be got, so it names no mend."""
    family = "arm" if platform.machine().lower() in ("aarch64", "arm64") else "x86"
    found = device.cpu_isa()
    return [
        Check("instructions", name, "ok" if name in found else "missing", "yes" if name in found else "no", enables)
        for name, enables in _ISA[family]
    ]


def _compiler() -> list[Check]:
    """torch.compile writes C++ on a CPU: it needs a compiler and Python's headers."""
    enables = "torch.compile: faster training (without it training runs eager)"
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        return [Check("compiler", "c++", "missing", "none found", enables, "apt-get install g++")]
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        found = f"{path}, but Python.h is not at {sysconfig.get_path('include')}"
        return [Check("compiler", "c++", "missing", found, enables, "apt-get install python3-dev")]
    return [Check("compiler", "c++", "ok", path, enables)]


def _room(total: int, available: int) -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    memory = f"{console.size(available)} free of {console.size(total)}" if total else "unknown on this system"
    return [
        Check("room", "memory", "ok", memory, "the size of a model and its batch"),
        Check("room", "disk", "ok", f"{console.size(free)} free in {Path.cwd()}", "artifacts in runs/"),
    ]


def _memory(root: Path = Path("/")) -> tuple[int, int]:
    """(bytes this process may use, bytes of them free): the machine's, cut by the container's limit (cgroup v2, v1)."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if match := re.match(r"(MemTotal|MemAvailable):\s+(\d+) kB", line):
                found[match[1]] = int(match[2]) * 1024
    total, available = found.get("MemTotal", 0), found.get("MemAvailable", 0)
    v2, v1 = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit_file, used_file in (v2, v1):
        with contextlib.suppress(OSError, ValueError):
            group = root / "sys/fs/cgroup"
            limit, used = int((group / limit_file).read_text()), int((group / used_file).read_text())
            if 0 < limit < (total or limit + 1):  # cgroup v1 writes "no limit" as a number near 2**63
                return limit, max(0, min(available or limit, limit - used))
    return total, available
