"""How much of a text its tokenizer loses.

A loss is counted in bits per byte of the original text. A tokenizer that drops characters leaves less to predict, so
its loss looks better than it is.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data.text import describe, find_sources, read_documents
from worldlm_ray.data.tokenizer import Tokenizer
from worldlm_ray.errors import DataError

SAMPLE_CHARS = 100_000
"""Largest sample of a text, in characters."""
SAMPLE_FILES = 10
"""Files that a sample is taken from, at their beginnings. They are spread evenly over all files."""
SAID, REFUSED = 0.01, 0.5
"""Fractions of lost characters: above the first there is a warning, above the second an error."""

_KNOWN = dict[str, float]()


def check_fidelity(config: DataConfig, tokenizer: Tokenizer, *, key: str, known_as: str) -> list[str]:
    """Encode and decode a sample of a text.

    Args:
        config: the data section, without a pool.
        tokenizer: of the text.
        key: dotted key of the section, for messages.
        known_as: changes with the text and the tokenizer. A process checks each text once.

    Returns:
        A warning where some characters are lost; else nothing.

    Raises:
        DataError: most of the characters are lost.
    """
    if tokenizer.fingerprint == "bytes":  # exact by construction
        return []
    if known_as not in _KNOWN:
        _KNOWN[known_as] = lost(_sample(config, key), tokenizer)
    share = _KNOWN[known_as]
    said = f"the tokenizer loses {share:.0%} of the characters in a sample of {describe(config)}"
    cure = "give a tokenizer that was made for such text, or `bytes`"
    if share > REFUSED:
        raise DataError(f"{key}.tokenizer: {config.tokenizer}: {said}; {cure}")
    return [f"{said}, and losses leave them out; {cure}"] if share > SAID else []


def lost(texts: Iterable[str], tokenizer: Tokenizer) -> float:
    """Fraction of the characters of some texts that encoding and decoding loses.

    White space, upper case and the way in which a character is composed do not count. A character that becomes the
    unknown token is lost.
    """
    missing = total = 0
    for text in texts:
        ids = tokenizer.encode(text)
        if tokenizer.unknown is not None:
            ids = ids[np.asarray(ids) != tokenizer.unknown]
        before = _counted(text)
        missing += (before - _counted(tokenizer.decode(ids))).total()
        total += before.total()
    return missing / total if total else 0.0


def _counted(text: str) -> Counter[str]:
    return Counter("".join(unicodedata.normalize("NFKD", text).casefold().split()))


def _sample(config: DataConfig, key: str) -> Iterator[str]:
    paths = find_sources(config, key).paths
    some = paths[:: -(-len(paths) // SAMPLE_FILES)] if paths else []
    sources = [[str(path)] for path in some] if len(paths) > 1 and config.max_bytes is None else [config.files]
    for files in sources:
        left = SAMPLE_CHARS // len(sources)
        section = DataConfig(**(vars(config) | {"files": files}))
        for document in islice(read_documents(section, key), left):
            yield document[:left]
            left -= len(document)
            if left <= 0:
                break
