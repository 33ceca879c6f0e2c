"""What many tests share: the real corpora where this checkout lies beside them, and small projects to run llmctl in."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as llmctl itself does (cli.main); before torch is imported

from tests import project
from tests.project import Project
from tests.warm import Warm


def pytest_configure() -> None:
    """A shell starts background jobs with Ctrl-C ignored, which is inherited: the tests that press it need it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora and models (`LLMCTL_TEST_DATA`, else ../shared/data); the test skips without it."""
    folder = Path(os.environ.get("LLMCTL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the folder of real corpora at {folder} (set LLMCTL_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """llmctl, imported and ready to fork."""
    with Warm(tmp_path_factory.mktemp("output")) as server:
        yield server


@pytest.fixture(scope="session")
def _finished(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("finished") / "project"
    project.write(folder)
    made = Project(folder, warm)
    done = made.llmctl("run", "t.toml")
    assert done.code == 0, done.out + done.err
    return made


@pytest.fixture
def fresh(warm: Warm, tmp_path: Path) -> Project:
    """A project in which nothing has run yet."""
    project.write(tmp_path / "fresh")
    return Project(tmp_path / "fresh", warm)


@pytest.fixture
def finished(_finished: Project, tmp_path: Path) -> Project:
    """A copy of a project whose whole chain has run: the test may break it."""
    return project.copy(_finished, tmp_path / "finished")
