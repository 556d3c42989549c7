"""Profiles: what was saved comes back bit for bit, and what does not fit is ignored with a notice."""

import zlib

import numpy as np
import pytest

from rgpu.gguf import GGUFFile
from rgpu.residency import profile
from rgpu.residency.policy import POLICIES
from rgpu.residency.profile import Profile, digest, load, save
from tests.tiny import stock_gguf

MODEL, MACHINE = "a" * 32, "a machine, 2 threads"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RGPU_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def kept():
    scores = np.random.default_rng(1).standard_normal(24).astype(np.float32)
    return Profile(MODEL, MACHINE, scores, {"cpu_gb_s": 41.5})


def content() -> bytes:
    return profile.path(MODEL, MACHINE).read_bytes()


def ignored(*wanted) -> str:
    """The notice with which what is kept is ignored."""
    found, notice = load(*(wanted or (MODEL, MACHINE, 24)))
    assert found is None and notice.startswith("what was learned of this model is not used: ") and "\n" not in notice
    return notice


def test_there_and_back(kept, cache):
    assert load(MODEL, MACHINE, 24) == (None, "")
    save(kept)
    found, notice = load(MODEL, MACHINE, 24)
    assert notice == "" and found.rates == kept.rates and (found.model, found.machine) == (MODEL, MACHINE)
    assert found.scores.dtype == np.float32 and found.scores.tobytes() == kept.scores.tobytes()
    assert [path.name for path in (cache / "profiles").iterdir()] == [profile.path(MODEL, MACHINE).name]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_begins_where_it_left_off(name):
    policy, keys = POLICIES[name](3, 8), np.arange(24)
    for step in range(5):
        policy.touch(step, np.random.default_rng(step).permutation(24)[:6])
    save(Profile(MODEL, MACHINE, policy.state()))
    fresh = POLICIES[name](3, 8)
    fresh.restore(load(MODEL, MACHINE, 24)[0].scores)
    assert np.array_equal(np.argsort(policy.state(), kind="stable"), np.argsort(fresh.score(keys), kind="stable"))


def test_every_damaged_byte_is_noticed(kept):
    save(kept)
    good = content()
    for at in range(len(good)):
        profile.path(MODEL, MACHINE).write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        assert "is damaged" in ignored()


def test_every_truncated_file_is_noticed(kept):
    save(kept)
    good = content()
    for length in range(len(good)):
        profile.path(MODEL, MACHINE).write_bytes(good[:length])
        assert "is damaged" in ignored()


def test_another_version(kept, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(profile, "VERSION", 0)
        save(kept)
    assert "is of version 0, and this is 1" in ignored()
    save(kept)
    assert load(MODEL, MACHINE, 24)[0]


def test_another_model_or_machine(kept):
    save(kept)
    assert load("b" * 32, MACHINE, 24) == (None, "") and load(MODEL, "another", 24) == (None, "")
    other = profile.path("b" * 32, MACHINE)
    other.write_bytes(content())
    assert "another model or machine" in ignored("b" * 32, MACHINE, 24)
    assert "24 experts" in ignored(MODEL, MACHINE, 32)


def test_what_cannot_be_read_or_written(kept, cache):
    save(kept)
    path = profile.path(MODEL, MACHINE)
    path.unlink()
    path.mkdir()
    assert "cannot be read: " in ignored()
    with pytest.raises(OSError):
        save(kept)
    assert [each.name for each in (cache / "profiles").iterdir()] == [path.name]  # nothing half-written is left


def test_an_older_profile_is_replaced_wholly(kept, monkeypatch):
    save(kept)

    def full(*_):
        raise OSError("no space")

    with monkeypatch.context() as disk, pytest.raises(OSError):
        disk.setattr(profile.os, "replace", full)
        save(Profile(MODEL, MACHINE, np.zeros(24, np.float32)))
    assert load(MODEL, MACHINE, 24)[0].scores.tobytes() == kept.scores.tobytes()


def test_a_digest_tells_models_apart_without_reading_weights(tmp_path):
    def of(name: str, **options) -> str:
        with GGUFFile(stock_gguf(tmp_path / name, "qwen3moe", **options)) as file:
            return digest(file)

    assert of("a.gguf") == of("b.gguf") == of("other-weights.gguf", seed=1)
    others = [of("c.gguf", quant="F16"), of("d.gguf", metadata={"general.name": "another"})]
    assert len({of("a.gguf"), *others}) == 3


def test_a_checksum_alone_is_not_trusted_with_another_layout(kept):
    """A file of a later version may hold anything behind its checksum, but begins with its version."""
    path = profile.path(MODEL, MACHINE)
    path.parent.mkdir(parents=True)
    later = b'{"version": 2}\nsomething else'
    path.write_bytes(b"%08x\n" % zlib.crc32(later) + later)
    assert "is of version 2" in ignored()
