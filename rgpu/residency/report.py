"""A budget in words: one row per line, as `chat` prints it at start and `rgpu plan` at length."""

from ..sizes import text
from .advice import fits, helps
from .budget import Budget
from .cost import Lanes

PLACES = {"vram": "VRAM", "ram": "RAM", "disk": "disk"}
CLASSES = {  # class of bytes -> its row
    "experts": "experts",
    "dense": "dense weights",
    "embedding": "embedding",
    "state": "recurrent state",
    "kv": "KV cache",
    "workspace": "workspace",
    "driver": "driver",
    "process": "process",
    "kept free": "kept free",
}
LANES = {  # lane of a step -> what takes the time
    "dense": "dense weights",
    "hit": "experts in VRAM",
    "host": "experts on the CPU",
    "pull": "experts over PCIe",
    "disk": "experts from disk",
    "state": "state and KV",
    "fixed": "fixed",
}
LIMITS = {
    "state": "reading the recurrent state and the KV cache",
    "dense": "VRAM's rate (dense weights)",
    "hit": "VRAM's rate (experts)",
    "host": "the CPU (experts that VRAM lacks)",
    "pull": "PCIe (experts that VRAM lacks)",
    "disk": "the disk (experts that memory lacks)",
    "ram": "RAM's rate (weights)",
    "cpu": "the CPU's arithmetic",
    "compute": "arithmetic",
    "fixed": "what a step costs besides its bytes",
}
MOST = 4  # changes that are proposed


def lines(budget: Budget) -> list[str]:
    """Where every class of bytes goes, slots, hit rate, tokens per second, and what limits them."""
    return table(budget) + ([f"problem  does not fit: {budget.problem}"] if budget.problem else speed(budget))


def table(budget: Budget) -> list[str]:
    """Bytes by class and place."""
    places = {place: sizes for place, sizes in budget.placement.where.items() if any(sizes.values())}
    rows = [["", *(PLACES[place] for place in places)]]
    for kind, name in CLASSES.items():
        row = [sizes.get(kind, 0) for sizes in places.values()]
        if any(row):
            rows.append([name, *(text(size) if size else "" for size in row)])
    rows.append(["in all", *(text(sum(sizes.values())) for sizes in places.values())])
    return [f"{first:15}{''.join(f'{size:>11}' for size in rest)}".rstrip() for first, *rest in rows]


def speed(budget: Budget) -> list[str]:
    """Rows on slots, hit rate, decode and prefill."""
    decode, n_ctx = budget.decode, budget.wishes.n_ctx
    prompts = {n: f"{budget.prefill_of(n):,.0f}" for n in budget.prefill}
    chosen, ours = budget.wishes.n_batch, budget.prefill[budget.wishes.n_batch]
    others = "; ".join(f"{n:,}: {rate}" for n, rate in prompts.items() if n != chosen)
    full = 1000 / budget.decode_full.total
    return [
        *_slots(budget),
        *_hits(budget),
        f"decode   {_rate(budget.decode_tok_s)} tok/s; {_rate(full)} behind {n_ctx:,} tokens of context",
        *_parts(decode),
        f"prefill  {prompts[chosen]} tok/s in chunks of {chosen:,} tokens ({others})",
        f"limit    decode: {LIMITS[decode.limit]}; prompts: {LIMITS[ours.limit]}",
    ]


def proposals(budget: Budget) -> list[str]:
    """What would help most, or what would make it fit: tried with the same arithmetic."""
    if budget.problem:
        *gentle, memory = fits(budget)
        rows = [f"the smallest change that fits is {each.what}: {_speeds(each.budget)}" for each in gentle]
        rows.append(f"without a change it takes {memory.what}: {_speeds(memory.budget)}")
        return [f"{'' if i else 'fits':8} {row}" for i, row in enumerate(rows)]
    rows = [f"{each.what}: {_speeds(each.budget)}" for each in helps(budget)[:MOST]]
    rows = rows or ["none of: more memory, a smaller type, a shorter context"]
    return [f"{'' if i else 'helps':8} {row}" for i, row in enumerate(rows)]


def _slots(budget: Budget) -> list[str]:
    """Only where experts have slots."""
    placement, shape = budget.placement, budget.shape
    if not placement.slots:
        return []
    classes = ", ".join(f"{n:,} of {size / 1e6:.2f} MB" for n, size in zip(placement.slots, placement.sizes, strict=True))
    row = f"slots    {budget.slots_per_layer:.3g} of {shape.n_expert} experts per layer: {classes}"
    if placement.how == "static":
        why = f"with fewer than {shape.n_expert_used + 2}, an expert would leave before it is used again"
        return [row, f"static   {why}: the same experts stay, the CPU computes all others"]
    return [row + (f"; {placement.spare} of each are for arrivals" if placement.spare else "")]


def _hits(budget: Budget) -> list[str]:
    where = "VRAM" if budget.machine.vram else "RAM"
    disk = f", {budget.from_disk:.1%} read from disk" if budget.from_disk else ""
    return [f"hits     {budget.hit_rate:.0%} of the routed experts are expected in {where}{disk}"]


def _parts(lanes: Lanes) -> list[str]:
    """What a step consists of: first its sum, then what runs at once within the last part of it."""
    serial = {lane: ms for lane, ms in lanes.ms.items() if lane not in lanes.at_once and ms >= 0.01 * lanes.total}
    beside = sorted(((lanes.ms[lane], lane) for lane in lanes.at_once), reverse=True)
    terms = [f"{_ms(ms)} {LANES[lane]}" for lane, ms in serial.items()] + [f"{_ms(ms)} experts" for ms, _ in beside[:1]]
    rows = [f"         {_ms(lanes.total)} ms = {' + '.join(terms)}"]
    if beside:
        rows.append("         experts at once: " + " | ".join(f"{_ms(ms)} {LANES[lane].split(' ', 1)[1]}" for ms, lane in beside))
    return rows


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.2g}" if ms < 10 else f"{ms:.3g}"


def _speeds(budget: Budget) -> str:
    return f"{_rate(budget.decode_tok_s)} tok/s, prompts at {budget.prefill_tok_s:,.0f}"


def _rate(tok_s: float) -> str:
    return f"{tok_s:,.0f}" if tok_s >= 100 else f"{tok_s:.3g}"
