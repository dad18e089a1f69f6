"""One question to a trained model: what it retrieves, what it answers, and what each document was worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import realm_kernels as rk

from .evaluate import read
from .inputs import CLS, MASK, SEP, UNK
from .model import Realm
from .pretrain import Setting


@dataclass(frozen=True)
class Candidate:
    """One candidate document; title and body are empty for the null document."""

    title: str
    body: str
    prior: float  # p(z|x)
    likelihood: float  # p(y|z,x)
    posterior: float  # p(z|x,y)
    utility: float  # log p(y|z,x) - log p(y|null,x)


@dataclass(frozen=True)
class Answer:
    """The most likely filling of the masks, its log p(y|x), and the candidates, null document first."""

    text: str
    log_marginal: float
    candidates: list[Candidate]


def answer(setting: Setting, model: Realm, table: rk.ShardedTable, question: str) -> Answer:
    """Fill the [MASK] of a sentence; the table is the index of the setting's documents by the model.

    Raises ValueError for a sentence without a mask or one that is too long.
    """
    ids = [CLS, *setting.tokenizer.encode(question).ids, SEP]
    length = setting.config.model.query_length
    if MASK not in ids:
        raise ValueError(f'the question must hold [MASK] where the answer goes, got "{question}"')
    if len(ids) > length:
        raise ValueError(f"the question may have {length - 2} wordpieces, got {len(ids) - 2}")
    if UNK in ids:
        raise ValueError(f'the question has characters that the model never saw: "{question}"')
    positions = torch.tensor([[i for i, token in enumerate(ids) if token == MASK]])
    masked = (torch.tensor([ids]), positions, None)
    # The documents' part in the whole answer is asked, whatever the model was trained with.
    reading = read(model, setting.corpus, table, masked, setting.config.marginal, mode="sequence")
    worth = reading.posterior
    candidates = []
    for k, row in enumerate(reading.rows[0].tolist()):
        null = row == setting.corpus.documents.null
        title, body = ("", "") if null else setting.corpus.documents.texts(row)
        candidates.append(
            Candidate(
                title=title,
                body=body,
                prior=worth.prior[0, k].item(),
                likelihood=reading.log_likelihood[0, k].sum().exp().item(),
                posterior=worth.posterior[0, k].item(),
                utility=worth.utility[0, k].item(),
            )
        )
    words = [setting.tokenizer.id_to_token(i) for i in reading.predictions[0].tolist()]
    text = " ".join(words).replace(" ##", "")
    return Answer(text, worth.log_marginal[0].item(), candidates)
