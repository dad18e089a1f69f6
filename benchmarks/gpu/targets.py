"""What was promised, held against what was measured: the worst case of each promise, and where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..report import Groups, groups_of, median
from .mips_topk import WIKIPEDIA
from .rows import OURS

Case = tuple[float, str]  # a value and the shape it was measured at


@dataclass(frozen=True)
class Promise:
    """Of the cases found in the results, each at least (or, with at_most, at most) `bound`."""

    told: str
    cases: Callable[[Groups], Iterator[Case]]
    bound: float
    at_most: bool = False

    def line(self, groups: Groups) -> list[str]:
        found = list(self.cases(groups))
        if not found:
            return [self.told, "–", "not measured", ""]
        worst, where = (max if self.at_most else min)(found)
        kept = worst <= self.bound if self.at_most else worst >= self.bound
        return [self.told, f"{worst:.2f}", "kept" if kept else "NOT kept", f"{where}, of {len(found)}"]


def ours(groups: Groups, op: str, /, **shape: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(our entry, its group) of an op in every random shape that agrees with `shape`."""
    for name, group in groups.items():
        if OURS in group and name.split()[0] == op:
            told = group[OURS]["extra_info"]
            if "order" not in told and told.get("shape", {}).items() >= shape.items():
                yield group[OURS], group


def share_of_limit(batches: Callable[[int], bool]) -> Callable[[Groups], Iterator[Case]]:
    def cases(groups: Groups) -> Iterator[Case]:
        for entry, _ in ours(groups, "mips_topk", N=WIKIPEDIA, dtype="bfloat16"):
            if batches(entry["extra_info"]["shape"]["B"]):
                yield entry["extra_info"]["limit_seconds"] / median(entry), entry["group"]

    return cases


def over_another(**other: Any) -> Callable[[Groups], Iterator[Case]]:
    """Our time in the shape that differs by `other` over ours, in bfloat16 at k = 8."""

    def cases(groups: Groups) -> Iterator[Case]:
        for entry, _ in ours(groups, "mips_topk", N=WIKIPEDIA, dtype="bfloat16", k=8):
            shape = entry["extra_info"]["shape"] | other
            for changed, _ in ours(groups, "mips_topk", **shape):
                yield median(changed) / median(entry), changed["group"]

    return cases


def bfloat16_over_int8(groups: Groups) -> Iterator[Case]:
    for ratio, where in over_another(dtype="int8")(groups):
        yield 1 / ratio, where


def over_peers(op: str, wanted: Callable[[str], bool], **shape: Any) -> Callable[[Groups], Iterator[Case]]:
    """The best of the wanted peers' times over ours."""

    def cases(groups: Groups) -> Iterator[Case]:
        for entry, group in ours(groups, op, **shape):
            times = [
                median(peer)
                for name, peer in group.items()
                if name.split()[0] not in (OURS, "ours") and wanted(name)
            ]
            if times:
                yield min(times) / median(entry), entry["group"]

    return cases


def extra_mebibytes(op: str, within: str = "") -> Callable[[Groups], Iterator[Case]]:
    def cases(groups: Groups) -> Iterator[Case]:
        for entry, _ in ours(groups, op):
            if within in entry["group"] and "extra_bytes" in entry["extra_info"]:
                yield entry["extra_info"]["extra_bytes"] / 2**20, entry["group"]

    return cases


LINEAR = "linear_marginal_loss"
PROMISES = (
    Promise("B <= 64: share of the memory limit", share_of_limit(lambda b: b <= 64), 0.80),
    Promise("B >= 256: share of the matrix limit", share_of_limit(lambda b: b >= 256), 0.55),
    Promise("bfloat16's time over int8's", bfloat16_over_int8, 1.4),
    Promise("time of k = 100 over k = 8", over_another(k=100), 1.3, at_most=True),
    Promise(
        "B = 512: torch's time over ours",
        over_peers("mips_topk", lambda p: p == "torch", N=WIKIPEDIA, B=512),
        5.0,
    ),
    Promise(
        "B = 512: the best other peer's",
        over_peers("mips_topk", lambda p: p != "torch", N=WIKIPEDIA, B=512),
        2.0,
    ),
    Promise("any shape: torch's time over ours", over_peers("mips_topk", lambda p: p == "torch"), 1.0),
    Promise("extra memory of a search, MiB", extra_mebibytes("mips_topk"), 256.0, at_most=True),
    Promise(
        "linear loss: torch.compile's time over ours", over_peers(LINEAR, lambda p: p == "torch.compile"), 2.0
    ),
    Promise(
        "linear loss: the better of Liger and CCE",
        over_peers(LINEAR, lambda p: p in ("Liger", "Apple CCE")),
        1.5,
    ),
    Promise("linear loss: extra memory, MiB", extra_mebibytes(LINEAR, "bfloat16"), 300.0, at_most=True),
)


def promises_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    groups = groups_of(results)
    return ["promise", "worst", "", "where"], [promise.line(groups) for promise in PROMISES]
