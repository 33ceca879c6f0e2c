"""A project of tests.faults.harder, trained without a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import project
from tests.faults.harder import harder
from tests.project import Project
from tests.warm import Warm


@pytest.fixture(scope="session")
def _whole(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = harder(tmp_path_factory.mktemp("whole") / "project", warm)
    done = made.llmctl("finetune", "t.toml")
    assert done.code == 0, done.out + done.err
    return made


@pytest.fixture
def whole(_whole: Project, tmp_path: Path) -> Project:
    """Trained without a stop."""
    return project.copy(_whole, tmp_path / "whole")
