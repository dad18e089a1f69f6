"""Ranks that embed documents while others train: the losses of one process; nobody waits for a lost rank."""

import json
import os
import random
from dataclasses import replace

import pytest
import ranks_pool
import torch

pytest.importorskip("transformers")

import realm_ranks_cases as cases
from table_crash_cases import in_child

import realm_kernels as rk
from realm_model.builders import Job
from realm_model.cli.common import one_clear_line
from realm_model.config import ModelConfig, RealmConfig, RunConfig, StageConfig, TextConfig, WorldConfig
from realm_model.corpus import Document, build_corpus
from realm_model.pretrain import pretrain
from realm_model.ranks import Ranks

WORLD = RunConfig(
    threads=1,
    world=WorldConfig(subjects=10, facts_per_subject=3, relations=3, min_objects=5),
    model=ModelConfig(vocab_size=400, hidden=16, layers=1, projection=8),
    # Rates at which rounding does not grow into another ranking within the run.
    ict=StageConfig(steps=3, batch=8, retriever_lr=1e-3),
    reader=StageConfig(steps=2, batch=8, reader_lr=1e-3),
    realm=StageConfig(steps=12, batch=4, retriever_lr=1e-3, reader_lr=1e-3),
    marginal=RealmConfig(refresh_every=4, refresh_lag=2, corpus_share=0.25),
    evaluate_every=100,
    checkpoint_every=3,
)
NAMES = ["Ada", "Boole", "Curie", "Darwin", "Euler", "Fermat", "Gauss", "Hopper", "Ibsen", "Jung"]
# Of a rank that hangs the others learn after this. Far above what any step takes, paused machines aside.
HANGS_AFTER = 10.0


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in lines if "loss" in line]


def evaluations(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["evaluation"]) for line in lines if "evaluation" in line]


def succeed(results):
    for rank, result in enumerate(results):
        assert not isinstance(result, Exception), f"rank {rank}: {getattr(result, 'where', result)}"
        assert not isinstance(result[0], str), f"rank {rank}: {result}"
    return results


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = ranks_pool.Pool(3, tmp_path_factory.mktemp("ranks"), wait=300)
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=["world", "text"])
def config(request, tmp_path_factory):
    if request.param == "world":
        return WORLD
    documents = [
        Document(
            f"d{i}", name, f"In {1800 + i} the young {name} met {NAMES[i * 7 % 10]}. Rain fell. It ended."
        )
        for i, name in enumerate(NAMES * 3)
    ]
    store = build_corpus(documents, tmp_path_factory.mktemp("text") / "corpus", vocabulary_size=200)
    text = TextConfig(str(store.directory), held_out=0.2)
    model = replace(WORLD.model, query_length=20, document_length=304)
    return replace(WORLD, text=text, model=model, marginal=replace(WORLD.marginal, corpus_share=1.0))


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run on one process."""
    out = tmp_path_factory.mktemp("alone")
    pretrain(config, out, lambda record: None)
    return out


@pytest.fixture(scope="module")
def undisturbed(pool, config, tmp_path_factory):
    """The run on two ranks that train and one that builds."""
    out = tmp_path_factory.mktemp("undisturbed")
    results = succeed(pool.run(cases.train, 3, config, out, 1, 60.0, timeout=60))
    # Only rank 0 reports. The builder embedded for both trainers: the first index and two refreshes.
    assert [seen for seen, _ in results] == [17 + 3, 0, 0] and results[2] == (0, 2 * 3)
    return out


@pytest.mark.parametrize("trainers", [1, 2, 3, 5])
@pytest.mark.parametrize("builders", [1, 2, 3, 4])
@pytest.mark.parametrize("documents", [8, 9, 100])
def test_every_document_of_a_trainer_is_embedded_once_in_the_order_of_its_table(
    trainers, builders, documents
):
    job = Job(Ranks(0, trainers + builders), builders)
    work = [0] * builders
    for trainer in range(trainers):
        shares = job.shares(documents, trainer)
        rows = [row for builder in sorted(shares) for row in shares[builder]]
        part = Ranks(trainer, trainers).part(documents)
        assert rows == list(range(part.start, part.stop))
        for builder, own in shares.items():
            work[builder] += len(own)
    assert sum(work) == documents and max(work) - min(work) <= 1


def test_the_losses_are_those_of_one_process(alone, undisturbed):
    one, three = losses(alone), losses(undisturbed)
    assert [line[:2] for line in one] == [line[:2] for line in three] and len(one) == 17
    # What differs is the rounding of sums over the ranks, as without builders.
    torch.testing.assert_close([line[2] for line in one], [line[2] for line in three], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("size", "count"), [(2, 4), (3, 5), (2, 1), (3, 2), (2, 0)])
def test_ranks_share_an_evaluation_and_find_what_one_does(pool, config, size, count):
    alone, asked = cases.evaluated(0, 1, config, count)
    results = pool.run(cases.evaluated, size, config, count)
    assert not any(isinstance(result, Exception) for result in results), results
    for values, _ in results:
        assert values == results[0][0] and values.keys() == alone.keys()
        assert all(values[name] == alone[name] for name in alone if name.startswith("recall"))
        torch.testing.assert_close(values, alone, rtol=1e-5, atol=1e-5)
    shares = [sum(batches, []) for _, batches in results]
    if count >= size:  # each statement is read by one rank, and ranks have equal work
        assert sum(shares, []) == sum(asked, [])
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len({len(batches) for _, batches in results}) == 1  # rounds, in which all search together


def test_the_evaluations_of_a_run_are_those_of_one_process(alone, undisturbed):
    one, three = evaluations(alone), evaluations(undisturbed)
    assert [line[:2] for line in one] == [line[:2] for line in three] and len(one) == 3
    for line, other in zip(one, three, strict=True):
        torch.testing.assert_close(line[2], other[2], rtol=1e-3, atol=1e-4)


def test_one_builder_for_one_trainer_changes_no_bit(pool, config, alone, tmp_path):
    succeed(pool.run(cases.train, 2, config, tmp_path, 1, 60.0, timeout=60))
    assert losses(tmp_path) == losses(alone)


def test_two_builders_serve_one_trainer(pool, config, alone, tmp_path):
    succeed(pool.run(cases.train, 3, config, tmp_path, 2, 60.0, timeout=60))
    one, three = losses(alone), losses(tmp_path)
    torch.testing.assert_close([line[2] for line in one], [line[2] for line in three], rtol=1e-4, atol=0)


def test_in_async_the_index_is_swapped_when_it_is_ready(pool, tmp_path):
    marginal = replace(WORLD.marginal, refresh="async", refresh_every=2)
    config = replace(WORLD, realm=replace(WORLD.realm, steps=60), marginal=marginal)
    succeed(pool.run(cases.train, 3, config, tmp_path, 1, 60.0, timeout=60))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["stage"] == "realm" and "loss" in line][-1]
    assert last["step"] == 59 and last["refreshes"] > 2 and last["failed_refreshes"] == 0


# The builder embeds thrice for each of two trainers: the fourth is of the snapshot of step 4.
@pytest.mark.parametrize(
    ("who", "how", "at"),
    [
        (0, "killed", random.Random(0).randrange(12)),
        (1, "killed", random.Random(1).randrange(12)),
        (2, "killed", 3),
        (0, "hangs", random.Random(2).randrange(12)),
        (2, "hangs", 3),
    ],
    ids=["trainer0-killed", "trainer1-killed", "builder-killed", "trainer0-hangs", "builder-hangs"],
)
def test_a_lost_rank_ends_all_of_them_and_the_run_goes_on_to_the_same_losses(
    pool, undisturbed, config, tmp_path, who, how, at
):
    if config.text is not None and (who, how) != (0, "killed"):
        pytest.skip("one road: as on a world")
    timeout = HANGS_AFTER if how == "hangs" else 60.0
    mortal = ranks_pool.Pool(3, tmp_path, wait=300)
    try:
        trouble = (who, how, at)
        results = mortal.run(cases.train, 3, config, tmp_path / "run", 1, timeout, trouble, timeout=timeout)
    finally:
        mortal.close()
    if how == "killed":
        assert isinstance(results[who], EOFError)
    for kind, message in (result[:2] for rank, result in enumerate(results) if rank != who):
        assert kind == "LostRankError" and "\n" not in message
        assert "lost" in message or "rank 0 ended the run, and its own error says why" in message
    assert len(losses(tmp_path / "run")) < 17
    succeed(pool.run(cases.train, 3, config, tmp_path / "run", 1, 60.0, timeout=60))
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_what_one_rank_refuses_all_are_told(pool, tmp_path):
    (tmp_path / "file").write_text("in the way")
    own, *others = pool.run(cases.refused, 3, WORLD, tmp_path / "file", 1)
    assert own == f"cannot write the run folder {tmp_path / 'file'}: File exists"
    assert others == [f"rank 0 of the job cannot take part: OSError: {own}"] * 2


def test_a_folder_of_another_run_is_left_alone_by_all(pool, tmp_path):
    pretrain(replace(WORLD, realm=StageConfig(0, 1)), tmp_path, lambda record: None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told = pool.run(cases.refused, 3, WORLD, tmp_path, 1)
    assert all("holds a run with another configuration" in line for line in told)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("builders", "size"), [(3, 3), (-1, 2), (1, 1)])
def test_one_rank_at_least_must_train(pool, tmp_path, builders, size):
    told = pool.run(cases.refused, size, WORLD, tmp_path / "run", builders)
    assert (
        told
        == [
            "refresh ranks must leave one rank of the job to train (torchrun --nproc-per-node), got "
            f"{builders} of {size} ranks"
        ]
        * size
    )
    assert not (tmp_path / "run").exists()


def test_a_lost_rank_is_one_line_at_the_command_line_and_the_process_ends(capfd):
    def lose():
        with one_clear_line():
            raise rk.LostRankError("lost a rank")

    status = in_child(lose)
    assert os.WEXITSTATUS(status) == 1 and capfd.readouterr().err == "realm-model: lost a rank\n"
