"""How the Triton backend searches one piece of a table: groups, tiles, slack, query blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .gpu import WORKSPACE_BYTES

MAX_K = 1024  # of a pass: the repair keeps as many 64-bit keys of a query in registers
MAX_SELECTED = (
    2048  # groups of a pass: those of k = 1024 and its slack; twice as many are sorted in registers
)
SORT_KEYS = 2048  # keys a program sorts: sixteen in each of 128 threads
ROUNDOFF = 2.0**-22  # of an addition in a tensor core, which truncates; to be confirmed on a GPU
FILTER_KEYS = 4096  # keys a program filters: sixteen in each of 256 threads
RESCORE_ROWS = 128  # of a program: one a thread
MAX_POSITIONS = 65535 * RESCORE_ROWS  # of a launch: programs along the second axis of a grid
RESCORE_REGISTERS = 128  # of a thread: unset, Triton 3.6 aims for 64 and spills, as 3.9 does at 96
REPAIR_LOOK = 128  # bounds a repair program looks at at once
SORT_KEYS_PER_WARP = SORT_KEYS // 4
SCAN_STAGES = 3  # of the software pipeline: two tiles are in flight while one is worked on
SCAN_CHOICES = dict(
    block_b=(16, 32, 64, 128), warps=(4, 8), stages=(2, 3, 4, 5), programs_per_sm=(1, 2, 3, 4)
)
SHARED_BYTES = 227 << 10  # of a program on sm_90 and sm_100
SHARED_SPARE = 2 << 10  # what the reductions of a scan tile need besides
CODES_SPARE = 16 << 10  # the same where products are integers
SYSTEM_SHARED = 1 << 10  # that each program takes beside its own
ALIGNMENT = 256  # of each array of the workspace, as of a fresh allocation
ARRAYS = 14
CODE_TERMS = 5  # numbers of a query that the scan of codes reads
TF32_ROUNDOFF = 2.0**-10  # of a float32 row in tf32: the tensor core ignores the low 13 bits


@dataclass(frozen=True)
class ScanConfig:
    """How the Triton scan of rk.mips_topk runs: it changes the time of a search, never its result.

    block_b: queries of a tile: 16, 32, 64 or 128. warps: of a program: 4 or 8. stages: tiles of rows in
    flight, and one. programs_per_sm: programs that run at once on a multiprocessor.
    """

    block_b: int
    warps: int
    stages: int
    programs_per_sm: int

    def __post_init__(self) -> None:
        for name, allowed in SCAN_CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"ScanConfig: {name} must be one of {allowed}, got {value!r}")


@dataclass(frozen=True)
class Plan:
    """How one piece is searched. It depends on shapes, dtypes, the workspace and the shared memory."""

    scan_dtype: torch.dtype
    relative: float  # bound of |s~ - q^.x| / (|q^| |x|)
    group: int  # G
    num_groups: int
    selected: int  # groups rescored for a query: m
    top: int  # rows kept of a query: T, k rounded up to a power of two
    batch: int  # queries of a pass over the piece
    block_n: int  # rows of a scan tile
    block_d: int  # columns loaded at once
    repair_parts: int  # programs that share the repair of a query
    scan: ScanConfig
    passes: int = 1  # of up to MAX_K rows each, over one scan
    early: int = 0  # rounds before them that only lower the bounds of groups whose best rows are excluded
    kept: int | None = None  # rows of a query that are read themselves; None: codes are of no use
    staged_bytes: int = 0  # of each of these that is copied from the host

    @property
    def lowers(self) -> bool:
        """Whether bounds are lowered between passes."""
        return self.passes + self.early > 1

    def dim_padded(self, dim: int) -> int:
        return ceil_div(dim, self.block_d) * self.block_d


def plan_for(
    batch: int,
    num_rows: int,
    dim: int,
    k: int,
    num_excluded: int,
    query_dtype: torch.dtype,
    row_dtype: torch.dtype,
    shared_bytes: int = SHARED_BYTES,
    workspace: int = WORKSPACE_BYTES,
    code_group: int | None = None,
    staged_bytes: int = 0,
) -> Plan:
    """The plan for a piece of num_rows > 0 rows. Its constants are reasoned, not measured.

    code_group: rows of a group of the table's codes, where these are scanned. staged_bytes: of a row that is
    copied from the host to be read.
    """
    scan_dtype = _scan_dtype(query_dtype, row_dtype) if code_group is None else torch.int8
    # 256 bytes of a row at once: a tile of 128 columns is 32 KiB in bfloat16 and in float32.
    block_n = 64 if scan_dtype == torch.float32 else 128
    if code_group is not None:
        # Rows of codes are D rounded up to 32 long: whole blocks of them.
        width = ceil_div(dim, 32) * 32
        block_d = min(128, width & -width)
    elif dim % 16 != 0:
        # Unaligned rows pass through registers: no more than fit there.
        block_d = min(power_of_two(dim, 16), 32)
    else:
        block_d = power_of_two(dim, 16) if dim <= 128 else 128 // scan_dtype.itemsize
    block_b = min(power_of_two(batch, 16), 128)
    while block_b > 16 and _shared_bytes(block_b, block_n, block_d, dim, scan_dtype) > shared_bytes:
        block_b //= 2
    in_pass = min(k, MAX_K)
    if code_group is None:
        slack = _slack(in_pass, query_dtype, row_dtype)
    else:
        slack = round(in_pass * (codes_growth(dim, with_query=True) - 1)) + 16
    selected = min(power_of_two(in_pass + num_excluded + slack, 2), MAX_SELECTED)
    passes = ceil_div(k, MAX_K)
    # A round takes the groups of so many excluded rows out of the way, beside those that are needed.
    beyond = MAX_SELECTED - min(in_pass + slack, MAX_SELECTED * 3 // 4)
    early = max(0, ceil_div(num_excluded, beyond) - 1)
    if code_group is None:
        group = _group_rows(batch, num_rows, dim * row_dtype.itemsize, selected, block_n, workspace)
    else:
        group = code_group
    num_groups = ceil_div(num_rows, group)
    kept = None
    if code_group is not None and passes == 1 and in_pass + num_excluded + slack <= MAX_SELECTED:
        kept = min(power_of_two(round(in_pass * codes_growth(dim, with_query=False)) + 16, 2), SORT_KEYS)
        kept = max(kept, power_of_two(in_pass, 2))
    plan = Plan(
        scan_dtype=scan_dtype,
        relative=0.0 if code_group is not None else _relative_error(dim, row_dtype),
        group=group,
        num_groups=num_groups,
        selected=min(selected, power_of_two(num_groups, 2)),
        top=power_of_two(in_pass, 2),
        batch=batch,
        block_n=max(block_n, group),
        block_d=block_d,
        # A few flagged queries should still spread over the device, each program with bounds to look at.
        repair_parts=min(max(16, min(256, 4096 // batch)), ceil_div(num_groups, REPAIR_LOOK)),
        scan=ScanConfig(
            block_b=block_b,
            warps=scan_warps(block_b),
            stages=SCAN_STAGES,
            programs_per_sm=_programs_per_sm(
                block_b, _shared_bytes(block_b, block_n, block_d, dim, scan_dtype), shared_bytes
            ),
        ),
        passes=passes,
        early=early,
        kept=kept,
        staged_bytes=staged_bytes,
    )
    return fit_batch(plan, dim, workspace)


def scores_all(plan: Plan, num_rows: int) -> bool:
    """Whether to score every row once: where the passes together would rescore as many."""
    return plan.lowers and (plan.passes + plan.early) * plan.selected * plan.group >= num_rows


def codes_growth(dim: int, with_query: bool) -> float:
    """How many times k groups, or rows, the bound of int8 codes cannot exclude, were elements normal.

    The step is 4.5 standard deviations of an element / 127, so the bound of a row's residual is 0.01 sqrt(D)
    of those of a score, and with a query's nearly twice that. In the tail of a normal distribution, 4.5
    standard deviations out, there are exp(4.5 * bound) times as many rows so much lower. Measured at D = 128:
    16 to 26 groups for k = 8 and 179 to 203 for k = 100.
    """
    return math.exp(4.5 * 0.01 * math.sqrt(dim) * (1.6 if with_query else 1.0))


def _shared_bytes(block_b: int, block_n: int, block_d: int, dim: int, scan_dtype: torch.dtype) -> int:
    """Shared memory of a scan program. Queries stay there where D fits one block, else stream."""
    buffers = SCAN_STAGES - 1
    query_buffers = 1 if dim <= block_d else buffers
    # Sixteen columns of ones give the norms of rows; integer products pass through to become maxima.
    more = 16 * block_d * scan_dtype.itemsize if scan_dtype != torch.int8 else CODES_SPARE
    return scan_dtype.itemsize * block_d * (query_buffers * block_b + buffers * block_n) + more + SHARED_SPARE


def _programs_per_sm(block_b: int, scan_shared: int, shared_bytes: int) -> int:
    """Scan programs that fit beside each other: more warps hide what a tile waits for. Not more than fit,
    as their tiles are dealt out evenly."""
    by_registers = 16 // scan_warps(block_b)  # of 128 a thread
    return max(1, min(by_registers, (shared_bytes + SYSTEM_SHARED) // (scan_shared + SYSTEM_SHARED)))


def fit_batch(plan: Plan, dim: int, workspace: int) -> Plan:
    """The plan with as many queries a pass as fit the workspace: whole scan tiles, if one fits."""
    fixed, a_query = _bytes(plan, dim)
    batch = max(1, min(plan.batch, (workspace - fixed) // a_query))
    if batch > plan.scan.block_b:
        batch -= batch % plan.scan.block_b
    return replace(plan, batch=batch)


def workspace_bytes(plan: Plan, dim: int) -> int:
    fixed, a_query = _bytes(plan, dim)
    return fixed + plan.batch * a_query


def _bytes(plan: Plan, dim: int) -> tuple[int, int]:
    """Bytes whatever the number of queries, and bytes of a query."""
    fixed = 4 * plan.num_groups + ARRAYS * ALIGNMENT
    scanned = plan.scan_dtype.itemsize * plan.dim_padded(dim)
    slope_and_offset, left_out_and_kth, flag = 4 + 4, 8 + 8, 4
    ceiling, terms, staged = 8, 4 * CODE_TERMS, plan.staged_bytes * (plan.kept or 0)
    maxima, keys = 4 * plan.num_groups, 8 * (sum(scratch_widths(plan)) + sum(held_widths(plan)))
    return (
        fixed,
        scanned + slope_and_offset + left_out_and_kth + flag + ceiling + terms + staged + maxima + keys,
    )


def scratch_widths(plan: Plan) -> tuple[int, int]:
    """Keys of a query in the two buffers that the launches from select to repair write in turn."""
    part, keep = select_part(plan.num_groups, plan.selected)
    widths = rounds(ceil_div(plan.num_groups, part) * keep, plan.selected, to_one_list=True)
    scored = plan.selected * plan.group
    if plan.kept is not None:
        widths += rounds(scored, plan.kept, to_one_list=True)
        scored = min(scored, plan.kept)
    rescore = rounds(scored, plan.top)
    # Where bounds are lowered the scores have an array of their own, which outlives the selection.
    widths += rescore[1:] if plan.lowers else rescore
    widths += rounds(plan.repair_parts * plan.top, plan.top)
    return max(widths[::2]), max(widths[1::2])


def held_widths(plan: Plan) -> tuple[int, int]:
    """Keys of a query that are kept until bounds are lowered: groups selected, rows scored."""
    return (plan.selected, plan.selected * plan.group) if plan.lowers else (0, 0)


def rounds(width: int, top: int, to_one_list: bool = False) -> list[int]:
    """Widths of a tournament's arrays: rounds keep `top` keys of each part until one part is left.

    That part is yet to be sorted; with to_one_list it has been.
    """
    widths = [width]
    while widths[-1] > (top if to_one_list else sort_keys(widths[-1], top)):
        widths.append(parts(widths[-1], top) * top)
    return widths


def select_part(num_groups: int, selected: int) -> tuple[int, int]:
    """Groups a select program reads and keys it keeps: it filters where several would have to sort.

    A filter has bins for twice the keys it keeps, and needs a few groups in each to be worth it.
    """
    if num_groups > SORT_KEYS and 8 * selected <= FILTER_KEYS:
        return FILTER_KEYS, 2 * selected
    return sort_keys(num_groups, selected), selected


def parts(width: int, top: int) -> int:
    return ceil_div(width, sort_keys(width, top))


def sort_keys(width: int, top: int) -> int:
    """Keys a program sorts to keep `top` of them: enough that a round at least halves what is left."""
    return min(max(SORT_KEYS, 2 * top), power_of_two(width, top))


def _scan_dtype(query_dtype: torch.dtype, row_dtype: torch.dtype) -> torch.dtype:
    """bfloat16 rows are scanned as they are, and so are float16 rows by float16 queries; all else in tf32.

    Other queries over float16 rows could overflow in float16; tf32 holds both half precisions exactly.
    """
    if row_dtype == torch.bfloat16 or row_dtype == query_dtype == torch.float16:
        return row_dtype
    return torch.float32


def _terms(dim: int) -> float:
    return ROUNDOFF * (dim + ceil_div(dim, 8) + 4)


def _relative_error(dim: int, row_dtype: torch.dtype) -> float:
    """Bound of |s~ - q^.x| / (|q^| |x|): D products and D/8 partial sums, each truncated once (README.md)."""
    terms = _terms(dim)
    if terms >= 0.5:
        return 2.0**100  # no useful bound: every group is rescored
    rounding = TF32_ROUNDOFF if row_dtype == torch.float32 else 0.0
    return (rounding + (1 + rounding) * terms / (1 - terms)) * (1 + 2.0**-20)  # passed as float32


def _slack(k: int, query_dtype: torch.dtype, row_dtype: torch.dtype) -> int:
    """Groups beyond k: k hold every row that may be returned, were U exact; the slack is for its error."""
    is_exact = query_dtype == row_dtype and row_dtype != torch.float32
    # Unrounded operands leave an error of a few ulp: one or two groups. Rounded ones leave up to 2 % of a
    # standard deviation: in the tail of a normal distribution up to 20 % more groups; half, for other tails.
    return 4 + k // 8 if is_exact else 8 + k // 2


def _group_rows(
    batch: int, num_rows: int, row_bytes: int, selected: int, block_n: int, workspace: int
) -> int:
    """Balance writing and reading a query's maxima, 8 N / G bytes, against reading m G rows to rescore.

    The design's sqrt(8 N / 2 k D) with the m groups that are really rescored, to the nearest power of two;
    larger where the maxima of a scan tile of 128 queries would not fit half of the workspace.
    """
    group = 1 << max(4, round(math.log2(8 * num_rows / (selected * row_bytes)) / 2))
    while 4 * ceil_div(num_rows, group) * min(batch, 128) > workspace // 2:
        group *= 2
    return min(group, block_n)


def sort_warps(keys: int) -> int:
    return max(1, min(16, keys // SORT_KEYS_PER_WARP))


def sort_registers(keys: int) -> int | None:
    """Of a thread, where it has sixteen keys: unset, Triton 3.9 aims for 128 and spills eight bytes."""
    return 168 if keys > SORT_KEYS else None


def repair_warps(top: int) -> int:
    """Eight keys a thread of the list it keeps, beside the rows it scores."""
    return max(4, sort_warps(2 * top) * 2)


def repair_registers(top: int) -> int:
    """Of a thread: enough not to spill, and three programs of the usual four warps side by side."""
    return min(168, 65536 // (32 * repair_warps(top)))


def scan_warps(block_b: int) -> int:
    """Warps of 16 query rows; wgmma wants them in fours."""
    return 8 if block_b == 128 else 4


def float32_error(dim: int) -> float:
    """What a float32 sum of D products may lose of the norms, in any order, and as much for safety."""
    return (dim + 8) * 2.0**-23


def float64_error(dim: int) -> float:
    """The same of a float64 sum, the canonical one among them; more, as it is passed as float32."""
    return (dim + 8) * 2.0**-50


def norm_scale(dim: int) -> float:
    """1 + the relative error of the root of D squares, at worst in bfloat16, of numbers rounded to it.

    (1 - 3 * 2^-9)^(-1/2) < 1 + 2^-8, and (1 - t)^(-1/2) <= 1 + t for what the sum may lose.
    """
    terms = _terms(dim)
    return 2.0**100 if terms >= 0.5 else (1 + 2.0**-8) * (1 + terms)


def power_of_two(at_least: int, lowest: int) -> int:
    return max(lowest, 1 << (at_least - 1).bit_length() if at_least > 1 else 1)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
