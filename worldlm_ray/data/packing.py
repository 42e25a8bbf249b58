"""Conversations -> rows of a fixed length, in which the tokens of answers are marked.

A row holds one token more than a sequence, as a window of text does. Whole conversations share a row where they fit, in
a fixed order; the rest of a row is padding. A token sees all tokens before it in its row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from worldlm_ray.data import special_tokens
from worldlm_ray.data.cache import PartMeta
from worldlm_ray.data.chat_template import Rendered
from worldlm_ray.errors import DataError

Ids = npt.NDArray[np.uint32]
COUNTED = np.uint32(1 << 31)
"""Added to the id of a token that is a target. Ids are far below it."""
OPEN = 64
"""Rows that a conversation may still go to: the newest."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a conversation, as many as a row has."""

    ids: Ids
    """With `COUNTED` where a token is a target."""
    bytes: int
    """UTF-8 bytes of the answers in it, without special tokens: to end a turn costs nats and says nothing."""
    is_cut: bool


class Encoder:
    """Encodes rendered conversations with a tokenizer.json.

    Args:
        files: tokenizer.json and the files beside it, by name.
        size: tokens of a row.
    """

    def __init__(self, files: Mapping[str, bytes], *, size: int) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_buffer(files[special_tokens.TOKENIZER])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Others would leave white space out of a token's place in the text.
        self._tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        special = special_tokens.find(files, self._tokenizer.get_vocab(with_added_tokens=True))
        self.control = {index: str(self._tokenizer.id_to_token(index)) for index in sorted(special.control)}
        """The special tokens by id."""
        self._size = size

    def encode(self, rendered: Rendered) -> Encoded:
        """The tokens of a conversation. A token counts if a part of an answer lies in it.

        Raises:
            DataError: the tokenizer cannot encode it.
        """
        text = rendered.text
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # a word outside a vocabulary that has no unknown token
            detail = " ".join(str(error).split())
            raise DataError(f"the tokenizer cannot encode {text[:40]!r} ({detail}); use one that can") from error
        ids = np.asarray(found.ids[: self._size], np.uint32)
        places = np.asarray(found.offsets[: self._size], np.int64).reshape(-1, 2)
        begins, ends = places[:, 0], places[:, 1]
        counts, size = np.zeros(len(ids), bool), 0
        for begin, end in rendered.answers:
            inside = (begins < end) & (ends > begin) & (ends > begins)
            if inside.any():
                counts |= inside
                size += len(text[begin : min(end, int(ends[inside].max()))].encode())
                size -= sum(len(self.control.get(index, "").encode()) for index in ids[inside].tolist())
        counts[:1] = False  # nothing that belongs to it comes before it
        return Encoded(np.where(counts, ids | COUNTED, ids), size, is_cut=len(found.ids) > self._size)


class Packer:
    """Packs conversations into rows: each goes to the first open row with room for it (first fit).

    Args:
        size: tokens of a row.
        padding: id at the end of a row.
        write: takes each full row [size], and each that is closed.
    """

    def __init__(self, size: int, *, padding: int, write: Callable[[Ids], None]) -> None:
        self._size, self._padding, self._write = size, padding, write
        self._open = list[Ids]()
        """Without their padding, the oldest first."""

    def add(self, ids: Ids) -> None:
        """Add a conversation of at most `size` tokens."""
        for index, row in enumerate(self._open):
            if len(row) + len(ids) <= self._size:
                self._open[index] = np.concatenate([row, ids])
                if len(self._open[index]) == self._size:
                    self._close(index)
                return
        self._open.append(ids)
        if len(ids) == self._size:
            self._close(len(self._open) - 1)
        elif len(self._open) > OPEN:
            self._close(0)

    def end(self) -> None:
        """Close all rows."""
        while self._open:
            self._close(0)

    def _close(self, index: int) -> None:
        row = self._open.pop(index)
        self._write(np.concatenate([row, np.full(self._size - len(row), self._padding, np.uint32)]))


class PartWriter:
    """Writes the rows of one part of a client's conversations.

    Args:
        handle: the part's file.
        size: tokens of a row.
        padding: id at the end of a row.
    """

    def __init__(self, handle: BinaryIO, *, size: int, padding: int) -> None:
        self._handle, self._hash = handle, hashlib.blake2b()
        self._packer = Packer(size, padding=padding, write=self._write)
        self._tokens = self._bytes = 0

    def add(self, encoded: Encoded) -> None:
        """Add a conversation."""
        self._packer.add(encoded.ids)
        self._bytes += encoded.bytes

    def end(self) -> PartMeta:
        """Write the rows that are still open. Returns what meta.json says of the part."""
        self._packer.end()
        return PartMeta(tokens=self._tokens, bytes=self._bytes, digest=self._hash.hexdigest()[:32])

    def _write(self, row: Ids) -> None:
        raw = row.tobytes()
        self._handle.write(raw)
        self._hash.update(raw)
        self._tokens += len(row)
