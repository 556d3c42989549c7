"""What would be better: the same plan with one thing changed, for the changes that a user can make."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ..machine import GB
from .budget import Budget, plan

GAIN = 1.03  # how many times the speed a change must give to be worth telling
MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")  # from the largest to the smallest
CARDS = (4, 6, 8, 12, 16, 24, 32, 48, 80)  # GiB of VRAM on a card …
MODULES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)  # … and of RAM in a PC
SHORT = 4096  # tokens of the shortest context that is proposed
STEP = GB // 10  # in which the memory that would do is told


class Change(NamedTuple):
    """What is changed, in words, and what it gives."""

    what: str
    budget: Budget


def changes(budget: Budget) -> list[Change]:
    """What would help most; of a plan with a problem, what would make it fit."""
    return fits(budget) if budget.problem else helps(budget)


def helps(budget: Budget) -> list[Change]:
    """Changes that make answers faster, best first; then those that make only prompts faster."""
    quarter = max(budget.wishes.n_ctx // 4, SHORT)
    contexts = [each for each in _contexts(budget) if each.budget.wishes.n_ctx in (quarter, budget.wishes.n_ctx)]
    tried = [*_memory(budget), *list(_types(budget))[:1], *contexts]
    tried = [change for change in tried if not change.budget.problem]
    faster = [each for each in tried if each.budget.decode_tok_s >= GAIN * budget.decode_tok_s]
    prompts = [each for each in tried if each not in faster and each.budget.prefill_tok_s >= GAIN * budget.prefill_tok_s]
    faster.sort(key=lambda each: -each.budget.decode_tok_s)
    return faster + sorted(prompts, key=lambda each: -each.budget.prefill_tok_s)


def fits(budget: Budget) -> list[Change]:
    """For a plan with a problem: the gentlest change that fits, if one does; then how much memory would do without any."""
    small = Change(f"--ctx {SHORT} --kv q8_0", _with(budget, n_ctx=min(SHORT, budget.wishes.n_ctx), kv="q8_0"))
    smaller = [Change(f"{what}, with {small.what}", each) for what, each in _types(small.budget)]
    gentle = [*_contexts(budget), small, *_types(budget), *smaller, *_without_gpu(budget)]
    return [change for change in gentle if not change.budget.problem][:1] + [_enough(budget)]


def _with(budget: Budget, **wishes) -> Budget:
    return plan(budget.shape, budget.machine, replace(budget.wishes, **wishes))


def _contexts(budget: Budget) -> Iterator[Change]:
    """A smaller type for keys and values; contexts of a half, a quarter …"""
    if budget.wishes.kv != "q8_0":
        yield Change("--kv q8_0", _with(budget, kv="q8_0"))
    n_ctx = budget.wishes.n_ctx // 2
    while n_ctx >= SHORT:
        yield Change(f"--ctx {n_ctx}", _with(budget, n_ctx=n_ctx))
        n_ctx //= 2


def _types(budget: Budget) -> Iterator[Change]:
    """Smaller types of weights, the next one first."""
    for mix in MIXES:
        shape = budget.shape.as_type(mix)
        if shape.file < 0.97 * budget.shape.file:
            yield Change(f"type {mix}, a file of {shape.file / GB:.1f} GB", plan(shape, budget.machine, budget.wishes))


def _memory(budget: Budget) -> Iterator[Change]:
    """No cap, the next larger card, more RAM."""
    shape, machine, wishes = budget.shape, budget.machine, budget.wishes
    if wishes.vram or wishes.ram:
        yield Change("no cap on memory", _with(budget, vram=None, ram=None))
    for size in [each << 30 for each in CARDS if machine.vram and each << 30 > 1.1 * machine.vram][:1]:
        yield Change(f"a card with {size >> 30} GB", plan(shape, replace(machine, vram=size), replace(wishes, vram=None)))
    for size in [each << 30 for each in MODULES if each << 30 > 1.1 * machine.ram][:1]:
        yield Change(f"{size >> 30} GB of RAM", plan(shape, replace(machine, ram=size), wishes))


def _without_gpu(budget: Budget) -> Iterator[Change]:
    if budget.machine.vram:
        yield Change("--vram 0", plan(budget.shape, replace(budget.machine, vram=0), replace(budget.wishes, vram=None)))


def _enough(budget: Budget) -> Change:
    """The least VRAM and RAM with which the plan fits as it is."""
    sizes = []
    while budget.problem:
        size, budget = _least(budget, budget.placement.short_of)
        sizes.append(size)
    return Change(" and ".join(sizes), budget)


def _least(budget: Budget, place: str) -> tuple[str, Budget]:
    """How much of one place is enough, found by halving, and the plan with it."""
    shape, machine, wishes = budget.shape, budget.machine, budget.wishes
    cap = getattr(wishes, place)

    def grown(steps: int) -> Budget:
        size = steps * STEP
        there = max(size + machine.display, getattr(machine, place)) if cap else size  # what is capped must be there, too
        return plan(shape, replace(machine, **{place: there}), replace(wishes, **{place: size}) if cap else wishes)

    few, enough = 0, 1
    while grown(enough).placement.short_of == place:
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (middle, enough) if grown(middle).placement.short_of == place else (few, middle)
    size = f"{enough * STEP / GB:.1f}"
    return f"--{place} {size}G" if cap else f"{size} GB of {place.upper()}", grown(enough)
