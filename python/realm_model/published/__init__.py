"""The published REALM checkpoints, as directories on disk: read, run, written.

Layout and key names are those of the port that transformers held from 4.16 to 4.57, and so are the outputs.

>>> from realm_model.published import OpenQA
>>> model = OpenQA.from_pretrained("realm-orqa-nq-openqa")  # doctest: +SKIP
>>> model.answer(["Who is the pioneer in modern computer science?"])[0].text  # doctest: +SKIP
'alan mathison turing'
"""

from .config import PublishedConfig
from .conversion import convert
from .models import Embedder, KnowledgeAugmentedEncoder, Reader, Scorer
from .openqa import Answer, OpenQA, OpenQALoss, ReadBlock
from .records import BlockRecords

__all__ = [
    "Answer",
    "BlockRecords",
    "Embedder",
    "KnowledgeAugmentedEncoder",
    "OpenQA",
    "OpenQALoss",
    "PublishedConfig",
    "ReadBlock",
    "Reader",
    "Scorer",
    "convert",
]
