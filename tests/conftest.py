"""Fixtures that several test files use: the shared reference data, where there is any, and a model to talk to."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from rgpu.engine import Engine
from tests.program import never_ending

# The same examples on every run, and no deadline on a busy machine: a failure means a change.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# A shell's background job ignores Ctrl-C, and so would every program that the tests start from it and press Ctrl-C in.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that is too large for the repository: `RGPU_SHARED`, or `shared` beside the checkout."""
    folder = Path(os.environ.get("RGPU_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("needs the shared reference data: set RGPU_SHARED to its folder")
    return folder


@pytest.fixture
def fresh_cache(tmp_path_factory, monkeypatch):
    """Nothing was learned of any model before. (Compiled kernels are found all the same: their folder was chosen at import.)"""
    monkeypatch.setenv("RGPU_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny random model that answers until it is stopped; test files with models of their own override these three."""
    return never_ending(tmp_path_factory.mktemp("chat") / "tiny.gguf")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """The same without a chat template."""
    return never_ending(tmp_path_factory.mktemp("chat") / "base.gguf", **{"tokenizer.chat_template": None})


@pytest.fixture(scope="session")
def engine(model):
    with Engine.open(model, device="reference") as engine:
        yield engine
