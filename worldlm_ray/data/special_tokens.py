"""The special tokens of a tokenizer.json: which they are, and what they stand for.

The program that prepares a text may write them, the text may not: a document that spells one gets ordinary tokens. This
package writes one of them, the end-of-text token, between two documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from worldlm_ray.errors import DataError

TOKENIZER, SETTINGS, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_USUAL = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos_token": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]"),
    "pad_token": ("<pad>", "<|padding|>", "[PAD]"),
}
"""Names by which a special token's purpose is recognised if no file states it, the most reliable first."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Special tokens of a tokenizer."""

    roles: Mapping[str, str]
    """Token by its purpose, such as eos_token. Only tokens of the vocabulary."""
    ids: Mapping[str, int]
    """Id by purpose."""
    control: frozenset[int]
    """Ids that no text may write. The unknown token is not among them: text may become it."""
    unknown: int | None = None
    """Id of the unknown token; None if there is none."""

    @property
    def end(self) -> int | None:
        """Id of the token that ends a document; None if there is none."""
        return self.ids.get("eos_token")


def find(files: Mapping[str, bytes], vocab: Mapping[str, int]) -> SpecialTokens:
    """Find the special tokens of a tokenizer.

    Args:
        files: its tokenizer.json and, if they are there, tokenizer_config.json and special_tokens_map.json, which say
            what the tokens are for.
        vocab: id of every token, also of added ones.

    Raises:
        DataError: one of the files is no JSON object.
    """
    state, settings, map_ = (_object(files.get(name), name) for name in (TOKENIZER, SETTINGS, MAP))
    added = state.get("added_tokens") or []
    special = [str(token["content"]) for token in added if token.get("special")]
    roles = dict[str, str]()
    for role in ROLES:
        named = [_content(found.get(role)) for found in (settings, map_)]
        usual = [token for token in _USUAL.get(role, ()) if token in special]
        known = [token for token in (*named, *usual) if token is not None and token in vocab]
        if known:
            roles[role] = known[0]
    control = {*special, *(token for role, token in roles.items() if role != "unk_token")}
    unknown = _unknown(state, vocab)
    return SpecialTokens(
        roles=roles,
        ids={role: vocab[token] for role, token in roles.items()},
        control=frozenset(vocab[token] for token in control if token in vocab) - {unknown},
        unknown=unknown,
    )


def speller(state: Mapping[str, Any], vocab: Mapping[str, int]) -> Callable[[str], list[int]]:
    """How a tokenizer encodes a word character by character, for words that are special tokens, too.

    Args:
        state: of the tokenizer.json.
        vocab: id of every token.

    Returns:
        A function from a word to ids. It raises DataError for a character that has no token.
    """
    characters = byte_characters()
    is_byte_level = '"ByteLevel"' in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
    unknown = _unknown(state, vocab)

    def spell(word: str) -> list[int]:
        found = []
        for character in word:
            written = [characters[byte] for byte in character.encode()] if is_byte_level else [character]
            if not all(token in vocab for token in written):
                written = [f"<0x{byte:02X}>" for byte in character.encode()]
            if all(token in vocab for token in written):
                found += [vocab[token] for token in written]
            elif unknown is not None:
                found.append(unknown)
            else:
                raise DataError(f"the tokenizer cannot write {word!r} as text; use one that can, or remove the word")
        return found

    return spell


def _unknown(state: Mapping[str, Any], vocab: Mapping[str, int]) -> int | None:
    """Id of the unknown token. Unigram gives its id, other models its name."""
    model = state.get("model", {})
    index = model.get("unk_id")
    return vocab.get(str(model.get("unk_token"))) if index is None else int(index)


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table), [256]."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _object(raw: bytes | None, name: str) -> dict[str, Any]:
    if raw is None:
        return {}
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{name}: is not JSON ({error}); download it again, or remove it") from error
    if not isinstance(found, dict):
        raise DataError(f"{name}: is a {type(found).__name__}, not an object; download it again, or remove it")
    return found


def _content(token: Any) -> str | None:
    """A token's text. Some files give an object with settings instead."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
