"""The extractive reader: which spans there are, what its losses are, what counts as an answer."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from realm_model.metrics import exact_match, f1, find_answers, holds_answer, normalize_answer, regex_match
from realm_model.reader import SpanHead, all_spans, best_span, reader_loss


def listed(spans):
    return list(zip(spans.starts.tolist(), spans.ends.tolist(), strict=True))


def test_spans_come_by_width_then_by_start():
    assert listed(all_spans(4, 3)) == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (1, 2), (2, 3), (0, 2), (1, 3)]


def test_no_span_is_longer_than_the_join():
    assert listed(all_spans(2, 10)) == [(0, 0), (1, 1), (0, 1)]


def test_spans_inside_are_those_of_the_block_alone():
    spans = all_spans(6, 3)
    body = torch.tensor([[False, False, True, True, True, False], [False] * 6])
    inside = spans.inside(body)
    ours = [span for span, ok in zip(listed(spans), inside[0].tolist(), strict=True) if ok]
    assert ours == [(2, 2), (3, 3), (4, 4), (2, 3), (3, 4), (2, 4)]
    assert not inside[1].any()


def test_correct_spans_are_the_answers_that_are_not_too_wide():
    spans = all_spans(8, 2)
    starts, ends = torch.tensor([[2, 4, -1], [-1, -1, -1]]), torch.tensor([[3, 6, -1], [-1, -1, -1]])
    correct = spans.correct(starts, ends)
    assert [span for span, ok in zip(listed(spans), correct[0].tolist(), strict=True) if ok] == [(2, 3)]
    assert not correct[1].any()


def test_a_span_is_scored_by_its_two_ends():
    head = SpanHead(hidden=6, width=4, eps=1e-3).double()
    torch.nn.init.normal_(head.layer_normalization.bias)
    hidden, spans = torch.randn(2, 7, 6, dtype=torch.float64), all_spans(7, 3)
    scores = head(hidden, spans)
    weight, bias = head.dense_intermediate.weight, head.dense_intermediate.bias
    for c, (start, end) in enumerate(listed(spans)):
        both = hidden[:, start] @ weight[:4].T + bias[:4] + hidden[:, end] @ weight[4:].T + bias[4:]
        relu = both.clamp(min=0)
        centred = relu - relu.mean(1, keepdim=True)
        norm = centred / (relu.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt()
        norm = norm * head.layer_normalization.weight + head.layer_normalization.bias
        expected = norm @ head.dense_output.weight[0] + head.dense_output.bias
        torch.testing.assert_close(scores[:, c], expected, rtol=0, atol=1e-12)


def example():
    """Two questions, five blocks retrieved, three read, four spans; the second question has no answer."""
    scores, span_scores = torch.randn(2, 5).double(), torch.randn(2, 3, 4).double()
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool().expand(2, 3, 4)
    correct = torch.zeros(2, 3, 4, dtype=torch.bool)
    correct[0, 0, 1] = correct[0, 1, 0] = True
    correct[0, 0, 3] = True  # not valid, so it does not count
    has_answer = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    return scores, has_answer, span_scores, correct, valid


def test_the_released_losses_are_two_softmaxes():
    scores, has_answer, span_scores, correct, valid = example()
    terms = reader_loss(scores, has_answer, span_scores, correct, valid)
    p = [math.exp(s) for s in scores[0].tolist()]
    assert terms.retriever[0].item() == pytest.approx(-math.log((p[0] + p[1] + p[4]) / sum(p)), abs=1e-12)
    spans = {
        (k, c): math.exp(scores[0, k] + span_scores[0, k, c])
        for k in range(3)
        for c in range(4)
        if valid[0, k, c]
    }
    expected = -math.log((spans[0, 1] + spans[1, 0]) / sum(spans.values()))
    assert terms.reader[0].item() == pytest.approx(expected, abs=1e-12)
    assert terms.retriever[1] == 0 and terms.reader[1] == 0


def test_the_papers_loss_marginalises_a_softmax_of_each_block():
    scores, has_answer, span_scores, correct, valid = example()
    terms = reader_loss(scores, has_answer, span_scores, correct, valid, form="paper")
    prior = scores[0, :3].softmax(0)
    of_block = [span_scores[0, k][valid[0, k]].softmax(0) for k in range(2)]
    expected = -(prior[0] * of_block[0][1] + prior[1] * of_block[1][0]).log()
    assert terms.reader[0].item() == pytest.approx(expected.item(), abs=1e-12)
    assert terms.reader[1] == 0 and not terms.retriever.any()
    with pytest.raises(ValueError, match="form must be .* got 'published'"):
        reader_loss(scores, has_answer, span_scores, correct, valid, form="published")


def test_the_prediction_is_the_largest_valid_logit():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    span_scores = torch.tensor([[[0.0, 9.0], [0.5, 0.6]], [[0.0, 0.1], [3.0, 0.2]], [[1.0, 1.0], [1.0, 1.0]]])
    valid = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]).bool()
    best = best_span(scores, span_scores, valid)
    assert best.block.tolist()[:2] == [0, 1] and best.span.tolist()[:2] == [0, 0]
    assert best.score.tolist() == [1.0, 3.0, -math.inf]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles!", "beatles"),
        ("a cat, an owl & the dog", "cat owl dog"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("Beyonc\u00e9", "beyonce\u0301"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_released(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_takes_any_reference():
    assert exact_match("The Fab Four.", ["Beatles", "fab four"])
    assert exact_match("Beyonc\u00e9", ["beyonce\u0301"])
    assert not exact_match("fab", ["fab four"]) and not exact_match("fab", [])


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("william shakespeare", ["William Shakespeare"], 1.0),
        ("shakespeare", ["William Shakespeare", "nobody"], 2 / 3),
        ("to be or not to be", ["to be"], 2 * 2 / (6 + 2)),  # each shared word as often as both have it
        ("ann", ["bob"], 0.0),
        ("", ["bob"], 0.0),
        ("the", ["a"], 1.0),
        ("ann", [], 0.0),
    ],
)
def test_f1_is_that_of_the_best_reference(prediction, references, value):
    assert f1(prediction, references) == pytest.approx(value)


def test_curated_trec_patterns_match_at_the_start_alone():
    assert regex_match("Shakespeare the poet", [r"no", r"shakes(peare)?"])
    assert not regex_match("William Shakespeare", ["Shakespeare"])
    assert regex_match("William Shakespeare", [".*Shakespeare"])
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        regex_match("x", ["("])


def test_a_block_holds_an_answer_as_bytes():
    block = "Hámlet, by William Shakespeare".encode()
    assert holds_answer(block, ["nobody", "Hámlet"]) and holds_answer(block, ["speare"])
    assert not holds_answer(block, ["hámlet"]) and not holds_answer(block, [])


def test_answers_are_found_wherever_their_wordpieces_stand():
    ids = [5, 6, 5, 5, 6, 7]
    assert find_answers(ids, [[5, 6]]) == [(0, 1), (3, 4)]
    assert find_answers(ids, [[5], [6, 7]]) == [(0, 0), (2, 2), (3, 3), (4, 5)]
    assert find_answers(ids, [[7, 8], [9]]) == [] and find_answers([], [[5]]) == []
    assert find_answers(ids, [[]]) == []
