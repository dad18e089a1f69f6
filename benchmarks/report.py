"""From pytest-benchmark's JSON to a table: for each shape our time, the peers' and the limit."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "realm_kernels"


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One dictionary a group: group, ours (ms), fraction of the limit, and the ratio of each peer to ours."""
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for entry in results["benchmarks"]:
        groups[entry["group"]][entry["extra_info"]["implementation"]] = entry
    rows = []
    for group, entries in groups.items():
        if OURS not in entries:
            continue
        ours = entries[OURS]["stats"]["median"]
        ratios = {name: entry["stats"]["median"] / ours for name, entry in entries.items() if name != OURS}
        limit = entries[OURS]["extra_info"]["limit_seconds"]
        rows.append({"group": group, "ours": ours * 1e3, "limit": limit / ours, "ratios": ratios})
    return rows


def lines_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table, as text."""
    rows = rows_of(results)
    peers = sorted({name for row in rows for name in row["ratios"]})
    header = ["shape", "ours, ms", "of the limit", *(f"x {name}" for name in peers)]
    body = [
        [
            row["group"],
            f"{row['ours']:.2f}",
            f"{row['limit']:.0%}",
            *(f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "–" for name in peers),
        ]
        for row in rows
    ]
    return header, body


def machine_line(results: dict[str, Any]) -> str:
    machine = results["machine_info"]
    processor = machine["cpu"].get("brand_raw", "unknown processor")
    return (
        f"{processor}, {machine['threads']} threads; measured limits: "
        f"{machine['read_gigabytes_per_second']:.1f} GB/s read, "
        f"{machine['float32_matrix_gigaflops']:.0f} GFLOP/s float32, "
        f"{machine['bfloat16_matrix_gigaflops']:.0f} GFLOP/s bfloat16"
    )


def write_report(json_path: Path) -> Path:
    """Print the table and write it beside the JSON as Markdown."""
    results = json.loads(json_path.read_text())
    header, body = lines_of(results)
    table = Table(title="medians; x peer: the peer's time over ours; above 1 ours is faster")
    for name in header:
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True)
    for line in body:
        table.add_row(*line)
    console = Console(width=max(Console().width, Console(width=1000).measure(table).maximum))
    console.print(table)
    console.print(machine_line(results))
    markdown = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *body]]
    path = json_path.with_suffix(".md")
    path.write_text(machine_line(results) + "\n\n" + "\n".join(markdown) + "\n")
    return path
