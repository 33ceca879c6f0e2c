"""The artifact: its identity, its damage, and that publishing leaves the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl import artifact
from llmctl.artifact import MANIFEST, Artifact, Job, Run, Settings
from llmctl.device import Device
from llmctl.errors import BusyError, DataError, RunError
from llmctl.recipe import Recipe
from tests.faults.killing import killed_at

CPU = Device("cpu", "a cpu", 1, frozenset())
SETTINGS = Settings("tokens", "prep", 1, 3, {"prep": {"vocab_size": 400}}, {}, {"text": {"a.txt": "ab" * 32}})
FILES = {"model.safetensors": b"weights", "deep/vocab.txt": b"pieces", "metrics.jsonl": b"{}\n"}


def job(folder: Path, place: str = "prep", **changes: Any) -> Job:
    inputs = changes.pop("inputs", {})
    made = dataclasses.replace(SETTINGS, inputs={role: found.identity for role, found in inputs.items()}, **changes)
    return Job(Recipe(name="x"), Run(folder / "runs" / "x"), place, made, inputs, CPU)


def published(
    work: Job, files: dict[str, bytes] = FILES, metrics: dict[str, Any] | None = None, logs: tuple[str, ...] = ()
) -> Artifact:
    with work.publishing() as staging:
        for name, content in files.items():
            (staging.path / name).parent.mkdir(parents=True, exist_ok=True)
            (staging.path / name).write_bytes(content)
        return staging.seal(metrics or {}, logs=logs)


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------------- identity


def test_what_is_sealed_is_what_is_opened(tmp_path: Path) -> None:
    made = published(job(tmp_path), metrics={"tokens": 3})
    again = Artifact.open(tmp_path / "runs/x/prep")
    assert again.identity == made.identity
    assert (again.kind, again.stage, again.place, again.metrics) == ("tokens", "prep", "prep", {"tokens": 3})
    assert again.short == made.identity[:8]
    assert again.run_path() == tmp_path / "runs/x"
    again.verify()


def test_times_metrics_environment_and_logs_are_not_identity(tmp_path: Path) -> None:
    one = published(job(tmp_path / "one"), metrics={"seconds": 1.0}, logs=("metrics.jsonl",))
    other_job = job(tmp_path / "two")
    other_job.device, other_job.started = Device("cuda", "a gpu", 9, frozenset({"amx_bf16"})), time.time() - 1000
    other = published(
        other_job, {**FILES, "metrics.jsonl": b"other\n"}, metrics={"seconds": 2.0}, logs=("metrics.jsonl",)
    )
    assert one.identity == other.identity
    assert one.manifest["environment"] != other.manifest["environment"]


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 4},
    "section": {"sections": {"prep": {"vocab_size": 401}}},
    "kind": {"kind": "model"},
    "stage": {"stage": "pretrain"},
    "version": {"version": 2},
    "source": {"sources": {"text": {"a.txt": "ac" * 32}}},
    "source's name": {"sources": {"texts": {"a.txt": "ab" * 32}}},
    "file of a source": {"sources": {"text": {"b.txt": "ab" * 32}}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_identity_changes_with(tmp_path: Path, change: str) -> None:
    assert published(job(tmp_path / "one")).identity != published(job(tmp_path / "two", **CHANGES[change])).identity


def test_identity_changes_with_any_byte_of_a_file_and_its_name(tmp_path: Path) -> None:
    identities = {published(job(tmp_path / "whole")).identity}
    for name, content in FILES.items():
        for at in range(len(content)):
            flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
            identities.add(published(job(tmp_path / "x"), {**FILES, name: flipped}).identity)
    renamed = {("other" if name == "metrics.jsonl" else name): content for name, content in FILES.items()}
    identities.add(published(job(tmp_path / "x"), renamed).identity)
    assert len(identities) == 2 + sum(map(len, FILES.values()))


def test_identity_changes_with_its_input(tmp_path: Path) -> None:
    data = published(job(tmp_path))
    other = published(job(tmp_path / "other", seed=9))
    one = published(job(tmp_path, "pretrain", inputs={"data": data}))
    two = published(job(tmp_path / "two", "pretrain", inputs={"data": other}))
    assert one.identity != two.identity
    assert one.inputs == [{"role": "data", "identity": data.identity, "path": "prep"}]


def test_an_input_is_found_in_the_run_while_it_is_still_the_same(tmp_path: Path) -> None:
    data = published(job(tmp_path))
    model = published(job(tmp_path, "pretrain", inputs={"data": data}))
    found = model.input("data")
    assert found is not None
    assert found.identity == data.identity
    assert model.input("model") is None
    published(job(tmp_path, seed=9))
    assert model.input("data") is None


def test_metrics_that_are_no_number_are_still_json(tmp_path: Path) -> None:
    made = published(job(tmp_path), metrics={"loss": float("nan")})
    json.loads((made.path / MANIFEST).read_text(), parse_constant=pytest.fail)
    assert Artifact.open(made.path).metrics == {"loss": None}


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_in_any_file(tmp_path: Path, name: str) -> None:
    made = published(job(tmp_path), logs=("metrics.jsonl",))
    path = made.path / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(DataError, match=f"{name} is damaged"):
        Artifact.open(made.path).verify()


@pytest.mark.parametrize("key", ["seed", "sections", "version", "kind", "stage", "inputs", "sources"])
def test_a_changed_manifest_is_found(tmp_path: Path, key: str) -> None:
    data = published(job(tmp_path / "other"))
    made = published(job(tmp_path, inputs={"data": data}))
    manifest = dict(made.manifest)
    others = {"sections": {}, "inputs": [], "sources": {}, "seed": 8, "version": 8}
    manifest[key] = others.get(key, "other")
    (made.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not add up"):
        Artifact.open(made.path).verify()


def test_a_missing_and_a_cut_off_file_are_found_on_opening(tmp_path: Path) -> None:
    made = published(job(tmp_path))
    (made.path / "model.safetensors").write_bytes(b"wei")
    with pytest.raises(DataError, match="has 3 bytes, 7 were written"):
        Artifact.open(made.path)
    (made.path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors is missing"):
        Artifact.open(made.path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    made = published(job(tmp_path))
    (made.path / MANIFEST).write_text(json.dumps({**made.manifest, "schema": 99}))
    with pytest.raises(DataError, match="newer llmctl") as caught:
        Artifact.open(made.path)
    assert caught.value.hint == "upgrade llmctl"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "deep/../../secret", "a\0b", "..", "."])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    made = published(job(tmp_path))
    (made.path.parent / "secret").write_text("s")
    files = {**made.manifest["files"], name: {"bytes": 1, "sha256": artifact.hash_file(made.path.parent / "secret")}}
    (made.path / MANIFEST).write_text(json.dumps({**made.manifest, "files": files}))
    with pytest.raises(DataError):
        Artifact.open(made.path)


@pytest.mark.parametrize("target", ["../../../secret", "absolute", "../secret-folder/secret"])
def test_links_that_leave_the_folder_are_refused(tmp_path: Path, target: str) -> None:
    made = published(job(tmp_path))
    secret = tmp_path / "secret"
    secret.write_bytes(FILES["model.safetensors"])
    (made.path.parent / "secret-folder").mkdir()
    (made.path.parent / "secret-folder" / "secret").write_bytes(FILES["model.safetensors"])
    (made.path / "model.safetensors").unlink()
    (made.path / "model.safetensors").symlink_to(secret if target == "absolute" else target)
    assert (made.path / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(DataError, match="outside its folder"):
        Artifact.open(made.path)


def test_an_artifact_may_be_reached_through_a_link(tmp_path: Path) -> None:
    made = published(job(tmp_path))
    (tmp_path / "link").symlink_to(made.path.parent)
    Artifact.open(tmp_path / "link" / "prep").verify()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("once")
    return published(job(folder, "pretrain", inputs={"data": published(job(folder))}))


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(["schema", "kind", "stage", "place", "identity", "files", "inputs", "sources", "metrics"]),
    value=JSON,
)
def test_any_manifest_is_taken_or_refused_by_name(made_once: Artifact, key: str, value: Any) -> None:
    """Whatever a manifest holds, opening and reading it ends in an artifact or in a DataError, never in a bug."""
    (made_once.path / MANIFEST).write_text(json.dumps({**made_once.manifest, key: value}))
    try:
        found = Artifact.open(made_once.path)
        found.verify()
        _ = (found.short, found.kind, found.stage, found.place, dict(found.metrics), found.run_path())
        found.input("data")
    except DataError:
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "{}", '{"files": {}}', "\xff"])
def test_a_manifest_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    made = published(job(tmp_path))
    (made.path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="damaged") as caught:
        Artifact.open(made.path)
    assert caught.value.file == str(made.path / MANIFEST)


# --------------------------------------------------------------------------------------------------------- publishing


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    before = published(job(tmp_path))
    for problem in (KeyboardInterrupt(), ValueError("bug"), DataError("bad")):
        with contextlib.suppress(type(problem)), job(tmp_path, seed=4).publishing() as staging:
            (staging.path / "half").write_text("x")
            raise problem
    assert Artifact.open(before.path).identity == before.identity
    assert not list(before.path.parent.glob(".*"))


def test_a_new_one_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    published(job(tmp_path))
    made = published(job(tmp_path), {"only": b"x"})
    assert everything(made.path) == [MANIFEST, "only"]
    assert not list(made.path.parent.glob(".*-prep"))


def test_publishing_tidies_up_the_work_that_it_replaces(tmp_path: Path) -> None:
    work = job(tmp_path)
    (work.work / "settings.json").write_text("{}")
    published(work)
    assert not work.run.work("prep").exists()


def old_or_new(folder: Path, old: Artifact, new: str) -> str:
    """Recovers as the next command does; what lies there must be whole, and nothing else that one could pick up."""
    run = Run(folder / "runs" / "x")
    with run.lock():
        pass
    found = run.artifact("prep")
    assert found is not None
    found.verify()
    assert found.identity in (old.identity, new)
    wanted = {MANIFEST, *(FILES if found.identity == old.identity else ["only"])}
    assert set(everything(found.path)) == wanted
    assert not [path.name for path in run.path.iterdir() if path.name.startswith((".staging", ".old"))]
    return found.identity


def test_killed_at_any_moment_of_publishing(tmp_path: Path) -> None:
    """Fault 1: before and after every sync, rename and deletion; the next command finds the old or the new, whole."""
    new = published(job(tmp_path / "new", seed=4), {"only": b"x"}).identity
    found = []
    for point in range(1000):
        old = published(job(tmp_path))
        (job(tmp_path).work / "settings.json").write_text("{}")
        killed = killed_at(point, lambda: published(job(tmp_path, seed=4), {"only": b"x"}))
        found.append(old_or_new(tmp_path, old, new))
        if not killed:
            break
    assert len(found) > 30
    commit = found.index(new)
    assert found == [old.identity] * commit + [new] * (len(found) - commit)  # one moment decides, once and for all


def test_killed_while_recovering_from_a_kill(tmp_path: Path) -> None:
    """The moment between the two renames, and then every moment of the recovery."""
    new = published(job(tmp_path / "new", seed=4), {"only": b"x"}).identity
    run = Run(tmp_path / "runs" / "x")
    for aside in (
        False,
        True,
    ):  # the old one is away and the new one is not there yet; or it is, and the old one is left
        for point in range(100):
            old = published(job(tmp_path))
            staging = job(tmp_path, seed=4)
            old.path.rename(run.path / ".old-prep")
            if aside:
                published(staging, {"only": b"x"}).path.rename(run.path / "new")
                old = published(job(tmp_path))
                old.path.rename(run.path / ".old-prep")
                (run.path / "new").rename(run.path / "prep")
            else:
                (run.path / ".staging-prep").mkdir()
                (run.path / ".staging-prep" / "half").write_text("x")
            killed = killed_at(point, run.recover)
            assert old_or_new(tmp_path, old, new) == (new if aside else old.identity)
            if not killed:
                break
        assert point > 4


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_while_writing(tmp_path: Path) -> None:
    """Fault 3: the save fails, the last artifact stays whole, and the error says what to do."""
    before = published(job(tmp_path))
    with disk_of(1000), pytest.raises(RunError) as caught, job(tmp_path, seed=4).publishing() as staging:
        (staging.path / "big").write_bytes(b"x" * 2000)
    assert "cannot write the artifact: File too large" in caught.value.message
    assert "make room" in caught.value.hint
    assert caught.value.exit_code == 4
    Artifact.open(before.path).verify()
    assert not list(before.path.parent.glob(".*-prep"))


def test_disk_full_while_saving_tensors(tmp_path: Path) -> None:
    """safetensors reports it in an error of its own."""
    import torch
    from safetensors.torch import save_file

    before = published(job(tmp_path))
    full = pytest.raises(RunError, match=r"cannot write the artifact: .*File too large")
    with disk_of(1000), full, job(tmp_path, seed=4).publishing() as staging:
        save_file({"a": torch.zeros(1000)}, staging.path / "model.safetensors")
    Artifact.open(before.path).verify()


@pytest.mark.parametrize("failing", range(1, 14))
def test_any_operation_that_fails_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """EIO, ENOSPC from fsync or rename: at once, without a recovery, the place holds something whole."""
    before = published(job(tmp_path))
    left = failing

    def breaks(operation: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(28, "No space left on device")
            return operation(*args, **named)

        return run

    with monkeypatch.context() as broken:
        for name in ("fsync", "rename", "replace"):
            broken.setattr(os, name, breaks(getattr(os, name)))
        try:
            published(job(tmp_path, seed=4), {"only": b"x"})
            failed = False
        except RunError:
            failed = True
    assert failed == (left <= 0)
    found = Artifact.open(before.path)
    found.verify()
    if not failed:
        assert found.identity != before.identity


# --------------------------------------------------------------------------------------------------------------- lock


def test_a_second_process_is_refused_and_told_who(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "x")
    with run.lock(), pytest.raises(BusyError, match=f"in use by process {os.getpid()}"), run.lock():
        pass
    with run.lock():  # free again
        pass


def test_the_lock_is_gone_when_its_process_is(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "x")
    run.path.mkdir(parents=True)

    def take() -> None:
        with run.lock():
            os.mkdir(run.path / "mine")

    assert killed_at(1, take, ("mkdir",)) or (run.path / "mine").exists()
    with run.lock():
        pass


def test_json_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifact.write_json(path, {"a": 1})
    for point in range(20):
        killed = killed_at(point, lambda: artifact.write_json(path, {"a": 2}))
        assert json.loads(path.read_text()) in ({"a": 1}, {"a": 2})
        if not killed:
            break
    assert json.loads(path.read_text()) == {"a": 2}
