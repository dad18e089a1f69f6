"""Makes the folder realm/ beside this file: tiny random models of the port that transformers held until
4.57, saved by it, and what they compute. Only needed to make the goldens again:

    python -m venv port && port/bin/pip install torch==2.13.0 transformers==4.57.6 numpy
    port/bin/python tests/goldens/make_realm_goldens.py

Each class has a folder as it is published. Both file formats occur, and so do the quirks of published files:
position_ids among the weights (embedder), CRLF line ends in vocab.txt (openqa), a query embedder stored twice
(scorer), tied weights left out (encoder). outputs.safetensors holds inputs and outputs, named class/what.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.models.deprecated.realm.configuration_realm import RealmConfig
from transformers.models.deprecated.realm.modeling_realm import (
    RealmEmbedder,
    RealmForOpenQA,
    RealmKnowledgeAugEncoder,
    RealmReader,
    RealmScorer,
)
from transformers.models.deprecated.realm.retrieval_realm import RealmRetriever
from transformers.models.deprecated.realm.tokenization_realm_fast import RealmTokenizerFast

HERE = Path(__file__).parent / "realm"
# The ids of the special tokens are not 0 to 4, as they are not in BERT's vocabulary.
SPECIAL = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "who wrote the play hamlet was written by william shakes ##peare in a town of poet ann born where"
BLOCKS = [
    "Hamlet was written by William Shakespeare.",
    "The town of Ann, where a poet was born",
    "",
    "The play was written in a town. The play Hamlet was written by a poet, William Shakespeare of the town.",
    "William was born in the town; William wrote the play Hamlet \u2014 Hámlet.",
    "Ann was born in a town of Ann",
]
QUESTIONS = [
    ("Who wrote the play Hamlet?", ["William Shakespeare", "Shakespeare"]),
    ("where was zzz William born", ["in the town", "nowhere"]),  # zzz is unknown
    ("who was Ann", ["by the poet of the town"]),  # in no block
]
SIZES = dict(
    hidden_size=8,
    retriever_proj_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_candidates=3,
    intermediate_size=12,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=24,
    span_hidden_size=5,
    max_span_width=3,
    reader_beam_size=2,
    reader_seq_len=18,
    num_block_records=len(BLOCKS),
    searcher_beam_size=5,
)


def randomize(model: torch.nn.Module) -> None:
    """Every weight and bias at random: a norm or a bias that is left out must show."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)


def inputs(vocabulary: int, *sizes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random ids, attention mask, segments; rows of different lengths."""
    ids = torch.randint(len(SPECIAL), vocabulary, sizes)
    length = torch.randint(sizes[-1] // 2, sizes[-1] + 1, sizes[:-1])
    mask = torch.arange(sizes[-1]) < length[..., None]
    segments = ((torch.arange(sizes[-1]) >= sizes[-1] // 3) & mask).long()
    return ids.masked_fill(~mask, 0), mask.long(), segments


def save(model: torch.nn.Module, name: str, safe: bool) -> None:
    model.save_pretrained(HERE / name, safe_serialization=safe)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    torch.manual_seed(0)
    words = sorted({*WORDS.split(), *".,;?", *"abcdefghiklmnoprstuvwxy"} - {"zzz"})
    vocabulary = [*SPECIAL, *words]
    config = RealmConfig(vocab_size=len(vocabulary), **SIZES)
    out: dict[str, torch.Tensor] = {}

    embedder = RealmEmbedder(config).eval()
    randomize(embedder)
    ids, mask, segments = inputs(len(vocabulary), 4, 9)
    out["embedder/ids"], out["embedder/segments"] = ids, segments
    out["embedder/projected"] = embedder(ids, mask, segments).projected_score
    save(embedder, "embedder", safe=False)
    path = HERE / "embedder" / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["realm.embeddings.position_ids"] = torch.arange(SIZES["max_position_embeddings"])[None]
    torch.save(weights, path)

    scorer = RealmScorer(config).eval()
    randomize(scorer)
    ids, mask, segments = inputs(len(vocabulary), 2, 7)
    documents, document_mask, document_segments = inputs(len(vocabulary), 2, SIZES["num_candidates"], 11)
    out["scorer/ids"], out["scorer/segments"] = ids, segments
    out["scorer/documents"], out["scorer/document_segments"] = documents, document_segments
    out["scorer/relevance"] = scorer(
        ids,
        mask,
        segments,
        candidate_input_ids=documents,
        candidate_attention_mask=document_mask,
        candidate_token_type_ids=document_segments,
    ).relevance_score
    save(scorer, "scorer", safe=False)

    encoder = RealmKnowledgeAugEncoder(config).eval()
    randomize(encoder)
    ids, mask, segments = inputs(len(vocabulary), 2, SIZES["num_candidates"], 12)
    labels = torch.full((2, 12), -100)
    labels[0, [2, 4]] = torch.tensor([9, 20])
    labels[1, 3] = 13
    relevance = torch.randn(2, SIZES["num_candidates"])
    kwargs = dict(attention_mask=mask, token_type_ids=segments, relevance_score=relevance, labels=labels)
    out["encoder/ids"], out["encoder/segments"] = ids, segments
    out["encoder/labels"], out["encoder/relevance"] = labels, relevance
    plain = encoder(ids, **kwargs)
    out["encoder/logits"], out["encoder/loss"] = plain.logits, plain.loss
    mlm_mask = torch.zeros(2, 12, dtype=torch.long)
    mlm_mask[0, 2] = mlm_mask[1, 3] = mlm_mask[1, 4] = 1  # one label left out, one position without a label
    out["encoder/mlm_mask"] = mlm_mask
    out["encoder/masked_loss"] = encoder(ids, mlm_mask=mlm_mask, **kwargs).loss
    save(encoder, "encoder", safe=True)

    reader = RealmReader(config).eval()
    randomize(reader)
    ids, mask, segments = inputs(len(vocabulary), 2, 13)
    body = (segments == 1) & (torch.arange(13) < mask.sum(-1, keepdim=True) - 1)
    relevance = torch.randn(5)
    starts = torch.tensor([[5, 6], [5, -1], [-1, -1], [3, -1], [-1, -1]])
    ends = torch.tensor([[5, 8], [8, -1], [-1, -1], [3, -1], [-1, -1]])  # one span is wider than the widest
    has_answers = starts[:, 0] >= 0
    read = reader(
        ids,
        mask,
        segments,
        relevance_score=relevance,
        block_mask=body,
        start_positions=starts,
        end_positions=ends,
        has_answers=has_answers,
    )
    out["reader/ids"], out["reader/segments"], out["reader/body"] = ids, segments, body
    out["reader/relevance"], out["reader/starts"], out["reader/ends"] = relevance, starts, ends
    out["reader/has_answers"], out["reader/correct"] = has_answers, read.reader_correct
    for name in ("loss", "retriever_loss", "reader_loss", "block_idx", "start_pos", "end_pos"):
        out[f"reader/{name}"] = getattr(read, name)
    hidden = reader.realm(ids, mask, segments).last_hidden_state
    out["reader/span_scores"] = reader.qa_outputs(hidden, body)[0]
    save(reader, "reader", safe=False)

    folder = HERE / "openqa"
    folder.mkdir()
    (folder / "vocab.txt").write_bytes(b"".join(word.encode() + b"\r\n" for word in vocabulary))
    (HERE / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    tokenizer = RealmTokenizerFast(str(HERE / "vocab.txt"))
    (HERE / "vocab.txt").unlink()
    records = np.array([block.encode() for block in BLOCKS], dtype=object)
    np.save(folder / "block_records.npy", records)
    openqa = RealmForOpenQA(config, RealmRetriever(records, tokenizer))
    randomize(openqa)
    openqa.block_emb = 0.3 * torch.randn(len(BLOCKS), SIZES["retriever_proj_size"])
    for block, (question, _) in ((0, QUESTIONS[0]), (4, QUESTIONS[1])):  # so that answers are in the top two
        projected = openqa.eval().embedder(**tokenizer([question], return_tensors="pt")).projected_score
        openqa.block_emb[block] += 0.1 * projected[0].detach()
    answers = []
    for number, (question, references) in enumerate(QUESTIONS):
        encoded = tokenizer([question], return_tensors="pt")
        answer_ids = tokenizer(references, add_special_tokens=False).input_ids
        for mode in ("eval", "train"):  # with dropout 0 they differ by the number of blocks retrieved only
            result = openqa.train(mode == "train")(**encoded, answer_ids=answer_ids)
            read = result.reader_output
            for name in ("loss", "retriever_loss", "reader_loss"):
                out[f"openqa/{number}/{mode}/{name}"] = getattr(read, name)
            out[f"openqa/{number}/{mode}/has_answers"] = read.retriever_correct
        answers.append(tokenizer.decode(result.predicted_answer_ids))
        out[f"openqa/{number}/ids"] = encoded.input_ids
        out[f"openqa/{number}/predicted"] = result.predicted_answer_ids
    save(openqa, "openqa", safe=False)

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}
    save_file(tensors, HERE / "outputs.safetensors")
    cases = [
        {"question": question, "references": references, "answer": answer}
        for (question, references), answer in zip(QUESTIONS, answers, strict=True)
    ]
    (HERE / "openqa.json").write_text(json.dumps({"cases": cases, "blocks": BLOCKS}, indent=2) + "\n")


if __name__ == "__main__":
    main()
