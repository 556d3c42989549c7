"""The picture of a plan: where the bytes go, as stacked bars, and where a token's time goes, lane by lane. Extra `plot`."""

from pathlib import Path

from .errors import RgpuError
from .residency.budget import Budget
from .residency.report import CLASSES, LANES, PLACES

SIZE = (10, 4.5)  # inches


def draw(budget: Budget, path: Path) -> None:
    """Writes the picture in the format that the file's name asks for. RgpuError without matplotlib, or for another format."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RgpuError("--png needs matplotlib, which is not installed: pip install 'rgpu[plot]'") from None
    figure = Figure(SIZE, layout="constrained")
    memory, time = figure.subplots(1, 2)
    _memory(memory, budget)
    _time(time, budget)
    figure.suptitle(f"{budget.shape.name}, {budget.shape.mix}, on {budget.machine.name}")
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise RgpuError(f"--png {path}: {error}") from None


def _memory(axes, budget: Budget) -> None:
    """One stacked bar per place."""
    places = {PLACES[place]: sizes for place, sizes in budget.placement.where.items() if any(sizes.values())}
    bottom = dict.fromkeys(places, 0.0)
    for number, (kind, label) in enumerate(CLASSES.items()):
        heights = [sizes.get(kind, 0) / 1e9 for sizes in places.values()]
        if any(heights):
            axes.bar([*places], heights, bottom=[*bottom.values()], color=f"C{number}", label=label)
            bottom = {place: bottom[place] + height for place, height in zip(places, heights, strict=True)}
    axes.set(ylabel="GB", title="where the bytes go")
    axes.legend(fontsize="small")


def _time(axes, budget: Budget) -> None:
    """One bar per lane, from when it begins: lanes that run at once begin together."""
    lanes, rows = budget.decode, []
    begin = 0.0
    for lane in [each for each in LANES if each in lanes.ms and each not in lanes.at_once]:
        rows.append((LANES[lane], begin, lanes.ms[lane]))
        begin += lanes.ms[lane]
    rows += [(LANES[lane], begin, lanes.ms[lane]) for lane in lanes.at_once]
    rows = [row for row in rows if row[2] > 0]
    for number, (label, start, ms) in enumerate(rows):
        axes.barh(label, ms, left=start, color=f"C{number}")
        axes.annotate(f" {ms:.2g}", (start + ms, number), va="center", fontsize="small")
    axes.invert_yaxis()
    speed = f"a token in {lanes.total:.3g} ms: {budget.decode_tok_s:.3g} tok/s"
    axes.set(xlabel="ms", title="does not fit" if budget.problem else speed)
