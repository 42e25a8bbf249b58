"""Tokenizers: raw bytes, or a Hugging Face tokenizer.json.

Held-out loss is compared across tokenizers in bits per byte. So each tokenizer also says how many bytes of
text each of its tokens stands for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from worldlm_ray.data import special_tokens
from worldlm_ray.errors import DataError
from worldlm_ray.storage import filesystem

Tokens = npt.NDArray[np.unsignedinteger[Any]]
ENCODING = 2
"""Part of every fingerprint: raise it when the same file encodes a text differently."""
MOST_TOKENS = 1 << 24
"""A larger id means a damaged file: a table with that many rows would fill the memory."""
_CURE = "give `bytes`, or a Hugging Face tokenizer.json or its folder"


class Tokenizer(Protocol):
    """What a dataset needs from a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever any text could be encoded differently."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """What `encode` returns: uint16, or uint32 where ids do not fit."""

    @property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, [vocab_size]; 0 for ids without a token."""

    @property
    def end(self) -> int | None:
        """Id of the token between two documents, which replaces a blank line; None if there is none."""

    @property
    def unknown(self) -> int | None:
        """Id of the unknown token; None if there is none."""

    def encode(self, text: str) -> Tokens:
        """Token ids of a text, without special tokens: not at its ends, nor where the text spells one."""

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of token ids; bytes that are not valid UTF-8 are replaced."""


class ByteTokenizer:
    """Every byte of UTF-8 is a token. Exact, and needs no file."""

    vocab_size = 256
    fingerprint = "bytes"
    dtype = np.dtype(np.uint16)
    end = None
    unknown = None

    @property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """One byte per token, [256]."""
        return np.ones(self.vocab_size, dtype=np.int64)

    def encode(self, text: str) -> Tokens:
        """The UTF-8 bytes of a text."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of bytes; those that are not valid UTF-8 are replaced."""
        return np.asarray(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class JsonTokenizer:
    """A Hugging Face tokenizer.json.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing or holds no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        # tokenizers costs 50 ms to import: clients that train on bytes do not pay for it.
        import tokenizers

        raw = read_file(path)
        files = {special_tokens.TOKENIZER: raw} | files_beside(path, (special_tokens.SETTINGS, special_tokens.MAP))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # tokenizers raises bare exceptions from Rust
            detail = " ".join(str(error).split())
            raise DataError(f"tokenizer {path}: is not a tokenizer.json ({detail}); {_CURE}") from error
        # Many files carry the truncation of the model they were made for, which would silently drop text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise DataError(f"tokenizer {path}: has an empty vocabulary; {_CURE}")
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > MOST_TOKENS:
            raise DataError(
                f"tokenizer {path}: has the id {self.vocab_size - 1:,}, ids are below {MOST_TOKENS:,}; {_CURE}"
            )
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 65_536 else np.uint32)
        try:
            special = special_tokens.find(files, vocab)
        except DataError as error:
            raise DataError(f"{path.parent}/{error}") from error
        self.end, self.unknown = special.end, special.unknown
        self.fingerprint = hashlib.blake2b(raw + f"{ENCODING} {self.end}".encode(), digest_size=16).hexdigest()
        self.token_bytes = _token_bytes(json.loads(raw), vocab, size=self.vocab_size)
        if self.end is not None:
            self.token_bytes[self.end] = len("\n\n")  # the blank line that it stands for
        # Text that spells a special token is text.
        self._tokenizer.encode_special_tokens = True
        self._is_control = np.zeros(self.vocab_size, dtype=bool)
        self._is_control[list(special.control)] = True
        self._spell = special_tokens.speller(json.loads(raw), vocab)
        if self._tokenizer.decoder is None and '"ByteLevel"' in json.dumps(json.loads(raw).get("pre_tokenizer")):
            self._tokenizer.decoder = (
                tokenizers.decoders.ByteLevel()
            )  # otherwise a text would be read as the names of its bytes

    def encode(self, text: str) -> Tokens:
        """Token ids of a text, without special tokens: not at its ends, nor where the text spells one."""
        # One text at a time: batches start threads, which warn or hang when the process forks later.
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # a word outside a vocabulary that has no unknown token
            detail = " ".join(str(error).split())
            raise DataError(f"the tokenizer cannot encode {text[:40]!r} ({detail}); use one that can") from error
        encoded: Tokens = np.asarray(ids, dtype=self.dtype)
        if self._is_control[encoded].any():  # a vocabulary may have a special token's name as an ordinary word, too
            names = {index: str(self._tokenizer.id_to_token(index)) for index in set(ids) if self._is_control[index]}
            spelled = [self._spell(names[index]) if index in names else [index] for index in ids]
            encoded = np.asarray([index for found in spelled for index in found], dtype=self.dtype)
        return encoded

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False))


def load_tokenizer(spec: str | None) -> Tokenizer:
    """Load the tokenizer that `data.tokenizer` names.

    Args:
        spec: `bytes`, or where a tokenizer.json lies: see `tokenizer_file`; None is `bytes`.

    Raises:
        DataError: the file is missing or holds no tokenizer.
    """
    return ByteTokenizer() if spec is None or spec == "bytes" else JsonTokenizer(tokenizer_file(spec))


def check_tokenizer(spec: str | None) -> None:
    """Check that `data.tokenizer` names a tokenizer, without loading it.

    Raises:
        DataError: as `load_tokenizer`.
    """
    if spec is None or spec == "bytes":
        return
    path = tokenizer_file(spec)
    try:
        state = json.loads(read_file(path))
    except ValueError as error:
        raise DataError(f"tokenizer {path}: is not JSON; {_CURE}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise DataError(f"tokenizer {path}: holds no tokenizer (it has no `model`); {_CURE}")


def tokenizer_file(spec: str) -> Path:
    """The tokenizer.json that `data.tokenizer` names, as a file or as its folder, locally or in an object store."""
    path = filesystem.place(spec)
    with filesystem.refusals(path):
        return path / "tokenizer.json" if path.is_dir() else path


def files_beside(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The files of some names that lie beside a tokenizer.json, by name.

    Raises:
        DataError: one of them cannot be read.
    """
    found = dict[str, bytes]()
    if path.name != special_tokens.TOKENIZER:  # files beside a tokenizer of another name belong to another model
        return found
    for name in names:
        file = path.with_name(name)
        with filesystem.refusals(file):
            if file.is_file():
                found[name] = read_file(file)
    return found


def read_file(path: Path) -> bytes:
    """The contents of a file of a tokenizer.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with filesystem.refusals(path):
            raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be read ({error.strerror or error}); {_CURE}") from error
    if filesystem.is_lfs_pointer(raw):
        raise DataError(f"tokenizer {path}: is a pointer of git-lfs; run `git lfs pull` in {path.parent}")
    return raw


def _token_bytes(state: Mapping[str, Any], vocab: Mapping[str, int], *, size: int) -> npt.NDArray[np.int64]:
    """Bytes per id: exact for byte-level BPE and byte fallback, close for the others."""
    byte_level = '"ByteLevel"' in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
    word_piece = state["model"].get("type") == "WordPiece"
    added = {str(token["content"]) for token in state.get("added_tokens") or []}
    lengths = np.zeros(size, dtype=np.int64)
    for token, index in vocab.items():
        if token in added:
            lengths[index] = len(token.encode())
        elif byte_level:
            lengths[index] = len(token)  # byte-level BPE writes each byte as one printable character
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            lengths[index] = 1  # byte fallback of SentencePiece
        elif word_piece:
            lengths[index] = len(token.removeprefix("##").encode())
        else:
            lengths[index] = len(token.replace("\u2581", " ").encode())
    return lengths
