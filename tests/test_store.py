"""The way of experts into slots: how each form of file is read, size classes, bytes, slots that are given up."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rgpu import load
from rgpu.gguf import GGUFFile, direct
from rgpu.gguf.direct import PAGE, DirectFiles
from rgpu.ops import Bank, Slots
from rgpu.ops.reference import ReferenceOps
from rgpu.quants import TYPES
from rgpu.residency.arena import SlotArena
from rgpu.residency.policy import LRU
from rgpu.residency.store import Extent, Store, record, size_classes
from tests.arenas import FORMS, N_EXPERT, written

EXTENTS = {"stacked": 3, "fused": 2, "split": 3, "per_expert": 1}  # of an expert: how many reads it takes


@pytest.fixture(scope="module", params=FORMS)
def file(request, tmp_path_factory):
    with GGUFFile(written(tmp_path_factory.mktemp(request.param), "qwen3moe", request.param)) as file:
        file.form = request.param
        yield file


def banks_of(file):
    return load.bind(file, load.inspect(file), ReferenceOps()).banks


def bank(*parts):
    """A bank of Q8_0 matrices [32, 32] (1088 bytes each) whose expert 0 lies at these (shard, byte) of gate, up and down."""
    return Bank(*(Slots(TYPES["Q8_0"], (32, 32), (), np.array([shard]), np.array([at])) for shard, at in parts))


@pytest.mark.parametrize(
    ("parts", "extents", "starts"),
    [
        # Page-aligned, one behind the other: three pages of which the last is needed to its byte 1088.
        (((0, 8192), (0, 12288), (0, 16384)), [(0, 8192, 12288, 8192 + 1088, 0)], [0, 4096, 8192]),
        # Far apart, each within a page.
        (((0, 100), (0, 40960), (0, 20000)),
         [(0, 0, 4096, 1188, 0), (0, 40960, 4096, 1088, 4096), (0, 16384, 4096, 4704, 8192)][:2]
         + [(0, 16384, 8192, 4704, 8192)], [100, 4096, 8192 + 3616]),
        # Back to back across pages' ends, then in another file at the same place.
        (((1, 4000), (1, 5088), (2, 5088)), [(1, 0, 8192, 6176, 0), (2, 4096, 4096, 2080, 8192)], [4000, 5088, 8192 + 992]),
        # Down before gate and up: nothing is joined backwards.
        (((0, 50000), (0, 51088), (0, 48912)),
         [(0, 49152, 4096, 3024, 0), (0, 45056, 8192, 4944, 4096)], [848, 1936, 4096 + 3856]),
    ],
)  # fmt: skip
def test_how_an_expert_is_read(parts, extents, starts, monkeypatch):
    monkeypatch.setattr(direct, "PAGE", 4096)
    assert record(bank(*parts), 0) == ([Extent(*each) for each in extents], starts)


def test_neighbours_in_a_file_are_read_as_one(file):
    for layer in banks_of(file):
        for expert in range(N_EXPERT):
            extents, starts = record(layer, expert)
            assert len(extents) == EXTENTS[file.form]
            for part, start in zip(layer, starts, strict=True):
                (extent,) = (e for e in extents if e.at <= start < e.at + e.nbytes)
                assert extent.shard == part.source[expert] and extent.offset + start - extent.at == part.offset[expert]
                assert start - extent.at + part.shape[0] * part.row_bytes <= extent.needed <= extent.nbytes
            assert all(e.nbytes - e.needed < PAGE for e in extents), "no page is read in vain"


def test_layers_of_equal_matrices_share_a_class(file):
    banks = banks_of(file)
    class_of, nbytes = size_classes(banks)
    assert class_of == CLASS_OF
    ends = [[e[-1].at + e[-1].nbytes for e, _ in (record(each, i) for i in range(N_EXPERT))] for each in banks]
    assert nbytes == [max(ends[0] + ends[2]), max(ends[1])] and all(size % PAGE == 0 for size in nbytes)


CLASS_OF = [0, 1, 0]


@pytest.fixture
def opened(file):
    """opened(counts): a store with so many slots of each class."""
    files = DirectFiles(file.paths)
    yield lambda *counts: Store(files, banks_of(file), *size_classes(banks_of(file)), counts)
    files.close()


def assert_holds(store, slot, key):
    layer, expert = divmod(key, N_EXPERT)
    for mine, mapped in zip(store.banks[layer], store.mapped[layer], strict=True):
        wanted = mapped.weight(expert).data
        np.testing.assert_array_equal(mine.weight(slot).data, wanted)
        assert mine.addresses[slot] == mine.data[0].ctypes.data + mine.offset[slot] and wanted.any()


def test_every_expert_comes_whole_into_any_slot(opened):
    """Each class's slots again and again, in another order every time; what other slots hold stays."""
    store, rng, holds = opened(7, 5), np.random.default_rng(0), {}
    for key in rng.permutation(3 * N_EXPERT).tolist():
        cls = CLASS_OF[key // N_EXPERT]
        slot = int(rng.integers(7, 12) if cls else rng.integers(7))
        assert 3 * 1152 < store.read(key, slot) <= store.nbytes[cls]
        holds[slot] = key
        if len(holds) == 12:
            for each in holds.items():
                assert_holds(store, *each)
    assert len(holds) == 12


def test_several_threads_read_at_once(opened):
    """Whole experts from the very first read on, then parts of one, with a switch of threads wherever there can be one."""
    store, interval = opened(7, 5), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            whole = list(threads.map(store.read, range(7), range(7)))
            for each in enumerate(range(7)):
                assert_holds(store, *each)
            for key in [*range(N_EXPERT)] * 5:
                parts = list(threads.map(store.read, [key] * 4, [3] * 4, range(4), [4] * 4))
                assert_holds(store, 3, key)
            assert sum(parts) in whole and min(parts) < max(whole)
    finally:
        sys.setswitchinterval(interval)


def test_slots_of_all_classes_are_given_up_in_proportion(opened):
    """A twelfth of 70 and 50 slots, five of the eleven left, and then more than there is above the floors of 24 and 16."""
    store = opened(70, 50)
    arena, policy = SlotArena(3, N_EXPERT, CLASS_OF, [70, 50], 8, 8), LRU(3, N_EXPERT)
    for slot in range(120):
        store.take(slot)
    for key, slot in arena.fill(range(3 * N_EXPERT)):
        store.read(key, slot)
    part = (70 * store.nbytes[0] + 50 * store.nbytes[1]) // 12
    for wanted, left in ((part, [64, 45]), (5 * part, [34, 24])):
        assert store.shrink(arena, policy, wanted)
        assert [len(pool.slots) for pool in arena.pools] == left
    kept = set(np.concatenate([pool.slots for pool in arena.pools]).tolist())
    for slot, (cls, part_of) in enumerate(store.places):
        assert slot in kept or not store.memory[cls][part_of].any(), "the system has taken the bytes"
    residents = np.flatnonzero(arena.slot_of >= 0)
    assert len(residents) == len(kept) - 2 * 8
    for key in residents.tolist():
        assert_holds(store, arena.slot_of[key], key)
    assert not store.shrink(arena, policy, 5 * part)
    assert [len(pool.slots) for pool in arena.pools] == [34, 24]


def test_a_class_with_nothing_to_give_does_not_keep_others_from_it(opened):
    store = opened(18, 40)
    arena = SlotArena(3, N_EXPERT, CLASS_OF, [18, 40], 6, 6)
    assert store.shrink(arena, LRU(3, N_EXPERT), 10 * max(store.nbytes))
    assert len(arena.pools[0].slots) == 18 and len(arena.pools[1].slots) < 40
