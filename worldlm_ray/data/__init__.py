"""Text of a client: where it comes from, how it becomes tokens, and how batches are drawn from it.

text.py        files and built-in corpora -> documents
corpora.py     real text that every installation of this package already holds
tokenizer.py   bytes, or a Hugging Face tokenizer.json
special_tokens.py  which of its tokens no text may write, and which one ends a text
fidelity.py    how much of a text its tokenizer loses
split.py       documents -> blocks, and the part that each goes to
cache.py       blocks -> memory-mapped tokens of the train, validation and held-out parts
chat_records.py, chat_template.py, packing.py, conversations.py  conversations -> rows whose targets are the answers
dataset.py     tokens -> batches
preparation.py a data section -> its dataset
"""

from __future__ import annotations

from worldlm_ray.data.corpora import CORPORA, Corpus
from worldlm_ray.data.dataset import Dataset
from worldlm_ray.data.preparation import prepare, prepare_shards
from worldlm_ray.data.text import check_sources, describe, read_documents
from worldlm_ray.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "CORPORA",
    "Corpus",
    "Dataset",
    "Tokenizer",
    "check_sources",
    "describe",
    "load_tokenizer",
    "prepare",
    "prepare_shards",
    "read_documents",
]
