"""Laws of tokens, joins and masks, on arrays made by hand."""

import pytest
import torch

pytest.importorskip("transformers")

from realm_model.config import preset
from realm_model.inputs import (
    CLS,
    IGNORE,
    MASK,
    PAD,
    SEP,
    UNK,
    Documents,
    Statements,
    encode_statements,
    join,
    learn_vocabulary,
    pack,
    prepare,
    query_inputs,
    wordpiece,
    world_tokenizer,
)
from realm_model.masking import crop_spans, exchange_objects, mask_statements
from realm_model.ragged import Ragged
from realm_model.world import Statement, draw_world, generate_source

A, B, C, D, E, F = range(10, 16)  # wordpieces


def rows(*values):
    return torch.tensor(values)


def test_a_query_closes_the_gaps_of_its_text():
    ids = query_inputs(rows([PAD, A, B, PAD], [C, PAD, PAD, PAD]))
    assert ids.tolist() == [[CLS, A, B, SEP], [CLS, C, SEP, PAD]]


def test_a_join_is_query_then_body_with_segments_and_padding_last():
    ids, segments = join(rows([CLS, A, B, SEP, PAD], [CLS, A, SEP, PAD, PAD]), rows([C, PAD], [C, D]))
    assert ids.tolist() == [[CLS, A, B, SEP, C, SEP], [CLS, A, SEP, C, D, SEP]]
    assert segments.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_a_document_is_title_then_body_cut_to_its_length():
    ids, segments = pack(rows([A, PAD], [A, B]), rows([C, D], [E, PAD]), length=6)
    assert ids.tolist() == [[CLS, A, SEP, C, D, SEP], [CLS, A, B, SEP, E, SEP]]
    assert segments.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]


def test_the_null_document_has_neither_title_nor_body():
    documents = Documents(Ragged.from_lists([[A]]), Ragged.from_lists([[B, C]]), length=8)
    assert documents.null == documents.num_documents == 1
    ids, segments = documents.inputs(rows(documents.null))
    assert ids.tolist() == [[CLS, SEP, SEP]]
    joined, _ = join(rows([CLS, A, SEP]), documents.read(rows(documents.null)))
    assert joined.tolist() == [[CLS, A, SEP, SEP]]


def test_a_vocabulary_covers_every_character_and_keeps_whole_words():
    texts = ["low lower lowest", "new newer"]
    vocabulary = learn_vocabulary(texts, 40, whole_words=["Zanzibar"])
    tokenizer = wordpiece(vocabulary)
    assert len(vocabulary) == len(set(vocabulary)) <= 40
    assert UNK not in tokenizer.encode("wolverine".replace("v", "w").replace("i", "o")).ids
    assert tokenizer.encode("zanzibar").tokens == ["zanzibar"]
    assert tokenizer.encode("low").tokens == ["low"]  # the most frequent merges


def test_a_vocabulary_depends_on_the_text_alone():
    texts = [f"word{i % 7} other{i % 5}" for i in range(50)]
    assert learn_vocabulary(texts, 60) == learn_vocabulary(iter(texts), 60)


def test_the_object_of_a_statement_is_found_and_kept_when_the_sentence_is_cut():
    tokenizer = wordpiece(learn_vocabulary(["a b c d e f g rome"], 40, ["rome"]))
    text = "a b c d e f Rome g"
    statement = Statement(text, text.index("Rome"), text.index("Rome") + 4, fact=5)
    for length in (12, 6):
        encoded = encode_statements([statement], tokenizer, length)
        found = encoded.ids[0, encoded.first[0] : encoded.last[0]]
        assert tokenizer.decode(found.tolist()) == "rome"
        assert encoded.ids.shape[1] == length and encoded.ids[0, 0] == CLS and SEP in encoded.ids[0]


def test_every_object_of_a_world_is_one_token_and_nothing_is_unknown():
    config = preset("tiny")
    world = draw_world(generate_source(), config.world, 0)
    corpus = prepare(world, world_tokenizer(world, config.model.vocab_size), config.model)
    for statements in (corpus.own, corpus.train, corpus.held_out):
        assert (statements.last - statements.first == 1).all()
        assert not (statements.ids == UNK).any()
    assert not (corpus.documents.bodies.values == UNK).any()


STATEMENTS = Statements(
    ids=rows([CLS, A, B, C, D, SEP, PAD], [CLS, A, B, C, D, E, SEP]),
    first=rows(2, 5),
    last=rows(4, 6),
    fact=rows(0, 1),
    origin=rows(0, 0),
)


def test_a_salient_mask_hides_the_object_and_nothing_else():
    ids, positions, targets = mask_statements(STATEMENTS, "salient", torch.Generator())
    assert ids.tolist() == [[CLS, A, MASK, MASK, D, SEP, PAD], [CLS, A, B, C, D, MASK, SEP]]
    assert positions[0].tolist() == [2, 3] and positions[1, 0] == 5
    assert targets.tolist() == [[B, C], [E, IGNORE]]


@pytest.mark.parametrize("kind", ["token", "span"])
def test_an_ablation_masks_as_many_tokens_somewhere_in_the_sentence(kind):
    generator = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(200):
        ids, positions, targets = mask_statements(STATEMENTS, kind, generator)
        assert (ids == MASK).sum(1).tolist() == [2, 1]
        assert torch.equal(ids == MASK, ids != STATEMENTS.ids)
        scored = targets != IGNORE
        assert torch.equal(STATEMENTS.ids.gather(1, positions)[scored], targets[scored])
        assert torch.equal((ids == SEP) | (ids == CLS), (STATEMENTS.ids == SEP) | (STATEMENTS.ids == CLS))
        places.add(tuple(positions[0].tolist()))
    pairs = [(i, j) for i in range(1, 5) for j in range(i + 1, 5)]
    assert places == {(i, j) for i, j in pairs if kind == "token" or j == i + 1}


def test_the_inverse_cloze_task_takes_a_span_out_of_its_context():
    bodies = rows([A, B, C, D, E, F], [A, B, C, PAD, PAD, PAD]).repeat(50, 1)
    spans, rest = crop_spans(bodies, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(spans + rest, bodies)  # PAD is 0: each token is in exactly one of them
    sizes = (spans != PAD).sum(1)
    assert set(sizes[::2].tolist()) <= {2, 3, 4} and set(sizes[1::2].tolist()) <= {1, 2}
    spans, rest = crop_spans(bodies, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(rest, bodies) and (spans != PAD).any(1).all()


def test_objects_are_exchanged_in_the_statement_and_its_document_together():
    own = rows([A, B, C, D, F], [A, B, C, D, E])
    other = STATEMENTS[torch.tensor([1, 0])]
    # Objects of different lengths, [B, C] and [E]: nothing is exchanged.
    statements, bodies = exchange_objects(STATEMENTS, own, other)
    assert torch.equal(statements.ids, STATEMENTS.ids) and torch.equal(bodies, own)

    longer = Statements(
        rows([CLS, A, E, F, SEP, PAD, PAD], [CLS, A, F, SEP, PAD, PAD, PAD]),
        rows(2, 2),
        rows(4, 3),
        rows(2, 3),
        rows(0, 0),
    )
    statements, bodies = exchange_objects(STATEMENTS, own, longer)
    assert statements.ids.tolist() == [[CLS, A, E, F, D, SEP, PAD], [CLS, A, B, C, D, F, SEP]]
    assert bodies.tolist() == [[A, E, F, D, F], [A, B, C, D, F]]
    assert torch.equal(statements.fact, STATEMENTS.fact)


@pytest.mark.parametrize("body", [(A, B, D, D, F), (PAD,) * 5, (A, B)], ids=["other", "null", "cut"])
def test_a_document_that_does_not_state_the_object_keeps_the_fact(body):
    bodies = rows(body, body)
    other = Statements(
        rows([CLS, A, E, F, SEP, PAD, PAD]).repeat(2, 1), rows(2, 2), rows(4, 3), rows(2, 3), rows(0, 0)
    )
    statements, exchanged = exchange_objects(STATEMENTS, bodies, other)
    assert torch.equal(statements.ids, STATEMENTS.ids) and torch.equal(exchanged, bodies)
