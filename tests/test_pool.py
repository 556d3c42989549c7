"""The pool that runs tables of kernel calls: every part once, rows in order, threads that come, sleep, wake and go."""

import gc
import threading
import time

import numpy as np
import pytest

from rgpu import kernels
from rgpu.kernels import elementwise, kernel
from rgpu.kernels.pool import PARKED, WAIT
from rgpu.kernels.scalar import floats
from rgpu.kernels.table import Table, span

N = 64


@kernel("iii")
def count_parts(counts, chain, n, part, parts):
    """counts[part] += 1; chain[i] = 2·chain[i] + 1 over this part's share of n, which tells the order of rows."""
    floats(counts, parts)[part] += 1
    c = floats(chain, n)
    for i in range(n * part // parts, n * (part + 1) // parts):
        c[i] = np.float32(2) * c[i] + np.float32(1)


@kernel("ii")
def reverse(out, x, part, parts):
    """out = x back to front, N values: a part reads what others wrote in the row before."""
    o, a = floats(out, N), floats(x, N)
    for i in range(N * part // parts, N * (part + 1) // parts):
        o[i] = a[N - 1 - i]


@kernel("i")
def out_of_memory(n, part, parts):
    np.empty(n, np.float32)[0] = 1


@pytest.fixture(scope="module", autouse=True)
def built():
    kernels.build([(count_parts,), (reverse,), (out_of_memory,), (elementwise.add,)])


@pytest.fixture(params=[1, 2, 3, 4])
def pool(request):
    return kernels.Pool(request.param)


def add(table, kernel, arguments, parts, reads, writes):
    table.add(kernel.address(), kernel.shape, arguments, parts, [*map(span, reads)], [*map(span, writes)])


def at(x):
    return x.ctypes.data


def test_every_part_is_done_once_and_rows_in_order(pool):
    counts, x, y = np.zeros(16, np.float32), np.zeros(N, np.float32), np.full(N, np.nan, np.float32)
    table = Table()
    for _ in range(10):
        add(table, count_parts, (at(counts), at(x), N), 16, [x], [x, counts])
        add(table, reverse, (at(y), at(x)), 8, [x], [y])
        add(table, reverse, (at(x), at(y)), 8, [y], [x])
    rows = table.array()
    for run in range(1, 50):
        x[:] = np.arange(N) / 64
        wanted = x.copy()
        pool.run(rows, 0, len(rows))
        for _ in range(10):
            wanted = 2 * wanted + 1
        np.testing.assert_array_equal(x, wanted)  # exact: 64ths below 2**11
        np.testing.assert_array_equal(y, wanted[::-1])
        assert (counts == 10 * run).all()


def test_any_slice_of_a_table_can_be_run(pool):
    counts, x = np.zeros(4, np.float32), np.zeros(N, np.float32)
    table = Table()
    for _ in range(5):
        add(table, count_parts, (at(counts), at(x), N), 4, [x], [x, counts])
    rows = table.array()
    for first, last in ((0, 2), (2, 2), (2, 5), (4, 5)):
        pool.run(rows, first, last)
    pool.run(rows, 0, 5, threads=1)
    assert (counts == 11).all() and (x == 2.0**11 - 1).all()


def test_a_sleeping_pool_wakes(pool):
    counts, x = np.zeros(4, np.float32), np.zeros(N, np.float32)
    table = Table()
    add(table, count_parts, (at(counts), at(x), N), 4, [x], [x, counts])
    rows = table.array()
    for run in range(1, 4):
        deadline = time.monotonic() + 20
        while pool.threads > 1 and not pool.control[PARKED::8][1:].all():
            assert time.monotonic() < deadline, "idle threads never sleep"
            time.sleep(0.005)
        pool.run(rows, 0, 1)
        assert (counts == run).all()


def test_a_kernel_without_memory_is_an_error_and_the_pool_goes_on(pool):
    counts, x = np.zeros(4, np.float32), np.zeros(N, np.float32)
    table = Table()
    add(table, out_of_memory, (2**55,), 2, [], [])
    add(table, count_parts, (at(counts), at(x), N), 4, [x], [x, counts])
    rows = table.array()
    with pytest.raises(MemoryError, match="scratch"):
        pool.run(rows, 0, 2)
    pool.run(rows, 1, 2)
    assert (counts == 2).all()


def test_threads_leave_with_their_pool():
    others = set(threading.enumerate())
    pool = kernels.Pool(3)
    mine = set(threading.enumerate()) - others
    assert len(mine) == 2 and all(thread.is_alive() for thread in mine)
    del pool
    gc.collect()
    assert not any(thread.is_alive() for thread in mine)


def test_floats_reach_a_kernel():
    x = np.arange(1, 9, dtype=np.float32)
    out, weight = np.full(8, np.nan, np.float32), np.ones(8, np.float32)
    kernels.build([(elementwise.rms_norm,)])
    table = Table()
    add(table, elementwise.rms_norm, (at(out), at(x), 8, at(weight), 1, 8, 0, 0.25), 1, [x], [out])
    kernels.Pool(1).run(table.array(), 0, 1)
    np.testing.assert_allclose(out, x / np.sqrt(np.mean(x**2) + 0.25), rtol=1e-6)


# ---- barriers: only where one row needs another ----


def waits(*calls):
    """Record calls (reads, writes) of arrays; the rows that wait."""
    table = Table()
    for reads, writes in calls:
        add(table, elementwise.add, (0, 0, 0), 1, reads, writes)
    return table.array()[:, WAIT].tolist()


def test_a_row_waits_only_for_what_it_needs():
    a, b, c, d = (np.zeros(N, np.float32) for _ in range(4))
    assert waits(([a], [b]), ([a], [c]), ([a], [d])) == [0, 0, 0]  # one input, three outputs
    assert waits(([a], [b]), ([b], [c])) == [0, 1]  # reads what was written
    assert waits(([a], [b]), ([c], [a])) == [0, 1]  # writes what is read
    assert waits(([a], [b]), ([c], [b])) == [0, 1]  # writes what was written
    assert waits(([a], [b]), ([b], [c]), ([b], [d]), ([a], [a])) == [0, 1, 0, 0]  # the barrier served them all
    assert waits(([a], [b]), ([c], [d]), ([d], [a])) == [0, 0, 1]


def test_parts_of_one_array_are_told_apart():
    a, b = np.zeros((4, 8), np.float32), np.zeros(N, np.float32)
    assert waits(([b], [a[:2]]), ([a[2:]], [b[:1]])) == [0, 1]
    assert waits(([], [a[:2]]), ([a[2:]], [])) == [0, 0]
    assert waits(([], [a[:, :4]]), ([a[:, 4:]], [])) == [0, 1]  # interleaved: their ranges of bytes overlap
