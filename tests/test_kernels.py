"""Building kernels: what a cache that is damaged or can't be written, or a Ctrl-C, leaves behind."""

import subprocess
import sys

import pytest

from rgpu import kernels

PROGRAM = """
import sys
from rgpu import kernels
from rgpu.kernels import elementwise
told = []
kernels.build([(elementwise.zero,), (elementwise.add,)], lambda done, total, name: told.append(name))
import numpy as np
x = np.full(5, 3, np.float32)
elementwise.add(x.ctypes.data, x.ctypes.data, 5)
assert (x == 6).all()
print([name for name in told if name])
"""


def start(folder):
    environment = {"RGPU_CACHE_DIR": str(folder), "PATH": "", "HOME": str(folder)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=sys.path[0])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("ending, damage", [("nbc", b""), ("nbi", b"garbage"), ("nbi", b"")])
def test_a_damaged_cache_is_made_again(tmp_path, ending, damage):
    everything = "['zero', 'add']"
    assert start(tmp_path) == (everything, "")
    assert start(tmp_path) == ("[]", "")
    files = list(tmp_path.rglob(f"*.{ending}"))
    assert files
    for file in files:
        file.write_bytes(damage)
    assert start(tmp_path) == (everything, "")
    assert start(tmp_path) == ("[]", "")


def test_a_cache_that_is_full_costs_a_warning(monkeypatch):
    class Full:
        overloads, signatures = {}, []

        def compile(self, signature):
            self.overloads[signature] = "compiled"
            raise OSError(28, "No space left on device")

        def disable_compile(self, value=True):
            pass

    with pytest.warns(UserWarning, match="can't be kept in .*No space left on device"):
        kernels._compile(Full(), "signature")


def test_an_interrupted_compilation_is_an_interrupt():
    class Interrupted:
        overloads, signatures = {}, []

        def compile(self, signature):
            raise KeyboardInterrupt

        def disable_compile(self, value=True):
            assert not value, "Numba refuses this while nothing is compiled"

    with pytest.raises(KeyboardInterrupt):
        kernels._compile(Interrupted(), "signature")
