"""What is known of machines: this one is measured once and remembered; the named ones make sense."""

import json
import os
from dataclasses import fields

import numpy as np
import pytest

from rgpu import machine
from rgpu.machine import PROFILES, Machine, this_machine


@pytest.fixture
def rates(monkeypatch, tmp_path):
    """Each measurement gives another number, and counts."""
    monkeypatch.setenv("RGPU_CACHE_DIR", str(tmp_path / "cache"))
    calls = {"read": 0, "arithmetic": 0, "storage": 0}

    def count(what: str, unit: float):
        def measure(*_):
            calls[what] += 1
            return unit * calls[what]

        return measure

    monkeypatch.setattr(machine, "BUFFER", 1 << 12)
    monkeypatch.setattr(machine, "read_rate", count("read", 40e9))
    monkeypatch.setattr(machine, "arithmetic_rate", count("arithmetic", 50e9))
    monkeypatch.setattr(machine, "storage_rate", count("storage", 2e9))
    return calls


def test_this_machine_is_measured_once(rates):
    first = this_machine(2)
    assert first == this_machine(2) and rates == {"read": 1, "arithmetic": 1, "storage": 0}
    assert first.cpu_gb_s == 40 and first.ram == machine.memory() and not first.vram
    assert first.cpu_gw_s < first.cpu_prefill_gw_s
    assert this_machine(2, again=True).cpu_gb_s == 80 == this_machine(2).cpu_gb_s


def test_threads_are_another_machine(rates):
    assert this_machine(1).cpu_gb_s == 40 and this_machine(2).cpu_gb_s == 80 and this_machine(1).cpu_gb_s == 40


def test_storage_is_measured_where_a_file_is(rates, tmp_path):
    assert this_machine(2).disk_gb_s == Machine("x").disk_gb_s
    file = tmp_path / "model"
    file.write_bytes(bytes(1))
    assert this_machine(2, file).disk_gb_s == 2 == this_machine(2, file).disk_gb_s
    assert rates == {"read": 1, "arithmetic": 1, "storage": 1}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 0, KEY: {}}', '{"version": 1}', '{"version": 1, KEY: RATES}'])
@pytest.mark.parametrize("rates_kept", ["3", '{"other": 3.0}', '{"cpu_gb_s": "fast"}'])
def test_what_does_not_fit_is_measured_again(rates, tmp_path, damage, rates_kept):
    this_machine(2)
    kept = tmp_path / "cache" / "machine.json"
    (key,) = json.loads(kept.read_text()).keys() - {"version"}
    kept.write_text(damage.replace("KEY", json.dumps(key)).replace("RATES", rates_kept))
    assert this_machine(2).cpu_gb_s == 80 == this_machine(2).cpu_gb_s


def test_a_cache_that_cannot_be_written_costs_a_measurement_only(rates, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("RGPU_CACHE_DIR", str(tmp_path / "file"))
    assert this_machine(2).cpu_gb_s == 40 and this_machine(2).cpu_gb_s == 80


def test_rates_are_bytes_per_second(monkeypatch, tmp_path):
    """The best of some runs: the work divided by the shortest time."""
    times = iter(range(100))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times) * 1.0)
    monkeypatch.setattr(machine, "PIECE", 1 << 10)
    assert machine.read_rate(np.ones(1000, np.int32), 2) == 3 << 10  # three whole pieces in the one second that every run takes
    assert machine.arithmetic_rate() == machine.BATCH * machine.ORDER**3
    file = tmp_path / "model"
    file.write_bytes(os.urandom(10000))
    assert machine.storage_rate(file) == machine.RECORDS * 10000


def test_a_missing_file_has_no_storage(rates, tmp_path):
    with pytest.raises(OSError):
        this_machine(2, tmp_path / "missing")


def test_physical_cores():
    assert 1 <= machine.physical_cores() <= os.cpu_count()


@pytest.mark.parametrize("name", PROFILES)
def test_named_machines_make_sense(name):
    m = PROFILES[name]
    numbers = {field.name: getattr(m, field.name) for field in fields(m) if field.type in (int, float)}
    gpu = {key for key in numbers if key.startswith(("gpu", "pcie", "vram", "display"))}
    assert all(value > 0 for key, value in numbers.items() if key not in gpu)
    assert name == "cpu" or all(numbers[key] > 0 for key in gpu)
    assert m.cpu_gb_s < m.ram_gb_s and m.disk_gb_s < m.pcie_gb_s or not m.vram
    assert m.ram % 10**9 == 0
