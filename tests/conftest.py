"""Fixtures that several test files use: the folder of shared reference data, where there is one."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, and no deadline on a busy machine: a failure means a change.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that is too large for the repository: `RGPU_SHARED`, or `shared` beside the checkout."""
    folder = Path(os.environ.get("RGPU_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("needs the shared reference data: set RGPU_SHARED to its folder")
    return folder
