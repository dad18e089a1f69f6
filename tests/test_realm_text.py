"""Pre-training on text, by the road of the worlds: statements, the Inverse Cloze Task, exclusion, resume."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from realm_model.config import (
    ModelConfig,
    RealmConfig,
    RunConfig,
    StageConfig,
    TextConfig,
    from_json,
    to_json,
)
from realm_model.corpus import BlockStore, Document, build_corpus
from realm_model.corpus.statements import MAX_MASKED, SpanStatements, prepare_text
from realm_model.inputs import CLS, PAD, SEP, Statements, trivial
from realm_model.masking import take_sentences, without
from realm_model.pretrain import Trainer, load_run, make_setting, pretrain

NAMES = ["Ada", "Boole", "Curie", "Darwin", "Euler", "Fermat", "Gauss", "Hopper", "Ibsen", "Jung"]


def documents():
    for i, name in enumerate(NAMES * 3):
        other = NAMES[(i * 7 + 3) % len(NAMES)]
        text = f"In {1800 + i} the young {name} met {other}. Rain fell on them. Later {name} wrote to Rome."
        # The first document comes twice, under two names.
        yield Document(f"d{i}", name, text)
    yield Document(
        "copy", "Ada", f"In 1800 the young Ada met {NAMES[3]}. Rain fell on them. Later Ada wrote to Rome."
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_corpus(documents(), tmp_path_factory.mktemp("text") / "corpus", vocabulary_size=200)


def config_for(store):
    return RunConfig(
        threads=1,
        text=TextConfig(str(store.directory), held_out=0.2),
        model=ModelConfig(
            hidden=16, layers=1, projection=8, query_length=20, document_length=304, dropout=0.1
        ),
        ict=StageConfig(steps=4, batch=8, retriever_lr=1e-2),
        reader=StageConfig(steps=4, batch=8, reader_lr=1e-2),
        realm=StageConfig(steps=8, batch=4, retriever_lr=1e-2, reader_lr=1e-2),
        marginal=RealmConfig(corpus_share=1.0, refresh_every=3, refresh_lag=2),
        evaluate_every=100,
        checkpoint_every=3,
    )


def test_a_statement_is_a_sentence_around_a_salient_span(store):
    source = SpanStatements(store, torch.tensor([1, 4]).numpy(), 20)
    assert len(source) == len(store.spans(1)) + len(store.spans(4))
    statements = source[torch.arange(len(source))]
    assert statements.fact.tolist() == [1] * len(store.spans(1)) + [4] * len(store.spans(4))
    for row in range(len(statements)):
        block = store[int(statements.fact[row])].body.tolist()
        ids, origin = statements.ids[row], int(statements.origin[row])
        length = int((ids != PAD).sum())
        assert ids[0] == CLS and ids[length - 1] == SEP
        assert ids[1 : length - 1].tolist() == block[origin : origin + length - 2]
        first, last = int(statements.first[row]), int(statements.last[row])
        assert 0 < last - first <= MAX_MASKED
        spans = store.spans(int(statements.fact[row])).tolist()
        assert [origin + first - 1, origin + last - 1] in spans


def test_a_sentence_cut_to_the_query_keeps_its_span_and_its_place(store):
    source = SpanStatements(store, torch.tensor([2]).numpy(), 5)
    statements = source[torch.arange(len(source))]
    body = torch.from_numpy(store[2].body.astype("int64"))
    for row in range(len(statements)):
        origin, length = int(statements.origin[row]), int((statements.ids[row] != PAD).sum())
        assert length <= 5
        assert torch.equal(statements.ids[row, 1 : length - 1], body[origin : origin + length - 2])


A, B, C, D, E = range(10, 15)


def test_the_inverse_cloze_task_takes_whole_sentences():
    bodies = torch.tensor([[A, B, C, D, E]]).repeat(60, 1)
    ends = torch.tensor([[2, 3, 5, -1]]).repeat(60, 1)
    spans, rest = take_sentences(bodies, ends, 9, 0.9, torch.Generator().manual_seed(0))
    found = {tuple(row[row != PAD].tolist()) for row in spans}
    assert found == {(A, B), (C,), (D, E)}
    removed = (rest != PAD).sum(1) < 5
    assert torch.equal((spans + rest)[removed], bodies[removed]) and torch.equal(
        rest[~removed], bodies[~removed]
    )
    assert 45 <= removed.sum() < 60
    cut, _ = take_sentences(bodies, ends, 1, 0.9, torch.Generator().manual_seed(0))
    assert {tuple(row[row != PAD].tolist()) for row in cut} == {(A,), (C,), (D,)}


def test_a_body_loses_the_statement_that_stands_in_it():
    bodies = torch.tensor([[A, B, C, D, E], [A, B, C, D, E]])
    ids = torch.tensor([[CLS, C, D, SEP], [CLS, C, D, SEP]])
    where = torch.tensor([2, -1])  # the second is said in other words
    statements = Statements(ids, torch.tensor([1, 1]), torch.tensor([2, 2]), torch.tensor([0, 1]), where)
    assert without(bodies, statements).tolist() == [[A, B, PAD, PAD, E], [A, B, C, D, E]]


def test_the_document_of_a_sentence_and_its_copies_are_no_candidates(store):
    config = config_for(store)
    corpus = prepare_text(store, config.text, config.model, 0)
    copy = len(store) - 1
    source = SpanStatements(store, torch.tensor([0, 5]).numpy(), 20)
    statements = source[torch.tensor([0, len(source) - 1])]
    assert trivial(corpus.documents, statements).tolist() == [[0, copy], [5, -1]]


def test_held_out_sentences_are_not_trained_on(store):
    config = config_for(store)
    corpus = prepare_text(store, config.text, config.model, 0)
    own = set(corpus.own[torch.arange(len(corpus.own))].fact.tolist())
    held_out = set(corpus.held_out.fact.tolist())
    assert len(held_out) == round(0.2 * len(store))
    assert not held_out & own and not held_out & set(corpus.contexts.tolist())
    assert held_out | own == set(range(len(store)))


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer may catch it."""


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in lines if "loss" in line]


def ignore(record):
    pass


@pytest.mark.parametrize(
    ("accumulate", "bfloat16", "lexical"),
    [(1, False, False), (2, True, False), (1, False, True)],
    ids=["plain", "accumulated-bf16", "lexical"],
)
def test_a_killed_run_on_text_has_the_losses_of_an_undisturbed_one(
    store, tmp_path, accumulate, bfloat16, lexical
):
    config = config_for(store)
    if lexical:  # as the preset squad
        text = replace(config.text, ict="span", ict_wordpieces=9, ict_queries=2, ict_remove=0.5)
        model = replace(config.model, lexical=True, reader_layers=2, shared_head=True)
        config = replace(config, text=text, model=model)
    config = replace(config, bfloat16=bfloat16, realm=replace(config.realm, accumulate=accumulate))
    pretrain(config, tmp_path / "whole", ignore)
    assert len(losses(tmp_path / "whole")) == 16
    kills = iter(torch.randint(1, 16, (3,), generator=torch.Generator().manual_seed(accumulate)).tolist())
    out, seen, last = tmp_path / "killed", [], next(kills)

    def report(record):
        seen.append(record)
        if last is not None and len(seen) == last:
            raise Killed

    while last is not None:
        seen.clear()
        with contextlib.suppress(Killed):
            pretrain(config, out, report)
        last = next(kills, None)
    pretrain(config, out, ignore)
    assert losses(out) == losses(tmp_path / "whole")
    assert from_json(to_json(config)) == config


def test_two_batches_to_a_step_have_the_gradient_of_one_twice_as_large(store):
    """REALM's loss is a mean over examples, so with the same statements the two ways agree."""
    config = config_for(store)
    config = replace(config, model=replace(config.model, dropout=0.0), ict=replace(config.ict, steps=0))
    config = replace(config, reader=replace(config.reader, steps=0))
    gradients, total = [], []
    for batch, accumulate in ((8, 1), (4, 2)):
        realm = replace(config.realm, batch=batch, accumulate=accumulate)
        trainer = Trainer(make_setting(replace(config, realm=realm)))
        trainer.optimizer.step = lambda step: None
        total.append(trainer.advance()["loss"])
        trainer.close()
        gradients.append([p.grad for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(total[0], total[1], rtol=1e-5, atol=0)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", ["ict", "reader", "realm"])
def test_bfloat16_changes_a_loss_by_its_rounding_only(store, stage):
    config = config_for(store)
    config = replace(config, model=replace(config.model, dropout=0.0))
    others = [name for name in ("ict", "reader", "realm") if name != stage]
    config = replace(config, **{name: StageConfig(0, 1) for name in others})
    exact, rounded = (
        Trainer(make_setting(replace(config, bfloat16=flag))).advance()["loss"] for flag in (False, True)
    )
    assert exact != rounded and abs(exact - rounded) < 0.02 * exact


def test_a_run_knows_its_corpus_by_the_fingerprint(store, tmp_path):
    config = replace(config_for(store), reader=StageConfig(0, 1), realm=StageConfig(0, 1))
    other = build_corpus(list(documents())[:12], tmp_path / "other", store.directory)
    pretrain(config, tmp_path / "run", ignore)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(str(store.directory), str(other.directory)))
    with pytest.raises(
        ValueError, match=f"trained on the corpus of fingerprint '{store.fingerprint[:12]}', got"
    ):
        load_run(tmp_path / "run")


def test_blocks_longer_than_the_model_reads_are_refused(store):
    config = config_for(store)
    short = replace(config.model, document_length=200)
    with pytest.raises(ValueError, match="blocks may have 197, .* has them of up to 288"):
        prepare_text(BlockStore.open(store.directory), config.text, short, 0)


def test_a_run_begins_as_the_run_it_is_given(store, tmp_path):
    from realm_model.start import start_from

    config = config_for(store)
    pretrain(config, tmp_path / "ict", ignore, last="ict")
    assert {stage for stage, _, _ in losses(tmp_path / "ict")} == {"ict"}
    following = start_from(replace(config, model=ModelConfig()), tmp_path / "ict")
    assert following.model == config.model and following.ict.steps == 0
    trainer = Trainer(make_setting(following))
    assert trainer.name == "reader"
    begun, trained = trainer.model.state_dict(), load_run(tmp_path / "ict")[1].state_dict()
    assert all(torch.equal(begun[name], trained[name]) for name in trained)


def test_both_networks_begin_as_a_bert_and_words_go_by_their_name(store, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from realm_model.inputs import wordpiece
    from realm_model.published.tokenizer import write_tokenizer
    from realm_model.start import start_from

    words = sorted(store.tokenizer.get_vocab(), key=store.tokenizer.get_vocab().get)
    shuffled = [words[0], *reversed(words[1:])]  # [PAD] first, the rest in another order
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=400,
        )
    )  # fmt: skip
    bert.cls.predictions.decoder.bias.data.normal_()
    bert.save_pretrained(tmp_path / "bert")
    write_tokenizer(wordpiece(shuffled), tmp_path / "bert")
    config = start_from(config_for(store), tmp_path / "bert")
    config = replace(config, model=replace(config.model, dropout=0.0))
    model = Trainer(make_setting(config)).model.eval()

    ids = torch.tensor([[CLS, *store[0].body.tolist(), SEP]])
    theirs = torch.tensor([[shuffled.index(words[i]) for i in ids[0]]])
    with torch.no_grad():
        expected = bert.eval()(theirs).logits[:, :, [shuffled.index(word) for word in words]]
        found = model.reader.lm(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    hidden, other = model.retriever.bert(ids).last_hidden_state, model.reader.lm.bert(ids).last_hidden_state
    assert torch.equal(hidden, other)

    write_tokenizer(wordpiece([*words[:20], *(f"x{i}" for i in range(len(words) - 20))]), tmp_path / "bert")
    with pytest.raises(ValueError, match="must know the words of the corpus, lacks"):
        Trainer(make_setting(config))


def test_two_ranks_have_the_losses_of_one(store, tmp_path):
    """Each takes half of every batch and holds half of the index; what differs is the rounding of sums."""
    config = config_for(store)
    config = replace(
        config,
        model=replace(config.model, dropout=0.0),
        # Small enough that rounding does not grow into another ranking within the run.
        ict=replace(config.ict, retriever_lr=1e-3),
        reader=replace(config.reader, reader_lr=1e-3),
        realm=replace(config.realm, retriever_lr=1e-3, reader_lr=1e-3),
    )
    for mode in ("sequence", "token"):
        config = replace(config, marginal=replace(config.marginal, mode=mode))
        pretrain(config, tmp_path / f"one-{mode}", ignore)
    script = tmp_path / "ranks.py"
    script.write_text(f"""
from pathlib import Path
from realm_model.config import read_config
from realm_model.pretrain import pretrain
from realm_model.ranks import Ranks
out = Path({str(tmp_path)!r})
assert Ranks.join().size == 2
for mode in ("sequence", "token"):
    pretrain(read_config(out / f"one-{{mode}}"), out / f"two-{{mode}}", lambda record: None)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    for mode in ("sequence", "token"):
        one, two = losses(tmp_path / f"one-{mode}"), losses(tmp_path / f"two-{mode}")
        assert [line[:2] for line in one] == [line[:2] for line in two] and len(one) == 16
        torch.testing.assert_close([line[2] for line in one], [line[2] for line in two], rtol=1e-4, atol=0)


def test_the_commands_walk_from_text_to_a_pretrained_run(store, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from realm_model import cli
    from realm_model.cli import text

    monkeypatch.setattr(
        text, "preset_named", lambda name, corpus: replace(config_for(store), text=TextConfig(corpus, 0.2))
    )
    path, out, runner = tmp_path / "text.jsonl", tmp_path / "corpus", CliRunner()
    lines = [json.dumps({"id": d.id, "title": d.title, "text": d.text}) for d in documents()]
    path.write_text("\n".join(lines))

    def call(*arguments):
        return runner.invoke(cli.app, [str(argument) for argument in arguments])

    result = call("corpus", path, "--out", out, "--vocabulary-size", 200)
    assert result.exit_code == 0 and "31 blocks of 31 documents" in result.stdout, result.output
    assert BlockStore.open(out).fingerprint == store.fingerprint
    result = call("corpus", path, "--out", out)
    assert result.exit_code == 1 and result.stderr.strip().endswith("a corpus is written to a new directory")

    ict, realm = tmp_path / "ict", tmp_path / "realm"
    result = call("ict", "--corpus", out, "--out", ict, "--steps", 3, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert [line[:2] for line in losses(ict)] == [("ict", step) for step in range(3)]
    result = call("pretrain", "--corpus", out, "--from", ict, "--out", realm, "--threads", 1, "--tensorboard")
    assert result.exit_code == 0, result.output
    assert {stage for stage, _, _ in losses(realm)} == {"reader", "realm"}
    evaluations = [json.loads(line) for line in (realm / "metrics.jsonl").read_text().splitlines()]
    last = evaluations[-1]["evaluation"]
    assert {"recall@5", "utility", "log_marginal"} <= set(last) and "gain" not in last
    files = {file.name for file in realm.iterdir()}
    assert {"config.json", "loss.png", "recall.png", "utility.png", "tensorboard"} <= files
    assert list((realm / "tensorboard").iterdir())
