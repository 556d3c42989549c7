"""What the policies have to reach: each bar with its figure, and whether it is met.

A bar that lacks one of its figures (a set, a size or a policy that was not asked for) is left out.
"""

from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from statistics import fmean
from typing import NamedTuple

PUBLISHED = {24: 47.8, 48: 69.4, 64: 78.4, 96: 88.9}  # set B, LRU per layer with so many slots, 8 of 256 experts
SIZES = (45, 70)  # slots per layer: 6.3 GB for Qwen3.6-35B-A3B at Q4_K_M, and all of an 8 GB card
CYCLE = 8  # slots per layer that one token uses


class Bar(NamedTuple):
    what: str
    figure: float
    needed: str
    met: bool

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'missed'} {self.what}: {self.figure:.2f} ({self.needed})"


def bars(found: Mapping) -> list[Bar]:
    """`found`: results by (set, slots per layer, policy)."""
    made = []
    for of in (generator, against_lru, against_static, swaps, cost):
        with suppress(KeyError):
            made += of(found)
    return made


def generator(found: Mapping) -> list[Bar]:
    """Generated routing has the locality of published traces."""
    made = []
    for slots, needed in PUBLISHED.items():
        rate = found["B", slots, "layer lru"].warm
        made.append(Bar(f"set B, LRU per layer, {slots} slots, %", rate, f"{needed} +- 1", abs(rate - needed) <= 1))
    return made


def against_lru(found: Mapping) -> list[Bar]:
    """Sets A and B, warm and after a change of topic; of LRU per layer and LRU over all layers, the better one.

    The last line says what is left in a run that does not hear of the router's near misses.
    """
    gains, blind, ways = {}, [], []
    for name, slots, part in product("AB", SIZES, ("warm", "changed")):
        kinds = ("rotary", "used only", "lru", "layer lru", "belady")
        rotary, used_only, lru, layers, best = (getattr(found[name, slots, kind], part) for kind in kinds)
        gains[f"set {name}, {slots} slots, {part}"] = rotary - max(lru, layers)
        blind.append(used_only - max(lru, layers))
        ways.append((rotary - max(lru, layers)) / (best - max(lru, layers)))
    least, mean, way = min(gains, key=gains.get), fmean(gains.values()), fmean(ways)
    return [
        Bar(f"rotary over LRU, points, least ({least})", gains[least], "never below", gains[least] >= 0),
        Bar("rotary over LRU, points, mean", mean, "3; aim 5", mean >= 3),
        Bar("rotary's part of the way from LRU to Belady", way, "aim 0.5", way >= 0.5),
        Bar("rotary told of used experts only over LRU, points, mean", fmean(blind), "3", fmean(blind) >= 3),
    ]


def against_static(found: Mapping) -> list[Bar]:
    """The adversarial set, and arenas that a single token overruns."""
    made = {}
    for name, slots, kind in found:
        if kind == "rotary" and (name == "C" or name in "AB" and slots < CYCLE):
            for part in ("warm", "changed"):
                gain = getattr(found[name, slots, "rotary"], part) - getattr(found[name, slots, "static"], part)
                made[f"set {name}, {slots} slots, {part}"] = gain
    least = min(made, key=made.get, default=None)
    return [Bar(f"rotary over static, points, least ({least})", made[least], "no worse", made[least] >= 0)] if made else []


def swaps(found: Mapping) -> list[Bar]:
    """Experts moved at the larger of both sizes, against those of LRU, where rotary hits as often or more."""
    made = []
    for name in "AB":
        rotary, lru = found[name, SIZES[1], "rotary"], found[name, SIZES[1], "layer lru"]
        part = rotary.moved / lru.moved
        what = f"set {name}, {SIZES[1]} slots: rotary's moves over LRU's ({rotary.warm - lru.warm:+.1f} points)"
        made.append(Bar(what, part, "at most 0.5", part <= 0.5 and rotary.warm >= lru.warm))
    return made


def cost(found: Mapping) -> list[Bar]:
    """What a step boundary costs with 2,800 slots."""
    us = found["B", SIZES[1], "rotary"].us
    return [Bar(f"touch and turn, set B, {SIZES[1]} slots, us", us, "at most 50", us <= 50)]
