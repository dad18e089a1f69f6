"""The cases of test_triton_compile.py: every Triton kernel, with what its launches choose.

To add a kernel, add its cases to CASES.
"""

from dataclasses import dataclass

from realm_kernels.linear_marginal_loss import triton as linear
from realm_kernels.marginal_loss.triton import REDUCE_BLOCK
from realm_kernels.marginal_loss.triton import tile as tile_of
from realm_kernels.mips_topk.triton_plan import (
    RESCORE_REGISTERS,
    repair_registers,
    repair_warps,
    scan_warps,
    sort_registers,
    sort_warps,
)
from realm_kernels.score_spans.triton import tile as score_tile
from realm_kernels.span_marginal_loss.triton import span_tile

# Every kernel compiles for each, in processes side by side; variants of a kernel for one.
ARCHITECTURES = (80, 90, 100)
HOPPER = (90,)


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel.

    arguments: by name a type ("*bf16", "i32", "i32:16" for a multiple of 16), or const(value) for a constexpr
    and for an integer that is 1. matrix: the matrix instruction meant, by architecture.
    """

    name: str
    kernel: str  # "module:function"
    arguments: dict
    warps: int = 4
    registers: int | None = None  # of a thread, where a launch limits them
    matrix: dict | None = None
    architectures: tuple = ARCHITECTURES


def const(value):
    return ["constant", value]


def consts(**values):
    return {name: const(value) for name, value in values.items()}


# What the PTX of a matrix instruction calls the operands that a case is named for.
OPERANDS = {"bf16": ("bf16", "kind::f16"), "tf32": ("tf32", "kind::tf32"), "int8": ("s8", "kind::i8")}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Triton 3.6 has no integer tcgen05.
INTEGERS = TENSOR_CORES | {100: "mma"}
MIPS_MODULES = dict(prepare="scan", scan="scan", select="select", shrink="select", finish="select")
MIPS_MODULES |= dict(rescore="rescore", repair="rescore", bound="select", lower="select", gather="gather")
MIPS_MODULES |= dict(prepare_codes="codes", scan_codes="codes", refine="codes")


def mips(name, arguments, variant="", warps=4, registers=None, matrix=None, on=ARCHITECTURES, **constants):
    kernel = f"realm_kernels.mips_topk.triton_{MIPS_MODULES[name]}:{name}_kernel"
    arguments = arguments | consts(**constants)
    return Case(f"mips_topk {name} {variant}".rstrip(), kernel, arguments, warps, registers, matrix, on)


def scan(
    name, queries, rows, block_b, block_n, block_d, dim, group, mask=False, matrix=None, on=ARCHITECTURES
):
    arguments = dict(
        scanned="*" + queries,
        rows="*" + rows,
        row_mask="*i1" if mask else const(None),
        group_max="*fp32",
        group_norm="*fp32",
        **dict.fromkeys(("num_queries", "num_rows", "num_groups"), "i32"),
        stride_row="i32:16" if dim % 16 == 0 else "i32",
        stride_mask=const(1),
        norm_scale="fp32",
    )
    padded = -(-dim // block_d) * block_d
    arguments |= consts(
        stride_d=1, DIM=dim, D_PADDED=padded, BLOCK_B=block_b, BLOCK_N=block_n, BLOCK_D=block_d
    )
    arguments |= consts(GROUP=group, HAS_MASK=mask, UPCAST=False, STAGES=3)
    return mips("scan", arguments, name, scan_warps(block_b), matrix=matrix, on=on)


def scan_codes(name, block_b, block_d, dim, group=128, mask=False, matrix=None, on=ARCHITECTURES):
    arguments = dict(scanned="*i8", terms="*fp32", codes="*i8", bounds="*fp32", group_max="*fp32")
    arguments |= dict(row_mask="*i1" if mask else const(None), stride_row="i32:16", stride_mask=const(1))
    arguments |= dict.fromkeys(("num_queries", "num_rows", "num_groups"), "i32")
    arguments |= consts(D_PADDED=dim, BLOCK_B=block_b, BLOCK_N=128, BLOCK_D=block_d, GROUP=group)
    arguments |= consts(HAS_MASK=mask, STAGES=3)
    return mips("scan_codes", arguments, name, scan_warps(block_b), matrix=matrix, on=on)


PREPARE = dict(queries="*fp32", scanned="*bf16", slope="*fp32", offset="*fp32", left_out="*i64")
PREPARE |= dict(stride_b="i32:16", relative="fp32")
BOUNDS = dict(group_max="*fp32", group_norm="*fp32", slope="*fp32", offset="*fp32", num_groups="i32")
U_ALONE = dict(group_max="*fp32", num_groups="i32") | consts(group_norm=None, slope=None, offset=None)
SELECT = dict(best="*i64", left_out="*i64", ceiling=const(None))
LOWER = dict(
    keys="*i64", selected="*i64", ceiling="*i64", group_max="*fp32", num_groups="i32", num_slots="i32"
)
SHRINK = dict(keys="*i64", best="*i64", left_out="*i64", flags="*i32", num_keys="i32")
FINISH = dict(keys="*i64", left_out="*i64", flags="*i32", kth="*i64", repairs="*i64", scores="*fp32")
FINISH |= dict(indices="*i64", num_keys="i32", first_row="i64", k="i32", stride_out="i32")
GATHER = dict(
    queries="*bf16", rows="*bf16", row_mask=const(None), exclude="*i64", num_rows="i32", first_row="i64"
)
GATHER |= dict(num_excluded="i32", stride_query_b="i32:16", stride_row="i32:16", stride_exclude_b="i32")
GATHER |= consts(stride_query_d=1, stride_d=1, stride_mask=1, stride_exclude=1, DIM=128, HAS_MASK=False)
RESCORE = GATHER | dict(selected="*i64", keys="*i64", num_positions="i32", first_position="i32")
RESCORE |= consts(ceiling=None, STAGED=False)
REPAIR = (
    GATHER | BOUNDS | dict(flags="*i32", kth="*i64", best="*i64", num_queries="i32", float32_error="fp32")
)
REPAIR |= consts(ceiling=None, terms=None, codes=None, bounds=None, stride_code=0, BLOCK_D=1)
CODES = dict(terms="*fp32", codes="*i8", bounds="*fp32", num_queries="i32", stride_code="i32:16")
CODES |= dict(float32_error="fp32", BLOCK_D=const(32))
REFINE = {
    name: kind for name, kind in GATHER.items() if name not in ("rows", "stride_row", "stride_d")
} | CODES
REFINE |= dict(selected="*i64", keys="*i64", num_positions="i32")
PREPARE_CODES = dict(queries="*fp32", mean="*fp32", scanned="*i8", terms="*fp32", left_out="*i64")
PREPARE_CODES |= dict(num_queries="i32", stride_b="i32:16", float64_error="fp32")
ROWS_BY_ID = dict(rows="*bf16", indices="*i64", gathered="*bf16", num_rows="i32", first_row="i64")
ROWS_BY_ID |= dict(stride_row="i32:16")

MASKED = {"row_mask": "*i1", "HAS_MASK": const(True)}


# The constants are those of triton_plan.py for D = 128 and k = 8, 100 and 1024.
MIPS_TOPK = [
    scan("bf16 B=128 D=128", "bf16", "bf16", 128, 128, 128, 128, 128, matrix=TENSOR_CORES),
    scan(
        "bf16 B=64 masked", "bf16", "bf16", 64, 128, 128, 128, 16, mask=True, matrix=TENSOR_CORES, on=HOPPER
    ),
    scan("bf16 B=16 D=128", "bf16", "bf16", 16, 128, 128, 128, 128, on=HOPPER),
    scan("bf16 B=128 D=100", "bf16", "bf16", 128, 128, 32, 100, 128, on=HOPPER),
    scan("bf16 B=128 D=768", "bf16", "bf16", 128, 128, 64, 768, 128, matrix=TENSOR_CORES),
    scan("tf32 B=128 D=128", "fp32", "fp32", 128, 64, 128, 128, 64, matrix=TENSOR_CORES),
    scan("tf32 over f16 rows", "fp32", "fp16", 128, 64, 128, 128, 64, on=HOPPER),
    mips("prepare", PREPARE, warps=1, stride_d=1, DIM=128, D_PADDED=128, BLOCK_D=128),
    scan_codes("B=128 D=128", 128, 128, 128, matrix=INTEGERS),
    scan_codes("B=64 masked", 64, 128, 128, group=32, mask=True, matrix=INTEGERS, on=HOPPER),
    scan_codes("B=16 D=128", 16, 128, 128, on=HOPPER),
    scan_codes("B=128 D=768", 128, 128, 768, matrix=INTEGERS),
    mips("prepare_codes", PREPARE_CODES, warps=1, stride_d=1, DIM=128, D_PADDED=128, BLOCK_D=128),
    mips("refine", REFINE, GROUP=128, BLOCK_R=128),
    mips("bound", BOUNDS, PART=1024),
    mips("lower", LOWER, SLOTS=8, GROUP=128),
    mips("gather", ROWS_BY_ID, warps=1, stride_d=1, DIM=128, BLOCK_D=128),
    mips(
        "select",
        SELECT | BOUNDS,
        "sorts",
        on=HOPPER,
        warps=sort_warps(512),
        PART=512,
        TOP=16,
        KEEP=16,
        GROUP=128,
    ),
    mips(
        "select",
        SELECT | BOUNDS,
        "filters",
        warps=sort_warps(4096),
        registers=sort_registers(4096),
        PART=4096,
        TOP=128,
        KEEP=256,
        GROUP=128,
    ),
    mips(
        "select",
        SELECT | U_ALONE | dict(ceiling="*i64"),
        "of a pass",
        on=HOPPER,
        warps=sort_warps(4096),
        registers=sort_registers(4096),
        PART=4096,
        TOP=2048,
        KEEP=2048,
        GROUP=64,
    ),
    mips(
        "shrink",
        SHRINK,
        "k=100",
        warps=sort_warps(512),
        PART=512,
        TOP=128,
        NOTE=True,
        ONLY_FLAGGED=True,
        GROUP=128,
    ),
    mips("rescore", RESCORE, registers=RESCORE_REGISTERS, GROUP=128, BLOCK_R=128, SELECTED=True),
    mips(
        "rescore",
        RESCORE | MASKED,
        "all",
        registers=RESCORE_REGISTERS,
        selected=None,
        GROUP=1,
        BLOCK_R=128,
        SELECTED=False,
    ),
    mips("finish", FINISH, "k=8", warps=sort_warps(2048), PART=2048, TOP=16, REPAIRED=False),
    mips(
        "finish",
        FINISH,
        "repaired",
        on=HOPPER,
        warps=sort_warps(512),
        PART=512,
        TOP=16,
        REPAIRED=True,
    ),
    mips(
        "repair",
        REPAIR,
        "k=8",
        warps=repair_warps(16),
        registers=repair_registers(16),
        GROUP=128,
        PART=128,
        TOP=16,
    ),
    mips(
        "repair",
        REPAIR | U_ALONE | CODES,
        "codes",
        on=HOPPER,
        warps=repair_warps(128),
        registers=repair_registers(128),
        GROUP=128,
        PART=128,
        TOP=128,
    ),
    mips(
        "rescore",
        RESCORE | dict(ceiling="*i64"),
        "staged",
        on=HOPPER,
        registers=RESCORE_REGISTERS,
        GROUP=1,
        BLOCK_R=128,
        SELECTED=True,
        STAGED=True,
    ),
    mips(
        "repair",
        REPAIR,
        "k=1024",
        on=HOPPER,
        warps=repair_warps(1024),
        registers=repair_registers(1024),
        GROUP=16,
        PART=128,
        TOP=1024,
    ),
]

MARGINAL = dict(scores="*fp32", log_weight="*fp32", token_mask="*u8", doc_mask="*u8")
MARGINAL |= dict(K="i32", M="i32", stride_b="i32", stride_k="i32", stride_m=const(1))
MARGINAL_FORWARD = MARGINAL | dict(loss="*fp64", count="*i64")
MARGINAL_BACKWARD = MARGINAL | dict(d_loss="*fp32", divisor="*i64", d_scores="*fp32", REDUCED=const(True))
MARGINAL_REDUCE = dict(losses="*fp64", counts="*i64", loss="*fp32", count="*i64", B="i32")


def marginal(name, documents, tokens, per_token, dtype="*fp32", on=ARCHITECTURES, **absent):
    """marginal_loss with the tiles that its launches choose for K documents and M tokens."""
    tile = tile_of(documents, tokens)
    warps, registers = tile.pop("num_warps"), tile.pop("maxnreg")
    arguments = MARGINAL_FORWARD if name == "fwd" else MARGINAL_BACKWARD | dict(d_log_likelihood=dtype)
    arguments = arguments | dict(log_likelihood=dtype) | consts(PER_TOKEN=per_token, **tile, **absent)
    title = f"marginal_loss {name} {'token' if per_token else 'sequence'} K={documents}"
    if absent:
        title += " bare"
    return Case(title, f"{LOSS}{name}_kernel", arguments, warps, registers, architectures=on)


BARE = dict(log_weight=None, token_mask=None, doc_mask=None)
LOSS = "realm_kernels.marginal_loss.triton_kernels:marginal_loss_"
MARGINAL_LOSS = [
    marginal("fwd", 8, 20, per_token=True),
    marginal("fwd", 8, 20, per_token=False, on=HOPPER),
    marginal("fwd", 8, 20, per_token=False, on=HOPPER, **BARE),
    marginal("fwd", 1, 1, per_token=True, on=HOPPER, **BARE, K=1, M=1, stride_k=1),
    marginal("bwd", 8, 20, per_token=True, on=HOPPER, **BARE, divisor=None, d_log_likelihood=None),
    marginal("bwd", 8, 20, per_token=False, on=HOPPER, **BARE, divisor=None, d_scores=None),
    marginal("fwd", 5000, 4, per_token=True, dtype="*fp64", on=HOPPER),
    marginal("bwd", 64, 64, per_token=True, dtype="*bf16"),
    marginal("bwd", 1000, 4, per_token=False),
    marginal("bwd", 5000, 4, per_token=False, dtype="*fp16", on=HOPPER),
    Case(
        "marginal_loss reduce",
        LOSS + "reduce_kernel",
        MARGINAL_REDUCE | consts(MEAN=True, BLOCK_B=REDUCE_BLOCK),
    ),
]

SPAN = dict(span_scores="*fp32", correct="*u8", valid="*u8", kept="*fp64", R="i32", C="i32")
SPAN_EVIDENCE = SPAN | dict(scores="*fp32", log_weight="*fp32", doc_mask="*u8", relevance="*fp64")
SPAN_EVIDENCE |= dict(log_likelihood="*fp64", has_correct="*i32")
SPAN_FORWARD = dict(relevance="*fp64", log_likelihood="*fp64", has_correct="*i32", kept="*fp64")
SPAN_FORWARD |= dict(loss="*fp64", count="*i64", R="i32", K="i32")
SPAN_BACKWARD = SPAN | dict(d_loss="*fp32", divisor="*i64", d_scores="*fp32", K="i32")


def spans(name, number, is_global, dtype="*fp32", on=ARCHITECTURES, **absent):
    """span_marginal_loss over C = number spans, or K = number documents in its forward over examples."""
    tile = tile_of(number, 1) if name == "marginal_loss_fwd" else span_tile(number)
    warps, registers = tile.pop("num_warps"), tile.pop("maxnreg")
    if name == "marginal_loss_fwd":
        arguments = SPAN_FORWARD | consts(**tile)
    elif name == "evidence":
        end = -(-number // tile["BLOCK_C"]) * tile["BLOCK_C"]
        arguments = SPAN_EVIDENCE | dict(span_scores=dtype) | consts(GLOBAL=is_global, C_END=end, **tile)
    else:
        arguments = SPAN_BACKWARD | dict(span_scores=dtype, d_span_scores=dtype)
        arguments |= consts(GLOBAL=is_global, REDUCED=True, **tile)
    title = f"span {name} {'global' if is_global else 'document'} {number}"
    kernel = f"realm_kernels.span_marginal_loss.triton_kernels:span_{name}_kernel"
    return Case(title, kernel, arguments | consts(**absent), warps, registers, architectures=on)


SPAN_MARGINAL_LOSS = [
    spans("evidence", 2880, is_global=True),
    spans("evidence", 1, is_global=False, on=HOPPER, valid=None, doc_mask=None, log_weight=None),
    spans("marginal_loss_fwd", 8, is_global=False),
    spans("marginal_loss_fwd", 5000, is_global=True, on=HOPPER),
    spans("marginal_loss_bwd", 2880, is_global=True, dtype="*bf16"),
    spans("marginal_loss_bwd", 1, is_global=False, on=HOPPER, valid=None, divisor=None, d_span_scores=None),
]

STRIDES = ("start_stride_n", "start_stride_t", "end_stride_n", "end_stride_t")
SCORE_SPANS = dict.fromkeys(("v", "scores", "moments"), "*fp32") | dict.fromkeys(STRIDES, "i32:16")
SCORE_SPANS |= dict.fromkeys(("T", "C", "max_width"), "i32")
SCORE_SPANS_FORWARD = dict(eps="fp32")
SCORE_SPANS_BACKWARD = dict(d_scores="*fp32", d_v="*fp32")


def score(name, length, width, dtype="*fp32", vector=4, on=ARCHITECTURES, **others):
    """score_spans over T = length wordpieces and representations of S = width, read `vector` at a time."""
    tile = score_tile(length, width, vector)
    warps = tile.pop("num_warps")
    arguments = SCORE_SPANS | dict(start=dtype, end=dtype)
    if name == "fwd":
        arguments |= SCORE_SPANS_FORWARD
    else:
        arguments |= SCORE_SPANS_BACKWARD | dict(d_start=dtype, d_end=dtype)
    kernel = f"realm_kernels.score_spans.triton_kernels:score_spans_{name}_kernel"
    title = f"score_spans {name} {dtype[1:]} T={length} S={width}"
    return Case(title, kernel, arguments | consts(**tile) | others, warps, architectures=on)


ONE_WORDPIECE = consts(T=1, C=1, max_width=1)
SCORE_SPANS_CASES = [
    score("fwd", 320, 256),
    score("fwd", 320, 256, "*bf16", 8, on=HOPPER),
    score("fwd", 320, 100, "*fp16", 1, on=HOPPER, **dict.fromkeys(STRIDES, "i32")),
    score("fwd", 320, 8192, on=HOPPER),
    score("fwd", 1, 16, on=HOPPER, **ONE_WORDPIECE),
    score("bwd", 320, 256),
    score("bwd", 320, 256, "*bf16", 8, on=HOPPER),
    score("bwd", 320, 8192, on=HOPPER),
    score("bwd", 1, 16, on=HOPPER, **ONE_WORDPIECE),
    score("bwd", 64, 256, on=HOPPER, **consts(d_start=None, d_end=None)),
    score("bwd", 65, 256, on=HOPPER, **consts(d_start=None, d_v=None)),
]

CHUNK = dict(logits="*fp32", bias="*fp32", targets="*i64", R="i32:16")
PARTS = dict(peaks="*fp32", sums="*fp32")
ROWS = dict(log_p="*fp64", total="*fp64", largest="*fp32")
LINEAR_WARPS = dict(
    statistics=linear.STATISTICS_WARPS, combine=linear.COMBINE_WARPS, gradient=linear.GRADIENT_WARPS
)
LINEAR_WARPS |= dict(product=linear.PRODUCT_WARPS)


def chunk(name, arguments, variant="", on=ARCHITECTURES, matrix=None, **constants):
    """linear_marginal_loss with the tiles of its launches."""
    kernel = f"realm_kernels.linear_marginal_loss.triton_kernels:linear_marginal_loss_{name}_kernel"
    arguments = CHUNK | arguments | consts(**constants)
    title = f"linear_marginal_loss {name} {variant}".rstrip()
    return Case(title, kernel, arguments, LINEAR_WARPS[name], matrix=matrix, architectures=on)


def product(variant, dtype="*bf16", width=768, block=linear.PRODUCT_V, on=ARCHITECTURES, **others):
    operands = dict(weight=dtype, hidden=dtype, V="i32") | PARTS | others
    return chunk("product", operands, variant, on, TENSOR_CORES, H=width, BLOCK_V=block, **PRODUCT)


PRODUCT = dict(BLOCK_R=linear.PRODUCT_R, BLOCK_H=linear.PRODUCT_H)
PRODUCT |= dict(GROUP=linear.PRODUCT_GROUP, STAGES=linear.PRODUCT_STAGES)
NARROW = linear.PRODUCT_V_NARROW
STATISTICS = PARTS | dict(V="i32") | consts(BLOCK_V=linear.STATISTICS_V, BLOCK_R=linear.STATISTICS_R)
COMBINE = PARTS | ROWS | dict(S="i32") | consts(BLOCK_S=linear.COMBINE_S, BLOCK_R=linear.COMBINE_R)
GRADIENT = ROWS | dict(d_bias="*fp32", factor="*fp64", V="i32")
GRADIENT |= consts(BLOCK_V=linear.GRADIENT_V, BLOCK_R=linear.GRADIENT_R)
UNBIASED = dict(bias=None)
LINEAR_MARGINAL_LOSS = [
    chunk("statistics", STATISTICS),
    chunk("statistics", STATISTICS, "bare", on=HOPPER, **UNBIASED),
    chunk("statistics", STATISTICS, "of one word", on=HOPPER, V=1, R=1, **UNBIASED),
    product("bf16", on=(80, 90)),
    product("fp16", "*fp16", on=(80, 90)),
    product("H=128", width=128, on=(80, 90)),
    product("H=1024 words % 16", width=1024, on=(80, 90), V="i32:16"),
    product("bf16 narrow", block=NARROW),
    product("R odd", block=NARROW, R="i32"),
    product("H=100 R odd", block=NARROW, width=100, R="i32"),
    product("of one word", block=NARROW, on=HOPPER, R=const(1), V=const(1)),
    chunk("combine", COMBINE),
    chunk("combine", COMBINE, "of one word", on=HOPPER, R=1, S=1, **UNBIASED),
    chunk("gradient", GRADIENT | dict(d_logits="*bf16"), "bf16", PITCH=2),
    chunk("gradient", GRADIENT | dict(d_logits="*fp16", R="i32"), "fp16 R odd", on=HOPPER, PITCH=2),
    chunk("gradient", GRADIENT | dict(d_logits="*fp32"), "fp32", PITCH=1),
    chunk("gradient", GRADIENT | dict(d_logits="*bf16"), "of one word", on=HOPPER, PITCH=2, V=1, R=1),
    chunk(
        "gradient",
        GRADIENT | dict(d_logits="*bf16"),
        "bf16 bare",
        on=HOPPER,
        PITCH=2,
        d_bias=None,
        **UNBIASED,
    ),
]

CASES = [*MIPS_TOPK, *MARGINAL_LOSS, *SPAN_MARGINAL_LOSS, *SCORE_SPANS_CASES, *LINEAR_MARGINAL_LOSS]
