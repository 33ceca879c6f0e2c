"""What many tests share: the real corpora, where this checkout lies beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora and models (`LLMCTL_TEST_DATA`, else ../shared/data); the test skips without it."""
    folder = Path(os.environ.get("LLMCTL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the folder of real corpora at {folder} (set LLMCTL_TEST_DATA)")
    return folder
