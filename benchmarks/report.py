"""From pytest-benchmark's JSON to tables: for each shape our time, the peers', the limit; adverse orders."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from .plot import plot_times

OURS = "realm_kernels"
Groups = dict[str, dict[str, dict[str, Any]]]  # by group, then by implementation
Lines = tuple[list[str], list[list[str]]]  # a header and rows, as text


def groups_of(results: dict[str, Any]) -> Groups:
    groups: Groups = defaultdict(dict)
    for entry in results["benchmarks"]:
        groups[entry["group"]][entry["extra_info"]["implementation"]] = entry
    return groups


def median(entry: dict[str, Any]) -> float:
    return entry["stats"]["median"]


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One dictionary a group: group, ours (ms), fraction of the limit, and the ratio of each peer to ours.

    Peers are those of the group and, where it names one with "peers_of", of another group with the same job;
    "compare" names more of ours. Groups of one order of the rows are not among them: see orders_of.
    """
    groups = groups_of(results)
    rows = []
    for group, entries in groups.items():
        if OURS not in entries or "order" in entries[OURS]["extra_info"]:
            continue
        ours, told = median(entries[OURS]), entries[OURS]["extra_info"]
        beside = {**groups.get(told.get("peers_of", ""), {}), **entries}
        beside = {name: entry for name, entry in beside.items() if name != OURS}
        for label, other in told.get("compare", {}).items():
            if OURS in groups.get(other, {}):
                beside[label] = groups[other][OURS]
        row = {"group": group, "ours": ours * 1e3, "limit": told["limit_seconds"] / ours}
        row["ratios"] = {name: median(entry) / ours for name, entry in beside.items()}
        row["recalls"] = {
            name: e["extra_info"]["recall"] for name, e in beside.items() if "recall" in e["extra_info"]
        }
        if "matrix_seconds" in told:
            row["ratios"]["torch mm"] = told["matrix_seconds"] / ours
        rows.append(row)
    return rows


def tables_of(results: dict[str, Any]) -> list[Lines]:
    """One table an op, in whose columns stand its own peers."""
    by_op: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows_of(results):
        by_op[row["group"].split()[0]].append(row)
    return [lines_of(rows) for rows in by_op.values()]


def lines_of(rows: list[dict[str, Any]]) -> Lines:
    """Of rows_of; the recall of an approximate peer stands behind its ratio."""
    peers = sorted({name for row in rows for name in row["ratios"]})

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row["ratios"]:
            return "–"
        recall = f" ({row['recalls'][name]:.3f})" if name in row["recalls"] else ""
        return f"{row['ratios'][name]:.2f}{recall}"

    header = ["shape", "ours, ms", "of the limit", *(f"x {name}" for name in peers)]
    body = [
        [row["group"], f"{row['ours']:.2f}", f"{row['limit']:.0%}", *(cell(row, name) for name in peers)]
        for row in rows
    ]
    return header, body


def orders_of(results: dict[str, Any]) -> Lines:
    """For each order of the rows our time, and that over the time of the same shape in random order."""
    times: dict[str, dict[str, float]] = defaultdict(dict)  # by shape, then by order
    for entry in results["benchmarks"]:
        order = entry["extra_info"].get("order")
        if order is not None:
            times[order["of"]][order["order"]] = median(entry)
    body = [
        [shape, order, f"{seconds * 1e3:.2f}", f"{seconds / of['random']:.2f}" if "random" in of else "–"]
        for shape, of in times.items()
        for order, seconds in of.items()
    ]
    return ["shape", "rows", "ours, ms", "over random"], body


def machine_line(results: dict[str, Any]) -> str:
    machine = results["machine_info"]
    processor = machine["cpu"].get("brand_raw", "unknown processor")
    line = (
        f"{processor}, {machine['threads']} threads; measured limits: "
        f"{machine['read_gigabytes_per_second']:.1f} GB/s read, "
        f"{machine['float32_matrix_gigaflops']:.0f} GFLOP/s float32, "
        f"{machine['bfloat16_matrix_gigaflops']:.0f} GFLOP/s bfloat16"
    )
    alone = {
        kind: machine[f"{kind}_multiply_add_gigaops"]
        for kind in ("float32", "bfloat16", "int8")
        if machine.get(f"{kind}_multiply_add_gigaops")
    }
    if alone:
        line += "; multiply-adds alone: " + ", ".join(
            f"{rate:.0f} Gop/s {kind}" for kind, rate in alone.items()
        )
    settings = sorted(
        {e["extra_info"]["settings"] for e in results["benchmarks"] if "settings" in e["extra_info"]}
    )
    if settings:
        line += f"; ScaNN tuned to {' and '.join(settings)}"
    if machine.get("missing_peers"):
        line += f"; not installed, so left out: {', '.join(machine['missing_peers'])}"
    return line


def plain_of(lines: Lines) -> str:
    """Columns of one width, the first to the left."""
    header, body = lines
    widths = [max(len(line[place]) for line in [header, *body]) for place in range(len(header))]

    def padded(line: list[str]) -> str:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest])

    return "\n".join([padded(header), "  ".join("-" * width for width in widths), *map(padded, body)])


def markdown_of(lines: Lines) -> str:
    header, body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *body]) + "\n"


def write_report(json_path: Path) -> list[Path]:
    """Print the tables and write them beside the JSON as Markdown, with a plot of what it can show."""
    results = json.loads(json_path.read_text())
    tables, orders = tables_of(results), orders_of(results)
    text = machine_line(results) + "\n"
    if tables:
        print("medians; x peer: the peer's time over ours; above 1 ours is faster\n")
    for table in tables:
        print(plain_of(table) + "\n")
        text += "\n" + markdown_of(table)
    if orders[1]:
        print("rows in other orders and of other values\n" + plain_of(orders) + "\n")
        text += "\n" + markdown_of(orders)
    print(machine_line(results))
    path = json_path.with_suffix(".md")
    path.write_text(text)
    return [path, *plot_times(results, json_path.parent)]
