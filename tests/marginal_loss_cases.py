"""Inputs that are known to break a marginal likelihood, their answers, and what rounding these may cost."""

from __future__ import annotations

import functools

import torch
from marginal_loss_oracle import Answer, Inputs, solve

INF, NAN = float("inf"), float("nan")
MODES = ("sequence", "token")
# Half an ulp, relative, and half the smallest subnormal: what rounding a result once may cost.
ROUNDING = {
    torch.float64: (0.0, 0.0),
    torch.float32: (2.0**-24, 2.0**-150),
    torch.bfloat16: (2.0**-8 + 2.0**-24, 2.0**-134),
    torch.float16: (2.0**-11 + 2.0**-24, 2.0**-25 + 2.0**-150),
}


def column(*values: float) -> torch.Tensor:
    """Log-likelihoods of one example and one token."""
    return torch.tensor(values)[None, :, None]


def cases() -> dict[str, Inputs]:
    """What is known to break a marginal likelihood."""
    torch.manual_seed(0)
    tiny_prior = torch.tensor([[0.0, 25.3, 24.0, 22.0]])  # the first has 1e-11 of the prior
    near = -60 + 1e-4 * torch.rand(2, 5, 1)
    found = {
        "random": Inputs(torch.randn(3, 5), torch.randn(3, 5, 4).log_softmax(2)),
        "one document": Inputs(torch.randn(2, 1), -torch.rand(2, 1, 3)),
        "one token": Inputs(torch.randn(3, 4), -torch.rand(3, 4, 1)),
        "sum -600": Inputs(torch.randn(2, 4), -30 - torch.randn(2, 4, 20)),
        "near -60, differences 1e-4": Inputs(torch.randn(2, 5), near),
        "near -60 in tokens": Inputs(
            torch.randn(2, 5), near.expand(2, 5, 12) / 12 + 1e-5 * torch.rand(2, 5, 12)
        ),
        "best document has a tiny prior": Inputs(tiny_prior, column(-1.0, -60.0, -61.0, -59.0)),
        "tiny prior, best by a little": Inputs(tiny_prior, column(-59.999, -60.0, -60.0, -60.0)),
        "tiny prior, second by far": Inputs(tiny_prior, column(-35.0, -60.0, -60.0, -60.0)),
        "tiny prior in tokens": Inputs(
            tiny_prior,
            torch.cat([column(-1.0, -60.0, -61.0, -59.0), column(-59.999, -60.0, -60.0, -60.0)], 2),
        ),
        "one document holds the prior": Inputs(torch.tensor([[40.0, 0.0, -3.0]]), column(-2.0, -2.5, -1.0)),
        "it holds it beyond float64": Inputs(torch.tensor([[800.0, 0.0]]), column(-900.0, -1.0)),
        "prior below the smallest double": Inputs(
            torch.tensor([[900.0, 0.0, 1.0]]), column(-950.0, -2.0, -1.5)
        ),
        "a likelihood beyond float64 for a prior below it": Inputs(
            torch.tensor([[0.0, -800.0, 0.1]]), column(-1000.0, -200.0, -1000.5)
        ),
        "the same in one of two tokens": Inputs(
            torch.tensor([[0.0, -800.0, 0.1]]),
            torch.cat([column(-1000.0, -200.0, -1000.5), column(-1.0, -2.0, -1.5)], 2),
        ),
        "large scores": Inputs(1e4 * torch.randn(2, 4), -torch.rand(2, 4, 2)),
        "a likelihood of zero": Inputs(torch.randn(1, 3), column(-1.0, -INF, -2.0)),
        "every likelihood zero": Inputs(torch.randn(1, 3), column(-INF, -INF, -INF)),
        "a token of likelihood zero": Inputs(
            torch.randn(1, 2), torch.tensor([[[-1.0, -INF, -3.0], [-2.0, -INF, -1.0]]])
        ),
        "weights": Inputs(torch.randn(2, 4), -torch.rand(2, 4, 3), log_weight=3 * torch.randn(2, 4)),
        "masks": Inputs(
            torch.tensor([[1.0, 2.0, NAN], [0.5, -INF, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
            torch.tensor([[[-1.0, -2.0], [-3.0, -1.0], [NAN, INF]]]).repeat(4, 1, 1),
            token_mask=torch.tensor([[True, True], [True, False], [True, True], [False, False]]),
            doc_mask=torch.tensor(
                [[True, True, False], [True, True, False], [False] * 3, [True, True, False]]
            ),
            log_weight=torch.tensor([[0.1, 0.2, NAN]]).repeat(4, 1),
        ),
    }
    base = found["random"]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        found[name] = Inputs(base.scores.to(dtype), base.log_likelihood.to(dtype))
    found["float16 subnormal"] = Inputs(torch.zeros(1, 2).half(), (2.0**-20 * column(-1.0, -3.0)).half())
    found["mixed dtypes"] = Inputs(
        base.scores.bfloat16(), base.log_likelihood.half(), log_weight=torch.randn(3, 5)
    )
    return found


CASES = cases()


@functools.cache
def answer(name: str, mode: str) -> Answer:
    return solve(CASES[name], mode)


def rounded(bound: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    relative, absolute = ROUNDING[dtype]
    return bound + relative * expected.abs().nan_to_num(posinf=0.0) + absolute
