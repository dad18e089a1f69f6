"""Who serves a call: use_backend, explain, and the reasons they give."""

import threading

import pytest
import torch

import realm_kernels as rk
from realm_kernels import native
from realm_kernels.backends import forced_backend

QUERIES, TABLE = torch.randn(2, 8), torch.randn(30, 8)


def served_by():
    return rk.explain(rk.mips_topk, QUERIES, TABLE, 3).backend


def test_the_first_that_can_serves():
    assert served_by() == ("cpu" if native.cpu is not None else "reference")


def test_use_backend_is_undone_even_by_an_error():
    with pytest.raises(KeyError), rk.use_backend("reference"):
        assert served_by() == "reference"
        with rk.use_backend(None):
            assert forced_backend() is None
        raise KeyError
    assert forced_backend() is None


def test_use_backend_is_local_to_the_thread():
    seen = []
    with rk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="use_backend: name must be one of cpu, .* here, got 'gpu'"):
        rk.use_backend("gpu").__enter__()


def test_a_backend_that_cannot_serve_says_why():
    with rk.use_backend("cuda"), pytest.raises(ValueError, match=r"mips_topk: use_backend\('cuda'\)"):
        rk.mips_topk(QUERIES, TABLE, 3)


def test_explain_counts_bytes_and_flops_and_checks_its_arguments():
    told = rk.explain(rk.mips_topk, QUERIES, TABLE, 3)
    assert told.bytes == 30 * 8 * 4 + 2 * 8 * 4 + 2 * 3 * 12
    assert told.flops == 2 * 2 * 30 * 8
    assert "mips_topk: backend" in str(told)
    with pytest.raises(ValueError, match=r"mips_topk: k must be in \[1, N=30\], got 31"):
        rk.explain(rk.mips_topk, QUERIES, TABLE, 31)
    with pytest.raises(ValueError, match="explain: function must be one of .*mips_topk"):
        rk.explain(torch.topk, QUERIES, 3)


@pytest.mark.parametrize("function", [rk.mips_topk, rk.marginal_loss, rk.span_marginal_loss])
def test_every_op_explains_itself(function):
    arguments = {
        rk.mips_topk: (QUERIES, TABLE, 3),
        rk.marginal_loss: (torch.randn(2, 3), torch.randn(2, 3, 4)),
        rk.span_marginal_loss: (torch.randn(2, 3), torch.randn(2, 3, 4), torch.rand(2, 3, 4) < 0.5),
    }
    told = rk.explain(function, *arguments[function])
    assert told.op == function.__name__ and told.bytes > 0 and told.flops > 0 and told.plan and told.limit
