"""The pictures of bench.residency: hit rate against slots per layer, and what a run looks like, layer by layer (extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Warm hit rates on set B that were published with the generator: slots per layer, %.
PUBLISHED = {
    "LRU per layer": {24: 47.8, 32: 56.6, 48: 69.4, 64: 78.4, 80: 84.6, 96: 88.9, 128: 94.1},
    "decayed LFU": {24: 55.9, 48: 74.5, 64: 81.5, 96: 89.8},
}
MEASURED = {44: 65, 70: 83, 100: 89}  # Qwen3.6-35B-A3B on real text
BIN = 10  # tokens of a column


def draw(results: Sequence, folder: Path) -> None:
    """Write residency.png and, of the last rotary on set B or on the only trace, residency_map.png."""
    sources = list(dict.fromkeys(each.source for each in results))
    figure = Figure((5 * len(sources), 4.5), layout="constrained")
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        hit_rates(axes, source, [each for each in results if each.source == source])
    figure.savefig(folder / "residency.png", dpi=120)
    shown = [each for each in results if each.replay.held is not None and each.source == ("B" if "B" in sources else sources[0])]
    if shown:
        figure = Figure((10, 6), layout="constrained")
        residency_map(figure, next((each for each in shown if each.policy == "rotary" and each.slots == 70), shown[0]))
        figure.savefig(folder / "residency_map.png", dpi=120)


def hit_rates(axes, source: str, results: Sequence) -> None:
    """One curve per policy; on set B, published points on top."""
    for policy in dict.fromkeys(each.policy for each in results):
        points = sorted((each.slots, each.warm) for each in results if each.policy == policy)
        style = "k--" if policy == "belady" else "-"
        axes.plot(*zip(*points, strict=True), style, label=policy)
    if source == "B":
        for (label, points), marker in zip({**PUBLISHED, "measured, 35B": MEASURED}.items(), "ovs", strict=True):
            axes.plot(points.keys(), points.values(), marker, color="black", fillstyle="none", label=label)
    axes.set(title=f"trace {source}", xlabel="slots per layer", ylabel="hit rate, warm, %", ylim=(0, 100))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def residency_map(figure, result) -> None:
    """Layers by time: the share of a layer's routed experts that were resident, and the slots that the layer has."""
    hits, held = result.replay.hits.mean(axis=2), result.replay.held
    n = len(hits) // BIN * BIN
    pictures = {"hit rate, %": 100 * hits, "slots of the layer": held}
    for axes, (label, values) in zip(figure.subplots(2, 1, sharex=True), pictures.items(), strict=True):
        binned = values[:n].reshape(-1, BIN, values.shape[1]).mean(axis=1)
        low = np.percentile(binned, 2)
        image = axes.imshow(binned.T, aspect="auto", interpolation="nearest", extent=(0, n, values.shape[1], 0), vmin=low)
        figure.colorbar(image, ax=axes, label=label)
        axes.set(ylabel="layer")
    axes.set(xlabel="token")
    figure.suptitle(f"{result.policy}, trace {result.source}, {result.slots} slots per layer: {result.warm:.1f} % warm")
