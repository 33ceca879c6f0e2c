"""The artifact: a folder that says what it is, what it was made from and how good it is.

    runs/<name>/<place>/artifact.json      place: prep, pretrain, finetune, eval/<subject>, export/<subject>/<variant>
    runs/<name>/.work/<place>/             what a stage needs to go on after a kill: never an artifact
    .staging-<leaf>, .old-<leaf>           beside a place, only while it is being published

Publishing: write into staging, sync every file, rename the old folder aside, rename staging in, sync the parent,
delete the
old. The last rename is the commit. Killed anywhere, the next command finds the old artifact or the new one, whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import llmctl
from llmctl import console
from llmctl.errors import BusyError, DataError, RunError

if TYPE_CHECKING:
    from llmctl.device import Device
    from llmctl.recipe import Recipe

SCHEMA = 1
MANIFEST = "artifact.json"


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Settings:
    """All that decides what a stage makes. Two equal settings make the same thing; the difference is the reason to
    make it again.
    """

    kind: str  # tokens, model, evaluation or export
    stage: str
    version: int  # of the data that the stage writes: a new llmctl that writes something else counts it up
    seed: int
    sections: Mapping[str, Any]  # as declared
    inputs: Mapping[str, str]  # role -> identity
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # source -> file as shown -> SHA-256

    def as_json(self) -> dict[str, Any]:
        """With digests for sources, so that a folder of many files is one line."""
        plain = {
            "kind": self.kind,
            "stage": self.stage,
            "version": self.version,
            "seed": self.seed,
            "sections": self.sections,
        }
        return {
            **plain,
            "inputs": dict(self.inputs),
            "sources": {name: digest(files) for name, files in self.sources.items()},
        }


@dataclass(frozen=True)
class Artifact:
    """A finished folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Reads the manifest and checks that every file is there in its size.

        Raises:
            DataError: no manifest, not readable, written by a newer llmctl, a file missing or cut off.
        """
        manifest_path = path / MANIFEST
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            if not isinstance(manifest, dict) or not isinstance(manifest["schema"], int):
                raise ValueError("no schema")
            if manifest["schema"] <= SCHEMA:
                _check_shape(manifest)
        except FileNotFoundError:
            raise DataError(
                "no artifact here (artifact.json is missing)", file=path, hint="llmctl status shows what there is"
            ) from None
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as reason:
            raise DataError(f"the manifest is damaged ({reason})", file=manifest_path, hint=_REMAKE) from None
        if manifest["schema"] > SCHEMA:
            raise DataError(
                f"written by a newer llmctl (schema {manifest['schema']}, this one reads {SCHEMA})",
                file=manifest_path,
                hint="upgrade llmctl",
            )
        artifact = cls(path, manifest)
        for name, entry in manifest["files"].items():
            file = artifact.file(name)
            found = file.stat().st_size if file.is_file() else None
            if found != entry["bytes"]:
                what = "is missing" if found is None else f"has {found:,} bytes, {entry['bytes']:,} were written"
                raise DataError(f"{name} {what}", file=path, hint=_REMAKE)
        return artifact

    def file(self, name: str) -> Path:
        """The path of one of the artifact's files; a name never leaves the folder, and no link leads out of it."""
        pure, real = PurePosixPath(name), os.path.realpath
        inside = not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
        if not inside or not Path(real(self.path / pure)).is_relative_to(real(self.path)):
            raise DataError(
                f"the manifest names a file outside its folder: {name!r}",
                file=self.path / MANIFEST,
                hint="do not use this artifact",
            )
        return self.path / pure

    def verify(self) -> None:
        """Hashes every file again.

        Raises:
            DataError: naming the first file whose bytes are not those that were published, or a manifest that does
            not add up.
        """
        for name, entry in self.manifest["files"].items():
            if hash_file(self.file(name)) != entry["sha256"]:
                message = f"{name} is damaged: its bytes are not those that were published"
                raise DataError(message, file=self.path, hint=self._anew())
        if _identity(self.manifest) != self.identity:
            raise DataError(
                "artifact.json was changed after it was published (its identity does not add up)",
                file=self.path,
                hint=self._anew(),
            )

    def _anew(self) -> str:
        return f"llmctl {'run' if self.stage == 'import' else self.stage} --rebuild makes it anew; {_OTHERS}"

    @property
    def identity(self) -> str:
        return str(self.manifest["identity"])

    @property
    def short(self) -> str:
        """The first eight digits of the identity, as shown to people."""
        return self.identity[:8]

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @property
    def place(self) -> str:
        """Where it lies in its run: "pretrain", "export/finetune/onnx-ort"."""
        return str(self.manifest["place"])

    @property
    def metrics(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.manifest["metrics"]
        return found

    @property
    def inputs(self) -> Sequence[Mapping[str, str]]:
        found: Sequence[Mapping[str, str]] = self.manifest["inputs"]
        return found

    def input(self, role: str) -> Artifact | None:
        """The input of that role, if it still lies in the same run and is still the one this was made from."""
        for entry in self.inputs:
            if entry["role"] == role:
                with contextlib.suppress(DataError):
                    found = Artifact.open(self.run_path() / entry["path"])
                    if found.identity == entry["identity"]:
                        return found
        return None

    def licence(self) -> str:
        """The licence that it, or the model it was made from, was imported under; empty where nobody named one."""
        for entry in self.manifest["sources"].values():
            if isinstance(entry.get("licence"), str):
                return str(entry["licence"])
        made_from = self.input("model")
        return made_from.licence() if made_from is not None else ""

    def in_its_run(self) -> bool:
        """Whether it lies where it was published, and was not copied out by itself."""
        parts = PurePosixPath(self.place).parts
        return self.path.absolute().parts[-len(parts) :] == parts

    def run_path(self) -> Path:
        """The run's folder."""
        return self.path.absolute().parents[len(PurePosixPath(self.place).parts) - 1]


_SHAPE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("version", "seed"), int),
    **dict.fromkeys(("kind", "stage", "place", "identity"), str),
    **dict.fromkeys(("metrics", "sections", "sources", "files", "environment", "times"), dict),
    "inputs": list,
}


def _check_shape(manifest: Mapping[str, Any]) -> None:
    """Whether a manifest is built as this module reads it.

    Raises:
        ValueError, KeyError, TypeError: naming the part that is not.
    """
    for key, kind in _SHAPE.items():
        if not isinstance(manifest[key], kind):
            raise ValueError(f"{key}: {manifest[key]!r}")
    parts: list[tuple[str, Any, type | tuple[type, ...]]] = [
        (name, section, dict) for name, section in manifest["sections"].items()
    ]
    for name, entry in manifest["files"].items():
        parts += [(name, entry["bytes"], int), (name, entry["sha256"], str)]
    for name, entry in manifest["sources"].items():
        parts += [(name, entry["sha256"], str)]
    for entry in manifest["inputs"]:
        parts += [("inputs", entry[key], str) for key in ("role", "identity", "path")]
    for key in ("started", "seconds"):
        parts += [("times", manifest["times"][key], (int, float))]
    for name, value, wanted in parts:
        if not isinstance(value, wanted):
            raise ValueError(f"{name}: {value!r}")
    place = manifest["place"].split("/")
    if len(place) > 3 or not all(part.strip(".") for part in place):
        raise ValueError(f"place: {manifest['place']!r}")


_OTHERS = "llmctl verify checks the others"
_REMAKE = f"llmctl run makes it anew; {_OTHERS}"


def _identity(manifest: Mapping[str, Any]) -> str:
    """The digest of what it is and what it was made from: no times, environment, metrics or logs."""
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if not entry.get("log")}
    return digest(
        {
            "schema": manifest["schema"],
            **{key: manifest[key] for key in ("kind", "stage", "version", "seed", "sections")},
            "inputs": {entry["role"]: entry["identity"] for entry in manifest["inputs"]},
            "sources": {name: entry["sha256"] for name, entry in manifest["sources"].items()},
            "files": files,
        }
    )


# ---------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Run:
    """`runs/<name>`: one pipeline's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def artifact(self, place: str) -> Artifact | None:
        """What was published at `place`; None where nothing was. A damaged one raises DataError."""
        folder = self.path / place
        return Artifact.open(folder) if (folder / MANIFEST).exists() else None

    def work(self, place: str) -> Path:
        """Where the stage at `place` keeps what it needs to go on after a kill."""
        return self.path / ".work" / place

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Holds the run for this process (a kernel lock: gone when the process is), and mends what a killed one left.

        Raises:
            BusyError: another process holds it, and `wait` is false.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire(handle, wait)
            self.recover()
            yield
        finally:
            os.close(handle)

    def mend(self) -> None:
        """Before a run is only read: what `lock` mends, where something was cut off and nobody is at work on it."""
        if any(True for _ in self._aside(".old-*")):
            with contextlib.suppress(BusyError, OSError), self.lock():
                pass

    def _aside(self, pattern: str) -> Iterator[Path]:
        for folder in ("", "*/", "*/*/"):
            yield from self.path.glob(folder + pattern)

    def _acquire(self, handle: int, wait: bool) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as reason:
            if reason.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise
            owner = os.pread(handle, 100, 0).decode(errors="replace").strip() or "another process"
            if not wait:
                raise BusyError(
                    f"{self.path} is in use by {owner}",
                    hint="wait for it, or add --wait-lock; another `name` runs beside it",
                ) from None
            console.note(f"{self.path} is in use by {owner}; waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} ({Path(sys.argv[0]).name} {' '.join(sys.argv[1:3])})".encode(), 0)

    def recover(self) -> None:
        """Restores a place whose publishing was cut between its two renames, and sweeps what was half written."""
        for old in list(self._aside(".old-*")):
            place = old.parent / old.name.removeprefix(".old-")
            if place.exists():
                shutil.rmtree(old)
            else:
                old.rename(place)
                _sync_folder(place.parent)
        for staging in list(self._aside(".staging-*")):
            shutil.rmtree(staging)


# ---------------------------------------------------------------------------------------------------------------- job


@dataclass
class Job:
    """What the chain hands a stage: the recipe, its inputs, where to work and where to publish."""

    recipe: Recipe
    run: Run
    place: str
    settings: Settings
    inputs: Mapping[str, Artifact]
    device: Device
    sources_index: Mapping[str, Any] = field(default_factory=dict)  # what the next check needs not to hash again
    deadline: float | None = None  # time.monotonic() at which --max-time is over
    until_step: int | None = None  # of a training: stop after it, with the state saved
    resolved: dict[str, Any] = field(default_factory=dict)  # what this machine chose where the recipe says "auto"
    started: float = field(default_factory=time.time)

    @property
    def work(self) -> Path:
        """The stage's working folder; made on first use."""
        folder = self.run.work(self.place)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def out_of_time(self) -> bool:
        """Whether --max-time is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @contextlib.contextmanager
    def publishing(self) -> Iterator[Staging]:
        """An empty folder to write into; `seal` it to publish. An exception leaves what was there, whole."""
        target = self.run.path / self.place
        staging = target.parent / f".staging-{target.name}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield Staging(self, staging, target)
        except Exception as reason:
            if not (isinstance(reason, OSError) or is_write_error_of_safetensors(reason)):
                raise
            raise RunError(
                f"cannot write the artifact: {getattr(reason, 'strerror', None) or reason}",
                file=getattr(reason, "filename", None) or target,
                hint=_NOTHING_LOST,
            ) from reason
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def is_write_error_of_safetensors(reason: Exception) -> bool:
    """safetensors has an error of its own, which is no OSError, for a full disk too."""
    return type(reason).__name__ == "SafetensorError" and "I/O error" in str(reason)


_NOTHING_LOST = "make room and run the same command again; what was published before is whole"


@dataclass
class Staging:
    """The folder of an artifact that is being written."""

    job: Job
    path: Path
    target: Path

    def seal(
        self, metrics: Mapping[str, Any], logs: Sequence[str] = (), told: Mapping[str, Mapping[str, str]] | None = None
    ) -> Artifact:
        """Writes the manifest, syncs everything and moves the folder to its place: from now on it is the artifact.

        `logs` are files that may differ between two equal runs (times in them): listed, but not part of the identity.
        `told` is what a source says of itself, by its name (its licence): kept beside its digest for people.
        """
        job, files = self.job, {}
        mask = os.umask(0)
        os.umask(mask)
        for file in self.path.rglob("*"):  # safetensors writes for its owner alone; who may read the run may read this
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            name = file.relative_to(self.path).as_posix()
            files[name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)} | (
                {"log": True} if name in logs else {}
            )
        settings = job.settings.as_json()
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            **{key: settings[key] for key in ("kind", "stage", "version")},
            "place": job.place,
            "identity": "",
            "metrics": dict(metrics),
            "seed": settings["seed"],
            "sections": settings["sections"],
            "inputs": [
                {"role": role, "identity": made.identity, "path": self._hint(made)} for role, made in job.inputs.items()
            ],
            "sources": {
                name: {"sha256": found, "files": len(job.settings.sources[name]), **(told or {}).get(name, {})}
                for name, found in settings["sources"].items()
            },
            "files": files,
            "environment": {**environment(job.device), "resolved": job.resolved},
            "times": {"started": round(job.started, 3), "seconds": round(time.time() - job.started, 3)},
        }
        manifest["identity"] = _identity(manifest)
        if job.sources_index:
            write_json(job.run.path / ".work" / f"sources-{job.place.replace('/', '.')}.json", job.sources_index)
        write_json(self.path / MANIFEST, manifest)
        self._publish()
        shutil.rmtree(job.run.work(job.place), ignore_errors=True)
        return Artifact.open(self.target)

    def _hint(self, made: Artifact) -> str:
        """Where an input lies: inside the run by its place, else by its path."""
        inside = made.path.absolute().is_relative_to(self.job.run.path.absolute())
        return made.place if inside else str(made.path.absolute())

    def _publish(self) -> None:
        for path in [*self.path.rglob("*"), self.path]:
            _sync_folder(path)
        old = self.target.parent / f".old-{self.target.name}"
        shutil.rmtree(old, ignore_errors=True)
        try:
            if self.target.exists():
                self.target.rename(old)
            self.path.rename(self.target)
        except BaseException:  # a signal's, too
            if old.exists() and not self.target.exists():
                old.rename(self.target)
            raise
        _sync_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(console.finite(value), stream, ensure_ascii=False, indent=1, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _sync_folder(path: Path) -> None:
    """fsync: for a folder it makes its renames last, for a file its bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def environment(device: Device) -> dict[str, Any]:
    """What made an artifact, for people who wonder later; never part of its identity."""
    versions = {}
    for module in ("torch", "numpy", "sentencepiece", "tokenizers", "onnx", "onnxruntime"):
        if module in sys.modules:
            versions[module] = str(getattr(sys.modules[module], "__version__", "?"))
    return {
        "llmctl": llmctl.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "device": device.name,
        "threads": device.threads,
        "isa": sorted(device.isa),
        "packages": versions,
    }


@contextlib.contextmanager
def stoppable(asked_first: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM ask the block to stop: the first one is put into the list; a second Ctrl-C quits at once.

    `asked_first` is called with the first, inside the signal's handler.

    CI systems send SIGINT, then SIGTERM 7.5 s later: a SIGTERM after the first signal is no second request.
    """
    asked: list[int] = []

    def ask(signum: int, frame: object) -> None:
        if asked and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if not asked:
            asked.append(signum)
            asked_first()

    previous = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
