"""Every Triton kernel has run in the interpreter on the inputs known to break it, against float64.

To add an op, add the test functions that hold its kernels against an oracle on such inputs; which kernels
they launch is seen, not believed. These laws run last, over what the session launched.
"""

import interpreted
import pytest
import torch

from benchmarks.kernels import triton_kernels

# By op: tests against the specification in float64 or an oracle of more digits, over orders, ties, duplicates
# and special values; over tiny priors, nearly equal documents and masks.
ADVERSARIAL = {
    "mips_topk": {
        "test_mips_topk_triton.py::test_adversarial_orders",
        "test_mips_topk_triton.py::test_nan_and_infinities",
        "test_mips_topk_triton.py::test_ties_go_to_the_smaller_id_whatever_the_split",
        "test_mips_topk_triton.py::test_any_small_input_equals_the_reference",
    },
    "marginal_loss": {
        "test_marginal_loss.py::test_the_loss_and_its_gradients_are_the_oracles_rounded_once",
        "test_marginal_loss.py::test_reductions_over_the_adversarial_cases",
    },
}


def op_of(kernel):
    return kernel.split(".")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("kernel", triton_kernels(), ids=lambda kernel: kernel.rpartition(":")[2])
def test_it_ran_on_the_inputs_known_to_break_it(kernel):
    tests = ADVERSARIAL[op_of(kernel)]
    if not tests & interpreted.begun:
        pytest.skip("the tests of its op are not part of this session")
    assert interpreted.launches[kernel] & tests, f"{kernel} was launched by none of {sorted(tests)}"
