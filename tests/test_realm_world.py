"""Laws of the generated and the loaded world of facts."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from realm_model.config import preset
from realm_model.world import Source, draw_world, generate_source, load_source, swap_objects

CONFIG = preset("tiny").world
HARD = replace(CONFIG, relations=8, document_patterns=2, query_patterns=2)


@pytest.fixture(scope="module")
def source():
    return generate_source()


def test_every_fact_is_stated_by_the_document_of_its_number(source):
    world = draw_world(source, HARD, seed=3)
    for query in world.train_queries + world.held_out_queries:
        document = world.documents[query.fact]
        statement = document.statement
        assert statement is not None and statement.fact == query.fact
        assert document.title in query.text
        said = statement.text[statement.start : statement.end]
        assert query.text[query.start : query.end] == said
        assert document.body.startswith(statement.text)


def test_a_query_never_says_it_as_the_document_does(source):
    world = draw_world(source, HARD, seed=3)
    for query in world.train_queries + world.held_out_queries:
        assert query.text != world.documents[query.fact].statement.text


def test_each_subject_has_one_document_without_a_fact(source):
    world = draw_world(source, CONFIG, seed=0)
    distractors = [document.title for document in world.documents if document.statement is None]
    assert len(distractors) == len(set(distractors)) == CONFIG.subjects
    assert len(world.documents) == world.num_facts + CONFIG.subjects


def test_held_out_subjects_have_documents_but_no_training_query(source):
    world = draw_world(source, CONFIG, seed=0)
    trained = {world.documents[query.fact].title for query in world.train_queries}
    held_out = {world.documents[query.fact].title for query in world.held_out_queries}
    assert len(held_out) == round(CONFIG.held_out * CONFIG.subjects)
    assert not trained & held_out


def test_a_seed_is_a_world_and_objects_are_drawn_anew_for_each(source):
    assert draw_world(source, CONFIG, seed=1) == draw_world(source, CONFIG, seed=1)
    assert draw_world(source, CONFIG, seed=1) != draw_world(source, CONFIG, seed=2)


def test_a_swap_changes_every_object_and_nothing_else(source):
    world = draw_world(source, HARD, seed=3)
    swapped = swap_objects(world, seed=1)
    assert swapped == swap_objects(world, seed=1) != swap_objects(world, seed=2)

    def parts(statement):
        object_ = statement.text[statement.start : statement.end]
        return statement.text[: statement.start], object_, statement.text[statement.end :], statement.fact

    said = {}
    for old, new in zip(world.documents, swapped.documents, strict=True):
        assert old.title == new.title and (old.statement is None) == (new.statement is None)
        if old.statement is None:
            assert old == new
            continue
        before, after = parts(old.statement), parts(new.statement)
        assert before[1] != after[1] and after[1] in world.objects[old.statement.fact]
        assert (before[0], *before[2:]) == (after[0], *after[2:])
        assert new.body == old.body.replace(old.statement.text, new.statement.text, 1)
        said[new.statement.fact] = after[1]
    for name in ("train_queries", "held_out_queries"):
        for old, new in zip(getattr(world, name), getattr(swapped, name), strict=True):
            assert (parts(old)[0], *parts(old)[2:]) == (parts(new)[0], *parts(new)[2:])
            assert parts(new)[1] == said[new.fact]


def test_a_pattern_of_two_relations_is_dropped():
    source = Source(
        subjects=["Ada", "Bob"],
        objects={"born": ["Rome", "Oslo"], "died": ["Rome", "Oslo"]},
        patterns={
            "born": ["[X] was in [Y].", "[X] was born in [Y].", "[X] is native to [Y]."],
            "died": ["[X] was in [Y] .", "[X] died in [Y].", "[X] passed away in [Y]."],
        },
    )
    config = replace(CONFIG, subjects=2, relations=2, facts_per_subject=2, min_objects=2, query_patterns=3)
    world = draw_world(source, config, seed=0)
    texts = [document.body for document in world.documents] + [query.text for query in world.train_queries]
    assert len(world.train_queries) > 0
    assert not any(" was in " in text for text in texts)


def test_a_folder_of_facts_and_patterns_is_a_source(tmp_path):
    facts = [
        {"relation": "r", "subject": f"Person {i}", "object": ("Rome", "Oslo")[i % 3 == 0]} for i in range(6)
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    (tmp_path / "patterns.jsonl").write_text(json.dumps({"relation": "r", "pattern": "[X] saw [Y]."}))
    source = load_source(tmp_path)
    assert source.subjects == [f"Person {i}" for i in range(6)]
    assert source.objects == {"r": ["Rome", "Oslo"]}  # the more frequent first
    assert source.patterns == {"r": ["[X] saw [Y]."]}


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*facts.jsonl: No such file"):
        load_source(tmp_path)
    (tmp_path / "facts.jsonl").write_text("{")
    with pytest.raises(ValueError, match="facts.jsonl is not JSON lines"):
        load_source(tmp_path)


def test_a_source_too_small_is_told_with_numbers(source):
    with pytest.raises(ValueError, match="wants 99 relations .* the source has 24"):
        draw_world(source, replace(CONFIG, relations=99), seed=0)
    with pytest.raises(ValueError, match="wants 99999 subjects"):
        draw_world(source, replace(CONFIG, subjects=99_999), seed=0)
