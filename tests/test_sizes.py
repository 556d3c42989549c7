"""Sizes as people write them."""

import pytest

from rgpu.errors import RgpuError
from rgpu.sizes import nbytes, text

WRITTEN = {
    "6.3G": 6_300_000_000,
    "6GiB": 6 << 30,
    "6gib": 6 << 30,
    "1.5Gi": 3 << 29,
    "500 MB": 500_000_000,
    " 800m ": 800_000_000,
    "2Ki": 2048,
    "7k": 7000,
    ".5T": 500_000_000_000,
    "1.T": 10**12,
    "12345": 12345,
    "12B": 12,
    4096: 4096,
}
WRONG = ["", "G", "0", "0G", "-1G", "1e9", "six", "6GG", "6Bi", "6iB", "1,5G", "nan", "٣G", None, 0, -5, 1.5, b"6G", [6]]


@pytest.mark.parametrize(("size", "expected"), WRITTEN.items())
def test_sizes_that_are_understood(size, expected):
    assert nbytes(size, "ram") == expected


@pytest.mark.parametrize("size", WRONG, ids=repr)
def test_what_is_no_size(size):
    with pytest.raises(RgpuError) as error:
        nbytes(size, "--ram")
    assert str(error.value) == f"--ram is {size!r}, but must be a size such as 6.3G, 800M or 6GiB"


@pytest.mark.parametrize(
    ("n", "expected"),
    [(6_300_000_000, "6.3 GB"), (63_240_000, "63.2 MB"), (9850, "9.85 kB"), (512, "0.512 kB"), (10**9, "1 GB"), (21e9, "21 GB")],
)
def test_sizes_in_words(n, expected):
    assert text(n) == expected
