"""Any corpus of text as blocks of wordpieces: read, packed, stored, mapped.

>>> from realm_model.corpus import BlockStore, build_corpus, read_documents
>>> store = build_corpus(read_documents("wiki.jsonl"), "wiki")  # doctest: +SKIP
>>> BlockStore.open("wiki")[0].text  # doctest: +SKIP
'The first block of the first document.'
"""

from .build import build_corpus
from .documents import Document, read_documents
from .store import Block, BlockStore

__all__ = ["Block", "BlockStore", "Document", "build_corpus", "read_documents"]
