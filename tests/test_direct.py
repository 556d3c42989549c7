"""Reading past the page cache: any range of any file, systems that cannot, files that change, reads that fail."""

import errno
import mmap
import os

import numpy as np
import pytest

from rgpu.errors import GGUFError
from rgpu.gguf import direct
from rgpu.gguf.direct import PAGE, DirectFiles, pages, room
from rgpu.gguf.shard import TensorInfo

SIZE = 5 * PAGE + 123
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def files(path):
    files = DirectFiles([path])
    yield files
    files.close()


def without_flag(monkeypatch):
    """A system that has no O_DIRECT."""
    monkeypatch.delattr(os, "O_DIRECT", raising=False)


def refused(monkeypatch):
    """A file system that refuses it."""
    opened, flag = os.open, getattr(os, "O_DIRECT", 0)

    def patched(path, flags, *more):
        if flags & flag:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", patched)


def read(files, begin, end, shard=0):
    return files.bytes(TensorInfo("w", "F32", (1,), shard, begin, end - begin))


def whole(files):
    """The first three pages, into memory that has been used."""
    memory = room(3 * PAGE)
    memory[:] = 77
    files.read(0, 0, 3 * PAGE, memory)
    return memory


@pytest.mark.parametrize("system", [None, without_flag, refused])
@pytest.mark.parametrize("piece", [PAGE, direct.PIECE])
def test_any_range_of_any_file(path, monkeypatch, system, piece):
    monkeypatch.setattr(direct, "PIECE", piece)
    if system:
        system(monkeypatch)
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1].tobytes())
    files = DirectFiles([path, other])
    edges = sorted({at for page in range(6) for at in (page * PAGE - 1, page * PAGE, page * PAGE + 1, SIZE - 1, SIZE)} - {-1})
    for shard, content in enumerate((CONTENT, CONTENT[::-1])):
        for begin in edges:
            for end in (each for each in edges if each > begin):
                got = read(files, begin, end, shard)
                assert got.ctypes.data % PAGE == begin % PAGE
                np.testing.assert_array_equal(got, content[begin:end])
    assert files.cached == [True, True] or system is None
    opened = files.files[:]
    files.close()
    for file in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_whole_pages():
    found = [pages(*range_) for range_ in ((0, 1), (0, PAGE), (PAGE - 1, PAGE + 1), (PAGE, PAGE + 1), (3 * PAGE + 5, 5 * PAGE))]
    assert found == [(0, PAGE), (0, PAGE), (0, 2 * PAGE), (PAGE, PAGE), (3 * PAGE, 2 * PAGE)]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise, to drop a file's pages")
@pytest.mark.parametrize("system", [None, without_flag])
def test_what_is_read_is_not_in_the_page_cache_too(path, monkeypatch, system):
    from tests.test_readahead import resident

    if system:
        system(monkeypatch)
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        at = np.frombuffer(mapping, np.uint8).ctypes.data
        wanted = set(range(at, at + 3 * PAGE, PAGE))
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(wanted):
            pytest.skip("this file system keeps its pages")
        files = DirectFiles([path])
        np.testing.assert_array_equal(whole(files), CONTENT[: 3 * PAGE])
        files.close()
        assert not resident(wanted)


@pytest.mark.parametrize("system", [None, without_flag])
@pytest.mark.parametrize("size", [0, 1, PAGE, 2 * PAGE, 2 * PAGE + 700, 3 * PAGE - 1])
def test_a_file_that_was_shortened(path, monkeypatch, system, size):
    if system:
        system(monkeypatch)
    files = DirectFiles([path])
    os.truncate(path, size)
    with pytest.raises(GGUFError, match=rf"^{path}: ends at byte {size}: it is shorter than when it was opened$"):
        whole(files)
    if size:
        np.testing.assert_array_equal(read(files, 0, size), CONTENT[:size])
    files.close()


def test_a_file_that_vanished(path, files, tmp_path):
    os.unlink(path)
    np.testing.assert_array_equal(read(files, 5, SIZE), CONTENT[5:])
    there = tmp_path / "there"
    there.write_bytes(b"x")
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with pytest.raises(GGUFError, match=rf"^{path}: cannot be opened: No such file or directory$"):
        DirectFiles([there, path])
    assert not before or os.listdir("/proc/self/fd") == before, "what was opened before it is closed"


def test_a_read_error(path, files, monkeypatch):
    preadv, calls = os.preadv, []

    def failing(file, buffers, offset):
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(direct, "PIECE", PAGE)
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(GGUFError, match=rf"^{path}: cannot be read at byte {PAGE}: Input/output error$"):
        whole(files)
    np.testing.assert_array_equal(whole(files), CONTENT[: 3 * PAGE])


def test_reads_that_come_in_parts(path, files, monkeypatch):
    preadv, calls = os.preadv, []

    def short(file, buffers, offset):
        calls.append(offset)
        return preadv(file, [buffers[0][:PAGE]], offset)

    monkeypatch.setattr(os, "preadv", short)
    np.testing.assert_array_equal(whole(files), CONTENT[: 3 * PAGE])
    assert calls == [0, PAGE, 2 * PAGE]
    np.testing.assert_array_equal(read(files, 4 * PAGE + 1, SIZE), CONTENT[4 * PAGE + 1 :])
