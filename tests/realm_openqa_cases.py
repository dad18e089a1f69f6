"""What the tests of Open-QA share: a corpus of a few sentences, a tiny model, their index, questions."""

import json
from types import SimpleNamespace

import torch

from realm_model.corpus import Document, build_corpus
from realm_model.openqa.folder import load_embedder
from realm_model.openqa.index import build_index
from realm_model.published import Embedder, KnowledgeAugmentedEncoder, PublishedConfig
from realm_model.published.tokenizer import write_tokenizer

CAPITALS = {"France": "Paris", "Norway": "Oslo", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima"}
DOCUMENTS = [
    Document(f"{land}#0", land, f"The capital of {land} is the city of {town}. It is old.")
    for land, town in CAPITALS.items()
]
QUESTIONS = [
    {"id": land, "question": f"what is the capital of {land}", "answers": [town], "paragraph": f"{land}#0"}
    for land, town in CAPITALS.items()
]
DROPOUT = 0.1


def make_folders(root, documents=DOCUMENTS):
    """corpus/, model/embedder, model/encoder, index/ and questions.jsonl under `root`."""
    store = build_corpus(documents, root / "corpus", vocabulary_size=150)
    config = PublishedConfig(
        vocab_size=store.tokenizer.get_vocab_size(),
        hidden_size=16,
        retriever_proj_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.2,  # so that even an untrained embedder tells blocks apart
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
        max_position_embeddings=48,
        span_hidden_size=8,
        max_span_width=4,
    )
    torch.manual_seed(0)
    for name, kind in (("embedder", Embedder), ("encoder", KnowledgeAugmentedEncoder)):
        kind(config).save_pretrained(root / "model" / name)
        write_tokenizer(store.tokenizer, root / "model" / name)
    build_index(load_embedder(root / "model"), store, root / "index")
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (root / "questions.jsonl").write_text(lines)
    return SimpleNamespace(
        store=store,
        model=root / "model",
        corpus=root / "corpus",
        index=root / "index",
        questions=root / "questions.jsonl",
    )
