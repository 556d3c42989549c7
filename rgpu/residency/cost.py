"""How long a token takes on a machine: bytes over rates, lane by lane. Arithmetic on a model's sizes and a machine's figures.

What is where is decided in budget.py; here it is given as shares of the experts that a token uses.
"""

from dataclasses import dataclass

import numpy as np

from ..machine import Machine
from ..shapes import ModelShape

# Share of a layer's experts that are in slots -> share of the routed ones that are among them: a warm least-recently-used list
# per layer, 256 experts, 8 used, ordinary text. Published figures of models with 128, 256 and 512 experts lie within 7 points.
SLOT_SHARE = (0.0, 0.04, 0.0625, 0.09375, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
HIT_RATE = (0.0, 0.298, 0.394, 0.478, 0.566, 0.694, 0.784, 0.846, 0.889, 0.941, 0.970, 0.984, 0.990, 1.0)
CHUNK = 64  # tokens that are read together, from which on a layer's experts are streamed in order, used or not
PULLED = np.linspace(0, 1, 101)  # shares of the misses that could be pulled over the bus


@dataclass(frozen=True)
class Lanes:
    """Milliseconds by lane, and in all. Those `at_once` run beside each other, all others one after the other."""

    ms: dict[str, float]
    at_once: tuple[str, ...]
    total: float
    limit: str  # what takes the most of the time: a lane, or "ram" or "cpu" where several lanes wait for the same


def hit_rate(share: float) -> float:
    """The expected share of routed experts that are resident, if each layer has slots for this share of its experts."""
    return float(np.interp(share, SLOT_SHARE, HIT_RATE))


def decode(
    shape: ModelShape, machine: Machine, hit: float, disk: float, kv_bytes: int = 0, n_past: int = 0, misses: str = "split"
) -> Lanes:
    """One token after `n_past` others, whose keys and values are `kv_bytes`.

    The share `hit` of the routed experts is found in VRAM (in RAM on a machine without GPU), the share `disk` is read from disk.
    What VRAM lacks is computed by the CPU ("cpu"), copied to the GPU ("pcie"), or divided between both ("split").
    """
    if not machine.vram:
        return _decode_on_cpu(shape, machine, disk, kv_bytes, n_past)
    hits, lacking = hit * shape.routed, (1 - hit) * shape.routed
    serial = {
        "fixed": machine.gpu_fixed_ms,
        "dense": _ms(shape.dense, machine.gpu_gb_s),
        "state": _ms(2 * shape.state + kv_bytes, machine.gpu_gb_s),
        "disk": _ms(disk * shape.routed, machine.disk_gb_s),
    }
    if misses == "pcie":  # the GPU alone computes, and waits before it does
        return _lanes(serial | {"hit": _ms(hits, machine.gpu_gb_s), "pull": _ms(lacking, machine.pcie_gb_s)})
    pulled = PULLED if misses == "split" else PULLED[:1]
    bus = max(machine.ram_gb_s, 1.1 * machine.cpu_gb_s)  # memory gives somewhat more than a CPU that is busy with it takes
    lanes = {
        "hit": _ms(hits + pulled * lacking, machine.gpu_gb_s),
        "host": np.maximum(_ms((1 - pulled) * lacking, machine.cpu_gb_s), _ms(lacking, bus)),
        "pull": _ms(pulled * lacking, machine.pcie_gb_s),
    }
    best = np.argmin(np.max(np.broadcast_arrays(*lanes.values()), axis=0))
    return _lanes(serial, {lane: float(each[best]) for lane, each in lanes.items()})


def _decode_on_cpu(shape: ModelShape, machine: Machine, disk: float, kv_bytes: int, n_past: int) -> Lanes:
    """Everything in its turn: what a layer lacks is read before it computes."""
    n_bytes, weights = shape.dense + shape.routed, shape.weights + shape.output_weights
    read, multiply = _ms(n_bytes, machine.cpu_gb_s), _ms(weights, machine.cpu_gw_s)
    experts = max(read, multiply) * shape.routed / n_bytes
    attention = max(_ms(kv_bytes, machine.cpu_gb_s), _ms(n_past * shape.attention, machine.cpu_gw_s))
    lanes = {
        "fixed": machine.fixed_ms + machine.layer_ms * shape.n_layer,
        "dense": max(read, multiply) - experts,
        "state": _ms(2 * shape.state, machine.cpu_gb_s) + attention,
        "host": experts,
        "disk": _ms(disk * shape.routed, machine.disk_gb_s),
    }
    return _lanes(lanes, together=("dense", "host"), as_one="ram" if read > multiply else "cpu")


def prefill(shape: ModelShape, machine: Machine, n_tokens: int, resident: float, disk: float) -> Lanes:
    """A chunk of a prompt. Of each layer's experts the share `resident` is in VRAM (in RAM without GPU), `disk` is on disk."""
    used = 1.0 if n_tokens >= CHUNK else 1 - (1 - shape.n_expert_used / shape.n_expert) ** n_tokens
    experts, multiplied = used * shape.experts, n_tokens * shape.weights + shape.output_weights
    if machine.vram:
        lanes = {
            "compute": _ms(shape.dense, machine.gpu_gb_s) + _ms(2 * multiplied, 1000 * machine.gpu_tflops),
            "pull": _ms((1 - resident) * experts, machine.pcie_gb_s),
        }
        fixed = {"fixed": machine.gpu_fixed_ms}
    else:
        reading = _ms(shape.dense + experts, machine.cpu_gb_s)
        lanes = {"compute": reading + _ms(multiplied, machine.cpu_prefill_gw_s)}
        fixed = {"fixed": machine.fixed_ms + machine.layer_ms * shape.n_layer}
    return _lanes(fixed, lanes | {"disk": _ms(disk * experts, machine.disk_gb_s)})


def _ms(amount, per_second: float):
    """Milliseconds for an amount at so many 1e9 a second."""
    return amount / (per_second * 1e6)


def _lanes(serial: dict[str, float], at_once: dict[str, float] | None = None, together: tuple = (), as_one: str = "") -> Lanes:
    """The sum of some lanes and the longest of others; those `together` count as one when the limit is looked for."""
    at_once = at_once or {}
    longest = max(at_once, key=at_once.get, default="")
    waited = {lane: ms for lane, ms in serial.items() if lane not in together}
    waited |= {as_one: sum(serial[lane] for lane in together)} if together else {}
    waited |= {longest: at_once[longest]} if longest else {}
    total = sum(waited.values())
    return Lanes(serial | at_once, tuple(at_once), total, max(waited, key=waited.get))
