"""What is printed last and written as Markdown and JSON: the parts, the speeds, what was left out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report import Lines, markdown_of, orders_of, plain_of, rows_of
from .processes import Outcome
from .rows import OURS
from .sanitize import Finding
from .targets import promises_of
from .tests import Verdict, skip_reasons

SHOWN_PROBLEMS = 10
# Of the table that is printed: the shapes that the targets are about. The files have all.
HEADLINES = ("N=13353718", "linear_marginal_loss bfloat16")


@dataclass
class Summary:
    """Filled part by part; written after each, so that what is stopped leaves what it had."""

    device: dict[str, Any]
    out: Path
    build: Outcome | None = None
    tests: dict[str, Verdict] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        wrong = [why for why in self.results.get("left_out", {}).values() if "answer differs" in why]
        return (
            (self.build is None or self.build.ok)
            and all(verdict.is_green for verdict in self.tests.values())
            and all(finding.ok for finding in self.findings)
            and not wrong
        )

    def write(self) -> None:
        told = {
            "gpu": self.device,
            "seconds": self.seconds,
            "build": None if self.build is None else str(self.build),
            "tests": {op: vars(verdict) for op, verdict in self.tests.items()},
            "sanitizers": {
                finding.tool: {"ok": finding.ok, "said": finding.said} for finding in self.findings
            },
        }
        (self.out / "summary.json").write_text(json.dumps(told, indent=1))
        (self.out / "summary.md").write_text(self.markdown())

    def parts(self) -> list[str]:
        """A line a part."""
        capability = ".".join(map(str, self.device["capability"]))
        lines = [
            f"{self.device['name']}, compute capability {capability}, torch {self.device['torch']},"
            f" triton {self.device['triton']}"
        ]
        limits = self.results.get("machine_info", {}).get("limits", {})
        if limits:
            lines.append("measured limits: " + ", ".join(f"{name} {x:.0f}" for name, x in limits.items()))
        if self.build is not None:
            lines.append(f"build: {self.build}")
        for op, verdict in self.tests.items():
            lines.append(f"tests of {op}: {verdict}")
            lines += [f"  {problem}" for problem in verdict.problems[:SHOWN_PROBLEMS]]
        lines += [f"skipped, {count} x: {why}" for why, count in skip_reasons(self.tests).most_common(5)]
        lines += [f"sanitizer {'clean' if f.ok else 'NOT CLEAN'}: {f}" for f in self.findings]
        if self.results:
            missing = self.results["machine_info"]["missing_peers"]
            if missing:
                lines.append(f"not installed, so left out: {', '.join(missing)}")
            left_out = Counter(self.results["left_out"].values())
            lines += [f"left out, {count} rows: {why}" for why, count in left_out.most_common(8)]
        if self.seconds:
            lines.append("seconds: " + ", ".join(f"{part} {s:.0f}" for part, s in self.seconds.items()))
        return lines

    def text(self) -> str:
        """The short table, last of what is printed."""
        blocks = []
        if self.results:
            header, body = speeds_of(self.results)
            chosen = [line for line in body if any(headline in line[0] for headline in HEADLINES)]
            if chosen or body:
                blocks.append(plain_of((header, chosen or body)))
                blocks.append(plain_of(promises_of(self.results)))
        return "\n\n".join([*blocks, "\n".join(self.parts()), f"all of it: {self.out}"])

    def markdown(self) -> str:
        blocks = ["\n".join(f"- {line}" for line in self.parts())]
        if self.results:
            tables = promises_of(self.results), speeds_of(self.results), orders_of(self.results)
            blocks += [markdown_of(table) for table in tables]
            left_out = self.results["left_out"].items()
            blocks.append(
                markdown_of((["left out", "why"], [[name.replace("|", "/"), why] for name, why in left_out]))
            )
        return "\n\n".join(blocks) + "\n"


def speeds_of(results: dict[str, Any]) -> Lines:
    """A line a shape: ours with its share of the limit, replayed in a graph, extra memory, repairs; peers."""
    rows = rows_of(results)
    told = {
        e["group"]: e["extra_info"]
        for e in results["benchmarks"]
        if e["extra_info"]["implementation"] == OURS
    }
    peers = sorted({name for row in rows for name in row["ratios"]})
    header = ["shape", "ours, ms", "of the limit", "replayed, ms", "extra MiB", "repairs"]
    header += [f"x {name}" for name in peers]
    body = []
    for row in rows:
        ours = told[row["group"]]
        replayed = f"{ours['replay_seconds'] * 1e3:.3f}" if "replay_seconds" in ours else "–"
        line = [row["group"], f"{row['ours']:.3f}", f"{row['limit']:.0%}", replayed]
        line += [f"{ours['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in ours else "–"]
        line += [str(ours["repairs"]) if "repairs" in ours else "–"]
        line += [f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "–" for name in peers]
        body.append(line)
    return header, body
