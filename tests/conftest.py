"""Fixtures that several test files use: the folder of shared reference data, where there is one."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that is too large for the repository: `RGPU_SHARED`, or `shared` beside the checkout."""
    folder = Path(os.environ.get("RGPU_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("needs the shared reference data: set RGPU_SHARED to its folder")
    return folder
