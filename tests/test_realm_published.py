"""The published checkpoints are those of transformers 4.57.6: equal on tiny random models of every class."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

from realm_published_cases import (
    CASES,
    CLASSES,
    GOLDENS,
    OUTPUT,
    PORT,
    QUESTIONS,
    REFERENCES,
    TOLERANCE,
    copy_of,
    embed,
    load,
    logits,
    losses,
    port,
    score,
    weights_of,
)

from realm_model.metrics import exact_match
from realm_model.published import Embedder, OpenQA, Scorer, convert
from realm_model.reader import best_span, reader_loss


def test_the_embedder_is_the_ports():
    torch.testing.assert_close(embed(load("embedder")), port("embedder", "projected"), **TOLERANCE)


def test_the_scorer_is_the_ports():
    torch.testing.assert_close(score(load("scorer")), port("scorer", "relevance"), **TOLERANCE)


def test_the_encoder_is_the_ports():
    model = load("encoder")
    expected = port("encoder", "logits").unflatten(0, (2, -1))  # [B, K, L, V]
    ours = logits(model)
    torch.testing.assert_close(ours[0], expected[0][:, [2, 4]], **TOLERANCE)
    torch.testing.assert_close(ours[1], expected[1][:, [3, 0]], **TOLERANCE)


@pytest.mark.parametrize(("masks", "loss"), [((), "loss"), (("mlm_mask",), "masked_loss")])
def test_the_encoders_loss_is_the_ports(masks, loss):
    arguments = port("encoder", "ids", "segments", "relevance", "labels", *masks)
    torch.testing.assert_close(load("encoder").loss(*arguments), port("encoder", loss), **TOLERANCE)


def test_the_encoders_loss_is_zero_where_nothing_is_asked():
    ids, segments, relevance, labels = port("encoder", "ids", "segments", "relevance", "labels")
    assert load("encoder").loss(ids, segments, relevance, labels, torch.zeros_like(labels)).item() == 0


def test_the_reader_is_the_ports():
    read = load("reader")(*port("reader", "ids", "segments", "body"))
    assert read.valid.any() and not read.valid.all()
    ours, theirs = read.scores[read.valid], port("reader", "span_scores")[read.valid]
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_the_readers_losses_and_prediction_are_the_ports():
    read = load("reader")(*port("reader", "ids", "segments", "body"))
    starts, ends, relevance, has_answers = port("reader", "starts", "ends", "relevance", "has_answers")
    correct = read.spans.correct(starts[:2], ends[:2])
    assert torch.equal(correct, port("reader", "correct")) and correct.any()
    terms = reader_loss(
        relevance[None], has_answers[None], read.scores[None], correct[None], read.valid[None]
    )
    torch.testing.assert_close(terms.retriever[0], port("reader", "retriever_loss"), **TOLERANCE)
    torch.testing.assert_close(terms.reader[0], port("reader", "reader_loss"), **TOLERANCE)
    torch.testing.assert_close((terms.retriever + terms.reader)[0], port("reader", "loss"), **TOLERANCE)
    best = best_span(relevance[None, :2], read.scores[None], read.valid[None])
    found = best.block[0], read.spans.starts[best.span], read.spans.ends[best.span]
    assert list(map(int, found)) == [int(v) for v in port("reader", "block_idx", "start_pos", "end_pos")]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_open_qa_answers_as_the_port_does_in_batches_of_any_size(batch):
    """In the port, of one only. The first word of the second question is not in the vocabulary."""
    answers = load("openqa").answer(QUESTIONS, batch_size=batch)
    assert [answer.text for answer in answers] == [case["answer"] for case in CASES]
    for answer in answers:
        written = answer.evidence[answer.start : answer.end]
        assert written.lower() == answer.text and written != ""


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_open_qa_losses_are_the_ports(mode):
    model = load("openqa").train(mode == "train")
    loss = model.loss(QUESTIONS, REFERENCES)
    for b in range(len(CASES)):
        expected = [PORT[f"openqa/{b}/{mode}/{name}"] for name in ("retriever_loss", "reader_loss", "loss")]
        torch.testing.assert_close(loss.terms.retriever[b], expected[0], **TOLERANCE)
        torch.testing.assert_close(loss.terms.reader[b], expected[1], **TOLERANCE)
        alone = model.loss(QUESTIONS[b : b + 1], REFERENCES[b : b + 1]).loss
        torch.testing.assert_close(alone, expected[2], **TOLERANCE)
        assert torch.equal(loss.has_answer[b], PORT[f"openqa/{b}/{mode}/has_answers"])
    assert loss.terms.reader[0] > 0 and loss.terms.retriever[2] == 0
    torch.testing.assert_close(loss.loss, (loss.terms.retriever + loss.terms.reader).mean())


def test_the_raw_has_answer_sees_what_the_join_cuts_off():
    """ "William Shakespeare" ends the fourth block, beyond reader_seq_len, and is written with capitals."""
    model = load("openqa").train()
    blocks = [model.records[row] for row in range(len(model.records))]
    long = next(row for row, block in enumerate(blocks) if len(block) > 90)
    holds = [b"William Shakespeare" in block for block in blocks]
    ids, top = model._retrieve(QUESTIONS[:1], 5)
    assert long in top.indices[0].tolist()
    raw = model.loss(QUESTIONS[:1], [["William Shakespeare"]], has_answer="raw").has_answer[0]
    cut = model.loss(QUESTIONS[:1], [["William Shakespeare"]]).has_answer[0]
    assert raw.tolist() == [holds[row] for row in top.indices[0].tolist()]
    assert cut.tolist() == [holds[row] and row != long for row in top.indices[0].tolist()]
    lower = model.loss(QUESTIONS[:1], [["william shakespeare"]], has_answer="raw").has_answer
    assert not lower.any()


@pytest.mark.parametrize("form", ["released", "paper"])
def test_fine_tuning_reaches_the_embedder_and_the_reader_and_not_the_index(form):
    model = load("openqa").train()
    model.loss(QUESTIONS, REFERENCES, form=form).loss.backward()
    assert model.embedder.cls.dense.weight.grad.abs().sum() > 0
    assert model.reader.qa_outputs.dense_output.weight.grad.abs().sum() > 0
    assert model.block_emb.grad is None and not model.block_emb.requires_grad


def test_fine_tuning_learns_an_answer():
    model, question = load("openqa").train(), QUESTIONS[:1]
    assert not exact_match(model.answer(question)[0].text, ["William Shakespeare"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(question, [["William Shakespeare"]]).loss.backward()
        optimizer.step()
    (answer,) = model.answer(question)
    assert exact_match(answer.text, ["William Shakespeare"])
    assert answer.evidence[answer.start : answer.end] == "William Shakespeare"
    assert model.training  # as it was before it answered


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_survives_its_files_with_every_key_of_the_layout(tmp_path, name, safe):
    model = load(name)
    for format_ in (not safe, safe):  # the second leaves nothing of the first behind
        model.save_pretrained(tmp_path, safe_serialization=format_)
    assert {path.name for path in tmp_path.glob("*model*")} == {
        "model.safetensors" if safe else "pytorch_model.bin"
    }
    again = CLASSES[name].from_pretrained(tmp_path)
    assert torch.equal(OUTPUT[name](again), OUTPUT[name](model))
    # The port's safetensors leave tied weights out; its .bin has every key, and legacy ones position_ids.
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} if name == "encoder" else set()
    theirs = {key for key in weights_of(GOLDENS / name) if "position_ids" not in key}
    assert set(weights_of(tmp_path)) == theirs | tied
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDENS / name))
    assert ours == theirs


def test_one_file_of_shards_is_read_as_one(tmp_path):
    folder = copy_of("openqa", tmp_path)
    weights = weights_of(folder)
    (folder / "pytorch_model.bin").unlink()
    halves = [sorted(weights)[::2], sorted(weights)[1::2]]
    for number, keys in enumerate(halves):
        save_file({key: weights[key].clone() for key in keys}, folder / f"{number}.safetensors")
    where = {key: f"{number}.safetensors" for number, keys in enumerate(halves) for key in keys}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert torch.equal(losses(OpenQA.from_pretrained(folder)), losses(load("openqa")))
    index.write_text(json.dumps({"weight_map": {"block_emb": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"must name files beside it, got '../elsewhere"):
        OpenQA.from_pretrained(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_a_converted_directory_computes_the_same(tmp_path, name):
    assert convert(GOLDENS / name, tmp_path / "a") == CLASSES[name].__name__
    convert(tmp_path / "a", tmp_path / "b")  # and again, from what it wrote
    for out in (tmp_path / "a", tmp_path / "b"):
        assert torch.equal(OUTPUT[name](CLASSES[name].from_pretrained(out)), OUTPUT[name](load(name)))
        assert not list(out.rglob("*.bin"))
    if name == "openqa":
        assert "block_emb" not in weights_of(out)
        again = OpenQA.from_pretrained(out)
        assert again.answer(QUESTIONS) == load(name).answer(QUESTIONS)
        again.save_pretrained(tmp_path / "c")
        assert OpenQA.from_pretrained(tmp_path / "c").answer(QUESTIONS) == again.answer(QUESTIONS)


def test_the_index_is_converted_to_bfloat16(tmp_path):
    seen = []
    convert(GOLDENS / "openqa", tmp_path, dtype="bfloat16", report=seen.append)
    assert seen == [len(load("openqa").records)]
    table = OpenQA.from_pretrained(tmp_path).block_emb
    assert table.dtype == torch.bfloat16
    assert torch.equal(torch.cat(list(table.shards)), load("openqa").block_emb.bfloat16())


def test_nothing_is_converted_that_cannot_be(tmp_path):
    folder, out = copy_of("openqa", tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match="out must be a new directory, got .*, which exists"):
        convert(folder, folder)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        convert(folder, out, dtype="int8")
    whole = (folder / "block_records.npy").read_bytes()
    (folder / "block_records.npy").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"block_records\.npy is refused"):
        convert(folder, out)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "architectures": ["RealmForever"]}))
    with pytest.raises(ValueError, match="architectures must be one of .* got 'RealmForever'"):
        convert(folder, out)
    assert not list(tmp_path.glob("out*"))


def test_a_scorer_with_a_query_embedder_of_its_own_keeps_it(tmp_path):
    model = Scorer(load("scorer").config, Embedder(load("scorer").config)).eval()
    model.save_pretrained(tmp_path)
    again = Scorer.from_pretrained(tmp_path)
    assert again.query_embedder is not again.embedder
    assert torch.equal(score(again), score(model))
    assert load("scorer").query_embedder is not None
    shared = load("scorer")
    assert shared.query_embedder is shared.embedder


def test_legacy_position_ids_are_there_and_ignored():
    assert "realm.embeddings.position_ids" in weights_of(GOLDENS / "embedder")
    assert not any("position_ids" in key for key in load("embedder").state_dict())


def test_a_vocabulary_with_crlf_gives_the_ports_wordpieces(tmp_path):
    folder = copy_of("openqa", tmp_path)
    assert b"\r\n" in (folder / "vocab.txt").read_bytes()
    tokenizer = OpenQA.from_pretrained(folder).tokenizer
    for b, question in enumerate(QUESTIONS):
        assert tokenizer.encode(question).ids == PORT[f"openqa/{b}/ids"][0].tolist()


def test_a_tokenizer_json_alone_will_do(tmp_path):
    folder = copy_of("openqa", tmp_path)
    OpenQA.from_pretrained(folder).save_pretrained(folder)
    (folder / "vocab.txt").unlink()
    assert torch.equal(losses(OpenQA.from_pretrained(folder)), losses(load("openqa")))
