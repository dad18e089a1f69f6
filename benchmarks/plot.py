"""One plot of a search's time against its batch: ours, the best peers, and the limit of the machine."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "realm_kernels"
DTYPES = ["float32", "bfloat16", "int8"]
BEST_PEERS = 3
Curve = dict[int, float]  # milliseconds by B


def curves_of(results: dict[str, Any]) -> dict[tuple[int, int, int], dict[str, dict[str, Curve]]]:
    """By (N, D, k): the curves of "ours" and of the limit by dtype, and those of the peers by name."""
    shapes: dict[tuple[int, int, int], dict[str, dict[str, Curve]]] = defaultdict(
        lambda: {kind: defaultdict(dict) for kind in ("ours", "limit", "peers")}
    )
    for entry in results["benchmarks"]:
        told = entry["extra_info"]
        shape = told.get("shape")
        if shape is None:
            continue
        curves = shapes[shape["N"], shape["D"], shape["k"]]
        milliseconds = entry["stats"]["median"] * 1e3
        if told["implementation"] == OURS:
            curves["ours"][shape["dtype"]][shape["B"]] = milliseconds
            curves["limit"][shape["dtype"]][shape["B"]] = told["limit_seconds"] * 1e3
        else:
            curves["peers"][f"{told['implementation']}, {shape['dtype']}"][shape["B"]] = milliseconds
    return shapes


def best(peers: dict[str, Curve]) -> list[str]:
    """The peers that are quickest at the largest batch, and the quickest at the smallest."""
    largest = max((b for curve in peers.values() for b in curve), default=0)
    by_time = {end: sorted((c[end], name) for name, c in peers.items() if end in c) for end in (1, largest)}
    names = [name for _, name in by_time[1][:1] + by_time[largest][:BEST_PEERS]]
    return list(dict.fromkeys(names))


def plot_times(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write mips_topk.png with a panel for each (N, D, k), log-log; nothing where no shape was measured."""
    shapes = curves_of(results)
    if not shapes:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(shapes), figsize=(4.6 * len(shapes), 4.4), squeeze=False, layout="constrained"
    )
    colours: dict[str, str] = {}
    for axis, ((num_rows, dim, k), curves) in zip(axes[0], shapes.items(), strict=True):
        for dtype, curve in curves["ours"].items():
            colour = f"C{DTYPES.index(dtype)}"
            points = zip(*sorted(curve.items()), strict=True)
            axis.plot(*points, marker="o", color=colour, label=f"ours, {dtype}")
            limit = zip(*sorted(curves["limit"][dtype].items()), strict=True)
            axis.plot(*limit, linestyle="--", linewidth=1, color=colour, label=f"limit, {dtype}")
        for name in best(curves["peers"]):
            colour = colours.setdefault(name, f"C{len(DTYPES) + len(colours)}")  # the same in every panel
            points = zip(*sorted(curves["peers"][name].items()), strict=True)
            axis.plot(*points, marker="x", linewidth=1, alpha=0.7, color=colour, label=name)
        axis.set(xscale="log", yscale="log", xlabel="queries B", title=f"N={num_rows:,}, D={dim}, k={k}")
        batches = sorted({b for curve in curves["ours"].values() for b in curve})
        axis.set_xticks(batches, [str(b) for b in batches])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("milliseconds a search")
    path = folder / "mips_topk.png"
    figure.savefig(path, dpi=75)
    plt.close(figure)
    return [path]
