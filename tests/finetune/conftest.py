"""A project whose base model is there, and nothing behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import project
from tests.project import Project
from tests.warm import Warm


@pytest.fixture(scope="session")
def _based(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("based") / "project"
    project.write(folder)
    made = Project(folder, warm)
    done = made.llmctl("pretrain", "t.toml")
    assert done.code == 0, done.out + done.err
    return made


@pytest.fixture
def based(_based: Project, tmp_path: Path) -> Project:
    """A copy of it: the test may break it."""
    return project.copy(_based, tmp_path / "based")
