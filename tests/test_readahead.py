"""Read-ahead: what is requested and in which order, for every layout of a file; what then lies in the page cache."""

import ctypes
import math
import mmap
import os
import time

import numpy as np
import pytest

from convert import stock
from rgpu import Engine
from rgpu.gguf import GGUFFile, names
from rgpu.kernels import build
from rgpu.kernels.post import post
from rgpu.ops.reference import ReferenceOps
from rgpu.residency import readahead
from rgpu.residency.readahead import DEPTH, UNIT, PageCache, ReadAhead
from tests.gguf_forms import rewrite
from tests.tiny import stock_gguf

FORMS = ("stacked", "fused", "split", "per_expert")
KINDS = ("gate", "up", "down")
N_EXPERT, K = 8, 3
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 500, 40)]
PAGE = mmap.PAGESIZE
needs_linux = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise, to drop a file's pages")


def written(folder, form):
    """A tiny model in one of the forms of files; every expert matrix is nine pages."""
    source = stock_gguf(folder / "stock.gguf", "qwen35moe", "Q4_K")
    out = folder / "model.gguf"
    if form == "per_expert":
        with GGUFFile(source) as file:
            stock.to_per_expert(file, out)
        return out
    return {"stacked": lambda: source, "fused": lambda: rewrite(source, out, fused=True),
            "split": lambda: rewrite(source, out, per_file=7)}[form]()  # fmt: skip


@pytest.fixture(scope="module", params=FORMS)
def engine(request, tmp_path_factory):
    with Engine.open(written(tmp_path_factory.mktemp(request.param), request.param), device="reference", n_ctx=256) as engine:
        yield engine


def place(file, name, first=0, parts=1):
    """Range of one of `parts` equal parts of a tensor in memory."""
    info = file.tensors[name]
    nbytes = info.nbytes // parts
    return file.mapping(info.shard).ctypes.data + info.offset + first * nbytes, nbytes


def expert(file, layer, kind, e):
    """Range of an expert's matrix in memory, by the names in the file."""
    if names.stacked(layer, kind) in file.tensors:
        return place(file, names.stacked(layer, kind), e, N_EXPERT)
    if kind != "down" and names.fused(layer) in file.tensors:
        return place(file, names.fused(layer), 2 * e + (kind == "up"), 2 * N_EXPERT)
    return place(file, names.expert(layer, kind, e))


def dense(file, layer):
    """Ranges of what a layer reads in its stored type besides experts: all tensors of blocks, and some of floats."""
    mine = [name for name in file.tensors if name.startswith(f"blk.{layer}.") and not names.is_expert(name)]
    return {place(file, name): file.tensors[name].quant for name in mine}


def needed(engine, tokens):
    """What read-ahead says that a forward needs, and the ids that were routed in every layer."""
    ahead = engine.executor.experts.readahead
    seen = ahead.boxes[:, 0].copy()
    engine.session().forward(tokens)
    assert (ahead.boxes[:, 0] == seen + 1).all() and (ahead.boxes[:, 1] == K * len(tokens)).all()
    return list(ahead.needed(seen)), [box[2 : 2 + K * len(tokens)].tolist() for box in ahead.boxes]


@pytest.mark.parametrize("n", [1, 2, 40])
def test_everything_is_requested_in_the_order_of_need(engine, n):
    file, n_layer = engine.file, engine.hparams.n_layer
    requests, routed = needed(engine, TOKENS[:n])
    assert len(set(requests)) == len(requests)
    at = {each: i for i, each in enumerate(requests)}
    output = place(file, "output.weight")
    expected = {output}
    for layer in range(n_layer):
        order = sorted(set(routed[layer])) if K * n >= N_EXPERT else list(dict.fromkeys(routed[layer]))
        assert n > 1 or len(order) == K < N_EXPERT
        mine = [expert(file, layer, kind, e) for e in order for kind in ("gate", "up")]
        mine += [expert(file, layer, "down", e) for e in order]
        assert [at[each] for each in mine] == list(range(at[mine[0]], at[mine[0]] + len(mine))), "as the kernels read them"
        expected |= set(mine)
        quantised = {each for each, quant in dense(file, layer).items() if quant == "Q4_K"}
        assert len(quantised) >= 7 and quantised <= at.keys()
        begin = min(at[each] for each in quantised)
        assert max(at[each] for each in quantised) < at[mine[0]]
        assert begin == 0 if layer == 0 else begin > min(at[each] for each in dense(file, layer - 1) if each in at)
        expected |= dense(file, layer).keys() & at.keys()
    assert set(requests) == expected
    assert at[output] < at[expert(file, n_layer - 1, "gate", routed[-1][0])], "some layers ahead, like all that is known"


def test_nothing_is_requested_before_it_is_known(engine):
    """Layer by layer: after each post its experts and the dense weights of one more layer, and then nothing."""
    ahead, ops = engine.executor.experts.readahead, ReferenceOps()
    seen = ahead.boxes[:, 0].copy()
    steps, known = ahead.needed(seen), sum(len(part) for part in ahead.dense[: DEPTH + 1])
    assert [next(steps) for _ in range(known)] == [each for part in ahead.dense[: DEPTH + 1] for each in part]
    for layer, ids in enumerate(([5, 1, 2], [0, 7, 3], [4, 6, 0], [1, 1, 1])):
        ops.post(ahead.boxes[layer], np.array([ids], np.int32))
        chosen = list(dict.fromkeys(ids))
        wanted = [expert(engine.file, layer, kind, e) for e in chosen for kind in ("gate", "up")]
        wanted += [expert(engine.file, layer, "down", e) for e in chosen]
        wanted += [each for part in ahead.dense[layer + 1 + DEPTH : layer + 2 + DEPTH] for each in part]
        assert [next(steps) for _ in wanted] == wanted
        if layer == 2:  # a forward that is broken off ends the wait
            ahead.over.set()
            assert list(steps) == []
            break


def test_the_kernel_posts_what_the_reference_does():
    build([(post,)])
    rng = np.random.default_rng(0)
    boxes = [np.full((2, 2 + 12), -1, np.int32) for _ in range(2)]
    for n in (4, 1, 3):
        ids = rng.integers(0, 1 << 20, (n, 3), np.int32)
        post(boxes[0].ctypes.data, ids.ctypes.data, ids.size, 0)
        ReferenceOps().post(boxes[1][0], ids)
        assert (boxes[0] == boxes[1]).all() and (boxes[0][1] == -1).all()
        assert boxes[0][0, 1 : 2 + 3 * n].tolist() == [3 * n, *ids.reshape(-1)]
    assert boxes[0][0, 0] == 2  # from -1 on


# ---- the page cache itself ----


def pages(ranges):
    """Addresses of the pages that these ranges touch."""
    return {page for at, nbytes in ranges for page in range(at // PAGE * PAGE, at + nbytes, PAGE)}


def resident(wanted):
    """Those of some pages that are in memory."""
    libc, answer = ctypes.CDLL(None), ctypes.create_string_buffer(1)

    def there(page):
        assert libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), answer) == 0
        return answer.raw[0] & 1

    return {page for page in wanted if there(page)}


def evict(file):
    """Drop a mapped file from memory; skips the test on file systems that live there."""
    libc = ctypes.CDLL(None)
    for shard, path in enumerate(file.paths):
        mapped = file.mapping(shard)
        libc.madvise(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), mmap.MADV_DONTNEED)
        with path.open("rb") as f:
            os.fsync(f.fileno())  # what is not written yet can't be dropped
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(pages([(mapped.ctypes.data, len(mapped))])):
            pytest.skip("this file system keeps its pages")


def arrive(wanted):
    """Wait for pages that have been requested; those that don't come within ten seconds."""
    until = time.monotonic() + 10
    while (missing := wanted - resident(wanted)) and time.monotonic() < until:
        time.sleep(0.01)
    return missing


@needs_linux
@pytest.mark.parametrize("tells", [True, False])
def test_what_was_routed_is_read_and_nothing_else(engine, tells):
    file, ahead, ops = engine.file, engine.executor.experts.readahead, ReferenceOps()
    evict(file)
    seen = ahead.boxes[:, 0].copy()
    for layer, box in enumerate(ahead.boxes):
        ops.post(box, np.array([[layer, 7 - layer, layer]], np.int32))
    wanted = pages([expert(file, layer, kind, e) for layer in range(4) for kind in KINDS for e in (layer, 7 - layer)])
    wanted |= pages([each for part in ahead.dense for each in part])
    ahead.over.clear()
    for _ in range(3):  # a system that is short of memory may drop a request
        ahead.cache.tells = tells
        ahead._follow(seen)
        ahead.cache.tells = True
        if not (missing := arrive(wanted)):
            break
    assert not missing
    others = pages([expert(file, layer, kind, e) for layer in range(4) for kind in KINDS for e in range(N_EXPERT)]) - wanted
    assert len(others) > 4 * 3 * 6 * 7, "of six experts in each layer, at least the pages that they share with none"
    assert not resident(others)


@needs_linux
def test_large_requests_arrive_whole(tmp_path):
    """The system drops what passes a limit of the device; a range with a hole in the middle is filled."""
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(24 << 20))
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        at, cache = np.frombuffer(mapping, np.uint8).ctypes.data, PageCache([path])
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(pages([(at, len(mapping))])):
            pytest.skip("this file system keeps its pages")
        begin, nbytes = at + 100, len(mapping) - 5000
        for unit in readahead._units((begin, nbytes)):
            assert unit[1] <= UNIT and cache.missing(*unit) is not None
            cache.request(*unit)
        assert not arrive(pages([(begin, nbytes)]))
        assert [cache.missing(*unit) for unit in readahead._units((begin, nbytes))] == [None] * 12
        assert not resident(pages([(at + len(mapping) - 4096, 1)]))


@needs_linux
def logits(engine):
    session = engine.session()
    return np.stack([session.forward(TOKENS), *(session.forward([token]) for token in TOKENS[:4])])


@needs_linux
def test_a_cold_run_gives_the_answer_of_a_warm_one(tmp_path, monkeypatch):
    with Engine.open(written(tmp_path, "per_expert"), n_ctx=256) as engine:
        ahead, followed = engine.executor.experts.readahead, []
        follow = ahead._follow
        monkeypatch.setattr(ahead, "_follow", lambda seen: followed.append(follow(seen)))
        warm = logits(engine)
        assert warm.std() > 0.5
        settle(engine, followed, warm)
        evict(engine.file)
        assert (logits(engine) == warm).all()
        assert followed, "from the second step on"
        assert ahead.thread is None and ahead.over.is_set()
        settle(engine, followed, warm)
        evict(engine.file)
        ahead.ended = -math.inf
        assert (engine.session().forward(TOKENS) == warm[0]).all() and followed, "after a pause it looks before the first"


def settle(engine, followed, warm):
    """Run until nothing is requested: soon, but something else in the process may read from storage too."""
    for _ in range(20):
        followed.clear()
        assert (logits(engine) == warm).all()
        if not followed:
            return
    pytest.fail("what is in memory is requested again and again")


@needs_linux
def test_a_forward_that_breaks_leaves_no_thread(engine, monkeypatch):
    ahead, ops = engine.executor.experts.readahead, engine.executor.ops
    session = engine.session()
    expected = session.forward(TOKENS[:5])
    session.reset()

    def broken(*arguments):
        assert ahead.thread.is_alive()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ops, "expert_ffn", broken)
        ahead.cold = True
        with pytest.raises(KeyboardInterrupt):
            session.forward(TOKENS[:5])
    assert ahead.thread is None
    ahead.cold = True
    assert (session.forward(TOKENS[:5]) == expected).all()


def test_a_system_without_requests(tmp_path, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_WILLNEED", raising=False)
    with Engine.open(written(tmp_path, "stacked"), device="reference", n_ctx=256) as engine:
        assert not isinstance(engine.executor.experts.readahead, ReadAhead)
        assert engine.session().forward(TOKENS[:2]).std() > 0.5
