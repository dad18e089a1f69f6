"""Every Triton kernel has run in the interpreter on the inputs known to break it, against float64.

To add an op, add the test functions that hold its kernels against an oracle on such inputs; which kernels
they launch is seen, not believed. These laws run last, over what the session launched.
"""

from pathlib import Path

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
        "test_mips_topk_triton_codes.py::test_adversarial_orders",
        "test_mips_topk_triton_codes.py::test_nan_infinities_and_overflow",
        "test_mips_topk_triton_codes.py::test_rows_of_the_host_without_codes_come_in_windows",
        "test_mips_topk_triton_passes.py::test_ties_and_repairs_between_passes",
        "test_mips_topk_triton_gather.py::test_rows_are_copied_bit_for_bit_and_none_is_zeros",
    },
    "linear_marginal_loss": {
        "test_linear_marginal_loss_triton.py::test_passes_are_right_at_every_edge_of_a_tile",
        "test_linear_marginal_loss_triton.py::test_is_no_worse_than_torch_in_the_same_dtype",
        "test_linear_marginal_loss_triton.py::test_confident_rows_keep_the_digits_of_their_gradient",
        "test_linear_marginal_loss_triton.py::test_impossible_targets_cost_infinity_and_have_no_gradient",
        "test_linear_marginal_loss_triton.py::test_what_masks_hide_is_never_looked_at",
    },
    "marginal_loss": {
        "test_marginal_loss.py::test_the_loss_and_its_gradients_are_the_oracles_rounded_once",
        "test_marginal_loss.py::test_reductions_over_the_adversarial_cases",
    },
    "span_marginal_loss": {
        "test_span_marginal_loss.py::test_agrees_with_fifty_digits",
        "test_span_marginal_loss.py::test_any_masks_agree_with_the_oracle",
        "test_span_marginal_loss.py::test_gradients_and_second_derivatives_match_finite_differences",
        "test_span_marginal_loss.py::test_retrieval_gradient_survives_nearly_equal_documents",
        "test_span_marginal_loss.py::test_retrieval_gradient_survives_a_tiny_prior_of_the_best_document",
        "test_span_marginal_loss.py::test_impossible_answers_cost_infinity_and_have_no_gradient",
        "test_span_marginal_loss.py::test_what_masks_hide_is_never_looked_at",
    },
    "score_spans": {
        "test_score_spans.py::test_no_less_accurate_than_plain_torch",
        "test_score_spans.py::test_any_width_is_served",
        "test_score_spans.py::test_a_mean_far_above_the_deviation_costs_no_more_digits_than_in_torch",
        "test_score_spans.py::test_what_spans_without_upstream_hold_is_not_looked_at",
        "test_score_spans.py::test_nan_reaches_the_spans_it_is_part_of_alone",
    },
}


def op_of(kernel):
    return kernel.split(".")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("kernel", triton_kernels(), ids=lambda kernel: kernel.rpartition(":")[2])
def test_it_ran_on_the_inputs_known_to_break_it(kernel):
    tests = ADVERSARIAL.get(op_of(kernel))
    assert tests, f"{op_of(kernel)} has no line in ADVERSARIAL"
    if not tests <= interpreted.begun:
        pytest.skip("not all tests of its op are part of this session")
    assert interpreted.launches[kernel] & tests, f"{kernel} was launched by none of {sorted(tests)}"


def test_the_tests_named_here_exist():
    """In the file named, or in the one whose laws it takes over."""
    for name in set().union(*ADVERSARIAL.values()):
        file, function = name.split("::")
        texts = [
            Path(__file__).with_name(place).read_text() for place in (file, file.replace("_triton.", "."))
        ]
        assert any(f"def {function}(" in text for text in texts), name
