"""Open-QA on a corpus of one's own: the index and whose it is, the parts as one, what an answer says."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from realm_openqa_cases import CAPITALS, DOCUMENTS, make_folders
from realm_published_cases import CASES, GOLDENS, QUESTIONS, load

import realm_kernels as rk
from realm_model.corpus import Document, build_corpus
from realm_model.openqa import index as index_module
from realm_model.openqa.assemble import Beams, assemble
from realm_model.openqa.folder import load_embedder, with_words, words_in
from realm_model.openqa.index import block_inputs, build_index, open_index
from realm_model.published import OpenQA


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("openqa"))


def test_an_index_holds_the_embedding_of_every_block(folders):
    embedder, store = load_embedder(folders.model), folders.store
    table, identity = open_index(folders.index)
    for row in range(len(store)):
        text = f"{store[row].title_text} [SEP] {store[row].text}"
        ids = store.tokenizer.encode(text).ids
        segments = [int(place > ids.index(ids[-1])) for place in range(len(ids))]
        alone = embedder(torch.tensor([ids]), torch.tensor([segments]))
        torch.testing.assert_close(table.rows(torch.tensor([row])), alone.detach(), rtol=0, atol=1e-5)
    assert identity.corpus == store.fingerprint


def test_a_block_longer_than_the_encoder_keeps_its_separator(folders):
    ids, segments = block_inputs(folders.store, range(1), 9)
    sep = folders.store.tokenizer.token_to_id("[SEP]")
    assert ids.shape == (1, 9) and ids[0, -1] == sep and segments[0, -1] == 1
    longer, _ = block_inputs(folders.store, range(1), 48)
    assert ids[0, :-1].tolist() == longer[0, :8].tolist()


def test_an_index_that_fails_half_way_leaves_the_old_one_with_its_own_identity(folders, monkeypatch):
    before, identity = open_index(folders.index)
    embedder = load_embedder(folders.model)
    with torch.no_grad():
        embedder.cls.dense.bias.add_(1.0)

    def full(self, path):
        write(self, path)
        raise OSError("disk full")

    write = index_module.Identity.write
    monkeypatch.setattr(index_module.Identity, "write", full)
    with pytest.raises(OSError, match="disk full"):
        build_index(embedder, folders.store, folders.index)
    after, found = open_index(folders.index)
    assert found == identity and torch.equal(after.shards[0], before.shards[0])


def test_an_index_made_again_is_the_new_models(folders, tmp_path):
    embedder = load_embedder(folders.model)
    first = build_index(embedder, folders.store, tmp_path / "index")
    with torch.no_grad():
        embedder.cls.dense.bias.add_(1.0)
    second = build_index(embedder, folders.store, tmp_path / "index", dtype=torch.bfloat16)
    table, identity = open_index(tmp_path / "index")
    assert identity == second != first and table.dtype == torch.bfloat16
    assert len(list((tmp_path / "index").glob("identity-*"))) == 1


def test_folders_that_do_not_belong_together_are_told_by_fingerprint(folders, tmp_path):
    words = (folders.corpus / "vocab.txt").read_text().splitlines()
    same = build_corpus(DOCUMENTS[1:], tmp_path / "same", vocabulary=folders.corpus / "vocab.txt")
    own, found = folders.store.fingerprint[:12], same.fingerprint[:12]
    with pytest.raises(ValueError, match=f"made with the corpus {own}, this one is {found}"):
        assemble(folders.model, tmp_path / "same", folders.index)
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:-1], "other"]) + "\n")
    build_corpus(DOCUMENTS, tmp_path / "other", vocabulary=tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match="must know the words of the corpus, lacks 1 .* such as 'other'"):
        assemble(folders.model, tmp_path / "other", folders.index)
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "more"]) + "\n")
    build_corpus(DOCUMENTS, tmp_path / "larger", vocabulary=tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=f"a vocabulary of {len(words) + 1} wordpieces.* only {len(words)}"):
        assemble(folders.model, tmp_path / "larger", folders.index)
    embedder = load_embedder(folders.model)
    with torch.no_grad():
        embedder.cls.dense.bias.add_(1.0)
    embedder.save_pretrained(tmp_path / "moved" / "embedder")
    with pytest.raises(ValueError, match="the index .* and the model .*moved do not belong together"):
        assemble(tmp_path / "moved", folders.corpus, folders.index)


def test_a_published_model_serves_a_corpus_of_its_vocabulary_in_the_stores_order(tmp_path):
    """The special tokens are 0, 3, 4, 5 and 6 in its vocab.txt, and 0 to 4 in the store."""
    published, texts = load("openqa"), [f"{case['answer']} was born in the town." for case in CASES]
    documents = [Document(str(number), "", text, spans=((0, 3),)) for number, text in enumerate(texts)]
    store = build_corpus(documents, tmp_path / "corpus", vocabulary=GOLDENS / "openqa" / "vocab.txt")
    assert store.tokenizer.token_to_id("[CLS]") != published.tokenizer.token_to_id("[CLS]")
    embedder = load_embedder(GOLDENS / "openqa")
    words = words_in(GOLDENS / "openqa", store, embedder.config)
    build_index(with_words(embedder, words), store, tmp_path / "index")
    ours = assemble(GOLDENS / "openqa", tmp_path / "corpus", tmp_path / "index", Beams(reader=2, length=18))
    cls, sep = (published.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    rows = []
    for text in texts:
        ids = published.tokenizer.encode(text, add_special_tokens=False).ids
        ids, segments = [cls, sep, *ids, sep], [0, 0, *[1] * len(ids), 1]
        rows.append(published.embedder(torch.tensor([ids]), torch.tensor([segments])).detach())
    table, _ = open_index(tmp_path / "index")
    torch.testing.assert_close(torch.cat(list(table.shards)), torch.cat(rows), rtol=0, atol=1e-5)
    config = replace(published.config, num_block_records=len(texts))
    records = [text.encode() for text in texts]
    theirs = OpenQA(config, torch.cat(list(table.shards)), records, published.tokenizer)
    theirs.embedder, theirs.reader = published.embedder, published.reader
    for own, other in zip(ours.model.answer(QUESTIONS), theirs.eval().answer(QUESTIONS), strict=True):
        assert (own.text, own.block, own.start, own.end) == (other.text, other.block, other.start, other.end)
        assert own.score == pytest.approx(other.score, abs=1e-4)


def test_a_table_that_no_one_signed_is_no_index(folders, tmp_path):
    table, _ = open_index(folders.index)
    table.save(tmp_path / "bare")
    with pytest.raises(ValueError, match="cannot read .*identity-000001.json"):
        assemble(folders.model, folders.corpus, tmp_path / "bare")


def test_an_answer_explains_itself_by_bayes(folders):
    model = assemble(folders.model, folders.corpus, folders.index, Beams(reader=3)).model
    question = "what is the capital of France"
    (answer,) = model.answer([question])
    assert [block.block for block in answer.read] == model.retrieve([question], 3).indices[0].tolist()
    prior = torch.tensor([block.relevance for block in answer.read]).softmax(0)
    worth = torch.tensor([[block.prior, block.likelihood, block.posterior] for block in answer.read])
    torch.testing.assert_close(worth[:, 0], prior)
    joint = worth[:, 0] * worth[:, 1]
    torch.testing.assert_close(worth[:, 2], joint / joint.sum())
    utility = torch.tensor([block.utility for block in answer.read])  # against p(y|x) of the blocks read
    torch.testing.assert_close(utility, (worth[:, 1] / joint.sum()).log())
    best = next(block for block in answer.read if block.block == answer.block)
    assert (answer.start, answer.end) in best.places and best.likelihood > 0
    for block in answer.read:
        assert all(block.text[a:b].lower() == answer.text for a, b in block.places)
        assert (block.likelihood > 0) == bool(block.places)


def test_the_likelihood_is_the_answers_share_of_a_blocks_spans(folders):
    """By hand: one block, every span scored, those that read as the answer summed."""
    model = assemble(folders.model, folders.corpus, folders.index, Beams(reader=1)).model
    with torch.no_grad():
        for parameter in model.reader.qa_outputs.parameters():
            parameter.zero_()  # every span of a block is as likely as any other
    (answer,) = model.answer(["what is the capital of Peru"])
    length = len(folders.store[answer.block].body)
    spans = sum(length - width + 1 for width in range(1, model.config.max_span_width + 1))
    assert answer.read[0].likelihood == pytest.approx(len(answer.read[0].places) / spans, rel=1e-5)


def test_a_model_without_an_encoder_retrieves_and_says_that_it_cannot_read(folders, tmp_path):
    load_embedder(folders.model).save_pretrained(tmp_path / "ict" / "embedder")
    parts = assemble(tmp_path / "ict", folders.corpus, folders.index)
    assert not parts.can_read and not assemble(folders.model, folders.corpus, folders.index).can_read
    found = parts.model.retrieve([f"the capital of {land}" for land in CAPITALS], 5, batch_size=2)
    table, _ = open_index(folders.index)
    queries = torch.cat(
        [
            parts.model.embedder(torch.tensor([folders.store.tokenizer.encode(f"the capital of {land}").ids]))
            for land in CAPITALS
        ]
    )
    expected = rk.mips_topk(queries.detach(), table, 5)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["index", "model/embedder", "model/encoder"])
def test_what_is_cut_short_is_named(tmp_path, what):
    folders = make_folders(tmp_path)
    (path,) = (tmp_path / what).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises((ValueError, OSError), match=path.name):
        assemble(folders.model, folders.corpus, folders.index)
