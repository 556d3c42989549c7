"""What goes where on a machine, and what that gives: bytes of every class by place, slots, hit rate, tokens per second.

Pure arithmetic on a model's shape, a machine's figures and a user's wishes, before anything is allocated. How long a token
takes is in cost.py, what would be better in advice.py, words and tables in report.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OutOfMemory
from ..machine import MIB, Machine
from ..shapes import ModelShape
from ..sizes import text
from . import cost
from .cost import Lanes

DRIVER = 300 * MIB  # of VRAM, for a process that uses the GPU
WORKSPACE = 400 * MIB  # of VRAM: activations of a chunk of a prompt, experts on their way
RESERVE = 256 * MIB  # of a promised cap on VRAM: it is given in larger pieces than are asked for
RAM_RESERVE = 64 * MIB  # … and on RAM: what nobody counts
SYSTEM = 2000 * MIB  # of RAM, for the system and other programs
PROCESS = 300 * MIB  # of RAM, before a model is opened
SPARE = 16  # slots of a class that hold no resident, at least: bytes that arrive land there
CHUNKS = (512, 2048, 4096)  # tokens of a prompt that are computed together
LOGIT_ROWS = 16  # of logits that are computed together
SNAPSHOTS = 4  # of the recurrent state, that a session keeps
NEVER = Lanes({}, (), math.inf, "")


@dataclass(frozen=True)
class Wishes:
    """What the user asks for. Sizes in bytes; None: all that the machine has."""

    n_ctx: int
    kv: str = "f16"
    n_batch: int = 512
    vram: int | None = None  # of the whole process
    ram: int | None = None  # of the whole process, on a machine without GPU: experts are read into slots
    experts: int | None = None  # what `ram` leaves for their slots; None: not known before the model is open


@dataclass(frozen=True)
class Placement:
    """Bytes by class in each place, and the slots of experts."""

    how: str  # "mapped": read in place; "all": every expert has a slot; "slots": they rotate; "static": some have, for good
    where: dict[str, dict[str, int]]  # "vram", "ram", "disk" -> class -> bytes
    sizes: tuple[int, ...]  # bytes of a slot, by size class …
    slots: tuple[int, ...]  # … how many there are …
    spare: int  # … and how many of each class hold no resident
    resident: float  # share of the experts in VRAM, or in RAM on a machine without GPU
    problem: str = ""  # why this does not fit …
    short_of: str = ""  # … and in which place


@dataclass(frozen=True)
class Budget:
    """A plan."""

    shape: ModelShape
    machine: Machine
    wishes: Wishes
    placement: Placement
    hit_rate: float  # of the routed experts: found in VRAM, or in RAM on a machine without GPU
    from_disk: float  # … and read from disk
    decode: Lanes
    decode_full: Lanes  # at the end of the context
    prefill: dict[int, Lanes]  # by tokens of a chunk

    @property
    def problem(self) -> str:
        return self.placement.problem

    @property
    def slots_per_layer(self) -> float:
        return sum(self.placement.slots) / sum(map(bool, self.shape.records))

    @property
    def decode_tok_s(self) -> float:
        return 1000 / self.decode.total

    @property
    def prefill_tok_s(self) -> float:
        return self.prefill_of(self.wishes.n_batch)

    def prefill_of(self, n_tokens: int) -> float:
        """Tokens per second of a prompt in chunks of so many."""
        return 1000 * n_tokens / self.prefill[n_tokens].total


def plan(shape: ModelShape, machine: Machine, wishes: Wishes) -> Budget:
    """Never fails: what does not fit has a `problem`, and no speed."""
    place = _on_gpu if machine.vram else _mapped if wishes.ram is None else _capped
    placement = place(shape, machine, wishes)
    chunks = sorted({wishes.n_batch, *CHUNKS})
    if placement.problem:
        return Budget(shape, machine, wishes, placement, 0.0, 0.0, NEVER, NEVER, dict.fromkeys(chunks, NEVER))
    on_disk = placement.where["disk"]["experts"] / shape.experts
    hits = placement.resident if placement.how == "static" else cost.hit_rate(placement.resident)
    # What was used lately is in RAM if not in VRAM: for the disk, both are one list.
    from_disk = 0.0 if not on_disk else min(1 - cost.hit_rate(1 - on_disk), 1 - hits)

    def decode(n_past: int) -> Lanes:
        return cost.decode(shape, machine, hits, from_disk, shape.kv(n_past, wishes.kv), n_past)

    prefill = {n: cost.prefill(shape, machine, n, placement.resident, on_disk) for n in chunks}
    return Budget(shape, machine, wishes, placement, hits, from_disk, decode(0), decode(wishes.n_ctx), prefill)


# ---- slots ----


def size_classes(records: Sequence[int]) -> tuple[list[int], list[int]]:
    """The class of each layer that has experts, and the bytes of a slot of each class; `records`: of an expert, by layer."""
    sizes = sorted(set(records) - {0})
    return [sizes.index(size) for size in records if size], sizes


def slots_within(available: int, class_of: Sequence[int], nbytes: Sequence[int], n_expert: int, k: int) -> tuple[list[int], int]:
    """How many slots of each class fit into `available` bytes, as many for every layer, and how many of a class are spare.

    OutOfMemory if that is less than k + 2 for every layer: below, hardly an expert would be used again before it had to leave.
    """
    layers = [class_of.count(cls) for cls in range(len(nbytes))]
    per_layer = sum(n * size for n, size in zip(layers, nbytes, strict=True))
    spare = max(2 * k, SPARE)  # a token's experts twice: two waves, one read while the other is computed
    share, least = min((available - spare * sum(nbytes)) // per_layer, n_expert), min(k + 2, n_expert)
    missing = least * per_layer + spare * sum(nbytes) - available
    if missing > 0:
        more = math.ceil(missing / 1e7) / 100
        raise OutOfMemory(
            f"{text(max(available, 0))} are left for experts, and at least {text(available + missing)} are needed ({least} of "
            f"every layer's {n_expert}): allow {more:.2f} GB more, or take a shorter context"
        )
    return [n * share + spare for n in layers], spare


# ---- the three arrangements ----


def _on_gpu(shape: ModelShape, machine: Machine, wishes: Wishes) -> Placement:
    """Dense weights and the session's memory in VRAM, experts in what is left of it, all others in the mapped file."""
    there, kept_free = machine.vram - machine.display, machine.display
    if wishes.vram is not None and wishes.vram - RESERVE < there:
        there, kept_free = wishes.vram - RESERVE, RESERVE
    vram = {"dense": shape.dense, **_session(shape, wishes), "workspace": WORKSPACE, "driver": DRIVER}
    needed = sum(vram.values())
    how, slots, spare, share = _slots(shape, there - needed)
    sizes = size_classes(shape.records)[1]
    lacking = shape.experts - shape.experts * share // shape.n_expert
    ram = {"embedding": shape.embedding, "process": PROCESS, "kept free": SYSTEM}
    problem = _problem("vram", needed, there) or _problem("ram", sum(ram.values()), machine.ram)
    vram |= {"experts": _product(slots, sizes), "kept free": kept_free}
    where = {"vram": vram} | _file(machine, ram, lacking)
    return Placement(how, where, tuple(sizes), tuple(slots), spare, share / shape.n_expert, *problem)


def _slots(shape: ModelShape, free: int) -> tuple[str, list[int], int, int]:
    """Of VRAM for experts: how they are arranged, slots by class, how many of a class are spare, residents of each layer."""
    class_of, sizes = size_classes(shape.records)
    layers = [class_of.count(cls) for cls in range(len(sizes))]
    if free >= shape.experts:
        return "all", [n * shape.n_expert for n in layers], 0, shape.n_expert
    try:
        slots, spare = slots_within(free, class_of, sizes, shape.n_expert, shape.n_expert_used)
    except OutOfMemory:
        share = max(free, 0) // _product(layers, sizes)
        return "static", [n * share for n in layers], 0, share
    return "slots", slots, spare, (slots[0] - spare) // layers[0]


def _mapped(shape: ModelShape, machine: Machine, wishes: Wishes) -> Placement:
    """Everything in RAM, experts where the system keeps the pages of the mapped file."""
    ram = _on_cpu(shape, wishes) | {"kept free": SYSTEM}
    where = {"vram": {}} | _file(machine, ram, shape.experts)
    resident = 1 - where["disk"]["experts"] / shape.experts
    return Placement("mapped", where, (), (), 0, resident, *_problem("ram", sum(ram.values()), machine.ram))


def _capped(shape: ModelShape, machine: Machine, wishes: Wishes) -> Placement:
    """The process stays within `wishes.ram`: experts are read from the file into slots."""
    class_of, sizes = size_classes(shape.records)
    ram = _on_cpu(shape, wishes) | {"kept free": RAM_RESERVE}
    n_expert, slots, spare, share, problem = shape.n_expert, [0] * len(sizes), 0, 0, ()
    available = wishes.ram - sum(ram.values()) if wishes.experts is None else wishes.experts
    try:
        slots, spare = slots_within(available, class_of, sizes, n_expert, shape.n_expert_used)
        share = (slots[0] - spare) // class_of.count(0)
    except OutOfMemory as error:
        problem = str(error), "ram"
    ram |= {"experts": _product(slots, sizes)}
    if wishes.experts is not None:  # then all that is there already was measured, and is the process
        ram["process"] += wishes.ram - sum(ram.values())
    where = {"vram": {}, "ram": ram, "disk": {"experts": shape.experts - shape.experts * share // n_expert}}
    return Placement("slots", where, tuple(sizes), tuple(slots), spare, share / n_expert, *problem)


def _session(shape: ModelShape, wishes: Wishes) -> dict[str, int]:
    return {"state": shape.state, "kv": shape.kv(wishes.n_ctx, wishes.kv)}


def _on_cpu(shape: ModelShape, wishes: Wishes) -> dict[str, int]:
    """Of RAM, without experts, on a machine without GPU."""
    workspace = 4 * (wishes.n_batch * shape.activations + LOGIT_ROWS * shape.n_vocab)
    session = _session(shape, wishes)
    session["state"] *= 1 + SNAPSHOTS
    return {"dense": shape.dense, **session, "workspace": workspace, "process": PROCESS}


def _file(machine: Machine, ram: dict[str, int], experts: int) -> dict[str, dict[str, int]]:
    """RAM and disk, where bytes of experts are read from a mapped file: as many are in RAM as have room beside `ram`."""
    mapped = min(max(machine.ram - sum(ram.values()), 0), experts)
    return {"ram": ram | {"experts": mapped}, "disk": {"experts": experts - mapped}}


def _problem(place: str, needed: int, there: int) -> tuple[str, ...]:
    """(why it does not fit, where), if it does not."""
    if needed <= there:
        return ()
    return f"{text(needed)} of {place.upper()} are needed before the first expert, and {text(there)} are there", place


def _product(counts: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(n * size for n, size in zip(counts, sizes, strict=True))
