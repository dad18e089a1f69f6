"""The start from nothing: a retriever that matches words and a reader that copies them, untrained."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from realm_model.config import ModelConfig, RunConfig, StageConfig, TextConfig, preset
from realm_model.corpus import Document, build_corpus
from realm_model.inputs import MASK, PAD, join, padded, query_inputs
from realm_model.lexical import SILENT, log_idf
from realm_model.masking import take_spans
from realm_model.model import Realm, bert_config, embed_all, encode
from realm_model.optimizer import parameter_groups
from realm_model.pretrain import Trainer, make_setting
from realm_model.reading import SUMS, start_reading

# Each document has two words of its own, and words of all.
OWN = [
    ("walrus", "quartz"),
    ("zephyr", "mango"),
    ("lantern", "gypsum"),
    ("falcon", "ribbon"),
    ("kelp", "onyx"),
]
TEXT = "The old {0} was there and it was seen by the people. In 1900 the {1} and the {0} were gone."


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    documents = [Document(f"d{i}", "", TEXT.format(*words)) for i, words in enumerate(OWN * 4)]
    documents = [replace(d, text=f"{d.text} {'Again. ' * (i // len(OWN))}") for i, d in enumerate(documents)]
    corpus = tmp_path_factory.mktemp("lexical") / "corpus"
    build_corpus(documents, corpus, vocabulary_size=300)
    return make_setting(
        RunConfig(
            threads=1,
            text=TextConfig(str(corpus), held_out=0.0, ict="span", ict_wordpieces=6, ict_queries=3),
            model=ModelConfig(
                hidden=128, layers=1, projection=128, shared_head=True, document_length=304, lexical=True
            ),
            ict=StageConfig(steps=2, batch=8, retriever_lr=1e-3),
        )
    )


@pytest.mark.parametrize("layers", [1, 2])
def test_an_untrained_retriever_finds_the_documents_that_share_rare_words(setting, layers):
    model = replace(setting.config.model, layers=layers)
    retriever = Trainer(replace(setting, config=replace(setting.config, model=model))).model.retriever.eval()
    rows = torch.cat(list(embed_all(retriever, setting.corpus.documents)))
    for number, (first, second) in enumerate(OWN):
        text = setting.tokenizer.encode(f"the {first} and the {second}?").ids
        top = (retriever.queries(query_inputs(torch.tensor([text]))) @ rows.T).topk(4).indices
        assert {int(row) % len(OWN) for row in top[0]} == {number}


def test_an_untrained_reader_copies_a_rare_word_of_the_document(setting):
    reader = Trainer(setting).model.reader.eval().requires_grad_(False)
    query = torch.tensor([setting.tokenizer.encode("the old").ids + [MASK]])
    ids = query_inputs(query)
    position = (ids == MASK).int().argmax(1, keepdim=True)
    for number, (first, _) in enumerate(OWN):
        hidden = reader(ids, setting.corpus.documents.read(torch.tensor([number])), position)
        scores = (hidden @ reader.weight.T + reader.bias)[0, 0]
        wanted, others = (
            max(float(scores[piece]) for piece in setting.tokenizer.encode(word).ids)
            for word in (first, OWN[number - 1][0])
        )
        assert wanted > others


def test_an_untrained_reader_of_two_layers_fills_a_mask_from_the_place_with_the_same_neighbours():
    config = ModelConfig(hidden=256, layers=1, reader_layers=2, heads=4, query_length=20, document_length=60)
    torch.manual_seed(0)
    model = Realm(config, 500)
    start_reading(model.reader, torch.full((500,), 1.0))
    model.eval().requires_grad_(False)
    words = torch.randperm(495)[:40] + 5  # a document of 40 words, each once
    places = torch.arange(2, 38)
    queries = torch.stack(
        [torch.cat([words[i - 2 : i], torch.tensor([MASK]), words[i + 1 : i + 3]]) for i in places]
    )
    ids = query_inputs(queries)
    hidden = model.read(ids, torch.full((len(ids), 1), 3), words.expand(len(ids), 1, 40))[:, 0, 0]
    filled = (hidden @ model.reader.weight.T + model.reader.bias).argmax(1)
    assert (filled == words[places]).float().mean() > 0.9
    # Beside another document there is nothing to copy.
    other = model.read(ids, torch.full((len(ids), 1), 3), words.flip(0).expand(len(ids), 1, 40))[:, 0, 0]
    confused = (other @ model.reader.weight.T + model.reader.bias).argmax(1)
    assert (confused == words[places]).float().mean() < 0.5


@pytest.mark.parametrize(("hidden", "heads"), [(64, 1), (64, 2), (64, 16), (8, 1)])
def test_a_reader_of_any_width_and_number_of_heads_can_begin(hidden, heads):
    config = ModelConfig(hidden=hidden, reader_layers=2, heads=heads, query_length=20, document_length=40)
    model = Realm(config, 100)
    start_reading(model.reader, torch.full((100,), 1.0))
    assert all(parameter.isfinite().all() for parameter in model.reader.parameters())


def test_an_untrained_reader_sees_where_the_words_of_a_question_stand():
    config = ModelConfig(hidden=256, layers=1, reader_layers=2, heads=4, query_length=20, document_length=80)
    torch.manual_seed(0)
    model = Realm(config, 500)
    start_reading(model.reader, torch.full((500,), 1.0))
    model.eval().requires_grad_(False)
    words = torch.randperm(495)[:70] + 5  # a document of 70 words, each once
    question = words[[31, 29, 30]]
    ids, segments = join(query_inputs(question[None]), words[None])
    places = torch.arange(5, 75)[None]  # of the document in the join
    before, behind = encode(model.reader.lm.bert, ids, segments, places)[0, :, SUMS : SUMS + 2].T
    far = torch.cat([torch.arange(20), torch.arange(42, 70)])
    assert before[33:36].mean() > 5 * before[far].abs().mean()
    assert behind[25:28].mean() > 5 * behind[far].abs().mean()
    assert before[33:36].min() > behind[33:36].max() and behind[25:28].min() > before[25:28].max()


def test_the_idf_is_of_documents_and_punctuation_has_none(setting):
    idf, piece = log_idf(setting.corpus.documents, setting.tokenizer), setting.tokenizer.token_to_id
    total = setting.corpus.documents.num_documents
    assert idf[piece(".")] == SILENT and idf[MASK] == SILENT
    assert idf[piece("the")] == SILENT  # in every document
    rare = min(setting.tokenizer.encode("kelp").ids, key=lambda i: -idf[i])
    assert idf[rare] == pytest.approx(torch.tensor((total + 1) / 4.5).log().log().item())


def test_queries_of_the_inverse_cloze_task_are_runs_of_their_bodies():
    bodies = torch.arange(1, 41).expand(200, 40).clone()
    bodies[:20, 3:] = PAD  # shorter than the shortest query
    spans, rest = take_spans(bodies, 4, 9, 0.5, torch.Generator().manual_seed(0))
    sizes = (spans != PAD).sum(1)
    assert set(sizes[20:].tolist()) == set(range(4, 10)) and set(sizes[:20].tolist()) == {3}
    assert torch.equal((spans != PAD) & (spans != bodies), torch.zeros_like(bodies, dtype=torch.bool))
    removed = (rest != bodies).any(1)
    assert 70 <= removed.sum() <= 130
    assert torch.equal((spans + rest)[removed], bodies[removed])


def test_the_last_layer_at_some_places_is_that_of_the_whole_bert():
    config = bert_config(ModelConfig(hidden=32, layers=2, heads=4), 50)
    torch.manual_seed(0)
    reader = Realm(ModelConfig(hidden=32, layers=2, heads=4), 50).reader.eval()
    ids = padded([[2, 7, 9, 3], [2, 8, 3], [2, *range(5, 30), 3]])
    ids, segments = join(ids, padded([[11, 12], [13], [14, 15, 16]]))
    positions = torch.tensor([[0, 2], [1, 0], [0, 20]])
    whole = reader.lm.bert(ids, (ids != PAD).long(), segments).last_hidden_state
    wanted = whole.gather(1, positions[..., None].expand(-1, -1, config.hidden_size))
    torch.testing.assert_close(encode(reader.lm.bert, ids, segments, positions), wanted)


def test_biases_and_layer_norms_do_not_decay(setting):
    model = Trainer(setting).model.retriever
    decaying, still = parameter_groups(model)
    assert still["weight_decay"] == 0.0 and decaying["weight_decay"] > 0
    assert len(decaying["params"]) + len(still["params"]) == len(list(model.parameters()))
    assert {p.dim() for p in decaying["params"]} == {2}
    assert all(p is not model.query_head[1].weight for p in decaying["params"])
    assert isinstance(model.query_head[1], nn.LayerNorm)


def test_a_checkpoint_does_not_begin_again(setting):
    trainer = Trainer(setting)
    trainer.advance()
    state = trainer.state_dict()
    resumed = Trainer(setting, fresh=False)
    resumed.load_state_dict(state)
    assert resumed.advance()["loss"] == trainer.advance()["loss"]


def test_the_preset_for_text_begins_lexically():
    assert preset("squad", "corpus").model.lexical and not preset("easy").model.lexical
